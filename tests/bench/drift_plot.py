"""The picture of `bench-drift`, from its JSON."""

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt

_WINDOW = 9
_COLORS = {"served": "tab:blue", "first": "tab:grey", "other": "tab:green"}
_LABELS = {"served": "served (learning)", "first": "trained on prose, fixed", "other": "trained on code, fixed"}


def plot_drift(report: Path, picture: Path) -> None:
    """Recall over documents, with what the learner did."""
    document = json.loads(report.read_text())
    figure, axis = plt.subplots(figsize=(11, 4.2), constrained_layout=True)
    for name, color in _COLORS.items():
        recalls = np.array([entry[name] for entry in document["documents"]])
        smooth = np.convolve(np.pad(recalls, _WINDOW // 2, mode="edge"), np.ones(_WINDOW) / _WINDOW, mode="valid")
        axis.plot(smooth, color=color, label=_LABELS[name], linewidth=2 if name == "served" else 1)
    marks = {"activate": ("^", "promoted"), "rollback": ("v", "rolled back")}
    for action, (marker, label) in marks.items():
        at = [decision["document"] for decision in document["decisions"] if decision["action"] == action]
        axis.plot(at, [axis.get_ylim()[0]] * len(at), marker, color="tab:red", label=label, clip_on=False)
    for border in document["borders"]:
        axis.axvline(border, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="documents served: prose, then code, then prose", ylabel="recall@k of the hints")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.suptitle(
        f"Demo model; mean of {_WINDOW} documents; {document['reached']:.0%} of the way to code's own predictor",
        fontsize=10,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
