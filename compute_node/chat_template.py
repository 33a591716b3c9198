"""A model's chat template: what it can say, and chats as the text it makes of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant called.

    Attributes:
        call_id: the caller's name for it, which the tool's answer refers to.
        name: the function's.
        arguments_json: a JSON object.
    """

    call_id: str
    name: str
    arguments_json: str


@dataclass(frozen=True)
class ChatTurn:
    """One message of a chat.

    Attributes:
        role: `system`, `user`, `assistant`, `tool` or what the template knows.
        content: its text, possibly empty.
        tool_calls: what the assistant called.
        tool_call_id: the call that a tool answers.
        name: who speaks, where the template shows it.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


class ChatTemplate:
    """The template of one tokenizer, whose `chat_template` may be one text or several by name.

    Args:
        tokenizer: the model's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def source(self) -> str | None:
        """The template for chats with tools, or the only one; None when the model has none."""
        if not self._tokenizer.chat_template:
            return None
        # Templates by name: `tool_use` is taken for chats with tools where it is there.
        return str(self._tokenizer.get_chat_template(None, tools=[{}]))

    @property
    def takes_tools(self) -> bool:
        """True when the template shows the model which tools there are."""
        source = self.source
        if source is None:
            return False
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
        try:
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError:
            # Transformers' own tags, such as `generation`, are unknown here.
            return "tools" in source
        return "tools" in names

    def render(self, turns: Sequence[ChatTurn], tools: Sequence[Mapping[str, object]] = ()) -> str:
        """The text that the assistant's answer follows.

        Raises:
            ValueError: the model has no template, or its template cannot say this.
        """
        if self._tokenizer.chat_template is None:
            raise ValueError("prompt.chat is set, but this model has no chat template; allowed: text or token_ids")
        self._check_tools(turns, tools)
        messages = [_message(turn) for turn in turns]
        schemas = [dict(tool) for tool in tools] or None
        try:
            text = self._tokenizer.apply_chat_template(
                # Declared for texts only; templates take what JSON has.
                messages,  # type: ignore[arg-type]
                tools=schemas,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=True,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"prompt.chat is not what the model's chat template allows: {error}") from error
        assert isinstance(text, str), "one chat renders to one text"
        return text

    def _check_tools(self, turns: Sequence[ChatTurn], tools: Sequence[Mapping[str, object]]) -> None:
        """A template leaves out silently what it does not know: the model would not see what was said."""
        if tools and not self.takes_tools:
            raise ValueError("tools is set, but this model's chat template has no place for tools")
        source = self.source or ""
        if any(turn.tool_calls for turn in turns) and "tool_calls" not in source:
            raise ValueError("prompt.chat has tool calls, but this model's chat template has no place for them")
        if any(turn.role == "tool" for turn in turns) and "tool" not in source:
            raise ValueError("prompt.chat has an answer of a tool, but this model's chat template has no place for it")


def _message(turn: ChatTurn) -> dict[str, object]:
    """As templates want it; what is absent is left out, since templates ask whether it is there."""
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                # An object, not its text: templates write it as JSON themselves.
                "function": {"name": call.name, "arguments": json.loads(call.arguments_json)},
            }
            for call in turn.tool_calls
        ]
    if turn.tool_call_id is not None:
        message["tool_call_id"] = turn.tool_call_id
    if turn.name is not None:
        message["name"] = turn.name
    return message
