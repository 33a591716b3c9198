"""The picture of an ablation, from its JSON: a row of plots for each link."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tests.bench.ablation_table import AblationGroup, AblationRow


def plot_ablation(report: Path, picture: Path) -> None:
    """Left: TPOT; middle: prefill, both with their floors; right: decode hit rates with the offline optimum."""
    document = json.loads(report.read_text())
    shares = sorted({group["link_share"] for group in document["groups"]})
    figure, axes = plt.subplots(len(shares), 3, figsize=(16, 4.6 * len(shares)), squeeze=False, constrained_layout=True)
    for share, (left, middle, right) in zip(shares, axes, strict=True):
        groups = [group for group in document["groups"] if group["link_share"] == share]
        _plot_times(left, groups, "tpot", "TPOT (ms)", f"Time per output token, {share:g}x link")
        _plot_times(middle, groups, "prefill", "prefill (ms)", f"Prefill of a chat, {share:g}x link")
        rates = [group["cache_rate"] for group in groups]
        for name, style in _styles(groups[0]).items():
            right.plot(rates, [_row(group, name)["decode"]["hit_rate"] for group in groups], **style)
        right.plot(rates, [group["belady_decode_hit_rate"] for group in groups], ":", color="black", label="Belady")
        right.set(xlabel="cache rate", ylabel="decode hit rate", ylim=(0, 1.02), title="Experts that were there")
    axes[0][2].legend(fontsize=8)
    figure.suptitle(f"Demo model, batch 1, {document['cpu']}, emulated links", fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def _plot_times(axes: Axes, groups: list[AblationGroup], phase: str, label: str, title: str) -> None:
    rates = [group["cache_rate"] for group in groups]
    for name, style in _styles(groups[0]).items():
        medians = [_row(group, name)[f"{phase}_s"]["median"] * 1e3 for group in groups]  # type: ignore[literal-required]
        axes.plot(rates, medians, **style)  # type: ignore[arg-type]
    floors = [group[f"floor_{phase}_s"] * 1e3 for group in groups]  # type: ignore[literal-required]
    axes.plot(rates, floors, ":", color="black", label="floor")
    resident = [group[f"all_resident_{phase}_s"] * 1e3 for group in groups]  # type: ignore[literal-required]
    axes.plot(rates, resident, "--", color="grey", linewidth=0.8, label="all resident")
    axes.set(xlabel="cache rate", ylabel=label, ylim=(0, None), title=title)


def _styles(group: AblationGroup) -> dict[str, dict[str, object]]:
    """The first, ProMoE and the last row stand out."""
    names = [row["variant"] for row in group["rows"]]
    colours = plt.get_cmap("viridis")
    styles: dict[str, dict[str, object]] = {}
    for number, name in enumerate(names):
        stands_out = number in (0, len(names) - 1) or "ProMoE" in name
        styles[name] = {
            "color": colours(number / max(1, len(names) - 1)),
            "marker": "o" if stands_out else ".",
            "linewidth": 2.0 if stands_out else 0.8,
            "label": name,
        }
    return styles


def _row(group: AblationGroup, name: str) -> AblationRow:
    return next(row for row in group["rows"] if row["variant"] == name)
