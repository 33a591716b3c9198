"""Chat messages as OpenAI's API has them, and as the domain's turns."""

import json
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from compute_node.chat_template import ChatTurn, ToolCall
from compute_node.http.request_fields import RequestFields


def _text_of(content: object) -> object:
    """A text, or the texts of a list of parts, one after the other."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"content has a part of type {kind!r}; allowed: text")
        text = part.get("text")
        if set(part) != {"type", "text"} or not isinstance(text, str):
            raise ValueError("content has a part that is not {'type': 'text', 'text': …}")
        texts.append(text)
    return "".join(texts)


def _json_object(text: object) -> object:
    if isinstance(text, str):
        try:
            is_object = isinstance(json.loads(text), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError("arguments is not a JSON object, written as a string")
    return text


class CalledFunction(RequestFields):
    """Which function, with what."""

    name: str
    arguments: Annotated[str, BeforeValidator(_json_object)] = "{}"


class MessageToolCall(RequestFields):
    """A call in an assistant's message; `index` is there when a stream's pieces were put together."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(RequestFields):
    """One message; `developer` is what newer clients call `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text_of)] = ""
    name: str | None = None
    tool_calls: list[MessageToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    annotations: list[None] = Field(default_factory=list)

    def turn(self) -> ChatTurn:
        """For the template.

        Raises:
            ValueError: a part that this role does not have.
        """
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"messages has tool_calls in a message of role {self.role!r}; allowed: 'assistant'")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"messages has tool_call_id in a message of role {self.role!r}; allowed: 'tool'")
        return ChatTurn(
            role="system" if self.role == "developer" else self.role,
            content=self.content,
            tool_calls=tuple(
                ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls
            ),
            tool_call_id=self.tool_call_id,
            name=self.name,
        )
