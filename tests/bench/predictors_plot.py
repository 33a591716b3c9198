"""The picture of `bench-predictors`, from its JSON."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt


def plot_predictors(report: Path, picture: Path) -> None:
    """Left: recall@k by lookahead; right: recall@1.5k; a line per predictor."""
    document = json.loads(report.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, constrained_layout=True)
    for axis, key, title in zip(axes, ("recall", "recall_wide"), ("recall@k", "recall@1.5k"), strict=True):
        for name, entry in document["predictors"].items():
            rows = entry["rows"]
            if rows:
                axis.plot([row["lookahead"] for row in rows], [row[key] for row in rows], "o-", label=name)
        axis.set(xlabel="lookahead (MoE layers)", title=title, xticks=[1, 2, 3, 4])
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="share of the routed experts", ylim=(0.3, 1.0))
    axes[0].axhline(0.85, color="grey", linewidth=0.8, linestyle=":")
    axes[1].legend(loc="lower left")
    figure.suptitle(
        f"Demo model, {document['tokens']} decoded tokens of {document['documents']} held-out chats, k = 8 of 32",
        fontsize=10,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
