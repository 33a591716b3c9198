"""From documents to a promotion or none, watched afterwards; what people do in between goes first."""

from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.learner.conductor import LEARNER, Comparison, Conductor, LearnerState
from predictor_service.learner.config import LearnerConfig
from predictor_service.shadow.tally import StepComparison
from promoe.errors import InvalidInput, ResourceExhausted
from tests.predictor_service.in_memory_stage import InMemoryStage

CONFIG = LearnerConfig(min_documents=10, documents_between_trainings=20, max_documents=60, watch_documents=60)
BASE = "learned@1"


class Trainings:
    """Which were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def train(self, base: str, name: str) -> None:
        self.asked.append((base, name))


class Run:
    """A conductor over a stage in memory."""

    def __init__(self, config: LearnerConfig = CONFIG) -> None:
        self.stage = InMemoryStage(BASE)
        self.trainings = Trainings()
        self.names = count(1)
        self.documents = count()
        self.conductor = Conductor(config, self.stage, self.trainings, lambda _: f"learned@auto{next(self.names)}")

    def shadowing(self) -> "Run":
        self.conductor.gathered(10, 10)
        self.conductor.trained(f"/out/{self.trainings.asked[-1][1]}", {"held_out_loss": 0.5})
        return self

    def watching(self) -> "Run":
        self.shadowing().serve(0.1, 60)
        assert self.conductor.state is LearnerState.WATCHING
        return self

    def serve(self, difference: float, documents: int, pair: Comparison | None = None) -> None:
        """Documents on which the shadow's recall is higher by so much."""
        first = self.conductor.compared
        for _ in range(documents):
            compared = pair or self.conductor.compared
            if compared is None or (pair is None and compared != first):
                return
            name = f"d{next(self.documents)}"
            for _ in range(3):
                step = StepComparison((name,), compared.active, compared.shadow, 0.5, 0.5 + difference)
                self.conductor.step_compared(step)
            self.conductor.requests_ended((name,))

    @property
    def actions(self) -> list[str]:
        return [decision.action for decision in self.stage.decisions]


def test_it_trains_when_there_are_enough_documents() -> None:
    run = Run()
    run.conductor.gathered(9, 9)
    run.conductor.gathered(30, 9)
    assert run.trainings.asked == []
    run.conductor.gathered(31, 10)
    assert run.conductor.state is LearnerState.TRAINING
    assert run.trainings.asked == [(BASE, "learned@auto1")]
    run.conductor.gathered(100, 50)
    assert len(run.trainings.asked) == 1


def test_a_better_candidate_is_promoted_watched_and_kept() -> None:
    run = Run().shadowing()
    assert run.stage.shadow == "learned@auto1"
    assert run.stage.decisions[-1].numbers == {"held_out_loss": 0.5}
    run.serve(0.1, 60)
    assert run.stage.active() == "learned@auto1"
    assert run.stage.shadow == BASE
    assert run.conductor.compared == Comparison("learned@auto1", BASE)
    promoted = run.stage.decisions[-2]
    assert promoted.action == "activate"
    assert promoted.who == LEARNER
    assert promoted.numbers["e_value"] >= 1 / CONFIG.alpha
    assert promoted.numbers["gain"] == pytest.approx(0.1)
    assert CONFIG.min_gain < promoted.numbers["gain_at_least"] < 0.1
    run.serve(-0.1, 60)
    assert run.conductor.state is LearnerState.GATHERING
    assert run.stage.active() == "learned@auto1"
    assert run.actions == ["publish", "shadow", "activate", "shadow", "clear"]
    assert "holds" in run.stage.decisions[-1].why


def test_a_worse_candidate_is_given_up_with_its_numbers() -> None:
    run = Run().shadowing()
    run.serve(-0.05, 60)
    assert run.conductor.state is LearnerState.GATHERING
    assert run.stage.active() == BASE
    assert run.actions == ["publish", "shadow", "clear"]
    assert "no better" in run.stage.decisions[-1].why
    assert run.stage.decisions[-1].numbers["gain"] == pytest.approx(-0.05)


def test_a_candidate_that_is_the_same_is_given_up_in_the_end() -> None:
    run = Run().shadowing()
    run.serve(CONFIG.min_gain, 60)
    assert run.actions == ["publish", "shadow", "clear"]
    assert run.stage.decisions[-1].numbers["documents"] == 60
    assert "in time" in run.stage.decisions[-1].why


def test_a_promotion_that_turns_out_to_lose_is_rolled_back() -> None:
    run = Run().watching()
    run.serve(0.1, 60)
    assert run.stage.active() == BASE
    assert run.stage.shadow is None
    assert run.actions[-2:] == ["rollback", "clear"]
    assert run.stage.decisions[-2].numbers["e_value"] >= 1 / CONFIG.alpha
    assert run.conductor.state is LearnerState.GATHERING


def test_a_promotion_that_is_neither_is_watched_no_longer_than_stated() -> None:
    run = Run().watching()
    run.serve(0.0, CONFIG.watch_documents)
    assert run.conductor.state is LearnerState.GATHERING
    assert run.stage.active() == "learned@auto1"
    assert run.stage.decisions[-1].numbers["documents"] == CONFIG.watch_documents


def test_the_next_training_waits_for_new_documents() -> None:
    run = Run().shadowing()
    run.conductor.gathered(50, 40)
    run.serve(-0.05, 60)
    run.conductor.gathered(69, 40)
    assert len(run.trainings.asked) == 1
    run.conductor.gathered(70, 40)
    assert len(run.trainings.asked) == 2


