"""`POST /v1/chat/completions`: what is asked for."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from compute_node.answer_grammar import AnswerGrammar
from compute_node.http.message_fields import Message
from compute_node.http.request_fields import AnswerFields, RequestFields
from compute_node.http.tool_fields import JsonObject, ToolChoice, ToolFields, tool_wish
from compute_node.prompt import MAX_CHAT_MESSAGES, ChatPrompt
from compute_node.tool_calls import ToolWish


class TextFormat(RequestFields):
    """Anything."""

    type: Literal["text"]


class JsonObjectFormat(RequestFields):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(RequestFields):
    """A named schema; it is always enforced, `strict` or not."""

    name: str
    schema_: JsonObject = Field(default_factory=dict, alias="schema")
    description: str | None = None
    strict: bool = False


class JsonSchemaFormat(RequestFields):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat: TypeAlias = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatFields(AnswerFields):
    """A chat to go on with.

    `safety_identifier` and `prompt_cache_key` say who asks; `store`, `service_tier`, `modalities` and `metadata` are
    taken where they ask for nothing else than what is done.
    """

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolFields] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] = Field(default_factory=list)
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def bound_messages(cls, messages: object) -> object:
        """Counted before anything is done for each of them."""
        if isinstance(messages, list) and not 1 <= len(messages) <= MAX_CHAT_MESSAGES:
            raise ValueError(f"messages has {len(messages)} entries; allowed: 1 to {MAX_CHAT_MESSAGES}")
        return messages

    @model_validator(mode="after")
    def check_together(self) -> "ChatFields":
        """What only makes sense with something else."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is set; allowed only with logprobs true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens say the same thing; give one of them")
        return self

    def prompt(self) -> ChatPrompt:
        """What the model is shown.

        Raises:
            ValueError: a message has what its role does not have.
        """
        is_shown = self.tool_choice != "none"
        tools = tuple(tool.tool().document() for tool in self.tools) if is_shown else ()
        return ChatPrompt(tuple(message.turn() for message in self.messages), tools)

    def tool_wish(self) -> ToolWish | None:
        """What may be called; see `tool_wish`."""
        return tool_wish(self.tools, self.tool_choice, self.parallel_tool_calls)

    def grammar(self) -> AnswerGrammar | None:
        """What `response_format` asks for."""
        asked = self.response_format
        if isinstance(asked, JsonObjectFormat):
            return AnswerGrammar.of_json_schema({"type": "object"}, "response_format")
        if isinstance(asked, JsonSchemaFormat):
            return AnswerGrammar.of_json_schema(asked.json_schema.schema_, "response_format")
        return None
