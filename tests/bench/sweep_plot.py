"""The picture of a cache rate sweep, from its JSON."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt


def plot_sweep(report: Path, picture: Path) -> None:
    """Left: TPOT with its floor; right: hit rates with the offline optimum."""
    document = json.loads(report.read_text())
    emulated = document["emulated"]["rows"]
    memcpy = document["memcpy"]["rows"]
    rates = [row["cache_rate"] for row in emulated]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)

    left.plot(rates, [row["tpot_s"]["median"] * 1e3 for row in emulated], "o-", label="LRU, emulated link")
    left.plot(rates, [row["floor_tpot_s"] * 1e3 for row in emulated], ":", color="black", label="floor, emulated link")
    left.plot(rates, [row["tpot_s"]["median"] * 1e3 for row in memcpy], "s-", label="LRU, memcpy link")
    left.axhline(emulated[-1]["all_resident_tpot_s"] * 1e3, color="grey", linewidth=0.8, label="all resident")
    left.set(xlabel="cache rate", ylabel="TPOT (ms)", ylim=(0, None), title="Time per output token")
    left.legend()

    right.plot(rates, [row["hit_rate"] for row in emulated], "o-", label="LRU")
    right.plot(
        rates, [row["belady_hit_rate"] for row in emulated], ":", color="black", label="Belady (offline optimum)"
    )
    right.set(xlabel="cache rate", ylabel="decode hit rate", ylim=(0, 1.02), title="Experts that were there")
    right.legend()
    link_mb_per_s = document["emulated"]["link_bytes_per_s"] / 1e6
    figure.suptitle(f"Demo model, batch 1, {document['cpu']}, emulated link {link_mb_per_s:.0f} MB/s", fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
