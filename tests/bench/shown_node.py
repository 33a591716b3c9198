"""A node's side of the predictor's stream without a model: shows recorded steps, a layer at a time, as an engine does.

Between two layers it looks for hints without a rest, as the engine thread looks around while it computes: one core is
busy all the time, and a hint is found when it comes.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import torch

from compute_node.device.cpu import CpuDevice
from compute_node.hint_client import HintClient, PredictorState
from compute_node.hint_inbox import HintInbox
from compute_node.layer_observer import LayerObserver
from predictor_service.trace_playback import RecordedStep
from promoe.model_spec import ModelSpec
from tests.running_store import wait_until

_CAPACITY: Final = 1 << 16
_CONNECT_S: Final = 60.0


class ShownNode:
    """Shows steps to one predictor service.

    Args:
        endpoint: of the service.
        spec: of the model that was recorded.
    """

    def __init__(self, endpoint: str, spec: ModelSpec) -> None:
        self._inbox = HintInbox(_CAPACITY)
        self.client = HintClient(endpoint, spec, self._inbox)
        self._inbox.look_for_more, self._inbox.flush = self.client.look, self.client.flush
        self._observer = LayerObserver(spec.num_moe_layers, CpuDevice(), [self.client])

    def show(self, steps: Sequence[RecordedStep], layer_s: float) -> list[float]:
        """All steps, each layer taking as long; returns the latencies of decoded steps' hints, in seconds."""
        latencies: list[float] = []
        for step in steps:
            self._observer.begin_step(replace(step.start, ended_request_ids=step.ended_request_ids))
            due_s = time.perf_counter()
            for event in step.layers:
                assert event.router_input_RD is not None, "recorded with what routers read"
                self._observer.routed(event.layer, event.topk_ids_TK, torch.from_numpy(event.router_input_RD), None)
                due_s += layer_s
                found = self._hints_until(due_s)
                if not step.is_prefill:
                    latencies += found
        return latencies

    def _hints_until(self, due_s: float) -> list[float]:
        found: list[float] = []
        while time.perf_counter() < due_s:
            found += [hint.latency_s for hint in self._inbox.drain() if hint.latency_s is not None]
        return found


@contextmanager
def shown_node(endpoint: str, spec: ModelSpec) -> Iterator[ShownNode]:
    """Connected; leaves at the end of the block."""
    node = ShownNode(endpoint, spec)
    node.client.start()
    try:
        wait_until(lambda: node.client.state is PredictorState.CONNECTED, _CONNECT_S)
        yield node
    finally:
        node.client.close()
