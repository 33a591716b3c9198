"""Answers over an engine that the test moves by hand: text, finish, usage, outcome."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from prometheus_client import CollectorRegistry
from transformers import PreTrainedTokenizerBase

from compute_node.admission import Admission, AdmissionLimits
from compute_node.answer import Answer, Answerer, AnswerEvent, AnswerOptions, Delta, Finish, FinishReason
from compute_node.answer_grammar import GrammarCompiler
from compute_node.engine import EndReason, RequestStarted
from compute_node.prompt import PromptCodec, PromptLimits, TextPrompt, TokenPrompt
from compute_node.request_metrics import RequestMetrics
from compute_node.sampling import Sampling
from promoe.errors import Overloaded, Unavailable
from tests.compute_node.hand_engine import HandEngine
from tests.compute_node.tiny_serving import load_tokenizer
from tests.families import END_OF_TURN_ID, VOCABULARY

CONTEXT = 50
GREEDY = Sampling()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


class Desk:
    """An answerer over a hand-moved engine."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.engine = HandEngine()
        self.registry = CollectorRegistry()
        metrics = RequestMetrics(self.registry)
        self.admission = Admission(self.engine, AdmissionLimits(1, 0, 60.0), metrics)
        codec = PromptCodec(tokenizer, PromptLimits(len(VOCABULARY), CONTEXT, 1000))
        eos_token_ids = frozenset({END_OF_TURN_ID})
        grammars = GrammarCompiler(tokenizer, len(VOCABULARY), eos_token_ids)
        self.answerer = Answerer(self.admission, codec, eos_token_ids, metrics, grammars)

    async def open(self, options: AnswerOptions) -> Answer:
        """An answer to a prompt of two tokens, at its first step."""
        answer = await self.answerer.open(TokenPrompt((5, 6)), options)
        self.engine.running[answer.request.request_id](RequestStarted(0.0))
        return answer

    def draw(self, answer: Answer, text: str) -> list[int]:
        """The tokens of `text`, one by one."""
        token_ids: list[int] = self.tokenizer(text)["input_ids"]
        self.engine.draw(answer.request.request_id, *token_ids)
        return token_ids

    def outcome(self, name: str) -> float | None:
        """How many requests ended so."""
        return self.registry.get_sample_value("promoe_requests_total", {"outcome": name})


Scenario: TypeAlias = Callable[[Desk], Awaitable[None]]


def run(scenario: Scenario, tokenizer: PreTrainedTokenizerBase) -> None:
    async def whole() -> None:
        await scenario(Desk(tokenizer))

    asyncio.run(asyncio.wait_for(whole(), 60))


async def events_of(answer: Answer) -> list[AnswerEvent]:
    return [event async for event in answer.events()]


def text_of(events: list[AnswerEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def finish_of(events: list[AnswerEvent]) -> Finish:
    assert isinstance(events[-1], Finish)
    return events[-1]


def test_text_that_was_held_back_comes_with_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY, max_tokens=10, stop_strings=("xyz!",)))
        token_ids = desk.draw(answer, "abc xyz")
        desk.engine.end(answer.request.request_id)
        events = await events_of(answer)
        assert text_of(events) == "abc xyz"
        deltas = [event for event in events if isinstance(event, Delta)]
        assert [delta.token.token_id for delta in deltas if delta.token is not None] == token_ids
        assert (deltas[-1].text, deltas[-1].token) == ("xyz", None)
        assert finish_of(events).reason is FinishReason.MAX_TOKENS
        assert desk.outcome("finished") == 1

    run(scenario, tokenizer)


def test_a_stop_string_cancels_the_engine_and_what_it_draws_after_is_not_shown(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY, stop_strings=("STOP",)))
        desk.draw(answer, "go STOP and more")
        events = await events_of(answer)
        assert text_of(events) == "go "
        finish = finish_of(events)
        assert (finish.reason, finish.stop_string) == (FinishReason.STOP_STRING, "STOP")
        assert finish.usage.num_output_tokens == len(tokenizer("go STOP")["input_ids"])
        assert desk.engine.running == {}
        assert desk.outcome("finished") == 1

    run(scenario, tokenizer)


def test_a_stop_token_that_was_drawn_behind_a_stop_string_is_not_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY, stop_strings=("STOP",)))
        desk.draw(answer, "go STOP")
        desk.engine.end(answer.request.request_id, EndReason.STOP_TOKEN, END_OF_TURN_ID)
        finish = finish_of(await events_of(answer))
        assert (finish.reason, finish.stop_token_id) == (FinishReason.STOP_STRING, None)
        assert finish.usage.num_output_tokens == len(tokenizer("go STOP")["input_ids"])

    run(scenario, tokenizer)


def test_a_stop_string_may_be_complete_only_when_the_answer_ends_in_a_broken_character(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY, stop_strings=("\ufffd",)))
        first_byte = tokenizer("\u6f22")["input_ids"][0]
        desk.draw(answer, "abc")
        desk.engine.draw(answer.request.request_id, first_byte)
        desk.engine.end(answer.request.request_id)
        events = await events_of(answer)
        assert text_of(events) == "abc"
        assert finish_of(events).reason is FinishReason.STOP_STRING

    run(scenario, tokenizer)


