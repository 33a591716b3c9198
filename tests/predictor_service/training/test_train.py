"""Training learns what there is to learn, alike for the same seed, and stops when told to."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from predictor_service.artifact import read_artifact
from predictor_service.training.fit import FitSettings
from predictor_service.training.token_blocks import Split, TokenBlock
from predictor_service.training.train import Training, train
from promoe.errors import InvalidInput
from tests.predictor_service.made_up_traces import PER_TOKEN, FixedBlocks, LearnableModel, learnable_spec
from tests.predictor_service.trained import SilentProgress, made_up_blocks, small_training, train_small


def popularity_recall(block: TokenBlock) -> float:
    """Of the layers' most popular experts: what needs no look at the token."""
    layers, tokens, _ = block.topk_ids_LNK.shape
    found = 0
    for layer in range(layers):
        popular = np.argsort(-np.bincount(block.topk_ids_LNK[layer].reshape(-1)))[:PER_TOKEN]
        found += int(np.isin(block.topk_ids_LNK[layer], popular).sum())
    return float(found / (layers * tokens * PER_TOKEN))


def weights_of(folder: Path, **changes: object) -> dict[str, np.ndarray]:
    return train_small("learned", folder, **changes)[0].trainee.tensors()


# A third of promoe's targets are the next token's, and words here follow each other at random.
@pytest.mark.parametrize(("kind", "gain"), [("learned", 0.2), ("promoe", 0.1)])
def test_it_learns_and_beats_popularity(kind: str, gain: float, tmp_path: Path) -> None:
    trained, _ = train_small(kind, tmp_path)
    baseline = popularity_recall(LearnableModel().block(30, seed=2))
    recall = trained.result.measured.recall_A[-1]
    assert recall > baseline + gain
    assert trained.result.measured.recall_wide_A[-1] >= recall
    metrics = trained.manifest("n", "1", learnable_spec(), ("f",)).metrics
    assert metrics["recall_at_k_lookahead_2"] == recall


def test_cross_entropy_is_in_promoes_favour(tmp_path: Path) -> None:
    recalls = [
        train_small("promoe", tmp_path / objective, objective=objective)[0].result.measured.recall_A[0]
        for objective in ("l1", "cross_entropy")
    ]
    assert recalls[1] > recalls[0]


def test_the_same_seed_trains_the_same(tmp_path: Path) -> None:
    fit = replace(small_training("learned").fit, epochs=2)
    first, again = weights_of(tmp_path / "1", fit=fit), weights_of(tmp_path / "2", fit=fit)
    other = weights_of(tmp_path / "3", fit=replace(fit, seed=1))
    assert first.keys() == again.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    assert any(not np.array_equal(values, other[name]) for name, values in first.items())


def test_it_is_as_good_as_its_best_epoch(tmp_path: Path) -> None:
    model, progress = LearnableModel(), SilentProgress()
    pack = model.write_pack(tmp_path / "pack")
    fit = replace(small_training("learned").fit, epochs=6, learning_rate=0.05, is_annealed=False, patience=6)
    trained = train(
        small_training("learned", fit=fit), learnable_spec(), pack, made_up_blocks(model, "learned"), progress
    )
    assert trained.result.epochs == len(progress.epochs) == 6
    assert trained.result.measured.loss == min(epoch.loss for epoch in progress.epochs)
    assert progress.num_tokens == 6 * trained.result.num_tokens


def test_it_stops_when_held_out_documents_get_no_better(tmp_path: Path) -> None:
    model, progress = LearnableModel(), SilentProgress()
    pack = model.write_pack(tmp_path / "pack")
    few = FixedBlocks(model.block(2, seed=1), model.block(20, seed=2))
    fit = replace(small_training("promoe").fit, epochs=200, learning_rate=0.02, is_annealed=False, patience=2)
    trained = train(small_training("learned", fit=fit), learnable_spec(), pack, few, progress)
    losses = [epoch.loss for epoch in progress.epochs]
    assert len(losses) < 200
    assert min(losses) == losses[-3] == trained.result.measured.loss


class Interrupted(SilentProgress):
    """Presses Ctrl-C in this epoch."""

    def __init__(self, in_epoch: int) -> None:
        super().__init__()
        self._in_epoch = in_epoch

    def advance(self, epoch: int, num_tokens: int) -> None:
        if epoch == self._in_epoch:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_the_best_epoch_so_far(tmp_path: Path) -> None:
    model, progress = LearnableModel(), Interrupted(2)
    blocks = made_up_blocks(model, "learned")
    trained = train(small_training("learned"), learnable_spec(), model.write_pack(tmp_path / "p"), blocks, progress)
    assert trained.result.was_interrupted
    assert trained.result.epochs == 2
    assert trained.result.measured.loss == min(epoch.loss for epoch in progress.epochs)


def test_ctrl_c_before_the_first_epoch_ends_all(tmp_path: Path) -> None:
    model = LearnableModel()
    blocks = made_up_blocks(model, "learned")
    with pytest.raises(KeyboardInterrupt):
        train(small_training("learned"), learnable_spec(), model.write_pack(tmp_path / "p"), blocks, Interrupted(0))


def test_a_training_that_goes_astray_is_none(tmp_path: Path) -> None:
    model = LearnableModel()
    training = small_training("learned")
    wild = replace(training, fit=replace(training.fit, learning_rate=1e30, epochs=1))
    pack = model.write_pack(tmp_path / "p")
    with pytest.raises(InvalidInput, match="went astray"):
        train(wild, learnable_spec(), pack, made_up_blocks(model, "learned"), SilentProgress())


