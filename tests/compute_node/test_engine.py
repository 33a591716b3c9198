"""What both engines promise: `generate`'s tokens whoever else runs, repeatable draws, ends, failures, cancellation."""

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from compute_node.engine import (
    EndReason,
    Engine,
    EngineKind,
    EngineRequest,
    RequestStarted,
    TokenDrawn,
)
from compute_node.sampling import RowSampler, Sampling
from compute_node.step_ledger import Phase, StepLedger
from promoe.errors import ResourceExhausted, Unavailable
from tests.compute_node.tiny_serving import (
    EventLog,
    SpanRecorder,
    StepLog,
    engine_request,
    greedy_oracle,
    started_engine,
    submit,
)
from tests.families import FAMILIES, SECOND_ENGINE_FAMILIES, make_tiny_model

KINDS = pytest.mark.parametrize("kind", list(EngineKind), ids=lambda kind: kind.value)

PROMPTS = ([5, 6, 7], [9] * 40, list(range(3, 60)), [8], [11, 12] * 20, [4, 5], [9] * 41, [100, 50, 20, 10])
"""Longer and shorter than a step and than a KV block, with a shared beginning."""

FAMILY_ENGINES = [
    (family, kind)
    for family in ("qwen2_moe", "gpt_oss", "deepseek_v2", "qwen3_next", "minimax")
    for kind in EngineKind
    if kind is EngineKind.INTERLEAVED or family not in SECOND_ENGINE_FAMILIES
]


