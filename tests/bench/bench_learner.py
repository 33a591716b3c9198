"""What a learner that trains costs the hints: their latency with it and without, in turns.

Two predictor services of the demo model, one with a learner and one without, and a node's side that shows each of them
recorded steps over packets, as fast as the layers of a model would be. A round has a stretch of each kind:

    without     the service that has no learner: what it is compared with
    paused      the service with one, which listens and does nothing
    training    the same, in the middle of a training that was asked for

A hint's latency is from its observation's handing over to its being found, by the engine thread that looks all the
time. Goal: with the learner training the 99th percentile, over the hints of all rounds, is at most 1.2 times that
without. Of a single round it is a matter of some 70 hints, and of who else was awake on the machine.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from promoe.pack_manifest import PackManifest
from promoe.predictor_admin import PredictorAdmin
from promoe.predictor_versions import LearnerState
from tests.bench.demo_model import demo_checkpoint, demo_pack
from tests.bench.report import Sample, median_ratio, out_argument, write_report
from tests.bench.shown_node import ShownNode, shown_node
from tests.bench.text_routing import RoutedText, TextRouting, prose
from tests.running_predictor import RunningPredictor
from tests.running_store import wait_until

GOAL: Final = 1.2
WHO: Final = "make bench-learner"
WITHOUT: Final = "without"
PAUSED: Final = "paused"
TRAINING: Final = "training"
KINDS: Final = (WITHOUT, PAUSED, TRAINING)

_GATHERING_LAYER_S: Final = 0.2e-3
_BEGIN_S: Final = 120.0
_GATHER_S: Final = 300.0
_SETTLE_S: Final = 1.0
"""Between two stretches: what a pause or its end sets going is over then."""


class Services:
    """Both of them, and a node at each.

    Args:
        folder: of their sockets and logs.
        texts: what is shown to both, over and over.
        settings: of the learner, `learner.key=value`.
    """

    def __init__(self, stack: ExitStack, folder: Path, texts: list[RoutedText], settings: list[str]) -> None:
        pack = demo_pack()
        spec = PackManifest.read(pack).spec
        self._texts = texts
        self._next_step = {WITHOUT: 1, TRAINING: 1}
        self._ended: dict[str, tuple[str, ...]] = {WITHOUT: (), TRAINING: ()}
        self._nodes: dict[str, ShownNode] = {}
        services: dict[str, RunningPredictor] = {}
        # It trains when it is told to, and is not done before this is.
        learner = ["learner.enabled=true", "learner.min_documents=1000000", "learner.max_train_s=3600", *settings]
        for name, more in ((WITHOUT, []), (TRAINING, [f"predictor.registry={folder / 'registry'}", *learner])):
            (folder / name).mkdir()
            services[name] = stack.enter_context(RunningPredictor(pack, folder / name, *more))
            services[name].wait_until_serving(_BEGIN_S)
            self._nodes[name] = stack.enter_context(shown_node(services[name].endpoint, spec))
        self.admin = PredictorAdmin(services[TRAINING].endpoint)
        self._learner = _learner_of(psutil.Process(services[TRAINING].process.pid))

    def begin_training(self) -> None:
        """Shows texts to the service with the learner until it holds as many documents, and lets it train."""
        begin_s = time.perf_counter()
        for text in cycle(self._texts):  # what it is shown before its process listens is lost
            self._show(TRAINING, iter([text]), _GATHERING_LAYER_S)
            if self.admin.learner().documents >= len(self._texts):
                break
            if time.perf_counter() - begin_s > _GATHER_S:
                raise SystemExit(f"The learner holds {self.admin.learner().documents} documents: it is not heard.")
        assert self.admin.train(WHO, "to see what it costs"), "it does nothing else"
        cpu_s = self._cpu_s()
        wait_until(lambda: self._cpu_s() - cpu_s > 2 * _SETTLE_S, _BEGIN_S)  # torch is loaded, steps are taken

    def stretch(self, kind: str, num_texts: int, layer_s: float) -> tuple[list[float], float]:
        """Latencies of the hints for so many texts, and the learner's share of a core meanwhile."""
        self.admin.pause_learner(kind != TRAINING, WHO)
        time.sleep(_SETTLE_S)
        begin_s, cpu_s = time.perf_counter(), self._cpu_s()
        latencies = self._show(WITHOUT if kind == WITHOUT else TRAINING, islice(cycle(self._texts), num_texts), layer_s)
        share = (self._cpu_s() - cpu_s) / (time.perf_counter() - begin_s)
        if self.admin.learner().state is not LearnerState.TRAINING:
            raise SystemExit(f"The training is over ({self.admin.learner().news}): give more --documents.")
        return latencies, share

    def _show(self, name: str, texts: Iterator[RoutedText], layer_s: float) -> list[float]:
        latencies: list[float] = []
        for text in texts:
            steps = text.steps(self._next_step[name], self._ended[name])
            self._next_step[name] += len(steps)
            self._ended[name] = (text.name,)
            latencies += self._nodes[name].show(steps, layer_s)
        return latencies

    def _cpu_s(self) -> float:
        times = self._learner.cpu_times()
        return float(times.user + times.system)


