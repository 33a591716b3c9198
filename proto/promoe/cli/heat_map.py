"""The expert cache as a picture: MoE layers from top to bottom, experts from left to right.

Where there is less room than experts, a cell stands for several: it shows the most urgent thing that one of them does,
and how many of them are resident. Nothing is told by colour alone: signs differ, and where two layers share a line as
half blocks, an empty half is an absent expert and the legend's counts say the rest.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from rich.style import Style
from rich.text import Text

from promoe.cache_map import CacheMap, ExpertBit

LABEL_WIDTH: Final = 4
"""`L29` and a space."""


class Activity(IntEnum):
    """What an expert is doing; of several, the largest is shown."""

    ABSENT = 0
    RESIDENT = 1
    HINTED = 2
    HIT = 3
    LOADING = 4
    MISSED = 5


class Drawing(Enum):
    """SIGNS: a line per row of cells. BLOCKS: two rows of cells in one line, told apart by colour."""

    SIGNS = "signs"
    BLOCKS = "blocks"


SIGNS: Final = {
    Activity.ABSENT: "·",
    Activity.RESIDENT: "█",
    Activity.HINTED: "+",
    Activity.HIT: "o",
    Activity.LOADING: "^",
    Activity.MISSED: "!",
}
_SHADES: Final = "░▒▓█"
_COLOURS: Final = {
    Activity.ABSENT: "grey35",
    Activity.HINTED: "#f0c000",
    Activity.HIT: "#30d030",
    Activity.LOADING: "#d060ff",
    Activity.MISSED: "#ff4040",
}
_RESIDENT_COLOURS: Final = ("#1a2c50", "#1f3f78", "#2452a0", "#2966c8")


@dataclass(frozen=True)
class Cell:
    """The most urgent activity of its experts, and the share of them that is resident, from 0 to 1."""

    activity: Activity
    resident_share: float


_NOTHING: Final = Cell(Activity.ABSENT, 0.0)


@dataclass(frozen=True)
class HeatMap:
    """A cache map brought to the size of its picture.

    Attributes:
        rows: of cells, from the first layer on.
        layers_per_row, experts_per_column: of one cell; the last ones may have fewer.
    """

    rows: tuple[tuple[Cell, ...], ...]
    layers_per_row: int
    experts_per_column: int

    @classmethod
    def of(cls, cache_map: CacheMap, max_rows: int, max_columns: int) -> "HeatMap":
        """Groups neighbours until the map fits into so many rows and columns; see CacheMap.by_layer for the error."""
        layers = cache_map.by_layer
        layers_per_row = -(-cache_map.num_moe_layers // max(1, max_rows))
        experts_per_column = -(-cache_map.num_experts // max(1, max_columns))
        return cls(
            tuple(
                tuple(
                    _cell(b"".join(layer[expert : expert + experts_per_column] for layer in group))
                    for expert in range(0, cache_map.num_experts, experts_per_column)
                )
                for start in range(0, cache_map.num_moe_layers, layers_per_row)
                if (group := layers[start : start + layers_per_row])
            ),
            layers_per_row,
            experts_per_column,
        )


def activity_of(bits: int) -> Activity:
    """What one expert is doing."""
    for bit, activity in (
        (ExpertBit.MISSED, Activity.MISSED),
        (ExpertBit.LOADING, Activity.LOADING),
        (ExpertBit.ROUTED, Activity.HIT),
        (ExpertBit.HINTED, Activity.HINTED),
        (ExpertBit.RESIDENT, Activity.RESIDENT),
    ):
        if bits & bit:
            return activity
    return Activity.ABSENT


_ACTIVITIES: Final = bytes(activity_of(bits) for bits in range(256))
_IS_RESIDENT: Final = bytes(bits & ExpertBit.RESIDENT for bits in range(256))


def _cell(experts: bytes) -> Cell:
    share = sum(experts.translate(_IS_RESIDENT)) / len(experts)
    return Cell(Activity(max(experts.translate(_ACTIVITIES))), share)


def draw_map(heat_map: HeatMap, drawing: Drawing) -> list[Text]:
    """The picture's lines, each with its first layer in front."""
    if drawing is Drawing.SIGNS:
        return [_line(heat_map, number, [_sign(cell) for cell in row]) for number, row in enumerate(heat_map.rows)]
    below = (*heat_map.rows, tuple(_NOTHING for _ in heat_map.rows[0]))
    return [
        _line(
            heat_map, number, [_halves(*cells) for cells in zip(heat_map.rows[number], below[number + 1], strict=True)]
        )
        for number in range(0, len(heat_map.rows), 2)
    ]


def legend(cache_map: CacheMap, drawing: Drawing) -> Text:
    """What the signs or colours mean, and how many experts each is true of."""
    missed = _count(cache_map, ExpertBit.MISSED)
    counts = {
        Activity.RESIDENT: _count(cache_map, ExpertBit.RESIDENT),
        Activity.HINTED: _count(cache_map, ExpertBit.HINTED),
        Activity.HIT: _count(cache_map, ExpertBit.ROUTED) - missed,
        Activity.LOADING: _count(cache_map, ExpertBit.LOADING),
        Activity.MISSED: missed,
    }
    counts[Activity.ABSENT] = len(cache_map.experts) - counts[Activity.RESIDENT]
    text = Text()
    for activity, count in counts.items():
        mark = SIGNS[activity] if drawing is Drawing.SIGNS else "□" if activity is Activity.ABSENT else "■"
        text.append(mark, _colour(Cell(activity, 1.0))).append(f" {activity.name.lower()} {count}  ")
    return text


def _line(heat_map: HeatMap, row: int, parts: list[tuple[str, Style]]) -> Text:
    label = f"L{row * heat_map.layers_per_row}".ljust(LABEL_WIDTH)
    return Text.assemble((label, "dim"), *parts)


def _sign(cell: Cell) -> tuple[str, Style]:
    sign = _SHADES[_shade(cell)] if cell.activity is Activity.RESIDENT else SIGNS[cell.activity]
    return sign, Style(color=_colour(cell))


def _halves(upper: Cell, lower: Cell) -> tuple[str, Style]:
    """The upper cell as foreground, the lower one as background; an absent expert's half stays empty."""
    lower_colour = None if lower.activity is Activity.ABSENT else _colour(lower)
    if upper.activity is Activity.ABSENT:
        return (" ", Style()) if lower_colour is None else ("▄", Style(color=lower_colour))
    return "▀", Style(color=_colour(upper), bgcolor=lower_colour)


def _colour(cell: Cell) -> str:
    return _RESIDENT_COLOURS[_shade(cell)] if cell.activity is Activity.RESIDENT else _COLOURS[cell.activity]


def _shade(cell: Cell) -> int:
    """0 where few are resident, to 3 where all are."""
    return min(len(_SHADES) - 1, int(cell.resident_share * len(_SHADES)))


def _count(cache_map: CacheMap, bit: ExpertBit) -> int:
    return sum(1 for bits in cache_map.experts if bits & bit)
