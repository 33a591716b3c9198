"""`python -m predictor_service.training`: a trace becomes an artifact that serves; what cannot be is refused."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from predictor_service.artifact import read_artifact
from predictor_service.predictor import PredictorSource
from predictor_service.predictors.learned import LearnedPredictor
from predictor_service.predictors.promoe import PromoePredictor
from predictor_service.training import __main__ as training
from promoe.pack_manifest import PackManifest
from tests.predictor_service.made_up_traces import LearnableModel, learnable_spec
from tests.promoe.specs import manifest_of
from tests.source_tree import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace and the pack of its model."""
    folder = tmp_path_factory.mktemp("training")
    model = LearnableModel()
    model.write_trace(folder / "run.trace", documents=40)
    manifest_of(learnable_spec()).write(model.write_pack(folder / "pack"))
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [str(folder / "run.trace"), "--pack", str(folder / "pack"), "--out", str(out), "--units", "16", *more]


def test_a_trace_becomes_a_predictor(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "learned.safetensors"
    status = training.main(
        arguments(
            folder, out, "--lookahead", "1", "--lookahead", "2", "--epochs", "2", "--also-fits", "ab", "--name", "n"
        )
    )
    assert status == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out)
    assert "epoch 2: held-out loss" in said.err
    manifest = read_artifact(out).manifest
    assert manifest.fingerprints == ("0badcafe", "ab")
    assert manifest.training["traces"] == "run.trace"
    assert manifest.metrics["held_out_tokens"] > 0
    spec = PackManifest.read(folder / "pack").spec
    predictor = LearnedPredictor(PredictorSource(spec, folder / "pack", out))
    assert predictor.version.version == "n@1"
    assert predictor.version.lookaheads == (1, 2)


def test_promoe_is_trained_from_layer_inputs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "promoe.safetensors"
    assert training.main(arguments(folder, out, "--kind", "promoe", "--epochs", "1", "--version", "7")) == 0
    spec = PackManifest.read(folder / "pack").spec
    assert PromoePredictor(PredictorSource(spec, folder / "pack", out)).version.version == "promoe-made up@7"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--lookahead", "9"], "lookaheads are"),
        (["--kind", "promoe", "--lookahead", "1", "--lookahead", "2"], "trained for one"),
        (["--epochs", "-1"], "epochs is -1"),
        (["--units", "-3"], "units is -3"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Path, tmp_path: Path, change: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(arguments(folder, tmp_path / "a.safetensors", *change)) == 1
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [["--held-out", "1"], ["--kind", "oracle"], ["--epochs", "many"]])
def test_wrong_usage_ends_with_2(folder: Path, tmp_path: Path, change: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        training.main(arguments(folder, tmp_path / "a.safetensors", *change))
    assert caught.value.code == 2


def test_a_trace_of_another_model_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = LearnableModel().write_pack(tmp_path / "pack")
    manifest_of(replace(learnable_spec(), fingerprint="deadbeef")).write(pack)
    status = training.main([str(folder / "run.trace"), "--pack", str(pack), "--out", str(tmp_path / "a.safetensors")])
    assert status == 1
    said = capsys.readouterr().err
    assert "0badcafe" in said
    assert "deadbeef" in said
    assert not (tmp_path / "a.safetensors").exists()


def test_ctrl_c_leaves_the_best_epoch_or_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    command = [sys.executable, "-m", "predictor_service.training", *arguments(folder, out, "--epochs", "100000")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("epoch 1:")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130), errors
    assert output.strip() == str(out)
    assert read_artifact(out).manifest.training["epochs"] >= 1  # type: ignore[operator]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_training_goes_on_from_an_artifact(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    assert training.main(arguments(folder, first, "--lookahead", "1", "--epochs", "1", "--name", "n")) == 0
    more = ("--from", str(first), "--version", "2", "--epochs", "2")
    assert training.main(arguments(folder, second, *more)) == 0
    manifest = read_artifact(second).manifest
    assert (manifest.name, manifest.version, manifest.parent) == ("n", "2", "n@1")
    assert manifest.lookaheads == (1,)
    capsys.readouterr()
    for wrong, sentence in (
        (("--from", str(first), "--version", "2", "--lookahead", "2"), "--lookahead is"),
        (("--from", str(first), "--version", "2", "--kind", "promoe"), "--kind is"),
        (("--from", str(first)), "--version is 1"),
        (("--from", str(folder / "run.trace"), "--version", "2"), "damaged"),
    ):
        assert training.main(arguments(folder, tmp_path / "3.safetensors", *wrong)) == 1
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "3.safetensors").exists()
