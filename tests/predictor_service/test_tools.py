"""The command line tools around trained predictors: evaluation, hints and show, from files to files."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from predictor_service.evaluation import __main__ as evaluation
from predictor_service.hints import __main__ as hints
from predictor_service.show import main as show
from promoe.pack_manifest import PackManifest
from promoe.trace_events import HintEvent
from promoe.trace_file import TraceReader
from tests.predictor_service.made_up_traces import LAYERS, LearnableModel, learnable_spec
from tests.predictor_service.trained import train_small
from tests.promoe.specs import manifest_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run.trace`, `pack` and `artifact.safetensors` of one model."""
    folder = tmp_path_factory.mktemp("tools")
    train_small("learned", folder)
    manifest_of(learnable_spec()).write(folder / "pack")
    LearnableModel().write_trace(folder / "run.trace", documents=3, seed=9)
    return folder


def run(tool: object, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    app = typer.Typer()
    app.command()(tool)  # type: ignore[type-var]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_evaluation_prints_every_predictor_that_fits(folder: Path) -> None:
    status, out, err = run(evaluation.main, str(folder / "run.trace"), "--pack", str(folder / "pack"), "--json")
    assert status == 0
    versions = {quality["version"] for quality in json.loads(out)}
    assert versions == {"frequency@1", "transition@1", "gate_ahead@1"}
    assert "Not learned" in err
    assert "Not promoe" in err


def test_a_trained_predictor_is_better_than_popularity(folder: Path) -> None:
    recalls = {}
    for name, more in (("frequency", []), ("learned", ["--artifact", str(folder / "artifact.safetensors")])):
        status, out, _ = run(
            evaluation.main, str(folder / "run.trace"), "--pack", str(folder / "pack"), "--predictor", name,
            "--lookahead", "2", "--json", *more,
        )  # fmt: skip
        assert status == 0
        (quality,) = json.loads(out)
        recalls[name] = next(row["recall"] for row in quality["lookaheads"] if not row["is_next_step"])
    assert recalls["learned"] > recalls["frequency"] + 0.1


def test_the_table_has_a_row_per_lookahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(
        evaluation.main, str(folder / "run.trace"), "--pack", str(folder / "pack"), "--predictor", "learned",
        "--artifact", str(folder / "artifact.safetensors"),
    )  # fmt: skip
    assert status == 0
    assert out.count("learned-test@3") == 4  # two lookaheads, within the step and across its end


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--predictor", "learned"], "promoe predictor train"),
        (["--predictor", "astrology"], "astrology"),
        (["--predictor", "learned", "--artifact", "none.safetensors"], "none.safetensors"),
    ],
)
def test_what_cannot_be_evaluated_is_said(folder: Path, more: list[str], sentence: str) -> None:
    status, _, err = run(evaluation.main, str(folder / "run.trace"), "--pack", str(folder / "pack"), *more)
    assert status == 1
    assert sentence in err


def test_hints_are_written_into_the_trace(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "hinted.trace"
    status, said, _ = run(
        hints.main, str(folder / "run.trace"), "--pack", str(folder / "pack"), "--predictor", "learned",
        "--artifact", str(folder / "artifact.safetensors"), "--lookahead", "2", "--out", str(out),
    )  # fmt: skip
    assert (status, said.strip()) == (0, str(out))
    before, after = TraceReader(folder / "run.trace"), TraceReader(out)
    assert after.header == before.header
    assert after.summary.is_complete
    hinted = [event for event in after if isinstance(event, HintEvent)]
    assert after.summary.num_events == before.summary.num_events + len(hinted)
    assert {event.hint.version for event in hinted} == {"learned-test@3"}
    assert {(event.hint.layer - event.hint.observed_layer) % LAYERS for event in hinted} == {2}


def test_a_trace_is_not_written_onto_itself(folder: Path) -> None:
    content = (folder / "run.trace").read_bytes()
    status, _, err = run(
        hints.main, str(folder / "run.trace"), "--pack", str(folder / "pack"), "--predictor", "frequency",
        "--out", str(folder / "run.trace"),
    )  # fmt: skip
    assert status == 1
    assert "trace itself" in err
    assert (folder / "run.trace").read_bytes() == content


def test_show_prints_the_manifest(folder: Path) -> None:
    artifact = folder / "artifact.safetensors"
    status, out, _ = run(show, str(artifact), "--json")
    assert status == 0
    manifest = json.loads(out)
    assert manifest["kind"] == "learned"
    assert manifest["bytes"] == artifact.stat().st_size
    status, text, _ = run(show, str(artifact))
    assert status == 0
    assert f"fingerprints: {PackManifest.read(folder / 'pack').spec.fingerprint}" in text
    assert "recall_at_k_lookahead_2" in text


def test_show_refuses_what_is_damaged(folder: Path, tmp_path: Path) -> None:
    content = np.frombuffer((folder / "artifact.safetensors").read_bytes(), np.uint8).copy()
    content[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(content.tobytes())
    status, _, err = run(show, str(tmp_path / "a.safetensors"))
    assert status == 1
    assert "checksum differs" in err
