"""Between text and tokens, in the form that other servers of open models have for it."""

from fastapi import APIRouter
from pydantic import Field, model_validator

from compute_node.http.answer_wire import JsonDocument
from compute_node.http.api_error import check_model
from compute_node.http.message_fields import Message
from compute_node.http.node_parts import NodeParts
from compute_node.http.request_fields import RequestFields
from compute_node.http.tool_fields import ToolFields
from compute_node.prompt import MAX_CHAT_MESSAGES, ChatPrompt, TextPrompt


class TokenizeFields(RequestFields):
    """A text, or a chat as it would be shown to the model."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[ToolFields] = Field(default_factory=list)

    @model_validator(mode="after")
    def check_one(self) -> "TokenizeFields":
        """Exactly one of the two."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt is to be given, or messages, and not both")
        if self.messages is not None and len(self.messages) > MAX_CHAT_MESSAGES:
            raise ValueError(f"messages has {len(self.messages)} entries; allowed: at most {MAX_CHAT_MESSAGES}")
        return self

    def domain_prompt(self) -> TextPrompt | ChatPrompt:
        """For the codec."""
        if self.messages is None:
            return TextPrompt(self.prompt or "")
        tools = tuple(tool.tool().document() for tool in self.tools)
        return ChatPrompt(tuple(message.turn() for message in self.messages), tools)


class DetokenizeFields(RequestFields):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


def token_router(parts: NodeParts) -> APIRouter:
    """`/tokenize` and `/detokenize`."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(fields: TokenizeFields) -> JsonDocument:
        check_model(fields.model, parts.model.name)
        tokens = await parts.codec.tokenize(fields.domain_prompt())
        return {"tokens": tokens, "count": len(tokens), "max_model_len": parts.model.max_context_tokens}

    @router.post("/detokenize")
    async def detokenize(fields: DetokenizeFields) -> JsonDocument:
        check_model(fields.model, parts.model.name)
        return {"prompt": await parts.codec.detokenize(fields.tokens)}

    return router
