"""Drift: a predictor trained on one kind of text serves another kind, and the learner follows, untouched by hand.

Prose is served to a predictor that was trained on prose, then code, then prose again. Sessions, shadow, judge and the
learner's process are the real ones; the model's router inputs come from plain forward passes, and while a candidate is
trained no document is served, so that a document, not a second, is the unit. Predictors that stay as they are run
beside: the first one, and one that was trained on code.
Goal: in the last quarter of the code at least half of the way from the first predictor to that one.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Final

# Before numpy is imported, as the service has it: one thread.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

from predictor_service.artifact import SUFFIX
from predictor_service.learner import feed_client
from predictor_service.learner.candidate_thread import CandidateProgress
from predictor_service.learner.child import LearnerChild
from predictor_service.learner.conductor import Conductor, LearnerState
from predictor_service.learner.config import LearnerConfig
from predictor_service.learner.control import AskStatus, CandidateTrained, LearnerStatus, Train
from predictor_service.learner.document import Document
from predictor_service.learner.gatherer import Gatherer
from predictor_service.learner.reservoir import DocumentBlocks
from predictor_service.predictor import PredictorSource
from predictor_service.predictors.learned import LearnedPredictor
from predictor_service.shadow.tally import StepComparison
from predictor_service.trace_playback import RecordedStep
from predictor_service.training.candidate import CandidateOrder, train_candidate
from promoe.config import Settings
from promoe.hint import ObservedKind
from promoe.model_spec import ModelSpec
from promoe.pack_manifest import PackManifest
from tests.bench.demo_model import demo_checkpoint, demo_pack
from tests.bench.drift_plot import plot_drift
from tests.bench.report import out_argument, write_report
from tests.bench.text_routing import RoutedText, TextRouting, code, prose
from tests.predictor_service.in_memory_stage import InMemoryStage
from tests.predictor_service.learner_feed import ROUTER_INPUT, step_packets, welcome
from tests.predictor_service.shadow_play import PlayedPredictor

GOAL: Final = 0.5
SESSION: Final = 1
FIRST: Final = "prose@1"
OTHER: Final = "code@1"
_MOST_STEPS: Final = 2000


class ServedModel:
    """The demo model's texts, and predictors trained on them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.pack = demo_pack()
        self.spec: ModelSpec = PackManifest.read(self.pack).spec
        self._num_prose, num_code = options.prose, options.code
        texts = TextRouting(demo_checkpoint(), self.pack, self.spec, options.tokens)
        self._prose = texts.documents(prose(), "prose", options.training + 2 * self._num_prose)
        self._code = texts.documents(code(), "code", options.training + num_code)
        self.first = self._trained("prose", islice(self._prose, options.training))
        self.other = self._trained("code", islice(self._code, options.training))
        self.borders = (self._num_prose, self._num_prose + num_code)

    def served(self) -> Iterator[RoutedText]:
        """Prose, code, and prose again; none of it was trained on."""
        yield from islice(self._prose, self._num_prose)
        yield from self._code
        yield from self._prose

    def predictor(self, path: Path) -> LearnedPredictor:
        return LearnedPredictor(PredictorSource(self.spec, self.pack, path))

    def _trained(self, name: str, texts: Iterator[RoutedText]) -> Path:
        """As `promoe predictor train` does it, from every layer."""
        began_s = time.perf_counter()
        gathered: list[Document] = []
        gatherer = Gatherer(self.spec, 1 << 20, gathered.append)
        gatherer.welcomed(ROUTER_INPUT)
        step = 1
        for text in texts:
            for recorded in text.steps(step):
                step += 1
                for packet in step_packets(SESSION, recorded, ROUTER_INPUT):
                    feed_client.tell(packet, gatherer)
        gatherer.end_session(SESSION)
        order = CandidateOrder(None, name, "1", _MOST_STEPS, 1e6, 1e-3, {"documents": len(gathered)})

        def blocks_of(observed: ObservedKind) -> DocumentBlocks:
            return DocumentBlocks.of(gathered, observed, 0.2, 256 << 20)

        path, metrics = train_candidate(
            order, self.spec, self.pack, blocks_of, self.folder, CandidateProgress(1.0, 1.0)
        )
        print(
            f"{name}@1 from {len(gathered)} documents: loss {metrics['held_out_loss']:.4f}, "
            f"{time.perf_counter() - began_s:.0f} s"
        )
        return path


class BenchStage(InMemoryStage):
    """With the files of versions, and when what was decided."""

    def __init__(self, active: str, path: Path) -> None:
        super().__init__(active)
        self.paths = {active: path}

    def publish(self, path: str) -> str:
        version = Path(path).name.removesuffix(SUFFIX)
        self.paths[version] = Path(path)
        return version

    def set_shadow(self, version: str, who: str, why: str, numbers: Mapping[str, float]) -> None:
        super().set_shadow(version, who, why, numbers)
        print(f"  {why}: {version}")


