"""A predictor that knows the routing and is wrong as often as a learned one: hints of a given recall, calibrated.

Its rankings are drawn before anything is measured. Shapes: T tokens, L MoE layers, K experts per token, N = 2 K ranked.
"""

import heapq
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import numpy as np
import numpy.typing as npt

from compute_node.hint_inbox import HintInbox, ReceivedHint
from compute_node.layer_sample import LayerSampler
from compute_node.miss_watch import MissWatch
from promoe.hint import Float32Array, Hint, IdArray, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.model_spec import ModelSpec
from tests.bench.hint_sources import HintSource, InProcessHints
from tests.bench.structured_routing import RoutedConversation

RECALLS: Final[Mapping[int, float]] = {2: 0.85, 3: 0.82}
"""By lookahead: of the first K hinted experts."""

FIRST_LAYERS_RECALL: Final = 0.70
"""Of the next step's first layers, hinted from the last output; assumed."""

RECALL_SPREAD: Final = 0.12
"""How much surer than the average the first of the K is, and how much less sure the last."""

FOUND_LATER: Final = 0.5
"""Share of what the first K miss that the next K have."""


def scores_of(recall: float, experts_per_token: int) -> Float32Array:
    """(N,) descending: how often the expert in each place is right."""
    sure_K = np.linspace(recall + RECALL_SPREAD, recall - RECALL_SPREAD, experts_per_token)
    left_K = np.linspace(1.8, 0.2, experts_per_token) * (1 - recall) * FOUND_LATER
    scores_N: Float32Array = np.concatenate((np.minimum(sure_K, 1), left_K)).astype(np.float32)
    return scores_N


def noisy_ranking(
    routed_K: npt.NDArray[np.int64], num_experts: int, scores_N: Float32Array, generator: np.random.Generator
) -> IdArray:
    """(N,) experts; the one in each place is routed with the place's score."""
    num_sure = len(routed_K)
    is_right_N = np.zeros(len(scores_N), bool)
    is_right_N[:num_sure] = generator.random(num_sure) < scores_N[:num_sure]
    found = generator.binomial(num_sure - int(is_right_N.sum()), FOUND_LATER)
    places_K = scores_N[num_sure:].astype(np.float64)
    is_right_N[num_sure + generator.choice(num_sure, found, replace=False, p=places_K / places_K.sum())] = True
    right, wrong = generator.permutation(routed_K), np.setdiff1d(np.arange(num_experts), routed_K)
    ranking_N = np.empty(len(scores_N), np.uint16)
    ranking_N[is_right_N] = right[: is_right_N.sum()]
    ranking_N[~is_right_N] = generator.choice(wrong, (~is_right_N).sum(), replace=False)
    return ranking_N


class NoisyOracle:
    """Knows conversations, which each session is asked in the same order.

    Args:
        conversations: in the order they are asked.
        num_experts: of a layer.
    """

    def __init__(self, conversations: Sequence[RoutedConversation], num_experts: int) -> None:
        self.version = PredictorVersion(
            "noisy-oracle@1", "noisy-oracle", ObservedKind.LAYER_INPUT, tuple(RECALLS), calibrated=True,
            wants_routing=False,
        )  # fmt: skip
        self.experts_per_token = conversations[0].ids_TLK.shape[2]
        self.num_layers = conversations[0].ids_TLK.shape[1]
        self.recalls = {**RECALLS, 0: FIRST_LAYERS_RECALL}
        self.scores = {key: scores_of(recall, self.experts_per_token) for key, recall in self.recalls.items()}
        self.num_prompt = [len(each.prompt) for each in conversations]
        generator = np.random.default_rng(2)
        self.rankings: list[dict[tuple[int, int, int], IdArray]] = [
            {
                (token, layer, key): noisy_ranking(each.ids_TLK[token, layer], num_experts, scores_N, generator)
                for token in range(len(each.prompt), len(each.ids_TLK))
                for layer in range(self.num_layers)
                for key, scores_N in self.scores.items()
            }
            for each in conversations
        ]

    def open_session(self) -> "NoisyOracleSession":
        """See Predictor."""
        return NoisyOracleSession(self)


