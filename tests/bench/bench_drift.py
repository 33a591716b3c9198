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
from collections.abc import Mapping
from itertools import count
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
from promoe.hint import ObservedKind
from promoe.model_spec import ModelSpec
from promoe.pack_manifest import PackManifest
from tests.bench.demo_model import demo_checkpoint, demo_pack
from tests.bench.drift_plot import plot_drift
from tests.bench.report import out_argument, write_report
from tests.bench.text_routing import TextRouting, code, prose
from tests.predictor_service.in_memory_stage import InMemoryStage
from tests.predictor_service.learner_feed import ROUTER_INPUT, step_packets, welcome
from tests.predictor_service.shadow_play import PlayedPredictor

GOAL: Final = 0.5
SESSION: Final = 1


class ServedModel:
    """The demo model's texts, and predictors trained on them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.pack = demo_pack()
        self.spec: ModelSpec = PackManifest.read(self.pack).spec
        self.texts = TextRouting(demo_checkpoint(), self.pack, self.spec, options.tokens)
        num_training, num_served = options.training, options.documents
        everything = num_training + num_served
        prose_documents = list(self.texts.documents(prose(), "prose", everything))
        code_documents = list(self.texts.documents(code(), "code", everything))
        self.first = self._trained("prose", prose_documents[:num_training], options.steps)
        self.other = self._trained("code", code_documents[:num_training], options.steps)
        half = num_served // 2
        served_prose = prose_documents[num_training:]
        self.served = [*served_prose[:half], *code_documents[num_training:], *served_prose[half:]]
        self.borders = (half, half + num_served)

    def predictor(self, path: Path) -> LearnedPredictor:
        return LearnedPredictor(PredictorSource(self.spec, self.pack, path))

    def _trained(self, name: str, documents: list[list[RecordedStep]], steps: int) -> Path:
        gathered: list[Document] = []
        gatherer = Gatherer(self.spec, 1 << 20, gathered.append)
        gatherer.welcomed(ROUTER_INPUT)
        for document in documents:
            for step in document:
                for packet in step_packets(SESSION, step, ROUTER_INPUT):
                    feed_client.tell(packet, gatherer)
        gatherer.end_session(SESSION)
        order = CandidateOrder(None, name, "1", steps, 1e6, 1e-3, {"documents": len(gathered)})

        def blocks_of(observed: ObservedKind) -> DocumentBlocks:
            return DocumentBlocks.of(gathered, observed, 0.2, 256 << 20)

        path, metrics = train_candidate(order, self.spec, self.pack, blocks_of, self.folder, CandidateProgress(1.0))
        print(f"  {name}@1 on {len(gathered)} documents: loss {metrics['held_out_loss']:.4f}")
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
        self.stage = BenchStage("prose@1", model.first)
        self._child = LearnerChild([word for text in settings for word in ("--set", text)], model.folder)
        numbers = count(2)
        self._conductor = Conductor(config, self.stage, self, lambda _: f"learned@{next(numbers)}")
        self._played: dict[str, PlayedPredictor] = {}
        self._fixed = {
            "first": PlayedPredictor(model.predictor(model.first)),
            "other": PlayedPredictor(model.predictor(model.other)),
        }
        self.documents: list[dict[str, float]] = []
        self.decisions: list[dict[str, object]] = []

    def train(self, base: str, name: str) -> None:
        """See Training."""
        print(f"  document {len(self.documents)}: {name} is trained from {base}")
        self._child.send(Train(self.stage.paths[base], name))

    def run(self) -> None:
        """All documents."""
        self._send(welcome(SESSION, ROUTER_INPUT))
        for document in self._model.served:
            self._serve(document)
        self._child.close()

    def _serve(self, document: list[RecordedStep]) -> None:
        sums = {"served": 0.0, "first": 0.0, "other": 0.0}
        for step in document:
            for packet in step_packets(SESSION, step, ROUTER_INPUT):
                self._send(packet)
            for name, recall in self._step(step).items():
                sums[name] += recall
        decoded = len(document) - 1
        self.documents.append({name: total / decoded for name, total in sums.items()})
        self._conductor.requests_ended((document[0].start.spans[0].request_id,))
        status = self._status()
        self._conductor.gathered(status.documents_seen, status.documents)
        while self._conductor.state is LearnerState.TRAINING:
            self._take_training()
        for decision in self.stage.decisions[len(self.decisions) :]:
            entry = {"document": len(self.documents), "action": decision.action, "version": decision.version}
            self.decisions.append({**entry, "why": decision.why, "numbers": decision.numbers})
            print(f"  document {len(self.documents)}: {decision.action} {decision.version} {decision.why}")

    def _step(self, step: RecordedStep) -> dict[str, float]:
        """Recall of what serves and of those that stay as they are; the shadow is compared."""
        active, shadow = self.stage.active(), self.stage.shadow
        scores = {version: self._of(version).play(step) for version in (active, shadow) if version is not None}
        recalls = {name: played.play(step) for name, played in self._fixed.items()} | {"served": scores[active]}
        if shadow is not None and scores[active] is not None and scores[shadow] is not None:
            names = tuple(span.request_id for span in step.start.spans)
            compared = StepComparison(names, active, shadow, scores[active] or 0.0, scores[shadow] or 0.0)
            self._conductor.step_compared(compared)
        return {name: recall for name, recall in recalls.items() if recall is not None}

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
                self._conductor.trained(answer.path, answer.metrics)
            elif not isinstance(answer, LearnerStatus):
                print(f"  {answer.sentence}")
                self._conductor.failed(answer.sentence)


def main() -> None:
    """Prints what happens, writes the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300, help="of each kind that are served")
    parser.add_argument("--training", type=int, default=200, help="documents of each kind to train the first ones on")
    parser.add_argument("--tokens", type=int, default=96, help="of a document")
    parser.add_argument("--steps", type=int, default=1000, help="of a training")
    parser.add_argument("--min-documents", type=int, default=32)
    parser.add_argument("--half-life", type=float, default=300.0, help="seconds")
    out_argument(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        model = ServedModel(Path(folder), options)
        learned = [
            f"learner.max_steps={options.steps}",
            f"learner.min_documents={options.min_documents}",
            f"learner.documents_between_trainings={options.min_documents}",
            f"learner.half_life_s={options.half_life}",
        ]
        config = LearnerConfig(
            max_steps=options.steps,
            min_documents=options.min_documents,
            documents_between_trainings=options.min_documents,
            half_life_s=options.half_life,
        )
        quick = ["learner.cpu_share=1.0", "learner.niceness=0", f"predictor.pack={model.pack}"]
        drift = Drift(model, config, [*learned, *quick])
        drift.run()
    begin, end = model.borders
    last = drift.documents[end - (end - begin) // 4 : end]
    first, other, served = (sum(entry[name] for entry in last) / len(last) for name in ("first", "other", "served"))
    reached = (served - first) / (other - first)
    print(f"last quarter of the code: first {first:.3f}, served {served:.3f}, trained on code {other:.3f}")
    print(f"{reached:.0%} of the way (goal {GOAL:.0%})")
    measured = {
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "borders": model.borders,
        "goal": GOAL,
        "reached": reached,
        "met": reached >= GOAL,
        "recall_last_quarter_of_code": {"first": first, "served": served, "other": other},
        "documents": drift.documents,
        "decisions": drift.decisions,
    }
    report = write_report("drift", measured, options.out)
    plot_drift(report, report.with_suffix(".png"))
    print(f"Written: {report}")


if __name__ == "__main__":
    main()
