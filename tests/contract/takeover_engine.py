"""An engine thread that listens to predictors over a link, and scripted services at endpoints of their own."""

import functools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from compute_node.device.cpu import CpuDevice
from compute_node.hint_inbox import HintInbox, ReceivedHint
from compute_node.hint_link import HintLink
from compute_node.layer_observer import LayerObserver
from compute_node.miss_watch import MissLevel
from compute_node.predictor_trial import TakeoverTimes
from compute_node.takeovers import Takeovers
from promoe.hint import ObservedKind, PredictorVersion, StepSpan, StepStart
from promoe.node_report import PredictorSwitch
from promoe.v1 import predictor_pb2 as pb
from tests.contract.hint_node import ENGINE_DEADLINE_S, HIDDEN, NUM_LAYERS, PATIENCE, SPEC
from tests.running_store import wait_until
from tests.scripted_predictor import Response, Script, ScriptedPredictor, good_hint, hints, welcome

TIMES = TakeoverTimes(handshake_s=20.0, idle_s=20.0, warm_up_s=20.0, drain_s=20.0, trial_s=60.0)
"""Long: what happens must be what happened, not that time was over."""

Outcome: TypeAlias = "Future[PredictorSwitch | None]"


class Engine:
    """An engine thread that never stops making steps, and the link that it watches."""

    def __init__(self, endpoint: str, times: TakeoverTimes = TIMES) -> None:
        self.inbox = HintInbox(100_000)
        self.misses = MissLevel.FEW
        self.link = HintLink(SPEC, self.inbox, PATIENCE, lambda: self.misses)
        self.takeovers = Takeovers(self.link, endpoint, times)
        self.observer = LayerObserver(NUM_LAYERS, CpuDevice(), self.link.samplers)
        self.step = 0
        self.longest_step_s = 0.0
        self.received: list[ReceivedHint] = []
        self._is_running = threading.Event()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def run(self) -> None:
        """Steps from now on."""
        self._is_running.set()

    def pause(self) -> None:
        """No more than the running one."""
        self._is_running.clear()

    def connect(self, endpoint: str) -> Outcome:
        return self.takeovers.connect(endpoint, "ann", "to see")

    def hints_of(self, name: str) -> list[ReceivedHint]:
        """Those that came so far."""
        return [received for received in list(self.received) if received.hint.version == name]

    def start(self) -> None:
        self.takeovers.start()
        self._thread.start()

    def end(self) -> None:
        self._ends.set()
        self._is_running.set()
        self._thread.join()
        self.takeovers.close()

    def _run(self) -> None:
        while self._is_running.wait() and not self._ends.is_set():
            began_s = time.perf_counter()
            self.make_step()
            self.longest_step_s = max(self.longest_step_s, time.perf_counter() - began_s)
            time.sleep(0.001)  # the services are threads of this process, too

    def is_connected(self) -> bool:
        incumbent = self.link.roles.incumbent
        return incumbent is not None and incumbent.client.active is not None

    def make_awaited_step(self) -> set[str]:
        """A step on the caller's thread that is over when all its hints have come; whose they are."""
        self.make_step()
        wanted = {(self.step, layer) for layer in range(1, NUM_LAYERS)}

        def came() -> bool:
            self.received += self.inbox.drain()
            return wanted <= {(received.hint.step, received.hint.layer) for received in self.received}

        wait_until(came)
        return {received.hint.version for received in self.received if received.hint.step == self.step}

    def make_step(self) -> None:
        """What the engine thread does for one."""
        self.step += 1
        self.observer.begin_step(StepStart(self.step, (StepSpan("r", 1, False),)))
        hidden_TD = torch.full((1, HIDDEN), float(self.step))
        for layer in range(NUM_LAYERS):
            self.observer.layer_input(layer, hidden_TD)
            self.received += self.inbox.drain()
            self.observer.routed(layer, np.full((1, 2), layer), hidden_TD, None)
        self.observer.last_output(hidden_TD)
        self.received += self.inbox.drain()


@contextmanager
def engine_at(endpoint: str, times: TakeoverTimes = TIMES) -> Iterator[Engine]:
    engine = Engine(endpoint, times)
    engine.start()
    try:
        yield engine
    finally:
        engine.end()
    assert engine.longest_step_s < ENGINE_DEADLINE_S, "the engine's thread waits for nobody"


def hints_as(name: str, **changes: object) -> Script:
    """Answers each observation with one hint that is named after the service."""

    def script(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome(PredictorVersion(name, "scripted", ObservedKind.LAYER_INPUT, (1,), True, True))
        for request in requests:
            if request.HasField("observation") and request.observation.layer < NUM_LAYERS - 1:
                hint = good_hint(request.observation, name)
                for field, value in changes.items():
                    hint.ClearField(field)  # type: ignore[arg-type]
                    hint.MergeFrom(pb.Hint(**{field: value}))  # type: ignore[arg-type]
                yield hints(hint)

    return script


def silent(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    next(requests)
    yield from (b"" for _ in requests if False)


class Services:
    """Scripted predictors at endpoints of their own, all over one transport."""

    def __init__(self, folder: Path, with_packets: bool) -> None:
        self._folder = folder
        self._make = functools.partial(ScriptedPredictor, spec=SPEC, with_packets=with_packets)
        self._open: list[ScriptedPredictor] = []

    def endpoint(self, name: str) -> str:
        return f"unix:{self._folder / name}"

    def serve(self, name: str, script: Script | None = None) -> ScriptedPredictor:
        service = self._make(self.endpoint(name), script=script or hints_as(name))
        self._open.append(service)
        return service.__enter__()

    def close(self) -> None:
        for service in self._open:
            service.kill()