@pytest.mark.parametrize(
    ("stop_token_id", "asked_for", "reason"),
    [
        (END_OF_TURN_ID, frozenset(), FinishReason.END_OF_SEQUENCE),
        (77, frozenset({77}), FinishReason.STOP_TOKEN),
        (END_OF_TURN_ID, frozenset({END_OF_TURN_ID}), FinishReason.STOP_TOKEN),
    ],
)
def test_the_token_that_ended_the_answer_is_counted_and_named(
    tokenizer: PreTrainedTokenizerBase, stop_token_id: int, asked_for: frozenset[int], reason: FinishReason
) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY, stop_token_ids=asked_for))
        assert answer.request.stop_token_ids == asked_for | {END_OF_TURN_ID}
        desk.draw(answer, "ab")
        desk.engine.end(answer.request.request_id, EndReason.STOP_TOKEN, stop_token_id)
        finish = finish_of(await events_of(answer))
        assert (finish.reason, finish.stop_token_id) == (reason, stop_token_id)
        assert finish.usage.num_output_tokens == 3

    run(scenario, tokenizer)


def test_ignoring_the_end_of_sequence_leaves_the_callers_own_stops(tokenizer: PreTrainedTokenizerBase) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY, stop_token_ids=frozenset({77}), ignore_eos=True))
        assert answer.request.stop_token_ids == {77}

    run(scenario, tokenizer)


@pytest.mark.parametrize(("asked", "reason"), [(48, FinishReason.MAX_TOKENS), (49, FinishReason.CONTEXT_FULL)])
def test_max_tokens_is_what_the_context_still_holds(
    tokenizer: PreTrainedTokenizerBase, asked: int, reason: FinishReason
) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY, max_tokens=asked))
        assert answer.request.max_tokens == CONTEXT - 2
        desk.engine.end(answer.request.request_id)
        assert finish_of(await events_of(answer)).reason is reason

    run(scenario, tokenizer)


def test_an_answer_without_a_token_has_no_tpot(tokenizer: PreTrainedTokenizerBase) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY))
        desk.engine.end(answer.request.request_id, EndReason.STOP_TOKEN, END_OF_TURN_ID)
        events = await events_of(answer)
        assert len(events) == 1
        assert finish_of(events).usage.tpot_s is None
        assert finish_of(events).usage.num_output_tokens == 1

    run(scenario, tokenizer)


def test_a_cancelled_answer_has_no_finish(tokenizer: PreTrainedTokenizerBase) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY))
        desk.draw(answer, "ab")
        answer.cancel()
        events = await events_of(answer)
        assert text_of(events) == "ab"
        assert not any(isinstance(event, Finish) for event in events)
        assert desk.outcome("cancelled") == 1

    run(scenario, tokenizer)


def test_a_reader_that_stops_reading_cancels(tokenizer: PreTrainedTokenizerBase) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY))
        desk.draw(answer, "ab")
        events = answer.events()
        await anext(events)
        assert desk.engine.running
        await events.aclose()  # type: ignore[attr-defined]
        assert desk.engine.running == {}
        assert desk.outcome("cancelled") == 1

    run(scenario, tokenizer)


def test_a_failure_is_counted_and_passed_on(tokenizer: PreTrainedTokenizerBase) -> None:
    async def scenario(desk: Desk) -> None:
        answer = await desk.open(AnswerOptions(GREEDY))
        desk.engine.fail(answer.request.request_id, Unavailable("The store is gone."))
        with pytest.raises(Unavailable):
            await events_of(answer)
        assert desk.outcome("failed") == 1

    run(scenario, tokenizer)


def test_who_is_not_let_in_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.open(AnswerOptions(GREEDY))
        with pytest.raises(Overloaded):
            await desk.answerer.open(TextPrompt("x"), AnswerOptions(GREEDY))
        assert desk.outcome("refused") == 1
        # Nobody looks at a prompt for which there is no room: this one would be refused for its length.
        with pytest.raises(Overloaded):
            await desk.answerer.open(TextPrompt("x" * 2000), AnswerOptions(GREEDY))
        await desk.admission.drain(0.0)
        with pytest.raises(Unavailable, match="shutting down"):
            await desk.answerer.open(TextPrompt("x" * 2000), AnswerOptions(GREEDY))
        assert desk.outcome("refused") == 3

    run(scenario, tokenizer)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; allowed: 1 or more"),
        ({"stop_strings": ("",)}, "stop_strings has a string of 0 characters; allowed: 1 to 1024"),
        ({"stop_strings": ("x" * 1025,)}, "stop_strings has a string of 1025 characters; allowed: 1 to 1024"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AnswerOptions(GREEDY, **options)  # type: ignore[arg-type]
