"""The node's side of a predictor's stream without a model: an observer, a client and its inbox, driven by the test."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from compute_node.device.cpu import CpuDevice
from compute_node.hint_client import HintClient, Patience, PredictorState
from compute_node.hint_inbox import HintInbox, ReceivedHint
from compute_node.layer_observer import LayerObserver
from compute_node.miss_watch import MissLevel
from promoe.hint import StepSpan, StepStart
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec
from tests.running_store import wait_until

NUM_LAYERS, NUM_EXPERTS, HIDDEN = 4, 8, 6
SPEC = ModelSpec(
    name="tiny",
    family="qwen2_moe",
    fingerprint="f" * 16,
    num_moe_layers=NUM_LAYERS,
    num_experts=NUM_EXPERTS,
    experts_per_token=2,
    hidden_size=HIDDEN,
    vocab_size=10,
    max_context_tokens=10,
    layout=ExpertLayout.of(Dtype.BFLOAT16, {"w": (2, 2)}),
)
PATIENCE = Patience(first_retry_s=0.01, last_retry_s=0.05, welcome_s=20.0, settled_s=60.0)
ENGINE_DEADLINE_S = 2.0
"""For hundreds of calls that wait for nobody, on a machine that is busy."""


class Node:
    """The node's side: an engine thread's observer, a client and its inbox."""

    def __init__(self, endpoint: str, patience: Patience = PATIENCE) -> None:
        self.inbox = HintInbox(100_000)
        self.misses = MissLevel.FEW
        self.client = HintClient(endpoint, SPEC, self.inbox, patience, lambda: self.misses)
        self.inbox.look_for_more, self.inbox.flush = self.client.look, self.client.flush
        self.observer = LayerObserver(NUM_LAYERS, CpuDevice(), [self.client])
        self.step = 0
        self.engine_s = 0.0
        self.received: list[ReceivedHint] = []

    def run_step(self, num_tokens: int = 1, ended: tuple[str, ...] = ()) -> None:
        """One forward pass as the engine's thread announces it; its time is added to `engine_s`."""
        began_s = time.perf_counter()
        self.step += 1
        self.observer.begin_step(StepStart(self.step, (StepSpan("r", num_tokens, num_tokens > 1),), ended))
        hidden_TD = torch.full((num_tokens, HIDDEN), float(self.step))
        for layer in range(NUM_LAYERS):
            self.observer.layer_input(layer, hidden_TD + layer)
            self.observer.routed(layer, np.full((num_tokens, 2), layer), hidden_TD, None)
        self.observer.last_output(hidden_TD + NUM_LAYERS)
        self.engine_s += time.perf_counter() - began_s

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Looks around without a step, until the condition holds."""

        def looked() -> bool:
            self.inbox.look_for_more()
            return condition()

        wait_until(looked)

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Steps, until the condition holds."""

        def stepped() -> bool:
            self.run_step()
            self.received += self.inbox.drain()
            return condition()

        wait_until(stepped)

    @property
    def is_connected(self) -> bool:
        return self.client.state is PredictorState.CONNECTED

    def wait_for_state(self, state: PredictorState) -> None:
        wait_until(lambda: self.client.state is state)


@contextmanager
def node_at(endpoint: str, patience: Patience = PATIENCE) -> Iterator[Node]:
    node = Node(endpoint, patience)
    node.client.start()
    try:
        yield node
    finally:
        began_s = time.perf_counter()
        node.client.close()
        assert time.perf_counter() - began_s < ENGINE_DEADLINE_S, "closing waits for nobody"
    assert node.engine_s < ENGINE_DEADLINE_S, "the engine's thread waits for nobody"
    assert node.client.state is PredictorState.AWAY


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the node said; gRPC tells of streams that ended under a scripted service, too."""
    records = [record for record in caplog.records if record.name.startswith("compute_node")]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]
