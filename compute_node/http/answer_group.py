"""The answers to one HTTP request, followed together."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeAlias

from compute_node.answer import Answer, AnswerEvent

GroupEvent: TypeAlias = tuple[int, AnswerEvent] | None
"""What happened to which answer; None when nothing did for a while."""


class AnswerGroup:
    """Answers that begin and are cancelled together; an answer's place is its index.

    Args:
        answers: accepted ones, of which nobody has read yet.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each answer's prompt."""
        return [len(answer.request.prompt_ids) for answer in self._answers]

    def cancel(self) -> None:
        """Ends them all within one step; idempotent."""
        for answer in self._answers:
            answer.cancel()

    async def events(self, idle_s: float | None = None) -> AsyncGenerator[GroupEvent]:
        """What happens, as it happens, until all have ended; closing it cancels them.

        Args:
            idle_s: give None after so many seconds without an event.

        Raises:
            DeadlineExceeded, PromoeError: what the first of them failed with; the others are cancelled.
        """
        happened: asyncio.Queue[tuple[int, AnswerEvent] | asyncio.Task[None]] = asyncio.Queue()

        async def follow(index: int, answer: Answer) -> None:
            async for event in answer.events():
                happened.put_nowait((index, event))

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
