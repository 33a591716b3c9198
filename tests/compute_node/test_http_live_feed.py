"""The live feed: one look for all, none for nobody, and nobody waits for who is slow."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing

import pytest

from compute_node.http.live_feed import MOST_LISTENERS, LiveFeed
from promoe.errors import Overloaded


class Looks:
    """Counts the looks, and says after how many nothing will happen any more."""

    def __init__(self, last: int = 10**9) -> None:
        self.number = 0
        self.last = last

    def look(self) -> dict[str, object]:
        self.number += 1
        return {"number": self.number}

    def feed(self) -> LiveFeed:
        return LiveFeed(self.look, lambda: self.number >= self.last, interval_s=0.001)


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def number_of(events: AsyncGenerator[bytes]) -> int:
    """The next look's."""
    data = await anext(events)
    return int(json.loads(data.removeprefix(b"data: "))["number"])


def test_nobody_looks_for_nobody() -> None:
    async def scenario() -> None:
        looks = Looks()
        feed = looks.feed()
        assert not feed.is_looking
        async with aclosing(feed.listen().events()) as events:
            assert await number_of(events) == 1
            assert feed.is_looking
        assert not feed.is_looking
        seen = looks.number
        await asyncio.sleep(0.01)
        assert looks.number == seen

    run(scenario())


def test_all_are_told_the_same_and_who_is_slow_misses_looks() -> None:
    async def scenario() -> None:
        looks = Looks()
        feed = looks.feed()
        async with aclosing(feed.listen().events()) as slow, aclosing(feed.listen().events()) as quick:
            first = await number_of(slow)
            numbers = [await number_of(quick) for _ in range(5)]
            assert numbers == sorted(set(numbers))
            assert await number_of(slow) > first + 1, "what was missed is not made up for"
        assert looks.number < 100, "two listeners do not look twice"

    run(scenario())


def test_the_last_look_is_told_and_ends_the_events() -> None:
    async def scenario() -> None:
        looks = Looks(last=3)
        listener = looks.feed().listen()
        numbers = [json.loads(data.removeprefix(b"data: "))["number"] async for data in listener.events()]
        assert numbers[-1] == 3

    run(scenario())


def test_who_leaves_is_told_no_more() -> None:
    async def scenario() -> None:
        listener = Looks().feed().listen()
        events = listener.events()
        await number_of(events)
        listener.leave()
        rest = [data async for data in events]
        assert len(rest) <= 1, "at most what was told already"

    run(scenario())


def test_too_many_are_refused() -> None:
    async def scenario() -> None:
        feed = Looks().feed()
        streams = [feed.listen().events() for _ in range(MOST_LISTENERS)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(Overloaded, match=str(MOST_LISTENERS)):
            feed.listen()
        await streams.pop().aclose()
        feed.listen()
        for stream in streams:
            await stream.aclose()
        assert not feed.is_looking

    run(scenario())
