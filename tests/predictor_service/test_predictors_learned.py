"""The trained predictors in service: they say what their networks say, keep requests apart, refuse others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor_service.artifact import compact, read_artifact, write_artifact
from predictor_service.packaged import packaged_artifact
from predictor_service.plugins import make_predictor
from predictor_service.predictor import PredictorSession, PredictorSource
from predictor_service.predictors.learned import LearnedPredictor
from predictor_service.predictors.promoe import LayerPair, PromoePredictor, layer_pairs
from predictor_service.predictors.ranking import union
from predictor_service.training.token_batch import BlockTensors
from predictor_service.training.train import Trained
from promoe.config import SettingUnfit
from promoe.errors import InvalidInput, ModelMismatch, ModelNotFound
from promoe.hint import Hint, LayerRouting, Observation, StepSpan, StepStart
from tests.predictor_service.layer_events import decode_start
from tests.predictor_service.made_up_traces import EXPERTS, LAYERS, PER_TOKEN, WORDS, LearnableModel, learnable_spec
from tests.predictor_service.test_predictors import RandomNode, check_hint
from tests.predictor_service.trained import train_small

FOUR_BITS = 0.2
"""How far rounding the weights to 4 bits moves a probability of these small networks at most."""


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, PredictorSource]:
    return train_small("learned", tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="module")
def promoe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, PredictorSource]:
    return train_small("promoe", tmp_path_factory.mktemp("promoe"))


class TokenStream:
    """Tokens of one request as a node would tell them, one per step."""

    def __init__(self, seed: int, num_tokens: int = 6) -> None:
        rng = np.random.default_rng(seed)
        self.inputs, self.router_inputs, self.routings = LearnableModel().run(rng.integers(0, WORDS, num_tokens), rng)


def observe_step(session: PredictorSession, streams: dict[str, TokenStream], token: int) -> dict[tuple[int, int], Hint]:
    """One decode step of these requests through a `learned` session; hints by (observed layer, layer)."""
    session.begin_step(decode_start(token + 1, *streams))
    hints: dict[tuple[int, int], Hint] = {}
    for layer in range(LAYERS):
        hidden_RD = np.stack([stream.router_inputs[layer, token] for stream in streams.values()])
        routing = np.stack([stream.routings[layer, token] for stream in streams.values()])
        observation = Observation(
            token + 1, layer, tuple(range(len(streams))), len(streams), hidden_RD, (LayerRouting(layer, routing),)
        )
        hints |= {(layer, hint.layer): hint for hint in session.observe(observation)}
    return hints


def scores_of(hint: Hint) -> np.ndarray:
    scores_E = np.zeros(EXPERTS)
    scores_E[hint.experts] = hint.scores
    return scores_E


def test_the_session_says_what_the_network_said_in_training(learned: tuple[Trained, PredictorSource]) -> None:
    trained, source = learned
    block = LearnableModel().block(1, tokens=8, seed=5)
    tensors = BlockTensors(block, EXPERTS, 3, trained.trainee.signature)  # type: ignore[attr-defined]
    with torch.no_grad():
        scored = trained.trainee.scored(tensors.batch(torch.arange(8)))
    expected_LATE = torch.sigmoid(scored.scores_PABE).numpy()
    session = LearnedPredictor(source).open_session()
    hidden = (block.hidden_SND.astype(np.uint32) << 16).view(np.float32)
    for token in range(8):
        session.begin_step(decode_start(token + 1))
        for layer in range(LAYERS):
            routing = LayerRouting(layer, block.topk_ids_LNK[layer, token : token + 1])
            observation = Observation(token + 1, layer, (0,), 1, hidden[layer, token : token + 1], (routing,))
            for lookahead, hint in zip((1, 2), session.observe(observation), strict=True):
                assert hint.layer == (layer + lookahead) % LAYERS
                assert hint.step == token + 1 + (layer + lookahead) // LAYERS
                if not scored.valid_PAB[layer, lookahead - 1, token]:
                    continue  # the block ends here, and nothing is known of the next token
                hinted = hint.experts.astype(int)
                np.testing.assert_allclose(hint.scores, expected_LATE[layer, lookahead - 1, token, hinted], atol=1e-4)


def test_promoe_says_what_its_networks_said_in_training(promoe: tuple[Trained, PredictorSource]) -> None:
    trained, source = promoe
    block = LearnableModel().block(1, tokens=8, seed=5, layer_input=True)
    with torch.no_grad():
        scored = trained.trainee.scored(BlockTensors(block, EXPERTS, 3, None).batch(torch.arange(8)))
    expected_NTE = scored.scores_PABE[:, 0].numpy()
    session = PromoePredictor(source).open_session()
    hidden = (block.hidden_SND.astype(np.uint32) << 16).view(np.float32)
    pairs = layer_pairs(LAYERS, 2)
    for token in range(8):
        session.begin_step(decode_start(token + 1))
        found: list[LayerPair] = []
        for source_layer in range(LAYERS + 1):
            observation = Observation(token + 1, source_layer, (0,), 1, hidden[source_layer, token : token + 1])
            for hint in session.observe(observation):
                pair = LayerPair(source_layer, hint.layer - source_layer + LAYERS * (hint.step - token - 1))
                found.append(pair)
                np.testing.assert_allclose(
                    hint.scores, expected_NTE[pairs.index(pair), token, hint.experts.astype(int)], atol=1e-4
                )
                assert hint.num_expected == PER_TOKEN
        assert sorted(found, key=pairs.index) == list(pairs)


def test_promoe_predicts_every_layer_once() -> None:
    for layers in (2, 5, 30):
        for lookahead in range(1, layers):
            pairs = layer_pairs(layers, lookahead)
            assert sorted((pair.source + pair.lookahead) % layers for pair in pairs) == list(range(layers))
            assert 0 not in {pair.source for pair in pairs}


def test_promoe_sums_scores_over_the_batch_and_keeps_k(promoe: tuple[Trained, PredictorSource]) -> None:
    predictor = PromoePredictor(promoe[1])
    hidden_RD = TokenStream(3).inputs[1, :3]
    session = predictor.open_session()
    session.begin_step(decode_start(1, "a", "b", "c"))
    (hint,) = session.observe(Observation(1, 1, (0, 1, 2), 3, hidden_RD))
    (pair,) = predictor.lookaheads_of[1].values()
    scores_E = sum(predictor.scores(pair, hidden_RD[row : row + 1])[0] for row in range(3))
    np.testing.assert_array_equal(hint.experts, np.argsort(-np.asarray(scores_E)))
    assert hint.num_expected == PER_TOKEN


def test_promoe_is_silent_in_prefill(promoe: tuple[Trained, PredictorSource]) -> None:
    session = PromoePredictor(promoe[1]).open_session()
    session.begin_step(StepStart(1, (StepSpan("a", 4, is_prefill=True),)))
    assert not session.observe(Observation(1, 1, (3,), 4, TokenStream(0).inputs[1, :1]))


def test_a_request_is_predicted_alike_whoever_else_is_served(learned: tuple[Trained, PredictorSource]) -> None:
    predictor = LearnedPredictor(learned[1])
    streams = {"a": TokenStream(1), "b": TokenStream(2)}
    together, alone = predictor.open_session(), {name: predictor.open_session() for name in streams}
    for token in range(6):
        both = observe_step(together, streams, token)
        single = {name: observe_step(alone[name], {name: streams[name]}, token) for name in streams}
        for place, hint in both.items():
            rows_RE = np.stack([scores_of(single[name][place]) for name in streams]).astype(np.float32)
            # Hints leave out what is improbable.
            np.testing.assert_allclose(scores_of(hint), union(rows_RE, 2), atol=0.05)


def test_a_request_that_ended_is_forgotten(learned: tuple[Trained, PredictorSource]) -> None:
    predictor = LearnedPredictor(learned[1])
    stream, other = TokenStream(1), TokenStream(2)
    used, fresh = predictor.open_session(), predictor.open_session()
    for token in range(5):
        observe_step(used, {"a": other}, token)
    used.end_requests(("a", "never seen"))
    after = observe_step(used, {"a": stream}, 5)
    first = observe_step(fresh, {"a": stream}, 5)
    assert after.keys() == first.keys()
    for place, hint in after.items():
        np.testing.assert_array_equal(hint.experts, first[place].experts)
        np.testing.assert_array_equal(hint.scores, first[place].scores)


def test_the_past_of_a_request_counts(learned: tuple[Trained, PredictorSource]) -> None:
    predictor = LearnedPredictor(learned[1])
    used, fresh = predictor.open_session(), predictor.open_session()
    for token in range(5):
        observe_step(used, {"a": TokenStream(2)}, token)
    after = observe_step(used, {"a": TokenStream(1)}, 5)
    first = observe_step(fresh, {"a": TokenStream(1)}, 5)
    assert any(not np.array_equal(after[place].scores, first[place].scores) for place in after)


def test_a_prompt_teaches_and_only_the_next_step_is_hinted(learned: tuple[Trained, PredictorSource]) -> None:
    session = LearnedPredictor(learned[1]).open_session()
    stream = TokenStream(4)
    session.begin_step(StepStart(1, (StepSpan("a", 6, is_prefill=True),)))
    hints: list[Hint] = []
    for layer in range(LAYERS):
        routing = LayerRouting(layer, stream.routings[layer, 3:])
        hints += session.observe(Observation(1, layer, (3, 4, 5), 6, stream.router_inputs[layer, 3:], (routing,)))
    assert {(hint.step, hint.layer) for hint in hints} == {(2, 0), (2, 1)}
    assert all(hint.num_expected == PER_TOKEN for hint in hints)


def test_four_bits_keep_the_probabilities(learned: tuple[Trained, PredictorSource], tmp_path: Path) -> None:
    trained, source = learned
    assert source.artifact is not None
    path = tmp_path / "compact.safetensors"
    write_artifact(path, read_artifact(source.artifact).manifest, compact(trained.trainee.tensors()))
    assert path.stat().st_size < source.artifact.stat().st_size / 2
    stream = {"a": TokenStream(1)}
    exact = observe_step(LearnedPredictor(source).open_session(), stream, 0)
    rounded = observe_step(LearnedPredictor(replace(source, artifact=path)).open_session(), stream, 0)
    gaps = np.stack([scores_of(hint) - scores_of(exact[place]) for place, hint in rounded.items()])
    assert 0 < np.abs(gaps).max() < FOUR_BITS


def test_one_lookahead_is_that_of_all(learned: tuple[Trained, PredictorSource]) -> None:
    source = learned[1]
    every, second = LearnedPredictor(source), LearnedPredictor(replace(source, lookahead=2))
    assert (every.version.lookaheads, second.version.lookaheads) == ((1, 2), (2,))
    all_hints = observe_step(every.open_session(), {"a": TokenStream(1)}, 0)
    hints = observe_step(second.open_session(), {"a": TokenStream(1)}, 0)
    assert hints.keys() == {(layer, (layer + 2) % LAYERS) for layer in range(LAYERS)}
    for place, hint in hints.items():
        np.testing.assert_allclose(hint.scores, all_hints[place].scores, rtol=1e-5)


def test_what_it_was_not_trained_for_is_refused(learned: tuple[Trained, PredictorSource]) -> None:
    with pytest.raises(SettingUnfit, match="trained for 1, 2"):
        LearnedPredictor(replace(learned[1], lookahead=4))


def test_another_model_is_refused(learned: tuple[Trained, PredictorSource]) -> None:
    with pytest.raises(ModelMismatch, match="deadbeef"):
        LearnedPredictor(replace(learned[1], spec=replace(learned[1].spec, fingerprint="deadbeef")))


def test_an_artifact_of_another_kind_is_refused(learned: tuple[Trained, PredictorSource]) -> None:
    with pytest.raises(InvalidInput, match="of the predictor learned, not of promoe"):
        PromoePredictor(learned[1])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_hints_are_valid_whatever_is_told(
    learned: tuple[Trained, PredictorSource], promoe: tuple[Trained, PredictorSource], data: st.DataObject
) -> None:
    spec = learned[1].spec
    sessions = LearnedPredictor(learned[1]).open_session(), PromoePredictor(promoe[1]).open_session()
    node = RandomNode(spec, data)
    for step in range(1, data.draw(st.integers(2, 5))):
        start = node.start(step)
        for session in sessions:
            session.begin_step(start)
        for observation in node.observations(start):
            for hint in sessions[0].observe(observation):
                check_hint(hint, observation, spec, start)
            for hint in sessions[1].observe(observation):
                # Its scores are no probabilities; all else holds.
                scores = np.linspace(1, 0, len(hint.scores), dtype=np.float32)
                assert (np.diff(hint.scores) <= 0).all()
                check_hint(replace(hint, scores=scores), observation, spec, start)
        if data.draw(st.booleans()):
            for session in sessions:
                session.end_requests(("a", "zz"))


@pytest.mark.parametrize("name", ["learned", "promoe"])
def test_without_an_artifact_there_is_none(name: str) -> None:
    with pytest.raises(ModelNotFound, match="promoe predictor train"):
        make_predictor(name, PredictorSource(learnable_spec(), Path("/no/pack")))


def test_an_artifact_that_lacks_a_tensor_is_refused(learned: tuple[Trained, PredictorSource], tmp_path: Path) -> None:
    assert learned[1].artifact is not None
    read = read_artifact(learned[1].artifact)
    tensors = {name: values for name, values in read.tensors.items() if name != "out.bias"}
    write_artifact(tmp_path / "a.safetensors", read.manifest, tensors)
    with pytest.raises(InvalidInput, match=r"out\.bias is missing"):
        LearnedPredictor(replace(learned[1], artifact=tmp_path / "a.safetensors"))


@pytest.mark.parametrize("kind", ["learned", "promoe"])
@pytest.mark.parametrize("fingerprint", ["0fd0574793216a47aa4c30e17defe2a1", "537ff4a3ec96c52f965ed1fd7b3e3943"])
def test_the_demo_model_has_a_packaged_predictor_in_either_dtype(kind: str, fingerprint: str) -> None:
    path = packaged_artifact(fingerprint, kind)
    assert path is not None
    assert fingerprint in read_artifact(path).manifest.fingerprints


def test_packaged_predictors_are_small() -> None:
    path = packaged_artifact("0fd0574793216a47aa4c30e17defe2a1", "learned")
    assert path is not None
    sizes = {entry.name: entry.stat().st_size for entry in path.parent.iterdir() if entry.suffix == ".safetensors"}
    assert sum(sizes.values()) < 10e6, sizes


def test_other_models_have_none() -> None:
    assert packaged_artifact("deadbeef", "learned") is None
    assert packaged_artifact("0fd0574793216a47aa4c30e17defe2a1", "frequency") is None
