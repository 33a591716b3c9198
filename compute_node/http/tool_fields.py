"""Tools that a chat may call, as OpenAI's API has them."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from compute_node.http.request_fields import RequestFields
from compute_node.tool_calls import Tool, ToolUse, ToolWish

JsonObject = dict[str, object]


class FunctionFields(RequestFields):
    """A function that the caller can run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool = False


class ToolFields(RequestFields):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionFields

    def tool(self) -> Tool:
        """For the domain."""
        function = self.function
        return Tool(function.name, function.description, function.parameters, function.strict)


class NamedFunction(RequestFields):
    """By name only."""

    name: str


class NamedToolChoice(RequestFields):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


def tool_wish(tools: Sequence[ToolFields], choice: ToolChoice | None, is_parallel: bool) -> ToolWish | None:
    """What was asked for; None when nothing is to be called.

    Raises:
        ValueError: a choice without tools, or of a tool that is not there; a name twice.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ValueError("tool_choice is set, but tools is empty")
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError(f"tools has a name twice: {', '.join(names)}")
    if choice == "none":
        return None
    chosen = [tool.tool() for tool in tools]
    if isinstance(choice, NamedToolChoice):
        name = choice.function.name
        if name not in names:
            raise ValueError(f"tool_choice is {name!r}; allowed: {', '.join(names)}")
        return ToolWish(tuple(chosen), ToolUse.NAMED, is_parallel=False, named=name)
    use = ToolUse.REQUIRED if choice == "required" else ToolUse.AUTO
    return ToolWish(tuple(chosen), use, is_parallel)
