"""How the answers to one request are written, whole or as a stream; the same for chats and texts."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from compute_node.answer import AnswerEvent, Finish
from compute_node.http.answer_group import AnswerGroup
from compute_node.http.answer_wire import JsonDocument, UsageCount
from compute_node.http.api_error import ApiError, api_error_body, status_and_body
from compute_node.http.event_stream import DONE, KEEPALIVE, EventStream, calling_on_disconnect, event
from promoe.errors import PromoeError

KEEPALIVE_S: Final = 15.0
"""Computing a long prompt takes longer than some proxies wait for a byte."""


class Choice(Protocol):
    """One choice of an answer on the wire, as it grows: a chat's or a text's."""

    def first_chunks(self) -> Sequence[JsonDocument]:
        """What a stream has before the first event."""

    def take(self, event: AnswerEvent) -> Sequence[JsonDocument]:
        """One more event; what a stream has of it."""

    def document(self) -> JsonDocument:
        """All of it."""


@dataclass(frozen=True)
class CompletionReply:
    """Answers under way, and how to write them.

    Attributes:
        group: the answers; the choices are in the same order.
        choices: follow the answers' events.
        head: what the reply begins with.
        usage: to be added to.
    """

    group: AnswerGroup
    choices: Sequence[Choice]
    head: JsonDocument
    usage: UsageCount

    async def whole(self, request: Request) -> Response:
        """When all is there; a client that leaves meanwhile cancels it.

        Raises:
            DeadlineExceeded, PromoeError, ApiError: see `AnswerGroup.events`.
        """
        async with (
            calling_on_disconnect(request.receive, self.group.cancel),
            aclosing(self.group.events()) as events,
        ):
            async for happened in events:
                if happened is not None:
                    self._take(*happened)
        choices = [choice.document() for choice in self.choices]
        return JSONResponse({**self.head, "choices": choices, "usage": self.usage.document()})

    def stream(self, chunk_kind: str, includes_usage: bool) -> Response:
        """As it comes.

        Args:
            chunk_kind: the `object` of each chunk.
            includes_usage: a last chunk, without choices, says what it took.
        """
        head = {**self.head, "object": chunk_kind, **({"usage": None} if includes_usage else {})}
        return EventStream(self._events(head, includes_usage), self.group.cancel)

    async def _events(self, head: JsonDocument, includes_usage: bool) -> AsyncGenerator[bytes]:
        for choice in self.choices:
            for document in choice.first_chunks():
                yield event({**head, "choices": [document]})
        try:
            async with aclosing(self.group.events(KEEPALIVE_S)) as events:
                async for happened in events:
                    if happened is None:
                        yield KEEPALIVE
                        continue
                    for document in self._take(*happened):
                        yield event({**head, "choices": [document]})
        except (PromoeError, ApiError) as error:
            # The status is long gone; clients know an event with an error.
            yield event(api_error_body(error) if isinstance(error, ApiError) else status_and_body(error)[1])
            return
        if includes_usage:
            yield event({**head, "choices": [], "usage": self.usage.document()})
        yield DONE

    def _take(self, index: int, happened: AnswerEvent) -> Sequence[JsonDocument]:
        if isinstance(happened, Finish):
            self.usage.add(happened)
        return self.choices[index].take(happened)