class Gate:
    """Holds the engine's thread in a forward pass, so that a test can act at a known point; can make passes fail."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.error: BaseException | None = None
        self._arrived = threading.Semaphore(0)
        self._passes = threading.Semaphore(0)
        self._is_open = threading.Event()
        self._hook = model.register_forward_pre_hook(lambda *_: self._pass())

    def await_arrival(self) -> None:
        """Returns when a forward pass waits at the gate."""
        assert self._arrived.acquire(timeout=60), "no forward pass came"

    def let_one_pass(self) -> None:
        """The waiting pass, or else the next one, goes on."""
        self._passes.release()

    def open(self) -> None:
        """All passes go on from now on."""
        self._is_open.set()
        self._passes.release()

    def remove(self) -> None:
        """Takes the gate out of the model."""
        self.open()
        self._hook.remove()

    def _pass(self) -> None:
        if not self._is_open.is_set():
            self._arrived.release()
            assert self._passes.acquire(timeout=60), "the test forgot the gate"
        if self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_tiny_model("qwen2_moe")


@pytest.fixture(scope="module")
def oracle() -> PreTrainedModel:
    """The same weights, out of reach of the engines."""
    return make_tiny_model("qwen2_moe")


@pytest.fixture(scope="module", params=list(EngineKind), ids=lambda kind: kind.value)
def engine(request: pytest.FixtureRequest, model: PreTrainedModel, oracle: PreTrainedModel) -> Iterator[Engine]:
    """One engine of each kind for all tests that leave it idle and alive.

    It comes after the oracle: Transformers' batching seeds torch's global generator when its thread starts.
    """
    with started_engine(request.param, model) as started:
        yield started


@pytest.fixture
def gate(model: PreTrainedModel) -> Iterator[Gate]:
    gate = Gate(model)
    yield gate
    gate.remove()


@pytest.mark.parametrize(("family", "kind"), FAMILY_ENGINES)
def test_tokens_are_those_of_generate(family: str, kind: EngineKind) -> None:
    assert family in FAMILIES
    model = make_tiny_model(family)
    expected = [greedy_oracle(model, prompt, 8) for prompt in PROMPTS[:4]]
    with started_engine(kind, model) as engine:
        logs = [submit(engine, engine_request(f"r{i}", prompt, 8)) for i, prompt in enumerate(PROMPTS[:4])]
        assert [log.token_ids() for log in logs] == expected


@pytest.mark.parametrize("num_requests", [1, 2, 8])
def test_requests_that_arrive_at_different_times_do_not_disturb_each_other(
    engine: Engine, num_requests: int, model: PreTrainedModel, oracle: PreTrainedModel
) -> None:
    lengths = [6 + 3 * (index % 4) for index in range(num_requests)]
    expected = [greedy_oracle(oracle, PROMPTS[index], lengths[index]) for index in range(num_requests)]
    logs: list[EventLog] = []
    heads: list[list[int]] = []
    for index in range(num_requests):
        logs.append(submit(engine, engine_request(f"r{index}", PROMPTS[index], lengths[index])))
        # The next one comes when this one has its second token.
        heads.append([logs[-1].until_token().token_id for _ in range(2)])
    answers = [head + log.token_ids() for head, log in zip(heads, logs, strict=True)]
    assert answers == expected


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_that_of_generate(
    engine: Engine, penalty: float, model: PreTrainedModel, oracle: PreTrainedModel
) -> None:
    log = submit(engine, engine_request("r", PROMPTS[2], 12, repetition_penalty=penalty))
    assert log.token_ids() == greedy_oracle(oracle, PROMPTS[2], 12, repetition_penalty=penalty)


def seeded(index: int) -> EngineRequest:
    return engine_request(f"s{index}", PROMPTS[index], 10, temperature=1.2, top_p=0.95, top_k=50, seed=index)


def test_a_seed_gives_the_same_answer_alone_in_company_and_on_the_other_engine(model: PreTrainedModel) -> None:
    answers = []
    for kind in EngineKind:
        with started_engine(kind, model) as engine:
            alone = [submit(engine, seeded(index)).token_ids() for index in range(4)]
            logs = [submit(engine, seeded(index)) for index in (3, 1, 0, 2)]
            company = submit(engine, engine_request("greedy", PROMPTS[1], 10))
            together = dict(zip((3, 1, 0, 2), [log.token_ids() for log in logs], strict=True))
            company.tokens_and_end()
        assert [together[index] for index in range(4)] == alone
        answers.append(alone)
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers[0]}) == 4


def test_draws_and_logprobs_are_those_of_a_plain_forward_pass(
    engine: Engine, model: PreTrainedModel, oracle: PreTrainedModel
) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.1, seed=11, top_logprobs=3)
    prompt = PROMPTS[4]
    log = EventLog()
    engine.submit(EngineRequest("r", tuple(prompt), 8, sampling, frozenset()), log.sink)
    tokens, _ = log.tokens_and_end()
    ids = list(prompt)
    sampler = RowSampler(sampling, prompt)
    for token in tokens:
        with torch.no_grad():
            logits_V = oracle(input_ids=torch.tensor([ids])).logits[0, -1]
        assert token.token_id == sampler.draw(logits_V).token_id
        logprobs_V = torch.log_softmax(logits_V, dim=-1)
        assert token.logprob == pytest.approx(float(logprobs_V[token.token_id]), abs=1e-4)
        best = torch.topk(logprobs_V, 3)
        assert [other.logprob for other in token.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [other.token_id for other in token.alternatives] == best.indices.tolist()
        ids.append(token.token_id)


def test_logprobs_do_not_change_greedy_tokens(engine: Engine, model: PreTrainedModel, oracle: PreTrainedModel) -> None:
    log = submit(engine, engine_request("r", PROMPTS[0], 6, top_logprobs=0))
    tokens, _ = log.tokens_and_end()
    assert [token.token_id for token in tokens] == greedy_oracle(oracle, PROMPTS[0], 6)
    assert all(token.logprob is not None and token.alternatives == () for token in tokens)


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(
    engine: Engine, model: PreTrainedModel, oracle: PreTrainedModel
) -> None:
    expected = greedy_oracle(oracle, PROMPTS[2], 12)
    stop = expected[5]
    first = expected.index(stop)
    log = EventLog()
    engine.submit(EngineRequest("r", tuple(PROMPTS[2]), 12, Sampling(), frozenset({stop, 999})), log.sink)
    tokens, end = log.tokens_and_end()
    assert [token.token_id for token in tokens] == expected[:first]
    assert (end.reason, end.stop_token_id, end.num_drawn) == (EndReason.STOP_TOKEN, stop, first + 1)


def test_events_come_in_order(engine: Engine, model: PreTrainedModel) -> None:
    log = submit(engine, engine_request("r", PROMPTS[0], 3))
    events = [log.next() for _ in range(5)]
    assert [type(event).__name__ for event in events] == ["RequestStarted", *["TokenDrawn"] * 3, "RequestEnded"]
    times = [event.at_s for event in events if isinstance(event, RequestStarted | TokenDrawn)]
    assert times == sorted(times)


@KINDS
def test_the_ledger_is_told_every_row_of_every_step(kind: EngineKind, model: PreTrainedModel) -> None:
    ledger = SpanRecorder()
    steps = StepLog()
    rows: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with started_engine(kind, model, ledger, steps) as engine:
        logs = [submit(engine, engine_request(f"r{i}", PROMPTS[i], 5)) for i in range(4)]
        for log in logs:
            log.tokens_and_end()
    hook.remove()
    assert [sum(span.num_tokens for span in spans) for spans in ledger.steps] == rows
    for index in range(4):
        spans = ledger.spans_of(f"r{index}")
        prefill = [span for span in spans if span.phase is Phase.PREFILL]
        decode = [span for span in spans if span.phase is Phase.DECODE]
        assert spans == prefill + decode
        assert sum(span.num_tokens for span in prefill) == len(PROMPTS[index])
        assert [span.num_tokens for span in decode] == [1] * 4
    mixed = [any(span.phase is Phase.PREFILL for span in step) for step in ledger.steps]
    assert steps.phases == [Phase.PREFILL if is_mixed else Phase.DECODE for is_mixed in mixed]


@KINDS
def test_expert_use_goes_to_the_request_and_is_forgotten_here(kind: EngineKind, model: PreTrainedModel) -> None:
    ledger = StepLedger()

    def count_a_miss(*_: object) -> None:
        for span in ledger.spans:
            ledger.use_of(span.request_id).of(span.phase).misses += 1

    hook = model.register_forward_pre_hook(count_a_miss)
    with started_engine(kind, model, ledger) as engine:
        _, end = submit(engine, engine_request("r", PROMPTS[0], 5)).tokens_and_end()
    hook.remove()
    assert (end.use.prefill.misses, end.use.decode.misses) == (1, 4)
    assert ledger.use_of("r").decode.misses == 0


def test_cancellation_takes_effect_within_one_step(
    engine: Engine, model: PreTrainedModel, oracle: PreTrainedModel, gate: Gate
) -> None:
    log = submit(engine, engine_request("long", PROMPTS[0], 400))
    gate.await_arrival()
    engine.cancel("long")
    gate.let_one_pass()
    tokens, end = log.tokens_and_end()
    assert (end.reason, len(tokens)) == (EndReason.CANCELLED, 1)
    # The engine goes on with others, and nothing is left of the cancelled one.
    gate.open()
    engine.cancel("long")
    assert submit(engine, engine_request("next", PROMPTS[0], 5)).token_ids() == greedy_oracle(oracle, PROMPTS[0], 5)


def test_a_cancelled_request_may_be_submitted_again(
    engine: Engine, model: PreTrainedModel, oracle: PreTrainedModel
) -> None:
    for _ in range(3):
        log = submit(engine, engine_request("r", PROMPTS[2], 100))
        log.until_token()
        engine.cancel("r")
        assert log.tokens_and_end()[1].reason is EndReason.CANCELLED
    assert submit(engine, engine_request("r", PROMPTS[2], 6)).token_ids() == greedy_oracle(oracle, PROMPTS[2], 6)


@KINDS
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (Unavailable("Expert L0E3 is damaged."), Unavailable),
        (torch.OutOfMemoryError("CUDA out of memory."), ResourceExhausted),
    ],
)
def test_a_failed_step_fails_its_requests_and_nobody_else(
    kind: EngineKind,
    raised: BaseException,
    expected: type[Exception],
    model: PreTrainedModel,
    oracle: PreTrainedModel,
    gate: Gate,
) -> None:
    steps = StepLog()
    with started_engine(kind, model, steps=steps) as engine:
        victim = submit(engine, engine_request("victim", PROMPTS[2], 5))
        gate.await_arrival()
        late = submit(engine, engine_request("late", PROMPTS[2], 5))
        gate.error = raised
        gate.open()
        error = victim.failure()
        assert isinstance(error, expected)
        assert late.token_ids() == greedy_oracle(oracle, PROMPTS[2], 5)
        # What the failed step wrote is not found as a shared prefix either.
        assert submit(engine, engine_request("again", PROMPTS[2], 5)).token_ids() == greedy_oracle(
            oracle, PROMPTS[2], 5
        )
    assert not steps.has_died


@KINDS
def test_the_line_of_a_failed_step_names_its_requests(
    kind: EngineKind, model: PreTrainedModel, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with started_engine(kind, model) as engine:
        victim = submit(engine, engine_request("job-17.0a", PROMPTS[2], 5))
        gate.await_arrival()
        gate.error = Unavailable("Expert L0E3 is damaged.")
        gate.open()
        victim.failure()
    about = [vars(line)["fields"] for line in caplog.records if "A step of" in line.message]
    assert about == [{"request_ids": ["job-17"], "answer_ids": ["job-17.0a"]}]


@KINDS
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_fails_all_requests_and_says_so(kind: EngineKind, model: PreTrainedModel, gate: Gate) -> None:
    steps = StepLog()
    with started_engine(kind, model, steps=steps) as engine:
        running = submit(engine, engine_request("running", PROMPTS[0], 5))
        gate.await_arrival()
        waiting = submit(engine, engine_request("waiting", PROMPTS[1], 5))
        gate.error = AssertionError("a bug")
        gate.open()
        for log in (running, waiting):
            assert "a bug" not in str(log.failure())
        with pytest.raises(Unavailable):
            submit_until_refused(engine)
    assert steps.has_died


def submit_until_refused(engine: Engine) -> None:
    """A request that meets the dying engine fails; the next is refused."""
    for number in itertools.count():
        submit(engine, engine_request(f"r{number}", PROMPTS[0], 1)).failure()


@KINDS
def test_stop_fails_what_is_open_and_refuses_what_comes(kind: EngineKind, model: PreTrainedModel) -> None:
    steps = StepLog()
    with started_engine(kind, model, steps=steps) as engine:
        log = submit(engine, engine_request("r", PROMPTS[0], 400))
        log.until_token()
        engine.stop()
        engine.stop()
        assert isinstance(log.failure(), Unavailable)
        with pytest.raises(Unavailable):
            submit(engine, engine_request("late", PROMPTS[0], 5))
    assert not steps.has_died
