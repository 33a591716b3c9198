"""All sessions together: how many there may be, what they did, and their common end."""

from dataclasses import replace

import numpy as np
import pytest

from predictor_service.lineup import Lineup
from predictor_service.predictors.frequency import FrequencyPredictor
from predictor_service.session_book import MOST_COSTS, SessionBook, SessionLimits
from promoe.errors import Overloaded, Unavailable
from tests.predictor_service.layer_events import decode_start, make_spec, observed, source_of

SPEC = make_spec()
IDS_RK = np.array([[1, 2]], np.uint16)


def make_book(max_sessions: int = 2) -> SessionBook[str]:
    limits = SessionLimits(max_rows=4, max_sessions=max_sessions, max_queued_events=2)
    predictor = FrequencyPredictor(source_of(SPEC))
    lineup = Lineup(predictor)
    return SessionBook(SPEC, lambda: lineup, limits)


def test_figures_are_summed_over_open_and_closed_sessions() -> None:
    book = make_book()
    assert book.stats().sessions == 0
    with book.opened("a", 4) as first:
        first.session.begin_step(decode_start(1))
        first.session.observe(observed(1, 0, IDS_RK))
        first.session.observe(observed(2, 0, IDS_RK))
        for _ in range(5):
            first.waiting.put("x", droppable=True)
        with book.opened("b", 4) as second:
            second.session.begin_step(decode_start(1))
            second.session.observe(observed(1, 0, IDS_RK))
            inside = book.stats()
        assert inside.sessions == 2
        assert book.stats().sessions == 1
    after = book.stats()
    assert after.sessions == 0
    for stats in (inside, after):
        assert (stats.observations, stats.hints, stats.refused_observations) == (2, 2, 1)
        assert stats.dropped_observations == 3
        assert stats.predict_s > 0
        assert stats.active.version == "frequency@1"


def test_there_are_no_more_sessions_than_allowed_and_a_place_becomes_free() -> None:
    book = make_book(max_sessions=1)
    with book.opened("a", 4), pytest.raises(Overloaded, match="serves 1 compute nodes"), book.opened("b", 4):
        pass
    with book.opened("b", 4):
        assert book.stats().sessions == 1


def test_the_end_reaches_every_session_and_every_later_one() -> None:
    book = make_book()
    end = Unavailable("Shutting down.")
    with book.opened("a", 4) as first, book.opened("b", 4) as second:
        book.end_all(end)
        for entry in (first, second):
            with pytest.raises(Unavailable, match="Shutting down"):
                entry.waiting.get()
    with pytest.raises(Unavailable, match="Shutting down"), book.opened("c", 4):
        pass
    assert book.stats().sessions == 0


def test_costs_of_versions_that_are_long_gone_are_not_kept_for_ever() -> None:
    predictor = FrequencyPredictor(source_of(SPEC))
    lineup = Lineup(predictor)
    book: SessionBook[str] = SessionBook(SPEC, lambda: lineup, SessionLimits(4, 2, 2))
    for number in range(MOST_COSTS + 2):
        predictor.version = replace(predictor.version, version=f"frequency@{number}")
        with book.opened("a", 4):
            pass
    assert list(book.costs()) == [f"frequency@{number}" for number in range(2, MOST_COSTS + 2)]
