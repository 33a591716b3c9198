"""The ablation's figures: what was measured of one link and cache rate, beside its limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypedDict

from compute_node.replay.belady import PhaseHits
from tests.bench.report import Sample, median_ratio
from tests.bench.side_by_side import ChatFigures, PhaseFigures


@dataclass(frozen=True)
class Limits:
    """What nobody can beat at one link and cache rate, and what the figures are divided by.

    Attributes:
        resident: the same chats with every expert on the device, in the same rounds.
        optimum: Belady's hits with slots shared by all layers.
        layer_optimum: Belady's hits with equal slots for every layer.
        link_bytes_per_s: of the emulated link.
        blob_nbytes: of an expert.
    """

    resident: Sequence[ChatFigures]
    optimum: PhaseHits
    layer_optimum: PhaseHits
    link_bytes_per_s: float
    blob_nbytes: int

    @property
    def floor_tpot_s(self) -> float:
        """Seconds per token: computing, or moving the least bytes, whichever takes longer."""
        num_accesses = sum(chat.decode.hits + chat.decode.misses for chat in self.resident)
        num_tokens = sum(len(chat.run.decode_s) for chat in self.resident)
        nbytes = (1 - self.optimum.decode.hit_rate) * num_accesses / num_tokens * self.blob_nbytes
        return max(_tpot(self.resident).median, nbytes / self.link_bytes_per_s)

    @property
    def floor_prefill_s(self) -> float:
        """Seconds per prefill."""
        num_accesses = sum(chat.prefill.hits + chat.prefill.misses for chat in self.resident)
        nbytes = (1 - self.optimum.prefill.hit_rate) * num_accesses / len(self.resident) * self.blob_nbytes
        return max(_prefill(self.resident).median, nbytes / self.link_bytes_per_s)


class AblationRow(TypedDict):
    """One variant's figures, as they are written down. Ratios are medians over neighbours in time."""

    variant: str
    tpot_s: dict[str, object]
    tpot_over_floor: float
    speedup_over_lru: float
    prefill_s: dict[str, object]
    prefill_over_floor: float
    prefill_speedup_over_lru: float
    decode: dict[str, object]
    prefill: dict[str, object]
    good_pred: float | None


class AblationGroup(TypedDict):
    """All rows of one link and cache rate."""

    link_share: float
    link_bytes_per_s: float
    cache_rate: float
    all_resident_tpot_s: float
    all_resident_prefill_s: float
    floor_tpot_s: float
    floor_prefill_s: float
    belady_decode_hit_rate: float
    belady_prefill_hit_rate: float
    belady_decode_hit_rate_per_layer: float
    rows: list[AblationRow]


@dataclass(frozen=True)
class Measured:
    """One variant's chats in the order of the rounds. `good_pred`: of its decode hints; None without hints."""

    chats: Sequence[ChatFigures]
    good_pred: float | None


def make_group(link_share: float, cache_rate: float, measured: dict[str, Measured], limits: Limits) -> AblationGroup:
    """Args: measured: by variant; the first one is what the others are compared with."""
    base = next(iter(measured.values())).chats
    return AblationGroup(
        link_share=link_share,
        link_bytes_per_s=limits.link_bytes_per_s,
        cache_rate=cache_rate,
        all_resident_tpot_s=_tpot(limits.resident).median,
        all_resident_prefill_s=_prefill(limits.resident).median,
        floor_tpot_s=limits.floor_tpot_s,
        floor_prefill_s=limits.floor_prefill_s,
        belady_decode_hit_rate=limits.optimum.decode.hit_rate,
        belady_prefill_hit_rate=limits.optimum.prefill.hit_rate,
        belady_decode_hit_rate_per_layer=limits.layer_optimum.decode.hit_rate,
        rows=[_row(name, one, base, limits) for name, one in measured.items()],
    )


