"""Functions that a model may call, and its calls as the formats of chat templates write them into the answer's text."""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from compute_node.answer_grammar import AnswerGrammar
from compute_node.chat_template import ToolCall
from compute_node.text_stream import overlap

_ANY_OBJECT: Final = {"type": "object"}


@dataclass(frozen=True)
class Tool:
    """A function that the caller can run.

    Attributes:
        name: what the model calls it.
        description: for the model.
        parameters: JSON schema of its arguments; None: it has none.
        is_strict: arguments that the schema does not allow must not come.
    """

    name: str
    description: str | None
    parameters: Mapping[str, object] | None
    is_strict: bool

    def document(self) -> Mapping[str, object]:
        """As chat templates want it."""
        function: dict[str, object] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class ToolUse(Enum):
    """What the model must call."""

    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True)
class ToolWish:
    """Tools and what is to be done with them.

    Attributes:
        tools: at least one.
        use: which calls there must be.
        is_parallel: there may be several.
        named: the tool that must be called, with `NAMED`.
    """

    tools: tuple[Tool, ...]
    use: ToolUse
    is_parallel: bool
    named: str | None = None

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Those that the choice leaves."""
        return tuple(tool for tool in self.tools if self.named in (None, tool.name))

    @property
    def must_be_enforced(self) -> bool:
        """True when free text could be other than what was asked for."""
        return self.use is not ToolUse.AUTO or any(tool.is_strict for tool in self.tools)


@dataclass(frozen=True)
class ToolCallFormat:
    """How a template's model writes a call.

    Attributes:
        begin: what comes before it.
        end: what comes after it.
        parse: name and arguments (JSON) of what is between, or None when it is no call; is given the tools.
        recognise: true for the source of a template that has this format.
        is_json: what is between is one JSON object of name and arguments, which a grammar can enforce.
    """

    begin: str
    end: str
    parse: Callable[[str, Sequence[Tool]], tuple[str, str] | None]
    recognise: Callable[[str], bool]
    is_json: bool

    def grammar(self, wish: ToolWish) -> AnswerGrammar | None:
        """Answers with no other calls than those that were asked for; None where any text will do.

        Raises:
            ValueError: this format's calls cannot be enforced.
        """
        if not wish.must_be_enforced:
            return None
        if not self.is_json:
            what = "tools has a strict function" if wish.use is ToolUse.AUTO else f"tool_choice is {wish.use.value}"
            raise ValueError(f"{what}, which cannot be enforced in the format of this model's tool calls")
        tools = wish.callable_tools
        alternatives = {
            "anyOf": [_call_schema(tool) for tool in tools],
            # Written as templates write calls. What a schema says beyond what can be enforced is no promise unless it
            # is strict.
            "x-guidance": {
                "whitespace_flexible": False,
                "item_separator": ", ",
                "key_separator": ": ",
                "lenient": not any(tool.is_strict for tool in tools),
            },
        }
        begin, end = (json.dumps(text) for text in (f"{self.begin}\n", f"\n{self.end}"))
        call = f"%json {json.dumps(alternatives)} {end}"
        if wish.use is ToolUse.AUTO:
            start = "(head call)* TEXT" if wish.is_parallel else "head call | TEXT"
            rules = f"start: {start}\ncall: {call}\nhead[lazy]: TEXT {begin}\nTEXT: /(.|\\n)*/"
        else:
            further = '("\\n" call)*' if wish.is_parallel else ""
            rules = f"start: call {further}\ncall: {begin} {call}"
        return AnswerGrammar.of_lark(f"%llguidance {{}}\n{rules}\n", "tools")


def _call_schema(tool: Tool) -> Mapping[str, object]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": tool.parameters or _ANY_OBJECT},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _parse_json_call(text: str, tools: Sequence[Tool]) -> tuple[str, str] | None:
    """`{"name": …, "arguments": {…}}`."""
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)


_FUNCTION: Final = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
_PARAMETER: Final = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _parse_tagged_call(text: str, tools: Sequence[Tool]) -> tuple[str, str] | None:
    """`<function=NAME>`, and for each argument `<parameter=NAME>`, its value and `</parameter>`."""
    function = _FUNCTION.fullmatch(text)
    if function is None:
        return None
    name, body = function.groups()
    schemas = next((_properties_of(tool) for tool in tools if tool.name == name), {})
    arguments = {key: _value_of(value, schemas.get(key)) for key, value in _PARAMETER.findall(body)}
    return name, json.dumps(arguments, ensure_ascii=False)


def _properties_of(tool: Tool) -> Mapping[str, object]:
    properties = (tool.parameters or {}).get("properties")
    return properties if isinstance(properties, dict) else {}


def _value_of(text: str, schema: object) -> object:
    """Text where the schema wants text, else JSON, and text again where it is none."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _has_json_calls(source: str) -> bool:
    return (
        "<tool_call>" in source and "arguments" in source and "<function=" not in source and "<arg_key>" not in source
    )


