"""The command: exit status, streams, and what a person reads."""

import io
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from expert_store.pack.__main__ import main
from expert_store.pack.progress_display import BarProgress, LineProgress
from promoe.pack_manifest import layer_file
from tests.families import save_tiny_checkpoint

app = typer.Typer()
app.command()(main)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("models") / "tiny", torch.float32)


def test_packing_and_checking(model: Path, tmp_path: Path) -> None:
    pack_dir = tmp_path / "pack"
    packed = CliRunner().invoke(app, [str(model), str(pack_dir), "--dtype", "bfloat16"])
    assert (packed.exit_code, packed.stdout) == (0, f"{pack_dir}\n")
    assert "Packing tiny: 3 layers" in packed.stderr
    assert "3 MoE layers of 8 experts" in packed.stderr
    assert "bfloat16" in packed.stderr

    checked = CliRunner().invoke(app, ["--verify", str(pack_dir)])
    assert (checked.exit_code, checked.stdout) == (0, f"{pack_dir}\n")

    path = layer_file(pack_dir, 1)
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    damaged = CliRunner().invoke(app, ["--verify", str(pack_dir)])
    assert (damaged.exit_code, damaged.stdout) == (1, "")
    assert "L1E0 in layer_00001.bin" in damaged.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such/model", "pack"], "error: There is no folder /no/such/model"),
        ([], "error: Give a model and a folder"),
        (["model"], "error: Give a model and a folder"),
        (["model", "--verify", "pack"], "error: --verify DIR takes neither"),
    ],
)
def test_errors_are_a_sentence_and_status_1(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert said in done.stderr


def test_an_interrupt_says_how_to_go_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: LineProgress) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LineProgress, "finish_layer", interrupted)
        stopped = CliRunner().invoke(app, [str(model), str(tmp_path / "pack")])
    assert stopped.exit_code == 130
    assert "run the same command again" in stopped.stderr
    again = CliRunner().invoke(app, [str(model), str(tmp_path / "pack")])
    assert again.exit_code == 0
    assert "Checking what is already packed" in again.stderr


def test_lines_come_at_tenths_and_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: clock_s)
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.begin("Packing x", 1000, 4)
    for step in range(100):
        clock_s = step / 10
        progress.advance(10)
        if step % 25 == 24:
            progress.finish_layer()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Packing x: 4 layers, 0.00 GB"
    assert len(lines) == 11
    assert lines[-1].startswith("Packing x: 100 %, 3 of 4 layers")
    for _ in range(100):
        progress.advance(10)
    assert len(stream.getvalue().splitlines()) == 11, "no more than two lines a second"
    progress.note("A sentence.")
    assert stream.getvalue().endswith("A sentence.\n")


def test_bars_show_layers_and_reach_the_end() -> None:
    stream = io.StringIO()
    bars = Progress(console=Console(file=stream, force_terminal=True))
    progress = BarProgress(bars)
    for title in ("Checking", "Packing"):
        progress.begin(title, 100, 2)
        progress.advance(60)
        progress.finish_layer()
        progress.advance(40)
        progress.finish_layer()
    progress.note("[not markup]")
    assert bars.finished
    assert [(task.description, task.fields["layers"]) for task in bars.tasks] == [("Checking", 2), ("Packing", 2)]
    assert "[not markup]" in stream.getvalue()