def _learner_of(service: psutil.Process) -> psutil.Process:
    """The service's child, once it is there."""

    def children() -> list[psutil.Process]:
        return [child for child in service.children() if "predictor_service.learner" in child.cmdline()]

    wait_until(lambda: bool(children()), _BEGIN_S)
    return children()[0]


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Who is first changes from round to round."""
    texts = TextRouting(demo_checkpoint(), demo_pack(), PackManifest.read(demo_pack()).spec, options.tokens)
    documents = list(texts.documents(prose(), "prose", options.documents))
    del texts
    all_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    p99_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    median_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder, ExitStack() as stack:
        services = Services(stack, Path(folder), documents, options.set)
        services.begin_training()
        for number in range(options.rounds):
            for kind in (*KINDS[number % 3 :], *KINDS[: number % 3]):
                latencies, share = services.stretch(kind, options.texts, options.layer_ms / 1e3)
                all_s[kind] += latencies
                p99_s[kind].append(float(np.percentile(latencies, 99)))
                median_s[kind].append(float(np.median(latencies)))
                shares[kind].append(share)
                print(
                    f"  round {number + 1} {kind:8}: p99 {p99_s[kind][-1] * 1e3:.3f} ms, median "
                    f"{median_s[kind][-1] * 1e3:.3f} ms, learner {share:.0%} of a core, {len(latencies)} hints",
                    flush=True,
                )
    overall_s = {kind: float(np.percentile(latencies, 99)) for kind, latencies in all_s.items()}
    ratios = {kind: overall_s[kind] / overall_s[WITHOUT] for kind in (PAUSED, TRAINING)}
    return {
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "num_hints": {kind: len(latencies) for kind, latencies in all_s.items()},
        "p99_of_all_s": overall_s,
        "p99_s": {kind: Sample(tuple(values)).as_dict() for kind, values in p99_s.items()},
        "median_s": {kind: Sample(tuple(values)).as_dict() for kind, values in median_s.items()},
        "learner_share_of_a_core": {kind: Sample(tuple(values)).as_dict() for kind, values in shares.items()},
        "p99_of_all_ratio_to_without": ratios,
        "median_of_rounds_p99_ratio_to_without": {
            kind: median_ratio(p99_s[kind], p99_s[WITHOUT]) for kind in (PAUSED, TRAINING)
        },
        "median_ratio_to_without": {
            kind: median_ratio(median_s[kind], median_s[WITHOUT]) for kind in (PAUSED, TRAINING)
        },
        "goal": GOAL,
        "met": ratios[TRAINING] <= GOAL,
    }


def main() -> None:
    """Prints the stretches and the ratio, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--documents", type=int, default=160, help="to train on")
    parser.add_argument("--tokens", type=int, default=64, help="of a document")
    parser.add_argument("--texts", type=int, default=4, help="of a stretch")
    parser.add_argument("--layer-ms", type=float, default=1.0, help="of the model that is served")
    parser.add_argument("--set", action="append", default=[], metavar="learner.KEY=VALUE", help="of the learner")
    out_argument(parser)
    options = parser.parse_args()
    measured = measure(options)
    ratios = measured["p99_of_all_ratio_to_without"]
    assert isinstance(ratios, dict), "by kind"
    print(
        f"Hint latency p99 with the learner training: {ratios[TRAINING]:.3f} times that without one (goal {GOAL}); "
        f"paused: {ratios[PAUSED]:.3f}."
    )
    print(f"Written: {write_report('learner', measured, options.out)}")


if __name__ == "__main__":
    main()
