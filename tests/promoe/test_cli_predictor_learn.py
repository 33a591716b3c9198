"""What the learner does is told in a few lines; what contradicts itself is a usage error."""

import os
import subprocess
import sys
from pathlib import Path

from promoe.cli.predictor_learn import learner_lines
from promoe.predictor_versions import LearnerReport, LearnerState, VersionMetric
from tests.packs import write_synthetic_pack
from tests.running_predictor import RunningPredictor

PROMOE = [sys.executable, "-c", "from promoe.cli.app import main; main()", "predictor", "learn"]


def learn(run_dir: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PROMOE_RUN_DIR": str(run_dir), "COLUMNS": "120"}
    return subprocess.run(
        [*PROMOE, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=120
    )


def test_what_is_held_and_how_a_judgement_stands_is_told() -> None:
    report = LearnerReport(
        LearnerState.SHADOWING, paused=True, documents=7, tokens=300, size_bytes=2 << 20, oldest_s=90.0,
        progress=(VersionMetric("gain", 0.0125), VersionMetric("e_value", 3.0)), news="a@2.1 looks on.",
    )  # fmt: skip
    assert learner_lines(report).plain.splitlines() == [
        "shadowing, paused",
        "a@2.1 looks on.",
        "7 requests are held: 300 tokens, 2.00 MiB, the oldest from 90.0 s ago.",
        "gain 0.0125, e_value 3",
    ]


def test_what_would_decide_a_judgement_is_told_in_words() -> None:
    numbers = {"documents": 57.0, "gain": 0.0125, "gain_at_least": -0.003, "e_value": 12.34, "e_value_needed": 100.0,
               "give_up_e_value": 0.2, "give_up_e_value_needed": 10.0}  # fmt: skip
    progress = tuple(VersionMetric(name, value) for name, value in numbers.items())
    told = (
        " was compared on 57 requests: its recall differs by +0.0125 (-0.0030 or more is all but sure). "
        "Evidence that it is better: 12.3 of 100; that it is not: 0.2 of 10."
    )
    for state, who in ((LearnerState.SHADOWING, "The candidate"), (LearnerState.WATCHING, "The version before")):
        assert learner_lines(LearnerReport(state, progress=progress)).plain.splitlines()[-1] == who + told


def test_what_is_off_holds_nothing() -> None:
    assert learner_lines(LearnerReport(LearnerState.OFF, news="It is off.")).plain == "off\nIt is off."


def test_a_service_that_does_not_learn_is_told_so(socket_dir: Path) -> None:
    write_synthetic_pack(socket_dir / "pack", layers=5)
    with RunningPredictor(socket_dir / "pack", socket_dir) as service:
        service.wait_until_serving()
        assert learn(socket_dir).stdout.startswith("off\nThis service does not learn")
        refused = learn(socket_dir, "--now")
        assert (refused.returncode, "does not learn" in refused.stderr) == (1, True)
    contradiction = learn(socket_dir, "--now", "--pause")
    assert contradiction.returncode == 2
    assert "Say one of --now, --pause and --resume." in contradiction.stderr
