"""What a predictor's session knows of the running step and the one before it.

Shapes: R sampled rows (tokens), K experts per token, E experts.
"""

import numpy as np

from promoe.hint import Float32Array, IdArray, Observation, StepStart


class StepState:
    """Follows the events of one session.

    Attributes:
        start: the running step; None before the first.
        routings: of the running step's rows, as far as they are known, by layer.
        former_routings: of the step before, if its rows were the same requests' tokens, one each; else empty.
    """

    def __init__(self) -> None:
        self.start: StepStart | None = None
        self.routings: dict[int, IdArray] = {}
        self.former_routings: dict[int, IdArray] = {}

    def begin(self, start: StepStart) -> None:
        """The next step; every row of a decode step continues the same row of an equal one before it."""
        former, self.start = self.start, start
        continues = former is not None and former.spans == start.spans and not _has_prefill(start)
        self.former_routings = self.routings if continues else {}
        self.routings = {}

    def learn(self, observation: Observation) -> list[int]:
        """Takes the observation's routings in; returns their layers."""
        for routing in observation.routings:
            self.routings[routing.layer] = routing.topk_ids_RK
        return [routing.layer for routing in observation.routings]

    def num_tokens_at(self, step: int) -> int:
        """Of the running step; the next one is taken to decode one token of each request of this one."""
        assert self.start is not None, "a step has begun"
        return self.start.num_tokens if step == self.start.step else len(self.start.spans)

    @property
    def is_prefill(self) -> bool:
        """Part of the running step's tokens are a prompt's: nearly every expert is needed, and no hint helps."""
        assert self.start is not None, "a step has begun"
        return _has_prefill(self.start)


def _has_prefill(start: StepStart) -> bool:
    """True when part of the step's tokens are a prompt's."""
    return any(span.is_prefill for span in start.spans)


def multi_hot(topk_ids_RK: IdArray, num_experts: int) -> Float32Array:
    """(R, E): 1 where the row was routed to the expert."""
    num_rows = len(topk_ids_RK)
    hot_RE = np.zeros((num_rows, num_experts), np.float32)
    hot_RE[np.arange(num_rows)[:, None], topk_ids_RK] = 1.0
    return hot_RE
