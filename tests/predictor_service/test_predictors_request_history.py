"""What a session remembers of requests is what training computed for the same tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor_service.predictors.request_history import (
    MOST_REQUESTS,
    NUM_FEATURES,
    POPULAR,
    ROUTED,
    SIGNATURE,
    RequestHistory,
    requests_of_rows,
)
from predictor_service.training.token_batch import BlockTensors, SignatureMap
from promoe.hint import StepSpan, StepStart
from tests.predictor_service.made_up_traces import EXPERTS, LAYERS, PER_TOKEN, LearnableModel


def test_serving_remembers_what_training_computed() -> None:
    block = LearnableModel().block(3, tokens=7)
    signature = SignatureMap(torch.from_numpy(LearnableModel().routers_LED), torch.zeros(LAYERS, EXPERTS))
    tensors = BlockTensors(block, EXPERTS, 2, signature)
    tokens = len(block.document_N)
    batch = tensors.batch(torch.arange(tokens))
    history = RequestHistory(LAYERS, EXPERTS, PER_TOKEN)
    layers = np.arange(LAYERS)
    for token in range(tokens):
        request = f"r{block.document_N[token]}"
        features_LF = history.features(request, layers)
        np.testing.assert_allclose(features_LF, batch.memory_TBF[:LAYERS, token], atol=1e-5)
        if batch.has_next_B[token]:
            continues_LF = batch.memory_TBF[:LAYERS, token + 1]
            np.testing.assert_array_equal(batch.memory_TBF[LAYERS:, token], continues_LF[:2])
        for layer in range(LAYERS):
            history.learn_routing(layer, (request,), block.topk_ids_LNK[layer, token : token + 1])
            hidden = torch.from_numpy((block.hidden_SND[layer, token].astype(np.uint32) << 16).view(np.float32))
            history.learn_signature(layer, (request,), (hidden @ signature.weight_LED[layer].T).numpy()[None])


def test_a_request_that_is_not_known_has_the_uniform_guess() -> None:
    features = RequestHistory(LAYERS, EXPERTS, PER_TOKEN).features("new", np.array([0, 3]))
    features_L3E = features.reshape(2, NUM_FEATURES, EXPERTS)
    assert (features_L3E[:, POPULAR] == np.float32(PER_TOKEN / EXPERTS)).all()
    assert not features_L3E[:, [ROUTED, SIGNATURE]].any()


def test_reading_the_unknown_does_not_make_it_known() -> None:
    history = RequestHistory(LAYERS, EXPERTS, PER_TOKEN)
    history.features("new", np.array([0]))[:] = 9
    assert len(history) == 0
    assert history.features("new", np.array([0])).max() < 1


def test_requests_whose_end_is_never_told_are_not_kept_for_ever() -> None:
    history = RequestHistory(1, EXPERTS, PER_TOKEN)
    for number in range(MOST_REQUESTS + 2):
        history.learn_routing(0, (str(number),), np.array([[1, 5]], np.uint16))
    assert len(history) == MOST_REQUESTS
    layers = np.array([0])
    unknown = history.features("new", layers)
    assert (history.features("1", layers) == unknown).all()
    assert (history.features("2", layers) != unknown).any()


@pytest.mark.parametrize("with_signatures", [True, False])
def test_what_another_session_knows_is_learned_where_nothing_is_known(with_signatures: bool) -> None:
    mine, other = RequestHistory(1, EXPERTS, PER_TOKEN), RequestHistory(1, EXPERTS, PER_TOKEN)
    mine.learn_routing(0, ("both",), np.array([[1, 5]], np.uint16))
    other.learn_routing(0, ("both", "theirs"), np.array([[2, 3], [2, 3]], np.uint16))
    other.learn_signature(0, ("theirs",), np.ones((1, EXPERTS), np.float32))
    layers, before = np.array([0]), mine.features("both", np.array([0]))
    mine.learn_requests(other, with_signatures=with_signatures)
    assert (mine.features("both", layers) == before).all()
    learned_FE = mine.features("theirs", layers).reshape(NUM_FEATURES, EXPERTS)
    assert np.flatnonzero(learned_FE[ROUTED]).tolist() == [2, 3]
    assert learned_FE[SIGNATURE].any() == with_signatures
    mine.learn_routing(0, ("theirs",), np.array([[0, 1]], np.uint16))
    assert other.features("theirs", layers)[0, 2] == 1, "what is copied is not shared"


def test_popularity_stays_a_share() -> None:
    history = RequestHistory(1, EXPERTS, PER_TOKEN)
    for _ in range(300):
        history.learn_routing(0, ("a",), np.array([[1, 5]], np.uint16))
    popular_E = history.features("a", np.array([0])).reshape(NUM_FEATURES, EXPERTS)[POPULAR]
    assert popular_E.sum() == pytest.approx(PER_TOKEN, rel=1e-3)
    assert popular_E[[1, 5]] == pytest.approx([1, 1], abs=1e-3)


def test_what_ended_takes_no_memory() -> None:
    history = RequestHistory(LAYERS, EXPERTS, PER_TOKEN)
    history.learn_signature(0, ("a", "b"), np.zeros((2, EXPERTS), np.float32))
    assert len(history) == 2
    history.forget(("a", "c"))
    assert len(history) == 1


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5), data=st.data())
def test_every_row_has_its_request(lengths: list[int], data: st.DataObject) -> None:
    spans = tuple(StepSpan(f"r{index}", length, length > 1) for index, length in enumerate(lengths))
    owners = [span.request_id for span in spans for _ in range(span.num_tokens)]
    rows = sorted(data.draw(st.sets(st.integers(0, len(owners) - 1))))
    assert requests_of_rows(StepStart(1, spans), rows) == tuple(owners[row] for row in rows)
