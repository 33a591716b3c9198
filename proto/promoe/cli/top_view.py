"""What `promoe top` shows, as a pure function of what was asked and the size of the terminal."""

from dataclasses import dataclass
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from promoe.cli.heat_map import LABEL_WIDTH, Drawing, HeatMap, draw_map, legend
from promoe.cli.node_history import NodeSample, Window
from promoe.cli.quantity import format_bytes_per_s, format_s
from promoe.cli.top_figures import FIGURES_WIDTH, figure_lines
from promoe.node_report import NodeInfo, PredictorState

_GAP: Final = "  "
_LEAST_MAP_WIDTH: Final = LABEL_WIDTH + 8
"""Below that the figures alone are shown."""
_HEADER_LINES: Final = 3
_FOOTER_LINES: Final = 2


@dataclass(frozen=True)
class TopFrame:
    """Everything that is shown.

    Attributes:
        endpoint: the node's.
        sample: the last look at it; None when it never answered.
        lately: the last seconds; None where they are not known yet.
        away_s: for how long it has not answered; None while it does.
        trouble: why it does not.
        drawing: how the map is drawn; None for what suits the terminal.
        keys: what can be pressed; empty where nobody can.
    """

    endpoint: str
    sample: NodeSample | None = None
    lately: Window | None = None
    away_s: float | None = None
    trouble: str = ""
    drawing: Drawing | None = None
    keys: str = ""


class TopView:
    """A frame that fills the console it is printed on."""

    def __init__(self, frame: TopFrame) -> None:
        self._frame = frame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or console.size.height
        is_coloured = console.color_system in ("256", "truecolor", "windows") and not console.no_color
        yield Text("\n").join(frame_lines(self._frame, options.max_width, height, is_coloured))


def frame_lines(frame: TopFrame, width: int, height: int, is_coloured: bool) -> list[Text]:
    """At most `height` lines of at most `width` columns.

    Args:
        frame: what is shown.
        width, height: of the terminal.
        is_coloured: cells can be told apart by their colours.
    """
    lines = [_title(frame)]
    sample = frame.sample
    if sample is None:
        lines.append(Text(f"The node has not answered yet. {frame.trouble}"))
    else:
        lines += [_cache_line(sample.info), _state_line(sample)]
        room = max(1, height - _HEADER_LINES - _FOOTER_LINES)
        drawing = frame.drawing or _suitable(sample.cache_map.num_moe_layers, room, is_coloured)
        lines += _body(frame, sample, (width, room), drawing)
        if width >= _body_width():
            lines = [
                *lines[: max(0, height - _FOOTER_LINES)],
                Text(frame.keys, "dim"),
                legend(sample.cache_map, drawing),
            ]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines[:height]


def _body(frame: TopFrame, sample: NodeSample, room: tuple[int, int], drawing: Drawing) -> list[Text]:
    """The map, and the figures beside it."""
    width, height = room
    active = sample.info.predictor.active
    figures = figure_lines(frame.lately, Window(None, sample.stats, 0.0), active.version if active else None)[:height]
    if width < _body_width():
        return figures
    max_columns = width - FIGURES_WIDTH - len(_GAP) - LABEL_WIDTH
    max_rows = height * 2 if drawing is Drawing.BLOCKS else height
    pictured = HeatMap.of(sample.cache_map, max_rows, max_columns)
    picture = draw_map(pictured, drawing)
    map_width = max(line.cell_len for line in picture)
    lines: list[Text] = []
    for number in range(max(len(picture), len(figures))):
        line = picture[number].copy() if number < len(picture) else Text()
        if number < len(figures):
            line.pad_right(map_width - line.cell_len + len(_GAP))
            line.append_text(figures[number])
        lines.append(line)
    return lines


def _body_width() -> int:
    return _LEAST_MAP_WIDTH + len(_GAP) + FIGURES_WIDTH


def _suitable(num_layers: int, height: int, is_coloured: bool) -> Drawing:
    """A line for each layer where there is room; else two share one, where colours tell them apart."""
    return Drawing.BLOCKS if is_coloured and num_layers > height else Drawing.SIGNS


def _title(frame: TopFrame) -> Text:
    title = Text.assemble(("promoe top", "bold"), f" · {frame.endpoint}")
    if frame.away_s is not None:
        title.append(f" · AWAY for {format_s(frame.away_s)}", style="bold red")
    if frame.sample is not None:
        device = frame.sample.info.device
        link = device.link
        if device.emulated_link_bytes_per_s:
            link = f"emulated link of {format_bytes_per_s(device.emulated_link_bytes_per_s)}"
        title.append(f" · {frame.sample.info.model.name} on {device.kind}, {link}")
    return title


def _cache_line(info: NodeInfo) -> Text:
    shape = info.expert_cache
    return Text(
        f"cache rate {shape.cache_rate:.3g}: {shape.slots_per_layer} of {info.model.num_experts} experts per layer · "
        f"policy {shape.policy} ({shape.eviction}, {shape.slot_split} slots)"
    )


def _state_line(sample: NodeSample) -> Text:
    stats, cache_map = sample.stats, sample.cache_map
    paused = sum(1 for layer in stats.layers if not layer.prefetching)
    off = f" · no prefetch in {paused} layers" if paused and sample.info.predictor.active else ""
    return Text(
        f"{_predictor_phrase(sample.info)} · {stats.running_requests} running, {stats.queued_requests} queued · "
        f"step {cache_map.step}, layer {cache_map.layer}{off}"
    )


def _predictor_phrase(info: NodeInfo) -> str:
    link = info.predictor
    if link.state is PredictorState.NONE or link.state is PredictorState.UNSPECIFIED:
        return "no predictor"
    version = f" {link.active.version}" if link.active else ""
    return f"predictor{version} {link.state.value}"
