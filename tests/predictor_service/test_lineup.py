"""What nodes are asked to show is what everybody needs; a request stays with the version that drew it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.lineup import Canary, Lineup, observed_by
from promoe.errors import InvalidInput
from promoe.hint import ObservedKind
from tests.predictor_service.test_versions import NamedPredictor

NOTHING = NamedPredictor("n@1", ObservedKind.NONE)
ROUTER = NamedPredictor("r@1", ObservedKind.ROUTER_INPUT)
INPUT = NamedPredictor("i@1", ObservedKind.LAYER_INPUT)


def test_alone_a_version_is_announced_as_it_is() -> None:
    assert Lineup(ROUTER).announced == ROUTER.version


def test_wishes_are_joined_under_the_active_one_s_name() -> None:
    modest = NamedPredictor("m@1", ObservedKind.NONE)
    modest.version = replace(modest.version, wants_routing=False, observe_every=4)
    eager = replace(ROUTER.version, observe_every=2)
    announced = Lineup(modest, onlookers=(eager,)).announced
    assert announced == replace(modest.version, observed=ObservedKind.ROUTER_INPUT, wants_routing=True, observe_every=2)
    assert Lineup(modest, canary=Canary(ROUTER, 0.5)).announced.observe_every == 1


def test_scores_want_routings_and_what_was_ready() -> None:
    quiet = NamedPredictor("q@1")
    quiet.version = replace(quiet.version, wants_routing=False)
    assert (Lineup(quiet).announced.wants_routing, Lineup(quiet).announced.wants_ready) == (False, False)
    scored = Lineup(quiet, is_scored=True).announced
    assert (scored.wants_routing, scored.wants_ready) == (True, True)


def test_two_kinds_of_hidden_states_do_not_go_together() -> None:
    assert observed_by([NOTHING.version, INPUT.version]) is ObservedKind.LAYER_INPUT
    with pytest.raises(InvalidInput, match="r@1 reads router_input and i@1 reads layer_input"):
        observed_by([ROUTER.version, INPUT.version, NOTHING.version])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_is_a_part(share: float) -> None:
    with pytest.raises(InvalidInput, match="canary's share"):
        Canary(ROUTER, share)


@given(st.floats(0.01, 0.98), st.text(min_size=1))
def test_who_is_drawn_for_a_small_share_is_drawn_for_a_larger_one(share: float, request_id: str) -> None:
    small, large = Canary(ROUTER, share), Canary(NOTHING, share + 0.01)
    assert small.takes(request_id) == small.takes(request_id)
    assert large.takes(request_id) or not small.takes(request_id)


def test_about_the_share_is_drawn() -> None:
    canary = Canary(ROUTER, 0.1)
    drawn = sum(canary.takes(f"request-{number}") for number in range(4000))
    assert 320 < drawn < 480
