"""What sessions tell becomes documents, whole and in order; what is missing never joins tokens that are apart."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor_service.feed import Overheard
from predictor_service.learner import feed_client, gatherer
from predictor_service.learner.document import Document, block_of, blocks_of
from predictor_service.learner.gatherer import Gatherer
from predictor_service.trace_playback import observations
from promoe.errors import InvalidInput
from promoe.hint import LayerRouting, PredictorVersion, StepSpan, StepStart
from tests.predictor_service.learner_feed import (
    EVERY_SECOND,
    LAYER_INPUT,
    ROUTER_INPUT,
    UNSEEN,
    made_up_steps,
    session_packets,
    welcome,
)
from tests.predictor_service.made_up_traces import EXPERTS, HIDDEN, LAYERS, PER_TOKEN, LearnableModel, learnable_spec

TOKENS, PROMPT = 12, 3


class Gathered:
    """A gatherer, and what it finished."""

    def __init__(self, max_tokens: int = 512) -> None:
        self.documents: list[Document] = []
        self.gatherer = Gatherer(learnable_spec(), max_tokens, self.documents.append)

    def tell(self, packets: list[bytes]) -> "Gathered":
        for packet in packets:
            feed_client.tell(packet, self.gatherer)
        return self


def gathered(documents: int, version: PredictorVersion = ROUTER_INPUT, max_tokens: int = 512) -> list[Document]:
    return Gathered(max_tokens).tell(list(session_packets(1, made_up_steps(documents), version))).documents


@pytest.mark.parametrize("version", [ROUTER_INPUT, LAYER_INPUT])
def test_documents_hold_what_was_served(version: PredictorVersion) -> None:
    documents = gathered(4, version)
    assert [document.name for document in documents] == [f"1:r{number}" for number in range(4)]
    expected = LearnableModel().block(4, TOKENS, layer_input=version is LAYER_INPUT)
    block = block_of(documents)
    np.testing.assert_array_equal(block.hidden_SND, expected.hidden_SND)
    np.testing.assert_array_equal(block.topk_ids_LNK, expected.topk_ids_LNK)
    np.testing.assert_array_equal(np.diff(block.document_N), np.diff(expected.document_N))
    assert block.known_SN.all()
    assert block.is_decode_N.sum() == 4 * (TOKENS - PROMPT)
    assert all(document.nbytes == sum(token.nbytes for token in document.tokens) for document in documents)


def test_layers_that_are_not_observed_are_not_seen_and_not_paid_for() -> None:
    (document,) = gathered(1, EVERY_SECOND)
    (whole,) = gathered(1)
    block = block_of([document])
    seen = [0, 2, 4]
    assert block.known_SN[seen].all()
    assert not block.known_SN[[1, 3]].any()
    np.testing.assert_array_equal(block.hidden_SND[seen], block_of([whole]).hidden_SND[seen])
    assert not block.hidden_SND[[1, 3]].any()
    np.testing.assert_array_equal(block.topk_ids_LNK, block_of([whole]).topk_ids_LNK)
    assert document.tokens[0].hidden_VD.nbytes == whole.tokens[0].hidden_VD.nbytes * 3 // 5


def test_only_the_first_tokens_of_a_long_document_are_held() -> None:
    (document,) = gathered(1, max_tokens=5)
    assert len(document.tokens) == 5


def test_a_version_that_sees_nothing_teaches_nothing() -> None:
    assert gathered(3, UNSEEN) == []


def test_a_version_of_which_nothing_was_told_teaches_nothing_until_it_is() -> None:
    packets = list(session_packets(1, made_up_steps(3), ROUTER_INPUT))[1:]
    first = Gathered().tell(packets)
    assert first.documents == []
    other = Gathered()
    other.gatherer.learn_version(ROUTER_INPUT.version, ROUTER_INPUT.observed)
    assert len(other.tell(packets).documents) == 3


def test_another_version_s_hidden_states_are_another_document() -> None:
    steps = made_up_steps(1)
    run = Gathered().tell([welcome(1, LAYER_INPUT), *list(session_packets(1, steps[:5], ROUTER_INPUT))[:-1]])
    run.tell(list(session_packets(1, steps[5:], LAYER_INPUT)))
    assert [document.observed for document in run.documents] == [ROUTER_INPUT.observed, LAYER_INPUT.observed]
    assert len({document.name for document in run.documents}) == 1, "both are on one side of the split"
    assert not run.documents[1].tokens[0].follows


def test_a_document_of_a_token_is_no_document() -> None:
    assert Gathered().tell(list(session_packets(1, made_up_steps(1)[:2], ROUTER_INPUT))).documents == []


def test_documents_whose_end_is_never_told_are_closed() -> None:
    run = Gathered()
    steps = made_up_steps(1)
    sessions = gatherer.MOST_OPEN_DOCUMENTS + 3
    for session in range(sessions):
        run.tell(list(session_packets(session, steps[:4], ROUTER_INPUT))[:-1])
        run.gatherer.begin_step(session, StepStart(99, ()))
    assert len(run.documents) == 3
    assert run.gatherer.open_nbytes > 0
    while run.gatherer.close_oldest():
        pass
    assert len(run.documents) == sessions
    assert run.gatherer.open_nbytes == 0


def test_sessions_whose_end_is_never_told_are_not_kept_for_ever() -> None:
    run = Gathered()
    steps = made_up_steps(1)
    for session in range(gatherer.MOST_SESSIONS + 3):
        run.tell(list(session_packets(session, steps[:5], ROUTER_INPUT))[:-1])
        run.gatherer.begin_step(0, StepStart(100 + session, (), version=ROUTER_INPUT.version))
    assert len(run.gatherer._last_step) == len(run.gatherer._steps) == gatherer.MOST_SESSIONS
    assert 0 in run.gatherer._last_step, "it was heard just now"
    assert len(run.documents) >= 3


def test_tokens_that_were_not_sampled_leave_a_gap() -> None:
    step = made_up_steps(1)[0]
    run = Gathered()
    run.gatherer.welcomed(ROUTER_INPUT)
    start = StepStart(1, (StepSpan("r0", 5, is_prefill=True),), version=ROUTER_INPUT.version)
    run.gatherer.begin_step(1, start)
    for observation in observations(step, ROUTER_INPUT):
        run.gatherer.observe(1, replace(observation, rows=(0, 1, 4), num_tokens=5))
    for later in made_up_steps(1)[1:3]:
        run.gatherer.begin_step(1, replace(later.start, version=ROUTER_INPUT.version))
        for observation in observations(later, ROUTER_INPUT):
            run.gatherer.observe(1, observation)
    run.gatherer.end_session(1)
    (document,) = run.documents
    assert [token.follows for token in document.tokens] == [False, True, False, True, True]


def test_several_requests_of_a_step_are_kept_apart() -> None:
    run = Gathered()
    run.gatherer.welcomed(ROUTER_INPUT)
    ids_RK = np.array([[0, 1], [2, 3]], np.uint16)
    hidden_RD = np.arange(2 * HIDDEN, dtype=np.float32).reshape(2, HIDDEN)
    step = made_up_steps(1)[1]
    for number in (1, 2, 3):
        spans = tuple(StepSpan(name, 1, is_prefill=False) for name in ("x", "y"))
        run.gatherer.begin_step(1, StepStart(number, spans, version=ROUTER_INPUT.version))
        for observation in observations(step, ROUTER_INPUT):
            routing = (LayerRouting(observation.layer, ids_RK),)
            both = replace(observation, step=number, rows=(0, 1), num_tokens=2, hidden_RD=hidden_RD, routings=routing)
            run.gatherer.observe(1, both)
    run.gatherer.end_requests(1, ["y"])
    run.gatherer.end_session(1)
    assert [document.name for document in run.documents] == ["1:y", "1:x"]
    for document, row in zip(run.documents, (1, 0), strict=True):
        assert [token.follows for token in document.tokens] == [False, True, True]
        assert all((token.topk_ids_LK == ids_RK[row]).all() for token in document.tokens)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 139)), st.sampled_from([ROUTER_INPUT, EVERY_SECOND]))
def test_whatever_packets_are_missing_tokens_are_true_and_gaps_are_gaps(
    lost: set[int], version: PredictorVersion
) -> None:
    """Every token is one that was served; two that follow each other followed each other."""
    whole = [token for document in gathered(2, version) for token in document.tokens]
    place = {_key(token): index for index, token in enumerate(whole)}
    packets = list(session_packets(1, made_up_steps(2), version))
    left = [packet for index, packet in enumerate(packets) if index == 0 or index not in lost]
    run = Gathered().tell(left)
    run.gatherer.end_session(1)
    for document in run.documents:
        places = [place[_key(token)] for token in document.tokens]
        for before, after, token in zip(places, places[1:], document.tokens[1:], strict=False):
            assert after > before
            if token.follows:
                assert after == before + 1


def _key(token: object) -> bytes:
    hidden_VD, topk_ids_LK = token.hidden_VD, token.topk_ids_LK  # type: ignore[attr-defined]
    return bytes(hidden_VD.tobytes() + topk_ids_LK.tobytes())


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 60), st.integers(0, 255))
def test_garbage_is_refused_or_ignored(said: bytes, answer: bytes, at: int, byte: int) -> None:
    run = Gathered().tell([welcome(1, ROUTER_INPUT)])
    good = list(session_packets(1, made_up_steps(1)[:4], ROUTER_INPUT))
    damaged = bytearray(good[3])
    damaged[at % len(damaged)] = byte
    for packet in (Overheard(1, said, answer).encode(), said, bytes(damaged)):
        try:
            feed_client.tell(packet, run.gatherer)
        except InvalidInput:
            continue
    run.tell(list(session_packets(2, made_up_steps(1), ROUTER_INPUT)))
    assert "2:r0" in [document.name for document in run.documents]


def test_an_observation_of_another_model_is_ignored() -> None:
    step = made_up_steps(1)[3]
    for change in (
        {"layer": LAYERS + 1},
        {"hidden_RD": np.zeros((1, HIDDEN + 1), np.float32)},
        {"hidden_RD": np.full((1, HIDDEN), np.nan, np.float32)},
        {"routings": (LayerRouting(LAYERS, np.zeros((1, PER_TOKEN), np.uint16)),)},
        {"routings": (LayerRouting(0, np.full((1, PER_TOKEN), EXPERTS, np.uint16)),)},
        {"rows": (7,)},
    ):
        run = Gathered()
        run.gatherer.welcomed(ROUTER_INPUT)
        run.gatherer.begin_step(1, replace(step.start, version=ROUTER_INPUT.version))
        for observation in observations(step, ROUTER_INPUT):
            run.gatherer.observe(1, replace(observation, **change) if observation.layer == 2 else observation)
        run.gatherer.end_session(1)
        assert run.gatherer.num_tokens == 0
        assert run.gatherer.num_lost_steps == 1


def test_blocks_hold_every_document_once() -> None:
    documents = gathered(7)
    whole = block_of(documents)
    for nbytes in (1, 3000, 1 << 30):
        blocks = list(blocks_of(documents, nbytes))
        np.testing.assert_array_equal(np.concatenate([block.hidden_SND for block in blocks], axis=1), whole.hidden_SND)
        assert len(blocks) == {1: 7, 3000: 4, 1 << 30: 1}[nbytes]