def _has_tagged_calls(source: str) -> bool:
    return all(mark in source for mark in ("<tool_call>", "<function=", "<parameter="))


TOOL_CALL_FORMATS: Final[Mapping[str, ToolCallFormat]] = {
    "hermes": ToolCallFormat("<tool_call>", "</tool_call>", _parse_json_call, _has_json_calls, is_json=True),
    "qwen3_coder": ToolCallFormat("<tool_call>", "</tool_call>", _parse_tagged_call, _has_tagged_calls, is_json=False),
}
"""By name; `hermes` is that of Qwen2.5 and Qwen3, too."""


def format_of(template_source: str | None) -> ToolCallFormat | None:
    """The format that a chat template teaches its model; None when it is none of the table."""
    if template_source is None:
        return None
    return next((known for known in TOOL_CALL_FORMATS.values() if known.recognise(template_source)), None)


AnswerPiece: TypeAlias = str | ToolCall
"""Text for people, or a call."""


class ToolCallScanner:
    """Tells calls from text in an answer that comes in pieces; text that may belong to a call is held back.

    A call that cannot be parsed is text. White space around calls belongs to the format.

    Args:
        tool_format: how calls are written.
        tools: what may be called.
    """

    def __init__(self, tool_format: ToolCallFormat, tools: Sequence[Tool] = ()) -> None:
        self._format = tool_format
        self._tools = tools
        self._held = ""
        self._is_inside = False
        self._drops_space = False
        self.num_calls = 0

    def push(self, text: str) -> list[AnswerPiece]:
        """Adds text; returns what became certain."""
        self._held += text
        pieces: list[AnswerPiece] = []
        while True:
            mark = self._format.end if self._is_inside else self._format.begin
            before, found, after = self._held.partition(mark)
            if not found:
                break
            self._held = after
            pieces += self._call(before, self._format.end) if self._is_inside else self._text(before.rstrip())
            self._is_inside = not self._is_inside
        if not self._is_inside:
            pieces += self._certain_text()
        return pieces

    def flush(self) -> list[AnswerPiece]:
        """The answer is over; an unfinished call is one if all of it is there but its end."""
        held, self._held = self._held, ""
        if self._is_inside:
            self._is_inside = False
            return self._call(held, "")
        return self._text(held)

    def _certain_text(self) -> list[AnswerPiece]:
        num_possible = overlap(self._held, self._format.begin)
        certain = self._held[: len(self._held) - num_possible].rstrip()
        self._held = self._held[len(certain) :]
        return self._text(certain)

    def _text(self, text: str) -> list[AnswerPiece]:
        shown = text.lstrip() if self._drops_space else text
        if not shown:
            return []
        self._drops_space = False
        return [shown]

    def _call(self, text: str, end: str) -> list[AnswerPiece]:
        parsed = self._format.parse(text, self._tools)
        if parsed is None:
            return [f"{self._format.begin}{text}{end}"]
        self.num_calls += 1
        self._drops_space = True
        return [ToolCall(f"call_{secrets.token_hex(12)}", *parsed)]
