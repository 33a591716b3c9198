"""The answers to one HTTP request, followed together."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Final, TypeAlias

from compute_node.answer import Answer, AnswerEvent, Finish
from compute_node.http.api_error import ApiError

CANCELLED: Final = "cancelled"
"""The code of an answer that somebody else than its client ended."""

GroupEvent: TypeAlias = tuple[int, AnswerEvent] | None
"""What happened to which answer; None when nothing did for a while."""


class AnswerGroup:
    """Answers that begin and are cancelled together; an answer's place is its index.

    Args:
        answers: accepted ones, of which nobody has read yet.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._is_cancelled = False

    def cancel(self) -> None:
        """Ends them all within one step; idempotent."""
        self._is_cancelled = True
        for answer in self._answers:
            answer.cancel()

    async def events(self, idle_s: float | None = None) -> AsyncGenerator[GroupEvent]:
        """What happens, as it happens, until all have ended; closing it cancels them.

        Args:
            idle_s: give None after so many seconds without an event.

        Raises:
            DeadlineExceeded, PromoeError: what the first of them failed with; the others are cancelled.
            ApiError: somebody else ended one of them: half an answer must not look like a whole one.
        """
        happened: asyncio.Queue[tuple[int, AnswerEvent] | asyncio.Task[None]] = asyncio.Queue()

        async def follow(index: int, answer: Answer) -> None:
            event: AnswerEvent | None = None
            async for event in answer.events():
                happened.put_nowait((index, event))
            if not isinstance(event, Finish) and not self._is_cancelled:
                # Of all statuses one that clients do not try again at.
                raise ApiError(499, f"Request {answer.request.request_id} was cancelled.", code=CANCELLED)

        tasks = [asyncio.create_task(follow(index, answer)) for index, answer in enumerate(self._answers)]
        for task in tasks:
            task.add_done_callback(happened.put_nowait)
        num_open = len(tasks)
        try:
            while num_open:
                try:
                    async with asyncio.timeout(idle_s):
                        item = await happened.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(item, asyncio.Task):
                    num_open -= 1
                    item.result()
                else:
                    yield item
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
