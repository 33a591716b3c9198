"""A document counts once, with the mean of its own steps; no step counts twice."""

from hypothesis import given
from hypothesis import strategies as st

from predictor_service.learner import comparison
from predictor_service.learner.comparison import DocumentDifferences
from predictor_service.shadow.tally import StepComparison


def step(*names: str, active: float = 0.5, shadow: float = 0.75) -> StepComparison:
    return StepComparison(names, "a@1", "b@1", active, shadow)


def test_a_document_is_the_mean_of_its_steps() -> None:
    documents = DocumentDifferences(10)
    assert documents.add(step("x", shadow=1.0)) == []
    assert documents.add(step("x", shadow=0.5)) == []
    assert documents.end(["x", "unknown"]) == [0.25]
    assert documents.end(["x"]) == []


def test_a_long_document_is_finished_and_counts_no_more() -> None:
    documents = DocumentDifferences(2)
    documents.add(step("x"))
    assert documents.add(step("x")) == [0.25]
    for _ in range(5):
        assert documents.add(step("x", shadow=0.0)) == []
    assert documents.end(["x"]) == []


def test_a_step_of_several_counts_for_the_first_that_is_open() -> None:
    documents = DocumentDifferences(10)
    documents.add(step("x", "y", shadow=1.0))
    documents.add(step("y", shadow=0.5))
    assert documents.end(["x", "y"]) == [0.5, 0.0]
    documents.add(step("x", "z", shadow=0.25))
    assert documents.end(["z"]) == [-0.25]


def test_documents_whose_end_is_never_told_are_finished_when_there_are_too_many() -> None:
    documents = DocumentDifferences(10)
    finished = [
        difference
        for number in range(comparison.MOST_OPEN_DOCUMENTS + 5)
        for difference in documents.add(step(f"r{number}"))
    ]
    assert len(finished) == 5


@given(st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True), max_size=60))
def test_every_step_counts_at_most_once(steps: list[list[str]]) -> None:
    """With as many steps as differences of 1/n each: the totals add up to the steps that counted."""
    documents = DocumentDifferences(4)
    differences = [d for names in steps for d in documents.add(step(*names))]
    differences += documents.end("abcde")
    assert len(differences) <= 5
    assert all(difference == 0.25 for difference in differences)