def test_a_model_whose_routers_are_unknown_is_learned_from_its_routing_alone(tmp_path: Path) -> None:
    model = LearnableModel()
    spec = replace(learnable_spec(), family="afmoe")
    blocks, progress = made_up_blocks(model, "learned"), SilentProgress()
    trained = train(small_training("learned"), spec, model.write_pack(tmp_path / "pack"), blocks, progress)
    assert trained.result.measured.recall_A[0] > popularity_recall(model.block(30, seed=2)) + 0.2
    signature_weights = trained.trainee.tensors()["in.weight"][:, -spec.num_experts :]
    assert not signature_weights.any()


def no_blocks(_split: Split) -> Iterator[TokenBlock]:
    return iter(())


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    pack = LearnableModel().write_pack(tmp_path / "pack")
    for kind in ("learned", "promoe"):
        with pytest.raises(InvalidInput, match="to train on"):
            train(small_training(kind), learnable_spec(), pack, no_blocks, SilentProgress())


def test_nothing_to_measure_on_is_said(tmp_path: Path) -> None:
    model = LearnableModel()
    prompts = model.block(2)
    only_prompts = replace(prompts, is_decode_N=np.zeros_like(prompts.is_decode_N))
    blocks = FixedBlocks(model.block(2), only_prompts)
    with pytest.raises(InvalidInput, match="to measure on"):
        train(small_training("learned"), learnable_spec(), model.write_pack(tmp_path / "p"), blocks, SilentProgress())


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("learned", {"lookaheads": ()}, "at least one"),
        ("learned", {"lookaheads": (1, 1)}, "each once"),
        ("learned", {"lookaheads": (5,)}, "1 to 4"),
        ("promoe", {"lookaheads": (1, 2)}, "for one"),
        ("learned", {"units": 0}, "1 or more"),
        ("learned", {"objective": "l1"}, "allowed for learned: cross_entropy"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: str, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small_training(kind, **changes).check(5)


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="learned, promoe"):
        Training.of("oracle")


@pytest.mark.parametrize("change", [{"epochs": 0}, {"patience": 0}, {"batch_tokens": 0}, {"learning_rate": 0.0}])
def test_a_fit_that_cannot_be_is_refused(change: dict[str, float]) -> None:
    good = FitSettings(1, 1, 1, 1e-3, is_annealed=True, seed=0)
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(good, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["learned", "promoe"])
def test_it_goes_on_from_an_artifact(kind: str, tmp_path: Path) -> None:
    first_fit = replace(small_training(kind).fit, epochs=1, is_annealed=False)
    first, source = train_small(kind, tmp_path, fit=first_fit)
    assert source.artifact is not None
    parent = read_artifact(source.artifact)
    training = replace(Training.from_parent(parent.manifest), fit=replace(first_fit, epochs=2))
    assert (training.lookaheads, training.units, training.objective) == (
        first.training.lookaheads, first.training.units, first.training.objective,
    )  # fmt: skip
    blocks, spec = made_up_blocks(LearnableModel(), kind), learnable_spec()
    trained = train(training, spec, source.pack, blocks, SilentProgress(), parent)
    assert trained.before is not None
    assert trained.before.loss == pytest.approx(first.result.measured.loss, rel=1e-4), "its weights are the parent's"
    assert trained.result.measured.loss < trained.before.loss
    manifest = trained.manifest("n", "4", spec, ("f",))
    assert manifest.parent == f"{kind}-test@3"
    assert manifest.metrics["held_out_loss_of_parent"] == trained.before.loss
    hopeless = replace(training, fit=replace(first_fit, epochs=1, learning_rate=10.0))
    with pytest.raises(InvalidInput, match=f"No epoch is better than {kind}-test@3"):
        train(hopeless, spec, source.pack, blocks, SilentProgress(), parent)


def test_a_kind_that_is_not_trained_is_no_parent(tmp_path: Path) -> None:
    first_fit = replace(small_training("learned").fit, epochs=1)
    _, source = train_small("learned", tmp_path, fit=first_fit)
    assert source.artifact is not None
    manifest = replace(read_artifact(source.artifact).manifest, kind="frequency")
    with pytest.raises(InvalidInput, match="of the kind frequency"):
        Training.from_parent(manifest)


def test_hidden_states_that_were_not_seen_teach_nothing(tmp_path: Path) -> None:
    """Zeros or noise: what stands in their place makes no difference."""
    model = LearnableModel()
    pack = model.write_pack(tmp_path / "pack")
    fit = replace(small_training("learned").fit, epochs=2)
    weights = []
    for filling in (0, 0x4000):
        whole, held_out = model.block(20, seed=1), model.block(10, seed=2)
        seen_SN = np.ones(whole.hidden_SND.shape[:2], np.bool_)
        seen_SN[[1, 3]] = False
        hidden_SND = np.where(seen_SN[..., None], whole.hidden_SND, np.uint16(filling))
        blocks = FixedBlocks(replace(whole, hidden_SND=hidden_SND, seen_SN=seen_SN), held_out)
        trained = train(small_training("learned", fit=fit), learnable_spec(), pack, blocks, SilentProgress())
        weights.append(trained.trainee.tensors())
    for name, values in weights[0].items():
        np.testing.assert_array_equal(values, weights[1][name])


@pytest.mark.parametrize("bound", [{"max_steps": 3}, {"max_s": 1e-6}])
def test_steps_and_time_are_bounded(bound: dict[str, float], tmp_path: Path) -> None:
    model, progress = LearnableModel(), SilentProgress()
    fit = replace(small_training("learned").fit, batch_tokens=16, **bound)  # type: ignore[arg-type]
    blocks = made_up_blocks(model, "learned", documents=20)
    pack = model.write_pack(tmp_path / "pack")
    trained = train(small_training("learned", fit=fit), learnable_spec(), pack, blocks, progress)
    assert trained.result.epochs == 1
    assert progress.num_tokens == 16 * bound.get("max_steps", 1)
