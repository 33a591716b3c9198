"""Two versions' hints of one observation are of two parts of a step, and belong together."""

import numpy as np
import pytest

from compute_node.hint_book import HintBook
from promoe.hint import Hint
from promoe.trace_events import HintFate


def hint(version: str, scores: dict[int, float], observed_layer: int = 0, num_expected: int = 2) -> Hint:
    experts = np.array(list(scores), np.uint16)
    return Hint(1, 2, 1, observed_layer, experts, np.array(list(scores.values()), np.float32), num_expected, version)


def filed(*hints: Hint) -> Hint:
    book = HintBook(4)
    list(book.begin_step(1))
    for each in hints:
        assert book.file(each) is HintFate.TAKEN
    result = book.hint_for(2)
    assert result is not None
    (visit,) = book.coming(4)
    assert visit.experts == result.experts.tolist()
    assert visit.scores == result.scores.tolist()
    return result


def test_probabilities_are_joined_best_first() -> None:
    joined = filed(hint("a@1", {5: 0.5, 6: 0.4}), hint("c@1", {7: 0.9, 6: 0.5}))
    assert joined.experts.tolist() == [7, 6, 5]
    assert joined.scores.tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert joined.num_expected == 3, "not more than are named"


def test_other_scores_are_joined_by_the_larger_one() -> None:
    joined = filed(hint("a@1", {5: 3.0, 6: 2.0}), hint("c@1", {6: 4.0, 5: 1.0}))
    assert dict(zip(joined.experts.tolist(), joined.scores.tolist(), strict=True)) == {6: 4.0, 5: 3.0}


def test_of_one_version_the_newer_counts() -> None:
    assert filed(hint("a@1", {5: 0.5}), hint("a@1", {6: 0.4})).experts.tolist() == [6]


def test_of_two_observations_the_newer_counts() -> None:
    assert filed(hint("a@1", {5: 0.5}), hint("c@1", {6: 0.4}, observed_layer=1)).experts.tolist() == [6]