class NoisyOracleSession:
    """Follows one node through the conversations."""

    def __init__(self, oracle: NoisyOracle) -> None:
        self._oracle = oracle
        self._conversation = -1
        self._token = 0
        self._is_prefill = False

    def begin_step(self, start: StepStart) -> None:
        """A prompt begins the next conversation."""
        self._is_prefill = start.spans[0].is_prefill
        if self._is_prefill:
            self._conversation += 1
            self._token = self._oracle.num_prompt[self._conversation] - 1
        else:
            self._token += 1

    def observe(self, observation: Observation) -> Sequence[Hint]:
        """For layers of this token, and after the last layer for the first ones of the next token."""
        oracle, layer = self._oracle, observation.layer
        if layer == oracle.num_layers:
            hints = [self._hint(observation, 1, target, 0) for target in range(min(max(RECALLS), oracle.num_layers))]
        elif self._is_prefill:
            return []
        else:
            hints = [
                self._hint(observation, 0, layer + lookahead, lookahead)
                for lookahead in RECALLS
                if layer + lookahead < oracle.num_layers
            ]
        return [hint for hint in hints if hint is not None]

    def end_requests(self, request_ids: Sequence[str]) -> None:
        """Nothing is kept for requests."""

    def _hint(self, observation: Observation, later: int, layer: int, key: int) -> Hint | None:
        oracle = self._oracle
        ranking_N = oracle.rankings[self._conversation].get((self._token + later, layer, key))
        if ranking_N is None:
            return None  # the conversation ends here
        return Hint(
            observation.step + later, layer, observation.step, observation.layer, ranking_N, oracle.scores[key],
            oracle.experts_per_token, oracle.version.version,
        )  # fmt: skip


@dataclass(frozen=True, order=True)
class _Delivery:
    due_s: float
    number: int
    received: ReceivedHint


class DelayedInbox(HintInbox):
    """Hands hints on to another inbox after the time that a predictor in a process of its own takes."""

    def __init__(self, inbox: HintInbox, latency_s: float) -> None:
        super().__init__()
        self._inbox = inbox
        self._latency_s = latency_s
        self._changed = threading.Condition()
        self._deliveries: list[_Delivery] = []
        self._num_put = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._deliver, name="delayed-hints")

    def put(self, received: ReceivedHint) -> None:
        """Later."""
        with self._changed:
            self._num_put += 1
            late = ReceivedHint(received.hint, self._latency_s)
            heapq.heappush(self._deliveries, _Delivery(perf_counter() + self._latency_s, self._num_put, late))
            self._changed.notify()

    @contextmanager
    def open(self) -> Iterator[HintInbox]:
        """Delivers within the context."""
        self._thread.start()
        try:
            yield self
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify()
            self._thread.join()

    def _deliver(self) -> None:
        with self._changed:
            while not self._is_closed:
                wait_s = self._deliveries[0].due_s - perf_counter() if self._deliveries else None
                if wait_s is None or wait_s > 0:
                    self._changed.wait(wait_s)
                else:
                    self._inbox.put(heapq.heappop(self._deliveries).received)


def hinted_by(oracle: NoisyOracle, latency_s: float) -> HintSource:
    """Hidden states are copied to the host and waited for as for a real predictor; hints come `latency_s` later."""

    @contextmanager
    def open_hints(spec: ModelSpec, inbox: HintInbox, misses: MissWatch) -> Iterator[LayerSampler]:
        with DelayedInbox(inbox, latency_s).open() as delayed:
            caller = InProcessHints(oracle, delayed, misses)
            caller.start()
            try:
                yield caller
            finally:
                caller.close()

    return open_hints
