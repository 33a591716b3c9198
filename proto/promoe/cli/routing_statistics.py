"""What routing is like: how skewed, how repetitive, and how well simple estimators foresee it.

Shapes: L MoE layers, N tokens, K experts per token, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from promoe.cli.trace_routing import IndexArray, TokenRouting
from promoe.hint import IdArray

MAX_LOOKAHEAD: Final = 4
_BUSIEST_SHARE: Final = 0.25

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerRouting:
    """One layer's routing in one phase; None where there were too few tokens to say.

    Attributes:
        entropy: of the experts' frequencies, 1 is uniform.
        busiest_share: of all accesses, that of the busiest quarter of the experts.
        overlap: share of a token's experts that the token before it had, too.
        chance_overlap: the same for two tokens that have nothing to do with each other, given the frequencies.
        frequency: recall of the K most frequent experts of the other documents.
        transition: recall of the K likeliest experts given those of the layer `lookahead` layers before, learned from
            the other documents; by lookahead from 1 up, None where there is no such layer.
    """

    entropy: float | None
    busiest_share: float | None
    overlap: float | None
    chance_overlap: float | None
    frequency: float | None
    transition: tuple[float | None, ...]


def routing_statistics(routing: TokenRouting, num_experts: int) -> list[LayerRouting]:
    """By layer."""
    current, before = routing.successors()
    learned, held_out = _split(routing.request_N)
    hots_LNE = [_hots(ids_NK, num_experts) for ids_NK in routing.topk_ids_LNK]
    layers: list[LayerRouting] = []
    for layer, ids_NK in enumerate(routing.topk_ids_LNK):
        hot_NE = hots_LNE[layer]
        counts_E = hot_NE.sum(axis=0).astype(np.float64)
        transition = tuple(
            _transition_recall(hots_LNE[layer - lookahead], ids_NK, learned, held_out) if layer >= lookahead else None
            for lookahead in range(1, MAX_LOOKAHEAD + 1)
        )
        layers.append(
            LayerRouting(
                entropy=_entropy(counts_E),
                busiest_share=_busiest_share(counts_E),
                overlap=_recall(hot_NE[before], ids_NK[current]),
                chance_overlap=_chance_overlap(counts_E, routing.num_tokens, ids_NK.shape[1]),
                frequency=_frequency_recall(hot_NE, ids_NK, learned, held_out),
                transition=transition,
            )
        )
    return layers


def reuse_distances(
    accesses: Sequence[tuple[bool, tuple[int, ...]]], num_experts: int
) -> tuple[IndexArray, IndexArray]:
    """How many other experts of the layer were used since an expert's last use: histograms for prefill and decode.

    The last entry counts first uses. The sum up to n, n excluded, divided by the total is the hit rate of LRU with n
    slots, where a step's experts are used one after the other.

    Args:
        accesses: of one layer, per step: whether it was prefill, and the experts.
    """
    prefill, decode = np.zeros(num_experts + 1, np.int64), np.zeros(num_experts + 1, np.int64)
    recent: list[int] = []
    for is_prefill, experts in accesses:
        histogram = prefill if is_prefill else decode
        for expert in experts:
            distance = recent.index(expert) if expert in recent else num_experts
            histogram[distance] += 1
            if distance < num_experts:
                del recent[distance]
            recent.insert(0, expert)
    return prefill, decode


def lru_hit_rate(histogram: IndexArray, num_slots: int) -> float | None:
    """Of per-layer LRU; see `reuse_distances`."""
    total = int(histogram.sum())
    return float(histogram[:-1][:num_slots].sum()) / total if total else None


def mean(values: Sequence[float | None]) -> float | None:
    """Over those that are there."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _hots(ids_NK: IdArray, num_experts: int) -> npt.NDArray[np.bool_]:
    hot_NE = np.zeros((len(ids_NK), num_experts), dtype=bool)
    np.put_along_axis(hot_NE, ids_NK.astype(np.int64), values=True, axis=1)
    return hot_NE


def _split(request_N: IndexArray) -> tuple[IndexArray, IndexArray]:
    """Every second document to learn from, the others to be asked about; a single one is halved."""
    is_held_out = request_N % 2 == 1
    if not is_held_out.any() or is_held_out.all():
        is_held_out = np.arange(len(request_N)) >= len(request_N) // 2
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _entropy(counts_E: FloatArray) -> float | None:
    total = counts_E.sum()
    if not total or len(counts_E) < 2:
        return None
    shares = counts_E[counts_E > 0] / total
    return float(-(shares * np.log(shares)).sum() / math.log(len(counts_E)))


def _busiest_share(counts_E: FloatArray) -> float | None:
    num_busiest = max(1, round(len(counts_E) * _BUSIEST_SHARE))
    total = counts_E.sum()
    return float(np.sort(counts_E)[-num_busiest:].sum() / total) if total else None


def _chance_overlap(counts_E: FloatArray, num_tokens: int, experts_per_token: int) -> float | None:
    if not num_tokens:
        return None
    return float(((counts_E / num_tokens) ** 2).sum() / experts_per_token)


def _recall(guessed_NE: npt.NDArray[np.bool_], ids_NK: IdArray) -> float | None:
    """Share of the routed experts that were guessed."""
    if not len(ids_NK):
        return None
    return float(np.take_along_axis(guessed_NE, ids_NK.astype(np.int64), axis=1).mean())


def _frequency_recall(
    hot_NE: npt.NDArray[np.bool_], ids_NK: IdArray, learned: IndexArray, held_out: IndexArray
) -> float | None:
    if not len(learned) or not len(held_out):
        return None
    guessed_E = _best(hot_NE[learned].sum(axis=0)[None].astype(np.float64), ids_NK.shape[1])
    return _recall(np.broadcast_to(guessed_E, (len(held_out), hot_NE.shape[1])), ids_NK[held_out])


def _transition_recall(
    source_NE: npt.NDArray[np.bool_], ids_NK: IdArray, learned: IndexArray, held_out: IndexArray
) -> float | None:
    """Scores are the sum over the source's experts a of P(e | a)."""
    if not len(learned) or not len(held_out):
        return None
    num_experts = source_NE.shape[1]
    source = source_NE[learned].astype(np.float64)
    together_EE = source.T @ _hots(ids_NK[learned], num_experts)
    # One count for nothing seen, so that a rare expert does not decide.
    likely_EE = together_EE / (source.sum(axis=0)[:, None] + 1)
    scores_NE = source_NE[held_out].astype(np.float64) @ likely_EE
    return _recall(_best(scores_NE, ids_NK.shape[1]), ids_NK[held_out])


def _best(scores_NE: FloatArray, num_best: int) -> npt.NDArray[np.bool_]:
    chosen = np.argpartition(-scores_NE, num_best - 1, axis=1)[:, :num_best]
    best_NE = np.zeros(scores_NE.shape, dtype=bool)
    np.put_along_axis(best_NE, chosen, values=True, axis=1)
    return best_NE
