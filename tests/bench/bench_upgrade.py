"""Predictors are changed under load: shadow, canary, activation, rollback, a second process that takes over and dies.

Eight streams answer in rounds; in every second round something is changed while they decode, the others are quiet and
are what it is compared with. Tokens must be those of the quiet rounds, no stream may be interrupted, and the time per
token (TPOT) at the 99th percentile should be at most 1.05 times the quiet rounds'. `make demo-upgrade` runs this once
through and draws GoodPred over time, with the changes marked.

What is tried and activated is `retrained`, a published version with the weights of the one before: what is measured
then is what changing costs. `--candidate gate_ahead` (the demo's) predicts worse and is shown every layer: the picture
tells them apart, and rounds with it are slower for that.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from expert_store.pack.packer import pack_checkpoint
from predictor_service.artifact import SUFFIX, read_artifact, write_artifact
from predictor_service.registry import Registry
from promoe import Client
from promoe.model_spec import Dtype
from promoe.node_admin import NodeAdmin
from promoe.node_report import PredictorState
from promoe.predictor_admin import PredictorAdmin
from tests.bench.demo_model import CACHE, PROMPTS, demo_checkpoint
from tests.bench.report import RESULTS, out_argument, write_report
from tests.bench.upgrade_load import HintWatch, RoundFigures, run_round, watching
from tests.running_node import RunningNode
from tests.running_predictor import RunningPredictor
from tests.running_store import RunningStore, wait_until

GOAL: Final = 1.05
NUM_STREAMS: Final = 8
WHO: Final = "make demo-upgrade"
RETRAINED: Final = "retrained"
GATE_AHEAD: Final = "gate_ahead"


@dataclass(frozen=True)
class Change:
    """Something that an operator does, by its name."""

    name: str
    make: Callable[[], object]


@dataclass(frozen=True)
class Marked:
    """When a change was asked for, and how long the call took."""

    name: str
    at_s: float
    took_s: float


class Stage:
    """The processes, and what is done to them.

    Args:
        folder: of their sockets and logs.
        cache_rate: of the node.
        candidate: what is tried and activated.
    """

    def __init__(self, stack: ExitStack, folder: Path, cache_rate: float, candidate: str) -> None:
        pack_dir = CACHE / "pack_float32"
        # Sums of float32 hold still while the others of a batch come and go.
        pack_checkpoint(demo_checkpoint(), pack_dir, dtype=Dtype.FLOAT32)
        (folder / "blue").mkdir()
        self._stack, self._folder, self._pack_dir = stack, folder, pack_dir
        self._registry = registry = f"predictor.registry={folder / 'registry'}"
        self._candidate = _republished(folder) if candidate == RETRAINED else candidate
        self.blue = stack.enter_context(RunningPredictor(pack_dir, folder / "blue", registry))
        store = stack.enter_context(RunningStore(pack_dir, folder))
        settings = (
            f"compute.predictor_endpoint={self.blue.endpoint}",
            f"compute.cache_rate={cache_rate}",
            "compute.max_context_tokens=512",
        )
        self.node = stack.enter_context(RunningNode(pack_dir, store.endpoint, folder, *settings))
        self.admin = PredictorAdmin(self.blue.endpoint)
        self.client = stack.enter_context(Client(self.node.endpoint()))
        wait_until(lambda: self.client.info().predictor.state is PredictorState.CONNECTED, 60)

    def changes(self, cycle: int) -> list[Change]:
        """In the order of a careful operator; the last one is bad luck, of a second service that is started now."""
        admin, node, name = self.admin, NodeAdmin(self.node.endpoint()), self._candidate
        folder = self._folder / f"green{cycle}"
        folder.mkdir()
        green = self._stack.enter_context(RunningPredictor(self._pack_dir, folder, self._registry))
        green.wait_until_serving()
        return [
            Change(f"shadow {name}", lambda: admin.set_shadow(name, WHO, "to compare")),
            Change(f"canary {name} 30 %", lambda: admin.activate(name, WHO, "to try", canary_share=0.3)),
            Change(f"activate {name}", lambda: admin.activate(name, WHO, "to see it alone")),
            Change("rollback", lambda: admin.rollback(WHO, "to go back")),
            Change("connect green", lambda: node.connect_predictor(green.endpoint, WHO, "another process")),
            Change("kill green", green.kill),
        ]


def _republished(folder: Path) -> str:
    """The packaged artifact, published as another version; its name."""
    with as_file(files("predictor_service") / "artifacts" / "learned-demo.safetensors") as path:
        packaged = read_artifact(path)
    again = folder / f"again{SUFFIX}"
    write_artifact(again, replace(packaged.manifest, name=RETRAINED, version="1"), packaged.tensors)
    return str(Registry(folder / "registry").publish(again).name)


def run(
    stage: Stage, cycles: int, num_tokens: int, began_s: float
) -> tuple[list[RoundFigures], list[RoundFigures], list[Marked]]:
    """Quiet rounds and rounds with a change, in turns; the streams keep their prompts."""
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(NUM_STREAMS)]
    quiet: list[RoundFigures] = []
    changed: list[RoundFigures] = []
    marks: list[Marked] = []
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(stage.node.endpoint())) for _ in range(NUM_STREAMS)]
        run_round(clients, prompts, num_tokens)  # experts, predictor and threads are warm then
        for cycle in range(cycles):
            for change in stage.changes(cycle):
                quiet.append(run_round(clients, prompts, num_tokens))
                changed.append(
                    _disturbed(lambda: run_round(clients, prompts, num_tokens), stage, change, marks, began_s)
                )
        quiet.append(run_round(clients, prompts, num_tokens))
    return quiet, changed, marks


def _disturbed(
    round_of: Callable[[], RoundFigures], stage: Stage, change: Change, marks: list[Marked], began_s: float
) -> RoundFigures:
    """A round in whose middle something is changed: when all its streams decode."""
    before = stage.client.cache_stats().decode.tokens

    def disturb() -> None:
        wait_until(lambda: stage.client.cache_stats(deadline_s=30).decode.tokens > before + 2 * NUM_STREAMS, 120)
        asked_s = time.perf_counter()
        change.make()
        marks.append(Marked(change.name, asked_s - began_s, time.perf_counter() - asked_s))

    with ThreadPoolExecutor(1) as threads:
        disturbing = threads.submit(disturb)
        figures = round_of()
        disturbing.result()
    return figures


def summarize(quiet: Sequence[RoundFigures], changed: Sequence[RoundFigures]) -> dict[str, object]:
    """What is promised, and what came."""
    oracle = quiet[0].token_ids
    quiet_s = [tpot_s for figures in quiet for tpot_s in figures.tpots_s]
    changed_s = [tpot_s for figures in changed for tpot_s in figures.tpots_s]
    ratio = float(np.percentile(changed_s, 99) / np.percentile(quiet_s, 99))
    return {
        "streams": NUM_STREAMS,
        "interrupted": sum(figures.num_failed for figures in (*quiet, *changed)),
        "answers_with_other_tokens": sum(
            ours != theirs for figures in changed for ours, theirs in zip(figures.token_ids, oracle, strict=True)
        ),
        "quiet_answers_with_other_tokens": sum(
            ours != theirs for figures in quiet for ours, theirs in zip(figures.token_ids, oracle, strict=True)
        ),
        "tpot_p99_s": {"quiet": float(np.percentile(quiet_s, 99)), "changed": float(np.percentile(changed_s, 99))},
        "tpot_median_s": {"quiet": float(np.median(quiet_s)), "changed": float(np.median(changed_s))},
        "tpot_p99_ratio": ratio,
        "tpot_median_s_of_rounds": {
            "quiet": [float(np.median(figures.tpots_s)) for figures in quiet],
            "changed": [float(np.median(figures.tpots_s)) for figures in changed],
        },
        "goal": GOAL,
        "met": ratio <= GOAL,
    }


def plot(points: Sequence[tuple[float, str, float]], marks: Sequence[Marked], picture: Path) -> None:
    """GoodPred of each version's hints as time goes by."""
    figure, axes = plt.subplots(figsize=(11, 4.4), constrained_layout=True)
    for version in dict.fromkeys(version for _, version, _ in points):
        mine = [(at_s, value) for at_s, name, value in points if name == version]
        axes.plot(*zip(*mine, strict=True), ".", markersize=6, label=version)
    for mark in marks:
        axes.axvline(mark.at_s, color="grey", linewidth=0.8)
        axes.text(mark.at_s, 1.02, f" {mark.name}", rotation=25, fontsize=8, va="bottom")
    axes.set(xlabel="seconds", ylabel="GoodPred", ylim=(0, 1.02))
    axes.legend(loc="lower right")
    figure.suptitle(f"{NUM_STREAMS} streams of the demo model while predictors are changed", fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main() -> None:
    """Prints what was promised and what came; writes the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-rate", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument(
        "--cycles", type=int, default=3, help="of six rounds with a change and as many quiet ones (--demo: 1)"
    )
    parser.add_argument("--candidate", help=f"{RETRAINED} (default), or a plug-in's name (--demo: {GATE_AHEAD})")
    parser.add_argument("--demo", action="store_true", help="keep nothing but the picture, in this folder")
    out_argument(parser)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp")))
        candidate = options.candidate or (GATE_AHEAD if options.demo else RETRAINED)
        stage = Stage(stack, folder, options.cache_rate, candidate)
        began_s = time.perf_counter()
        watch: HintWatch = stack.enter_context(watching(stage.client, began_s))
        quiet, changed, marks = run(stage, 1 if options.demo else options.cycles, options.tokens, began_s)
        history = [f"{entry.action.value} {entry.version or entry.after}" for entry in stage.admin.history()]
        connected = stage.client.info().predictor.endpoint == stage.blue.endpoint
    measured = summarize(quiet, changed)
    for mark in marks:
        print(f"  {mark.at_s:6.1f} s  {mark.name} ({mark.took_s * 1e3:.0f} ms)")
    tpots = measured["tpot_p99_s"]
    assert isinstance(tpots, dict), "both kinds of rounds"
    ratio = measured["tpot_p99_ratio"]
    print(
        f"  interrupted {measured['interrupted']}, other tokens {measured['answers_with_other_tokens']}, TPOT p99 "
        f"{tpots['changed'] * 1e3:.0f} ms against {tpots['quiet'] * 1e3:.0f} ms quiet ({ratio:.3f}, goal "
        f"{GOAL}); after the kill the node is {'back' if connected else 'NOT back'} at the first service"
    )
    points = watch.good_pred()
    if not options.demo:
        document = {
            "cache_rate": options.cache_rate, "num_tokens": options.tokens, "candidate": candidate, **measured,
            "history": history, "changes": [vars(mark) for mark in marks], "good_pred": points,
            "back_at_the_first_service": connected,
        }  # fmt: skip
        print(f"Written: {write_report('upgrade', document, options.out)}")
    picture = Path("upgrade.png") if options.demo else RESULTS / "upgrade.png"
    plot(points, marks, picture)
    print(f"Drawn: {picture}")


if __name__ == "__main__":
    main()