class Drift:
    """Serves documents one after the other, with the learner beside."""

    def __init__(self, model: ServedModel, config: LearnerConfig, settings: list[str]) -> None:
        self._model = model
        self.stage = BenchStage(FIRST, model.first)
        self.stage.paths[OTHER] = model.other
        self._child = LearnerChild([word for text in settings for word in ("--set", text)], model.folder)
        numbers = count(2)
        self._conductor = Conductor(config, self.stage, self, lambda _: f"learned@{next(numbers)}")
        self._played: dict[str, PlayedPredictor] = {}
        # What a node would show: of layers and rows what the version that serves wants.
        self._shown = model.predictor(model.first).version
        self._next_step = 1
        self._ended: tuple[str, ...] = ()
        self.documents: list[dict[str, float]] = []
        self.decisions: list[dict[str, object]] = []

    def train(self, base: str, name: str) -> None:
        """See Training."""
        print(f"  document {len(self.documents)}: {name} is trained from {base}", flush=True)
        self._child.send(Train(self.stage.paths[base], name))

    def run(self) -> None:
        """All documents."""
        self._send(welcome(SESSION, self._shown))
        for text in self._model.served():
            self._serve(text)
        self._child.close()

    def _serve(self, text: RoutedText) -> None:
        steps = text.steps(self._next_step, self._ended)
        self._next_step, self._ended = self._next_step + len(steps), (text.name,)
        sums = dict.fromkeys(("served", "first", "other"), 0.0)
        for step in steps:
            for packet in step_packets(SESSION, step, self._shown):
                self._send(packet)
            for name, recall in self._step(step).items():
                sums[name] += recall
        num_decoded = len(steps) - 1
        self.documents.append({name: total / num_decoded for name, total in sums.items()})
        self._conductor.requests_ended((text.name,))
        status = self._status()
        self._conductor.gathered(status.documents_seen, status.documents)
        while self._conductor.state is LearnerState.TRAINING:
            self._take_training()
        for decision in self.stage.decisions[len(self.decisions) :]:
            entry = {"document": len(self.documents), "action": decision.action, "version": decision.version}
            self.decisions.append({**entry, "why": decision.why, "numbers": decision.numbers})
            print(f"  document {len(self.documents)}: {decision.action} {decision.version} {decision.why}", flush=True)

    def _step(self, step: RecordedStep) -> dict[str, float]:
        """Recall of what serves and of those that stay as they are; the shadow is compared."""
        active, shadow = self.stage.active(), self.stage.shadow
        versions = {active, FIRST, OTHER} | ({shadow} if shadow else set())
        played = {version: self._of(version).play(step) for version in sorted(versions)}
        scores = {version: score for version, score in played.items() if score is not None}
        if shadow is not None and scores:
            names = tuple(span.request_id for span in step.start.spans)
            self._conductor.step_compared(StepComparison(names, active, shadow, scores[active], scores[shadow]))
        roles = {"served": active, "first": FIRST, "other": OTHER}
        return {role: scores[version] for role, version in roles.items() if version in scores}

    def _of(self, version: str) -> PlayedPredictor:
        if version not in self._played:
            self._played[version] = PlayedPredictor(self._model.predictor(self.stage.paths[version]))
        return self._played[version]

    def _send(self, packet: bytes) -> None:
        while not self._child.feed.send(packet):
            self._status()  # it has read something when it answers

    def _status(self) -> LearnerStatus:
        self._child.send(AskStatus())
        while True:
            for answer in self._child.answers():
                if isinstance(answer, LearnerStatus):
                    return answer

    def _take_training(self) -> None:
        for answer in self._child.answers():
            if isinstance(answer, CandidateTrained):
                print(f"    held-out loss {answer.metrics['held_out_loss']:.4f}")
                self._conductor.trained(answer.path, answer.metrics)
            elif not isinstance(answer, LearnerStatus):
                print(f"    {answer.sentence}")
                self._conductor.failed(answer.sentence)


def summarize(documents: list[dict[str, float]], borders: tuple[int, int]) -> dict[str, object]:
    """Mean recalls of each part, and how far the served one had come in the last quarter of the code."""
    begin, end = borders
    last = documents[end - (end - begin) // 4 : end]
    recalls = _means(last)
    reached = (recalls["served"] - recalls["first"]) / (recalls["other"] - recalls["first"])
    return {
        "goal": GOAL,
        "reached": reached,
        "met": reached >= GOAL,
        "recall_last_quarter_of_code": recalls,
        "recall_prose_before": _means(documents[:begin]),
        "recall_code": _means(documents[begin:end]),
        "recall_prose_again": _means(documents[end:]),
    }


def _means(documents: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(entry[name] for entry in documents) / len(documents) for name in documents[0]}


def main() -> None:
    """Prints what happens, writes the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=int, default=40, help="documents that are served before the code, and after it")
    parser.add_argument("--code", type=int, default=128, help="documents of it that are served")
    parser.add_argument("--training", type=int, default=80, help="documents of each kind to train the first ones on")
    parser.add_argument("--tokens", type=int, default=48, help="of a document")
    parser.add_argument("--set", action="append", default=[], metavar="learner.KEY=VALUE", help="of the learner")
    out_argument(parser)
    options = parser.parse_args()
    began_s = time.perf_counter()
    # Nothing is served meanwhile that could be held up.
    shares = ["learner.cpu_share=1.0", "learner.serving_cpu_share=1.0"]
    settings = [*options.set, *shares, "learner.niceness=0"]
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        model = ServedModel(Path(folder), options)
        config = Settings(None, settings).section("learner", LearnerConfig)
        drift = Drift(model, config, [*settings, f"predictor.pack={model.pack}"])
        drift.run()
    summary = summarize(drift.documents, model.borders)
    recalls = summary["recall_last_quarter_of_code"]
    assert isinstance(recalls, dict), "of the three"
    first, served, other = recalls["first"], recalls["served"], recalls["other"]
    print(f"Last quarter of the code: first {first:.3f}, served {served:.3f}, trained on code {other:.3f}")
    print(f"{summary['reached']:.0%} of the way (goal {GOAL:.0%}), {time.perf_counter() - began_s:.0f} s")
    measured = {
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "learner": {name: str(value) for name, value in vars(config).items()},
        "took_s": time.perf_counter() - began_s,
        "borders": model.borders,
        **summary,
        "documents": drift.documents,
        "decisions": drift.decisions,
    }
    report = write_report("drift", measured, options.out)
    plot_drift(report, report.with_suffix(".png"))
    print(f"Written: {report}")


if __name__ == "__main__":
    main()
