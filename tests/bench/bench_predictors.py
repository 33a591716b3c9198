"""How good every predictor is on held-out chats, by lookahead; what a prediction costs; how large the artifacts are.

The node is recorded while it answers prompts that the packaged predictors were not trained on; then the recorded
observations are played to each predictor through the interface that serves them, and its hints are held against the
recorded routing. Hints for the next step's first layers are told apart.
Goal: recall@k at lookahead 2 above 0.85.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

# Before numpy is imported, as the service has it: one thread.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

from predictor_service.evaluation.quality import Evaluation, PredictorQuality
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


def measure(trace: TraceReader, source: PredictorSource) -> dict[str, object]:
    """Every predictor at every lookahead that it has."""
    measured: dict[str, object] = {}
    for name in PREDICTORS:
        qualities = list(_qualities(name, trace, source))
        artifact = packaged_artifact(source.spec.fingerprint, name)
        rows = [asdict(row) for quality in qualities for row in quality.lookaheads if not row.is_next_step]
        measured[name] = {
            "version": qualities[0].version,
            "rows": rows,
            "next_step_rows": [asdict(row) for quality in qualities for row in quality.lookaheads if row.is_next_step],
            "artifact_bytes": None if artifact is None else artifact.stat().st_size,
            "all_lookaheads_median_s": _cost(name, trace, source),
            "median_observe_s": [quality.median_observe_s for quality in qualities],
            "p99_observe_s": [quality.p99_observe_s for quality in qualities],
        }
        print(_line(name, rows, measured[name]))
    return measured


def _qualities(name: str, trace: TraceReader, source: PredictorSource) -> Iterator[PredictorQuality]:
    for lookahead in LOOKAHEADS:
        try:
            predictor = make_predictor(name, replace(source, lookahead=lookahead))
        except SettingUnfit:
            continue  # it was not trained for this one
        evaluation = Evaluation(predictor)
        evaluation.play(trace)
        quality = evaluation.quality()
        # What promoe's last output predicts is at other lookaheads.
        asked = tuple(row for row in quality.lookaheads if row.is_next_step or row.lookahead == lookahead)
        yield replace(quality, lookaheads=asked)


def _cost(name: str, trace: TraceReader, source: PredictorSource) -> float:
    """Of an observation with the hints of all the lookaheads that the predictor serves."""
    evaluation = Evaluation(make_predictor(name, source))
    evaluation.play(trace)
    return evaluation.quality().median_observe_s


def _line(name: str, rows: list[dict[str, object]], entry: object) -> str:
    assert isinstance(entry, dict), "made above"
    recalls = "  ".join(f"{row['lookahead']}: {row['recall']:.3f}/{row['recall_wide']:.3f}" for row in rows)
    size = entry["artifact_bytes"]
    stored = "" if size is None else f", {size / 1e6:.2f} MB"
    return f"  {name:10} {recalls or 'no hints':60} {entry['all_lookaheads_median_s'] * 1e6:6.0f} µs{stored}"


def main() -> None:
    """Prints the table, writes the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
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
