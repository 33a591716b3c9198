"""How good every predictor is on held-out chats, by lookahead; what a prediction costs; how large the artifacts are.

The node is recorded while it answers prompts that the packaged predictors were not trained on; then the recorded
observations are played to each predictor through the interface that serves them, and its hints are held against the
recorded routing. Hints for the next step's first layers are told apart.
Goal: recall@k at lookahead 2 above 0.85.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

# Before numpy is imported, as the service has it: one thread.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

from predictor_service.evaluation.quality import Evaluation, play
from predictor_service.packaged import packaged_artifact
from predictor_service.plugins import make_predictor
from predictor_service.predictor import PredictorSource
from predictor_service.trace_playback import recorded_steps
from promoe.config import SettingUnfit
from promoe.pack_manifest import PackManifest
from promoe.trace_file import TraceReader
from tests.bench.demo_model import demo_pack
from tests.bench.held_out_chats import held_out_prompts, record_chats
from tests.bench.predictors_plot import plot_predictors
from tests.bench.report import out_argument, write_report

GOAL: Final = 0.85
GOAL_LOOKAHEAD: Final = 2
LOOKAHEADS: Final = (1, 2, 3, 4)
PREDICTORS: Final = ("none", "frequency", "transition", "gate_ahead", "promoe", "learned")


@dataclass(frozen=True)
class Contestant:
    """One predictor at one lookahead, or (`lookahead` None) at all that it serves: what that costs."""

    name: str
    lookahead: int | None
    evaluation: Evaluation


def measure(trace: TraceReader, source: PredictorSource) -> dict[str, object]:
    """Every predictor at every lookahead that it has; all see each step one after the other."""
    contestants = [contestant for name in PREDICTORS for contestant in _contestants(name, source)]
    play(trace, [contestant.evaluation for contestant in contestants])
    measured: dict[str, object] = {}
    for name in PREDICTORS:
        entry = _entry(name, [each for each in contestants if each.name == name], source)
        measured[name] = entry
        print(_line(name, entry))
    return measured


def _contestants(name: str, source: PredictorSource) -> Iterator[Contestant]:
    for lookahead in (None, *LOOKAHEADS):
        try:
            predictor = make_predictor(name, replace(source, lookahead=lookahead))
        except SettingUnfit:
            continue  # it was not trained for this one
        yield Contestant(name, lookahead, Evaluation(predictor))


def _entry(name: str, contestants: Sequence[Contestant], source: PredictorSource) -> dict[str, object]:
    rows: list[dict[str, object]] = []
    next_step_rows: list[dict[str, object]] = []
    cost: dict[str, float] = {}
    for contestant in contestants:
        quality = contestant.evaluation.quality()
        key = "all" if contestant.lookahead is None else str(contestant.lookahead)
        cost[key] = quality.median_observe_s
        if contestant.lookahead is None:
            continue
        for row in quality.lookaheads:
            if row.is_next_step:
                next_step_rows.append(asdict(row))
            elif row.lookahead == contestant.lookahead:
                rows.append(asdict(row))
    artifact = packaged_artifact(source.spec.fingerprint, name)
    return {
        "version": contestants[0].evaluation.quality().version,
        "rows": rows,
        "next_step_rows": next_step_rows,
        "artifact_bytes": None if artifact is None else artifact.stat().st_size,
        "median_observe_s_by_lookahead": cost,
    }


def _line(name: str, entry: dict[str, object]) -> str:
    rows, cost, size = entry["rows"], entry["median_observe_s_by_lookahead"], entry["artifact_bytes"]
    assert isinstance(rows, list), "made above"
    assert isinstance(cost, dict), "made above"
    recalls = "  ".join(f"{row['lookahead']}: {row['recall']:.3f}/{row['recall_wide']:.3f}" for row in rows)
    stored = f", {size / 1e6:.2f} MB" if isinstance(size, int) else ""
    return f"  {name:10} {recalls or 'no hints':60} {cost['all'] * 1e6:6.0f} µs{stored}"


def main() -> None:
    """Prints the table, writes the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--trace", type=Path, help="a recorded trace of held-out chats; default: record one")
    out_argument(parser)
    options = parser.parse_args()
    pack_dir = demo_pack()
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        path = options.trace or Path(folder) / "chats.trace"
        if options.trace is None:
            record_chats(pack_dir, held_out_prompts()[: options.chats], options.tokens, path)
        trace = TraceReader(path)
        decoded = [step for step in recorded_steps(trace, hidden=False) if not step.is_prefill]
        documents = {span.request_id for step in decoded for span in step.start.spans}
        predictors = measure(trace, PredictorSource(PackManifest.read(pack_dir).spec, pack_dir))
    recall = _goal_recall(predictors)
    print(f"learned at lookahead {GOAL_LOOKAHEAD}: {recall:.3f} (goal {GOAL})")
    report = write_report(
        "predictors",
        {
            "documents": len(documents),
            "tokens": len(decoded),
            "recorded": options.trace is None,
            "goal": GOAL,
            "goal_recall": recall,
            "met": recall > GOAL,
            "predictors": predictors,
        },
        options.out,
    )
    plot_predictors(report, report.with_suffix(".png"))
    print(f"Written: {report}")


def _goal_recall(predictors: dict[str, object]) -> float:
    entry = predictors["learned"]
    assert isinstance(entry, dict), "made above"
    return next(float(row["recall"]) for row in entry["rows"] if row["lookahead"] == GOAL_LOOKAHEAD)


if __name__ == "__main__":
    main()
