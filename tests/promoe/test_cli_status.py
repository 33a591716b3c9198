"""`promoe status` tells which predictor a node listens to, since when, and what becomes of it if it fails."""

from promoe.cli.status import takeover_phrases
from promoe.node_report import PredictorLink, PredictorState, PredictorSwitch


def test_a_node_that_was_started_with_its_predictor_has_nothing_to_tell() -> None:
    assert takeover_phrases(PredictorLink("unix:a", PredictorState.CONNECTED, None)) == []


def test_a_candidate_and_the_one_on_trial_are_told() -> None:
    switch = PredictorSwitch(1.0, "unix:a", "unix:b", "ann", "to see", is_return=False)
    link = PredictorLink("unix:b", PredictorState.CONNECTED, None, "unix:c", "unix:a", switch)
    candidate, since, trial = takeover_phrases(link)
    assert candidate == "unix:c is tried out beside it"
    assert since.startswith("since 19")
    assert since.endswith(", by the wish of ann: to see")
    assert trial == "on trial; if it fails, the node goes back to unix:a"


def test_a_return_says_what_had_failed() -> None:
    switch = PredictorSwitch(1.0, "unix:b", "unix:a", "the node itself", "It was killed.", is_return=True)
    (told,) = takeover_phrases(PredictorLink("unix:a", PredictorState.AWAY, None, last_switch=switch))
    assert told.startswith("gone back to at 19")
    assert told.endswith(": It was killed.")
