"""A session goes over to another version between two steps, when the node samples for it, and loses nothing."""

from collections.abc import Sequence

import numpy as np
import pytest

from predictor_service.lineup import Lineup
from predictor_service.predictor import Predictor, PredictorSession
from predictor_service.session import MOST_ANNOUNCED, Session
from promoe.errors import InvalidInput
from promoe.hint import Hint, Observation, ObservedKind, StepSpan, StepStart
from tests.predictor_service.layer_events import make_spec
from tests.predictor_service.test_versions import NamedPredictor

SPEC = make_spec(layers=3, experts=8, per_token=2, hidden=4)


class Remembering(NamedPredictor):
    """A session per stream, which remembers its steps and takes over what another one of its kind remembers."""

    def open_session(self) -> "RememberingSession":  # type: ignore[override]
        return RememberingSession(self)


class RememberingSession:
    def __init__(self, predictor: NamedPredictor) -> None:
        self.predictor = predictor
        self.steps: list[int] = []

    def adopt(self, former: PredictorSession) -> None:
        if isinstance(former, RememberingSession):
            self.steps = list(former.steps)

    def begin_step(self, start: StepStart) -> None:
        self.steps.append(start.step)

    def observe(self, observation: Observation) -> Sequence[Hint]:
        return self.predictor.observe(observation)

    def end_requests(self, request_ids: Sequence[str]) -> None:
        pass


class Stream:
    """A node's end: samples for the newest version that it has read."""

    def __init__(self, *predictors: NamedPredictor, says_version: bool = True) -> None:
        self.lineup = Lineup(predictors[0])
        self.session = Session("node", SPEC, lambda: self.lineup, max_rows=4)
        self.follows = self.session.announced
        self.says_version = says_version
        self.step = 0

    @property
    def active(self) -> Predictor:
        return self.lineup.active

    @active.setter
    def active(self, predictor: Predictor) -> None:
        if predictor is not self.lineup.active:
            self.lineup = Lineup(predictor)

    def begin(self, reads_welcome: bool = True) -> str | None:
        self.step += 1
        span = StepSpan("r1", 1, is_prefill=False)
        version = self.follows.version if self.says_version else ""
        announced = self.session.begin_step(StepStart(self.step, (span,), version=version))
        if announced is not None and reads_welcome:
            self.follows = announced
        return None if announced is None else announced.version

    def hint_versions(self, kind: ObservedKind) -> set[str]:
        """Of one layer's hints, observed as one version wishes."""
        hidden_RD = None if kind is ObservedKind.NONE else np.zeros((1, SPEC.hidden_size), np.float32)
        return {hint.version for hint in self.session.observe(Observation(self.step, 0, (0,), 1, hidden_RD))}


A, B, C = (Remembering(f"{name}@1") for name in "abc")
NO_HIDDEN = Remembering("n@1", ObservedKind.NONE)


def test_the_running_step_is_the_former_version_s_and_the_next_one_the_new_one_s() -> None:
    stream = Stream(A)
    assert stream.begin() is None
    stream.active = B
    assert stream.hint_versions(A.version.observed) == {"a@1"}
    assert stream.begin() == "b@1", "announced when the next step begins"
    assert stream.hint_versions(A.version.observed) == {"a@1"}
    assert stream.begin() is None, "announced once"
    assert stream.hint_versions(A.version.observed) == {"b@1"}


def test_a_node_that_reads_late_is_served_by_the_version_it_samples_for() -> None:
    """The versions want different things: what one is shown would be no use to the other."""
    stream = Stream(NO_HIDDEN)
    stream.begin()
    stream.active = B
    announced = stream.begin(reads_welcome=False)
    for _ in range(3):
        assert stream.hint_versions(ObservedKind.NONE) == {"n@1"}
        stream.begin()
    stream.follows = B.version
    assert announced == "b@1"
    stream.begin()
    assert stream.hint_versions(B.version.observed) == {"b@1"}


def test_a_node_that_does_not_say_follows_a_welcome_from_the_next_step_on() -> None:
    stream = Stream(A, says_version=False)
    stream.begin()
    stream.active = B
    stream.begin()
    assert stream.hint_versions(A.version.observed) == {"a@1"}
    stream.begin()
    assert stream.hint_versions(B.version.observed) == {"b@1"}


def test_what_is_remembered_goes_along() -> None:
    stream = Stream(A)
    for predictor in (A, A, B, B, C, A, A):
        stream.active = predictor
        stream.begin()
    adopted = stream.session._active.predictions
    assert isinstance(adopted, RememberingSession)
    assert adopted.predictor is A
    assert adopted.steps == list(range(1, stream.step + 1))


def test_a_version_that_remembers_nothing_begins_anew() -> None:
    stream = Stream(A)
    stream.begin()
    stream.active = NamedPredictor("d@1")
    stream.begin()
    stream.begin()
    assert stream.hint_versions(stream.active.version.observed) == {"d@1"}


def test_back_before_the_node_has_read() -> None:
    stream = Stream(A)
    stream.begin()
    stream.active = B
    stream.begin(reads_welcome=False)
    stream.active = A
    assert stream.begin() == "a@1", "the node will read of b first, and must know that it is over"
    assert stream.hint_versions(A.version.observed) == {"a@1"}


def test_many_changes_in_a_row_are_not_kept_for_ever() -> None:
    stream = Stream(A)
    stream.begin()
    for number in range(3 * MOST_ANNOUNCED):
        stream.active = NamedPredictor(f"v@{number}")
        stream.begin(reads_welcome=False)
    assert len(stream.session._announced) <= MOST_ANNOUNCED + 1
    assert stream.hint_versions(A.version.observed) == {"a@1"}, "what is in use is never forgotten"


def test_a_version_that_was_never_announced_ends_the_session() -> None:
    stream = Stream(A)
    stream.follows = C.version
    with pytest.raises(InvalidInput, match=r"sampled for c@1; announced were a@1"):
        stream.begin()