def test_a_learner_that_was_started_again_counts_anew() -> None:
    run = Run().shadowing()
    run.conductor.gathered(500, 40)
    run.serve(-0.05, 60)
    run.conductor.gathered(3, 3)
    run.conductor.gathered(20, 20)
    assert len(run.trainings.asked) == 2


def test_a_training_that_failed_leaves_everything_as_it_was() -> None:
    run = Run()
    run.conductor.gathered(10, 10)
    run.conductor.failed("The disk is full.")
    assert run.conductor.state is LearnerState.GATHERING
    assert run.actions == []
    run.conductor.failed("Again.")
    run.conductor.trained("/out/late@1", {})
    assert run.actions == []


@pytest.mark.parametrize("at", ["training", "shadowing", "watching"])
def test_a_person_who_activates_something_goes_first(at: str) -> None:
    run = Run()
    if at == "training":
        run.conductor.gathered(10, 10)
    else:
        run = run.shadowing() if at == "shadowing" else run.watching()
    before = run.conductor.compared
    run.stage.activate_by_hand("other@1")
    run.conductor.trained("/out/c@1", {})
    run.serve(0.1, 80, before or Comparison("other@1", "c@1"))
    assert run.stage.active() == "other@1"
    assert run.stage.shadow is None
    assert run.conductor.state is LearnerState.GATHERING
    assert run.actions[-1:] in ([], ["clear"])


def test_a_person_who_wants_the_shadow_gets_it() -> None:
    run = Run().shadowing()
    run.conductor.step_aside("ann", "I try mine")
    assert run.conductor.state is LearnerState.GATHERING
    assert run.actions == ["publish", "shadow"]


def test_comparisons_of_other_versions_are_ignored() -> None:
    run = Run().shadowing()
    run.serve(0.2, 80, Comparison(BASE, "other@1"))
    assert run.conductor.state is LearnerState.SHADOWING
    assert run.conductor.numbers()["documents"] == 0


def test_paused_it_decides_nothing_and_counts_nothing() -> None:
    run = Run()
    run.conductor.pause()
    run.conductor.gathered(10, 10)
    assert run.conductor.state is LearnerState.GATHERING
    with pytest.raises(InvalidInput, match="paused"):
        run.conductor.train_now("ann", "now")
    run.conductor.resume()
    run.shadowing()
    run.conductor.pause()
    assert run.conductor.is_paused
    run.serve(0.2, 80)
    assert run.conductor.numbers()["documents"] == 0
    run.conductor.resume()
    run.serve(0.2, 80)
    assert run.stage.active() == "learned@auto1"


def test_a_candidate_that_comes_while_it_is_paused_waits() -> None:
    run = Run()
    run.conductor.gathered(10, 10)
    run.conductor.pause()
    run.conductor.trained("/out/learned@auto1", {})
    assert run.actions == []
    run.conductor.resume()
    assert run.conductor.state is LearnerState.SHADOWING


def test_what_changed_while_it_was_paused_is_noticed() -> None:
    run = Run().shadowing()
    run.conductor.pause()
    run.stage.activate_by_hand("other@1")
    run.conductor.resume()
    assert run.conductor.state is LearnerState.GATHERING
    assert run.stage.shadow is None


def test_a_training_can_be_asked_for() -> None:
    run = Run()
    assert run.conductor.train_now("ann", "new text") == "learned@auto1"
    with pytest.raises(InvalidInput, match="training already"):
        run.conductor.train_now("ann", "again")


@pytest.mark.parametrize("at", ["publish", "promote", "watch", "roll back"])
def test_a_stage_that_cannot_leaves_the_learner_gathering(at: str) -> None:
    run = Run()
    fault = ResourceExhausted("The disk is full.")
    if at == "publish":
        run.stage.fault = fault
        run.shadowing()
    elif at == "promote":
        run.shadowing().stage.fault = fault
        run.serve(0.1, 60)
        assert run.stage.active() == BASE
    else:
        run.watching().stage.fault = fault
        run.serve(0.1 if at == "roll back" else -0.1, 60)
        assert run.stage.active() == "learned@auto1"
    assert run.conductor.state is LearnerState.GATHERING
    assert run.conductor.compared is None


EVENTS = st.sampled_from(
    ["gather", "train", "trained", "failed", "better", "worse", "human", "pause", "resume", "aside"]
)


@given(st.lists(EVENTS, max_size=40))
def test_whatever_happens_the_state_fits_the_stage(events: list[str]) -> None:
    run = Run()
    gathered = count(10, 25)
    for event in events:
        conductor = run.conductor
        if event == "gather":
            conductor.gathered(next(gathered), 20)
        elif event == "train" and conductor.state is LearnerState.GATHERING and not conductor.is_paused:
            conductor.train_now("ann", "why not")
        elif event == "trained" and run.trainings.asked:
            conductor.trained(f"/out/{run.trainings.asked[-1][1]}", {})
        elif event == "failed":
            conductor.failed("It was killed.")
        elif event in ("better", "worse"):
            run.serve(0.1 if event == "better" else -0.1, 60)
        elif event == "human":
            run.stage.activate_by_hand(f"human@{len(run.stage.decisions)}")
        elif event == "pause":
            conductor.pause()
        elif event == "resume":
            conductor.resume()
        elif event == "aside":
            conductor.step_aside("ann", "mine")
            run.stage.shadow = None
        compares = conductor.state in (LearnerState.SHADOWING, LearnerState.WATCHING)
        assert (conductor.compared is not None) == compares
        assert run.stage.shadow == (conductor.compared.shadow if conductor.compared is not None else None)
    activations = [decision.version for decision in run.stage.decisions if decision.action == "activate"]
    assert all(one != other for one, other in pairwise(activations))
