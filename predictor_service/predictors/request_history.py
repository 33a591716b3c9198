"""What a trained predictor remembers of each running request: where its last token was routed, and what is popular.

Training computes the same features with the same constants, so that a predictor serves what it was trained on.
Shapes: L MoE layers, R sampled rows (tokens), K experts per token, E experts; 3 features: ROUTED, POPULAR, SIGNATURE.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from promoe.hint import Float32Array, IdArray, StepStart

ROUTED: Final = 0
"""1 where the request's last token was routed to the expert."""
POPULAR: Final = 1
"""Decayed share of the request's tokens that were."""
SIGNATURE: Final = 2
"""What the layer's router made of the request's last token, in units of its spread."""
NUM_FEATURES: Final = 3

MOST_REQUESTS: Final = 1024
"""That are remembered; the oldest are forgotten, since their end may never be told."""

POPULARITY_DECAY: Final = 0.97
"""Per token. .97 was better than .8 and .9 alone, and beside ROUTED the shorter ones add nothing."""


def requests_of_rows(start: StepStart, rows: Sequence[int]) -> tuple[str, ...]:
    """The request of each of the step's rows; rows ascend."""
    requests: list[str] = []
    spans = iter(start.spans)
    end = 0
    request_id = ""
    for row in rows:
        while row >= end:
            span = next(spans)
            request_id, end = span.request_id, end + span.num_tokens
        requests.append(request_id)
    return tuple(requests)


class RequestHistory:
    """The features of the requests of one session.

    Args:
        num_layers, num_experts, experts_per_token: of the model.
    """

    def __init__(self, num_layers: int, num_experts: int, experts_per_token: int) -> None:
        self._unknown_L3E = np.zeros((num_layers, NUM_FEATURES, num_experts), np.float32)
        self._unknown_L3E[:, POPULAR] = experts_per_token / num_experts
        self._of_request: dict[str, Float32Array] = {}

    def __len__(self) -> int:
        return len(self._of_request)

    def learn_routing(self, layer: int, requests: Sequence[str], topk_ids_RK: IdArray) -> None:
        """The rows' routing, rows of one request in the order of its tokens."""
        for request_id, topk_ids_K in zip(requests, topk_ids_RK, strict=True):
            routed_E, popular_E, _ = self._entry(request_id)[layer]
            routed_E[:] = 0
            routed_E[topk_ids_K] = 1
            popular_E *= POPULARITY_DECAY
            popular_E[topk_ids_K] += 1 - POPULARITY_DECAY

    def learn_signature(self, layer: int, requests: Sequence[str], signature_RE: Float32Array) -> None:
        """The rows' signatures at this layer."""
        for request_id, signature_E in zip(requests, signature_RE, strict=True):
            self._entry(request_id)[layer, SIGNATURE] = signature_E

    def learn_requests(self, other: "RequestHistory", *, with_signatures: bool) -> None:
        """Copies of what another session knows of requests unknown here; signatures only where they mean the same."""
        for request_id, known_L3E in other._of_request.items():
            if request_id not in self._of_request:
                entry_L3E = self._entry(request_id)
                entry_L3E[:] = known_L3E
                if not with_signatures:
                    entry_L3E[:, SIGNATURE] = 0

    def features(self, request_id: str, layers: np.ndarray) -> Float32Array:
        """(layers, 3E)"""
        entry_L3E = self._of_request.get(request_id, self._unknown_L3E)
        features: Float32Array = entry_L3E[layers].reshape(len(layers), -1)
        return features

    def forget(self, request_ids: Sequence[str]) -> None:
        """These requests are over."""
        for request_id in request_ids:
            self._of_request.pop(request_id, None)

    def _entry(self, request_id: str) -> Float32Array:
        entry_L3E = self._of_request.get(request_id)
        if entry_L3E is None:
            while len(self._of_request) >= MOST_REQUESTS:
                del self._of_request[next(iter(self._of_request))]
            entry_L3E = self._of_request[request_id] = self._unknown_L3E.copy()
        return entry_L3E
