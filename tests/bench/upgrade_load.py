"""Streams that ask a node again and again in rounds, and the figures of hints beside them as time goes by."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from promoe import Client
from promoe.node_report import HintQuality, StepPhase
from tests.bench.demo_model import chat

_SAMPLE_EVERY_S: Final = 0.5


@dataclass(frozen=True)
class RoundFigures:
    """One answer of every stream, all at once.

    Attributes:
        token_ids: of each stream's answer.
        tpots_s: seconds per token after the first, as the node measured them.
        num_failed: streams that were interrupted.
    """

    token_ids: tuple[tuple[int, ...], ...]
    tpots_s: tuple[float, ...]
    num_failed: int


def run_round(clients: Sequence[Client], prompts: Sequence[str], num_tokens: int) -> RoundFigures:
    """Every client asks its prompt; greedy, so that the answers can be compared."""

    def ask(client: Client, prompt: str) -> tuple[tuple[int, ...], float | None]:
        answer = client.complete(chat(prompt), max_tokens=num_tokens, ignore_eos=True)
        usage = answer.usage
        return tuple(answer.token_ids), None if usage is None else usage.tpot_s

    with ThreadPoolExecutor(len(clients)) as threads:
        asked = [threads.submit(ask, client, prompt) for client, prompt in zip(clients, prompts, strict=True)]
    answers = [future.result() for future in asked if future.exception() is None]
    return RoundFigures(
        token_ids=tuple(ids for ids, _ in answers),
        tpots_s=tuple(tpot_s for _, tpot_s in answers if tpot_s is not None),
        num_failed=len(asked) - len(answers),
    )


@dataclass(frozen=True)
class HintSample:
    """What the node had counted of decoding, by version, at one time."""

    at_s: float
    hinted: dict[str, int]
    correct: dict[str, int]
    ready: dict[str, int]


@dataclass
class HintWatch:
    """Samples of a node's scores, taken by a thread."""

    samples: list[HintSample] = field(default_factory=list)

    def good_pred(self) -> list[tuple[float, str, float]]:
        """By interval: its end, a version, and accuracy × fetch rate of that version's hints in it."""
        points: list[tuple[float, str, float]] = []
        for before, after in zip(self.samples, self.samples[1:], strict=False):
            for version, total in after.hinted.items():
                hinted = total - before.hinted.get(version, 0)
                if hinted > 0:
                    correct = after.correct[version] - before.correct.get(version, 0)
                    ready = after.ready[version] - before.ready.get(version, 0)
                    points.append((after.at_s, version, correct / hinted * ready / hinted))
        return points


@contextmanager
def watching(client: Client, began_s: float) -> Iterator[HintWatch]:
    """Looks at the node's scores twice a second until the block is left."""
    watch, done = HintWatch(), threading.Event()

    def look() -> None:
        while not done.wait(_SAMPLE_EVERY_S):
            qualities = client.cache_stats(deadline_s=30).hints.qualities
            watch.samples.append(_sample(time.perf_counter() - began_s, qualities))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()


def _sample(at_s: float, qualities: Sequence[HintQuality]) -> HintSample:
    sample = HintSample(at_s, {}, {}, {})
    for quality in qualities:
        if quality.phase is StepPhase.DECODE:
            for counts, count in (
                (sample.hinted, quality.hinted),
                (sample.correct, quality.correct),
                (sample.ready, quality.ready),
            ):
                counts[quality.version] = counts.get(quality.version, 0) + count
    return sample
