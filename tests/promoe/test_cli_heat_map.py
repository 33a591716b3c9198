"""Whatever the size of the picture, it shows every expert once, and the most urgent thing first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.cache_map import CacheMap, ExpertBit
from promoe.cli.heat_map import LABEL_WIDTH, SIGNS, Activity, Drawing, HeatMap, activity_of, draw_map, legend

SIZES = st.integers(1, 70)


@st.composite
def cache_maps(draw: st.DrawFn) -> CacheMap:
    num_layers, num_experts = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    size = num_layers * num_experts
    experts = draw(st.lists(st.integers(0, 31), min_size=size, max_size=size))
    return CacheMap(num_layers, num_experts, bytes(experts), 1, 0)


@given(cache_maps(), SIZES, SIZES)
def test_each_cell_is_the_most_urgent_of_its_experts(cache_map: CacheMap, max_rows: int, max_columns: int) -> None:
    heat_map = HeatMap.of(cache_map, max_rows, max_columns)
    assert len(heat_map.rows) <= max_rows
    assert all(len(row) <= max_columns for row in heat_map.rows)
    experts_of: dict[tuple[int, int], list[int]] = {}
    for layer, row in enumerate(cache_map.by_layer):
        for expert, bits in enumerate(row):
            place = (layer // heat_map.layers_per_row, expert // heat_map.experts_per_column)
            experts_of.setdefault(place, []).append(bits)
    places = {(number, column) for number, row in enumerate(heat_map.rows) for column in range(len(row))}
    assert places == set(experts_of)
    for (number, column), experts in experts_of.items():
        cell = heat_map.rows[number][column]
        assert cell.activity == max(activity_of(bits) for bits in experts)
        assert cell.resident_share == sum(bits & ExpertBit.RESIDENT for bits in experts) / len(experts)


@given(cache_maps(), SIZES, SIZES, st.sampled_from(Drawing))
def test_the_picture_is_as_wide_and_high_as_its_cells(
    cache_map: CacheMap, max_rows: int, max_columns: int, drawing: Drawing
) -> None:
    heat_map = HeatMap.of(cache_map, max_rows, max_columns)
    picture = draw_map(heat_map, drawing)
    num_rows = len(heat_map.rows)
    assert len(picture) == (num_rows if drawing is Drawing.SIGNS else -(-num_rows // 2))
    assert {line.cell_len for line in picture} == {LABEL_WIDTH + len(heat_map.rows[0])}


@pytest.mark.parametrize(
    ("bits", "activity"),
    [
        (0, Activity.ABSENT),
        (ExpertBit.RESIDENT, Activity.RESIDENT),
        (ExpertBit.RESIDENT | ExpertBit.HINTED, Activity.HINTED),
        (ExpertBit.RESIDENT | ExpertBit.ROUTED | ExpertBit.HINTED, Activity.HIT),
        (ExpertBit.LOADING | ExpertBit.HINTED, Activity.LOADING),
        (ExpertBit.RESIDENT | ExpertBit.ROUTED | ExpertBit.MISSED, Activity.MISSED),
    ],
)
def test_what_is_shown_of_an_expert_that_is_several_things(bits: int, activity: Activity) -> None:
    assert activity_of(bits) is activity


def test_signs_tell_everything_without_colours() -> None:
    missed = ExpertBit.RESIDENT | ExpertBit.ROUTED | ExpertBit.MISSED
    experts = bytes((0, ExpertBit.RESIDENT, ExpertBit.HINTED, ExpertBit.ROUTED, ExpertBit.LOADING, missed))
    cache_map = CacheMap(1, 6, experts, 1, 0)
    assert draw_map(HeatMap.of(cache_map, 1, 6), Drawing.SIGNS)[0].plain == "L0  ·█+o^!"
    assert len(set(SIGNS.values())) == len(Activity)
    assert legend(cache_map, Drawing.SIGNS).plain.split("  ") == [
        "█ resident 2", "+ hinted 1", "o hit 1", "^ loading 1", "! missed 1", "· absent 4", "",
    ]  # fmt: skip


def test_residents_of_a_cell_are_shaded_by_their_share() -> None:
    experts = bytes(ExpertBit.RESIDENT if expert % 4 < expert // 4 else 0 for expert in range(20))
    picture = draw_map(HeatMap.of(CacheMap(1, 20, experts, 1, 0), 1, 5), Drawing.SIGNS)
    assert picture[0].plain == "L0  ·▒▓██"  # none, one, two, three and all of four


def test_half_blocks_show_two_layers_in_one_line() -> None:
    resident, hinted = ExpertBit.RESIDENT, ExpertBit.HINTED
    layers = ((0, resident, 0, resident), (0, 0, hinted, hinted), (resident, 0, 0, 0))
    cache_map = CacheMap(3, 4, bytes(bits for layer in layers for bits in layer), 1, 0)
    first, second = draw_map(HeatMap.of(cache_map, 3, 4), Drawing.BLOCKS)
    assert (first.plain, second.plain) == ("L0   ▀▄▀", "L2  ▀   ")
    both = first.spans[-1].style
    assert not isinstance(both, str)
    assert both.color is not None
    assert both.bgcolor is not None
    assert both.color != both.bgcolor


def test_a_map_that_is_not_what_it_says_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 layers × 4 experts"):
        HeatMap.of(CacheMap(3, 4, bytes(11), 1, 0), 9, 9)
