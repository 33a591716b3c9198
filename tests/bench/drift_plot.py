"""The picture of `bench-drift`, from its JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_WINDOW = 9
_COLORS = {"served": "tab:blue", "first": "tab:grey", "other": "tab:green"}
_MARKS = {"activate": ("^", "promoted", "tab:red"), "rollback": ("v", "active again", "tab:purple")}
_LABELS = {"served": "served (learning)", "first": "trained on prose, fixed", "other": "trained on code, fixed"}


def plot_drift(report: Path, picture: Path) -> None:
    """Recall over documents, with what the learner did."""
    document = json.loads(report.read_text())
    figure, axis = plt.subplots(figsize=(11, 5), constrained_layout=True)
    for name, color in _COLORS.items():
        recalls = np.array([entry[name] for entry in document["documents"]])
        # By kind: a mean over a border would be of both.
        for part in np.split(np.arange(len(recalls)), document["borders"]):
            padded = np.pad(recalls[part], _WINDOW // 2, mode="edge")
            smooth = np.convolve(padded, np.ones(_WINDOW) / _WINDOW, mode="valid")
            label = _LABELS[name] if part[0] == 0 else None
            axis.plot(part, smooth, color=color, label=label, linewidth=2.2 if name == "served" else 1.2)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.22 * (high - low))
    for decision in document["decisions"]:
        if decision["action"] in _MARKS:
            marker, verb, color = _MARKS[decision["action"]]
            axis.axvline(decision["document"], color=color, linewidth=0.8, linestyle="--")
            axis.plot([decision["document"]], [low], marker, color=color, clip_on=False, markersize=9)
            axis.annotate(
                f"{decision['version']}\n{verb}",
                (decision["document"], high),
                (4, 4),
                textcoords="offset points",
                color=color,
                fontsize=8,
            )
    _name_kinds(axis, (0, *document["borders"], len(document["documents"])))
    axis.set(xlabel="documents served", ylabel="recall@k of the hints", xlim=(-1, len(document["documents"])))
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", fontsize=8)
    figure.suptitle(
        f"Demo model, mean of {_WINDOW} documents; in the code's last quarter {document['reached']:.0%} of the way "
        "from prose's predictor to code's",
        fontsize=10,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _name_kinds(axis: Axes, borders: Sequence[int]) -> None:
    top = axis.get_ylim()[1]
    for name, begin, end in zip(("prose", "code", "prose again"), borders[:-1], borders[1:], strict=True):
        axis.text((begin + end) / 2, top, name, ha="center", va="bottom", fontsize=10, weight="bold")
        if begin:
            axis.axvline(begin, color="black", linewidth=1.2)