def _row(name: str, measured: Measured, base: Sequence[ChatFigures], limits: Limits) -> AblationRow:
    chats = measured.chats
    tpot, prefill = _tpot(chats), _prefill(chats)
    return AblationRow(
        variant=name,
        tpot_s=tpot.as_dict(),
        tpot_over_floor=tpot.median / limits.floor_tpot_s,
        speedup_over_lru=median_ratio(_tpot(base).values, tpot.values),
        prefill_s=prefill.as_dict(),
        prefill_over_floor=prefill.median / limits.floor_prefill_s,
        prefill_speedup_over_lru=median_ratio(_prefill(base).values, prefill.values),
        decode=_phase(
            [chat.decode for chat in chats],
            sum(len(chat.run.decode_s) for chat in chats),
            sum(sum(chat.run.decode_s) for chat in chats),
        ),
        prefill=_phase([chat.prefill for chat in chats], len(chats), sum(prefill.values)),
        good_pred=measured.good_pred,
    )


def _phase(figures: Sequence[PhaseFigures], num_units: int, elapsed_s: float) -> dict[str, object]:
    """Bytes are per token in decode and per prompt in prefill."""
    hits, misses = sum(one.hits for one in figures), sum(one.misses for one in figures)
    stall_s, late_s = sum(one.stall_s for one in figures), sum(one.late_stall_s for one in figures)
    reasons = sorted({reason for one in figures for reason in one.nbytes_by_reason})
    return {
        "hit_rate": hits / max(1, hits + misses),
        "bytes_by_reason": {
            reason: sum(one.nbytes_by_reason.get(reason, 0) for one in figures) / num_units for reason in reasons
        },
        "stall_share": stall_s / elapsed_s,
        "late_prefetch_stall_share": late_s / elapsed_s,
    }


def _tpot(chats: Sequence[ChatFigures]) -> Sample:
    return Sample(tuple(chat.run.tpot_s for chat in chats))


def _prefill(chats: Sequence[ChatFigures]) -> Sample:
    return Sample(tuple(chat.run.prefill_s for chat in chats))


_HEADING: Final = (
    "| | TPOT ms | × floor | × LRU's speed | prefill ms | × floor | decode hits | prefill hits | MB/token | stall "
    "| GoodPred |"
)


def print_group(group: AblationGroup) -> None:
    """A Markdown table."""
    print(
        f"\n### cache rate {group['cache_rate']}, {group['link_share']:g}x link "
        f"({group['link_bytes_per_s'] / 1e6:.0f} MB/s)\n"
    )
    print(_HEADING)
    print("|" + "---|" * (_HEADING.count("|") - 1))
    for row in group["rows"]:
        print(_line(row))
    print(
        f"| all resident | {group['all_resident_tpot_s'] * 1e3:.1f} | | | "
        f"{group['all_resident_prefill_s'] * 1e3:.0f} | | 1.000 | 1.000 | 0.00 | | |"
    )
    print(
        f"| floor (Belady) | {group['floor_tpot_s'] * 1e3:.1f} | 1.00 | | {group['floor_prefill_s'] * 1e3:.0f} | 1.00 "
        f"| {group['belady_decode_hit_rate']:.3f} | {group['belady_prefill_hit_rate']:.3f} | | | |",
        flush=True,
    )


def _line(row: AblationRow) -> str:
    decode, prefill = row["decode"], row["prefill"]
    by_reason = decode["bytes_by_reason"]
    assert isinstance(by_reason, dict), "bytes by reason"
    good_pred = "" if row["good_pred"] is None else f"{row['good_pred']:.3f}"
    tpot_ms, prefill_ms = (float(str(row[name]["median"])) * 1e3 for name in ("tpot_s", "prefill_s"))
    return (
        f"| {row['variant']} | {tpot_ms:.1f} | {row['tpot_over_floor']:.2f} | {row['speedup_over_lru']:.2f} | "
        f"{prefill_ms:.0f} | {row['prefill_over_floor']:.2f} | {decode['hit_rate']:.3f} | {prefill['hit_rate']:.3f} | "
        f"{sum(by_reason.values()) / 1e6:.2f} | {decode['stall_share']:.1%} | {good_pred} |"
    )
