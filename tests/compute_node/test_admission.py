"""The bounded door to the engine, over an engine that the test moves by hand."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from compute_node.admission import Admission, AdmissionLimits, AdmittedRequest
from compute_node.engine import (
    EndReason,
    EngineEvent,
    RequestEnded,
    TokenDrawn,
)
from compute_node.request_metrics import RequestMetrics
from compute_node.sampling import SampledToken
from promoe.errors import DeadlineExceeded, Overloaded, Unavailable
from tests.compute_node.hand_engine import HandEngine
from tests.compute_node.tiny_serving import engine_request

_T = TypeVar("_T")


def new_admission(
    engine: HandEngine, max_concurrent: int = 2, max_queued: int = 2, deadline_s: float = 60.0
) -> Admission:
    return Admission(
        engine, AdmissionLimits(max_concurrent, max_queued, deadline_s), RequestMetrics(CollectorRegistry())
    )


def run(scenario: Coroutine[None, None, _T]) -> _T:
    return asyncio.run(asyncio.wait_for(scenario, 60))


async def events_of(admitted: AdmittedRequest) -> list[EngineEvent]:
    return [event async for event in admitted.events()]


async def settle() -> None:
    """Lets what the engine called back happen: callbacks run in the order they were asked for."""
    await asyncio.sleep(0)


def test_what_does_not_run_waits_and_what_does_not_wait_is_refused() -> None:
    async def scenario() -> None:
        engine = HandEngine()
        admission = new_admission(engine)
        admitted = [admission.admit(engine_request(f"r{i}", [1], 5)) for i in range(4)]
        assert list(engine.running) == ["r0", "r1"]
        assert (admission.num_running, admission.num_queued) == (2, 2)
        with pytest.raises(Overloaded, match="2 requests are running and 2 are waiting") as refused:
            admission.admit(engine_request("r4", [1], 5))
        assert 100 <= refused.value.retry_after_ms <= 60_000
        # A place that becomes free goes to who waited longest.
        engine.end("r1")
        await settle()
        assert list(engine.running) == ["r0", "r2"]
        admission.admit(engine_request("r5", [1], 5))
        for request_id in ("r0", "r2", "r3", "r5"):
            await settle()
            engine.end(request_id)
        await settle()
        assert [type(event) for event in await events_of(admitted[3])] == [RequestEnded]
        assert (admission.num_running, admission.num_queued) == (0, 0)

    run(scenario())


def test_events_pass_through_in_order_and_end_with_the_last() -> None:
    async def scenario() -> None:
        engine = HandEngine()
        admitted = new_admission(engine).admit(engine_request("r", [1], 5))
        for token_id in (4, 5):
            engine.running["r"](TokenDrawn(SampledToken(token_id), 0.0))
        engine.end("r")
        events = await events_of(admitted)
        assert [event.token.token_id for event in events if isinstance(event, TokenDrawn)] == [4, 5]
        assert isinstance(events[-1], RequestEnded)

    run(scenario())


def test_a_failure_is_raised() -> None:
    async def scenario() -> None:
        engine = HandEngine()
        admitted = new_admission(engine).admit(engine_request("r", [1], 5))
        engine.fail("r", Unavailable("The store is gone."))
        with pytest.raises(Unavailable, match="The store is gone"):
            await events_of(admitted)

    run(scenario())


def test_cancelling_who_waits_never_reaches_the_engine() -> None:
    async def scenario() -> None:
        engine = HandEngine()
        admission = new_admission(engine, max_concurrent=1)
        running, waiting = (admission.admit(engine_request(f"r{i}", [1], 5)) for i in range(2))
        waiting.cancel()
        waiting.cancel()
        events = await events_of(waiting)
        assert [event.reason for event in events if isinstance(event, RequestEnded)] == [EndReason.CANCELLED]
        assert admission.num_queued == 0
        running.cancel()
        await settle()
        running.cancel()
        assert (admission.num_running, engine.max_running) == (0, 1)

    run(scenario())


@pytest.mark.parametrize("place", ["running", "waiting"])
def test_a_request_that_lives_too_long_is_cancelled(place: str) -> None:
    async def scenario() -> None:
        engine = HandEngine()
        admission = new_admission(engine, max_concurrent=1, deadline_s=0.05)
        admitted = [admission.admit(engine_request(f"r{i}", [1], 5)) for i in range(2)]
        with pytest.raises(DeadlineExceeded, match=r"not finished within 0\.05 s"):
            await events_of(admitted[0 if place == "running" else 1])
        await settle()
        assert admission.num_running + admission.num_queued == 1

    run(scenario())


def test_draining_waits_for_what_was_accepted_and_refuses_the_rest() -> None:
    async def scenario() -> None:
        engine = HandEngine()
        admission = new_admission(engine, max_concurrent=1)
        admitted = [admission.admit(engine_request(f"r{i}", [1], 5)) for i in range(2)]
        draining = asyncio.create_task(admission.drain(60.0))
        await settle()
        with pytest.raises(Unavailable, match="shutting down"):
            admission.admit(engine_request("late", [1], 5))
        for index in range(2):
            assert not draining.done()
            engine.end(f"r{index}")
            await events_of(admitted[index])
        await draining

    run(scenario())


def test_draining_ends_at_its_deadline() -> None:
    async def scenario() -> None:
        engine = HandEngine()
        admission = new_admission(engine, max_concurrent=1)
        admitted = [admission.admit(engine_request(f"r{i}", [1], 5)) for i in range(2)]
        await admission.drain(0.01)
        for each in admitted:
            with pytest.raises(Unavailable, match="shutting down"):
                await events_of(each)
        assert engine.running == {}

    run(scenario())


def test_an_idle_node_drains_at_once() -> None:
    async def scenario() -> None:
        await new_admission(HandEngine()).drain(60.0)

    run(scenario())


def test_who_waits_for_a_dead_engine_is_told() -> None:
    async def scenario() -> None:
        engine = HandEngine()
        # More than the interpreter's stack would hold, if one refusal led to the next.
        admission = new_admission(engine, max_concurrent=1, max_queued=1000)
        admitted = [admission.admit(engine_request(f"r{i}", [1], 5)) for i in range(1001)]
        error = Unavailable("The engine died.")
        engine.refusal = error
        engine.fail("r0", error)
        for each in admitted:
            with pytest.raises(Unavailable, match="died"):
                await events_of(each)
        admission.refuse("The engine died.")
        with pytest.raises(Unavailable, match="died"):
            admission.admit(engine_request("late", [1], 5))
        assert (admission.num_running, admission.num_queued) == (0, 0)

    run(scenario())


moves = st.lists(st.tuples(st.sampled_from(["admit", "end", "cancel"]), st.integers(0, 9)), max_size=40)


@given(moves=moves, max_concurrent=st.integers(1, 3), max_queued=st.integers(0, 3))
def test_no_request_is_lost_and_no_limit_is_passed(
    moves: list[tuple[str, int]], max_concurrent: int, max_queued: int
) -> None:
    async def scenario() -> None:
        engine = HandEngine()
        admission = new_admission(engine, max_concurrent, max_queued)
        accepted: dict[str, AdmittedRequest] = {}
        for number, (move, which) in enumerate(moves):
            if move == "admit":
                try:
                    accepted[f"r{number}"] = admission.admit(engine_request(f"r{number}", [1], 5))
                except Overloaded:
                    assert (admission.num_running, admission.num_queued) == (max_concurrent, max_queued)
            elif move == "end" and engine.running:
                engine.end(list(engine.running)[which % len(engine.running)])
            elif move == "cancel" and accepted:
                list(accepted.values())[which % len(accepted)].cancel()
            await settle()
            assert len(engine.running) == admission.num_running <= max_concurrent
            assert admission.num_queued <= max_queued
            assert admission.num_queued == 0 or admission.num_running == max_concurrent
        while engine.running:
            engine.end(next(iter(engine.running)))
            await settle()
        for each in accepted.values():
            assert isinstance((await events_of(each))[-1], RequestEnded)

    run(scenario())


def test_open_requests_are_told_with_their_progress_and_can_be_ended_by_anybody() -> None:
    async def scenario() -> None:
        engine = HandEngine()
        admission = new_admission(engine, max_concurrent=1)
        running, waiting = (admission.admit(engine_request(name, [1, 2, 3], 7)) for name in ("r0", "r1"))
        engine.draw("r0", 5, 6)
        await settle()
        first, second = admission.open_requests()
        assert (first.request_id, first.is_running, first.num_output_tokens) == ("r0", True, 2)
        assert (second.request_id, second.is_running, second.num_output_tokens) == ("r1", False, 0)
        assert (second.num_prompt_tokens, second.max_output_tokens) == (3, 7)
        assert first.age_s >= second.age_s > 0
        assert admission.cancel_id("r1")
        assert admission.cancel_id("r0")
        await settle()
        for admitted in (running, waiting):
            last = (await events_of(admitted))[-1]
            assert isinstance(last, RequestEnded)
            assert last.reason is EndReason.CANCELLED
        assert admission.open_requests() == ()
        assert not admission.cancel_id("r0")

    run(scenario())
