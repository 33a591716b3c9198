"""An expert has one name, and it orders by layer, then expert."""

from hypothesis import given
from hypothesis import strategies as st

from promoe.ids import ExpertId

EXPERTS = st.builds(ExpertId, st.integers(0, 100), st.integers(0, 1000))


def test_prints_layer_then_expert() -> None:
    assert str(ExpertId(layer=3, expert=17)) == "L3E17"
    assert f"{ExpertId(0, 0)}" == "L0E0"


@given(EXPERTS, EXPERTS)
def test_orders_like_the_pack_and_the_arena(left: ExpertId, right: ExpertId) -> None:
    num_experts = 1001
    places = [expert.layer * num_experts + expert.expert for expert in (left, right)]
    assert (left < right) == (places[0] < places[1])


@given(EXPERTS, EXPERTS)
def test_two_experts_never_share_a_printed_name(left: ExpertId, right: ExpertId) -> None:
    assert (str(left) == str(right)) == (left == right)
