"""How a plan looks in a terminal: needs and haves, what is short, and what decoding would come to."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from promoe.cli.diagnosis import Verdict
from promoe.cli.plan_resources import Resource
from promoe.cli.quantity import format_bytes_per_s, format_nbytes, format_rate, format_s
from promoe.footprint import ModelFootprint

_STYLES: Final = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}
_WORDS: Final = {Verdict.OK: "ok", Verdict.WARN: "warn", Verdict.FAIL: "short"}
_NONE: Final = "–"


def plan_view(footprint: ModelFootprint, resources: Sequence[Resource], plan: Mapping[str, object]) -> Group:
    """Everything, top to bottom; `plan` is `compute_node.planning`'s document."""
    parts: list[RenderableType] = [_headline(footprint, plan), Text(), _resource_table(resources), Text()]
    parts += [Text(each.sentence, style="bold red") for each in resources if each.sentence]
    forecast = plan["forecast"]
    if isinstance(forecast, dict):
        suggested = _whole(plan["suggested_slots"])
        parts += [
            Text(suggestion(forecast, suggested), style="bold"),
            Text(),
            _forecast_table(forecast, suggested, _whole(plan["most_slots"])),
            Text(),
            *(Text(line, style="dim") for line in _basis(forecast)),
        ]
    return Group(*parts)


def suggestion(forecast: Mapping[str, object], slots_per_layer: int) -> str:
    """The cache rate to take and what to expect of it, in a sentence."""
    row = _row_of(forecast, slots_per_layer)
    low_s, high_s = row["tpot_low_s"], row["tpot_high_s"]
    return (
        f"Suggestion: --cache-rate {row['cache_rate']:.3g} ({slots_per_layer} slots a layer): TPOT between "
        f"{format_s(low_s)} and {format_s(high_s)}, {1 / high_s:.3g} to {1 / low_s:.3g} tokens/s"
        f"{_for_requests(forecast)}."
    )


def _headline(footprint: ModelFootprint, plan: Mapping[str, object]) -> Text:
    spec, device = footprint.spec, _table(plan["device"])
    return Text.assemble(
        (spec.name, "bold"),
        f": {spec.num_moe_layers} MoE layers of {spec.num_experts} experts, {spec.experts_per_token} per token, "
        f"{format_nbytes(spec.experts_nbytes)} of experts in {spec.layout.dtype.value}; from {footprint.read_from}. "
        f"Planned for {device['description']}, {format_nbytes(device['budget_nbytes'])} to be used.",
    )


def _resource_table(resources: Sequence[Resource]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("", "", Text("needs", "dim"), Text("has", "dim"), "")
    for each in resources:
        table.add_row(
            Text(_WORDS[each.verdict], _STYLES[each.verdict]),
            each.name,
            _NONE if each.need_nbytes is None else format_nbytes(each.need_nbytes),
            _NONE if each.have_nbytes is None else format_nbytes(each.have_nbytes),
            each.note,
        )
    return table


def _forecast_table(forecast: Mapping[str, object], suggested: int, most: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for title in ("cache rate", "slots", "device", "TPOT", "decode hit rate", ""):
        table.add_column(justify="left" if not title else "right", no_wrap=True, header=title)
    table.add_row(*(Text(title, "dim") for title in ("cache rate", "slots", "device", "TPOT", "hit rate", "")))
    for row in _rows(forecast):
        slots = _whole(row["slots_per_layer"])
        remark = "◂ suggested" if slots == suggested else "" if slots <= most else "does not fit"
        table.add_row(
            f"{row['cache_rate']:.3g}",
            str(slots),
            format_nbytes(row["device_nbytes"]),
            f"{format_s(row['tpot_low_s'])} – {format_s(row['tpot_high_s'])}",
            f"{format_rate(row['hit_rate_low'])} – {format_rate(row['hit_rate_high'])}",
            remark,
            style="dim" if slots > most else "bold" if slots == suggested else "",
        )
    return table


def _basis(forecast: Mapping[str, object]) -> Iterator[str]:
    link, memory = _table(forecast["link"]), _table(forecast["memory_bandwidth"])
    low_s, high_s = _pair(forecast["all_resident_s"])
    yield (
        f"Estimated, not measured: the expert cache ({forecast['policy']}) simulated over a routing "
        f"({forecast['routing']}); at best a perfect predictor, at worst none."
    )
    yield f"Link {format_bytes_per_s(link['bytes_per_s'])} ({link['source']})."
    if forecast["is_resident_given"]:
        yield f"Computing with all experts resident takes {format_s(low_s)}, as given."
        return
    yield (
        f"Computing with all experts resident: {format_s(low_s)} (weights read at "
        f"{format_bytes_per_s(memory['bytes_per_s'])}, {memory['source']}) to {format_s(high_s)} (a full context, and "
        f"{format_s(_seconds(forecast['layer_overhead_s']))} a layer for the program itself). --resident-tpot takes "
        "a measured one."
    )


def _for_requests(forecast: Mapping[str, object]) -> str:
    number = _whole(forecast["num_requests"])
    return "" if number == 1 else f" for each of {number} requests at once"


def _rows(forecast: Mapping[str, object]) -> list[dict[str, float]]:
    rows = forecast["rows"]
    assert isinstance(rows, list), "a forecast has rows"
    return rows


def _row_of(forecast: Mapping[str, object], slots_per_layer: int) -> dict[str, float]:
    return next(row for row in _rows(forecast) if row["slots_per_layer"] == slots_per_layer)


def _table(value: object) -> dict[str, float]:
    assert isinstance(value, dict), f"{value!r} is an object"
    return value


def _pair(value: object) -> tuple[float, float]:
    assert isinstance(value, list), f"{value!r} is a pair"
    low, high = value
    return low, high


def _whole(value: object) -> int:
    assert isinstance(value, int), f"{value!r} is a count"
    return value


def _seconds(value: object) -> float:
    assert isinstance(value, float), f"{value!r} is a time"
    return value
