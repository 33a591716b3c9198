"""Where an expert path's hints come from: the predictor service in its own process, or the same predictor in here."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, TypeAlias

from compute_node.hint_client import HintClient, PredictorState
from compute_node.hint_inbox import HintInbox, ReceivedHint
from compute_node.layer_sample import LayerSample, LayerSampler, WantedSamples
from compute_node.miss_watch import MissLevel, MissWatch
from compute_node.outgoing import QUEUE_CAPACITY
from predictor_service.config import PredictorConfig
from predictor_service.predictor import Predictor
from promoe.hint import Observation, ObservedKind, StepStart
from promoe.model_spec import ModelSpec
from tests.running_store import wait_until

CONNECT_DEADLINE_S: Final = 60.0

HintSource: TypeAlias = Callable[[ModelSpec, HintInbox, MissWatch], AbstractContextManager[LayerSampler]]
"""Opens a sampler of layers that puts hints into the inbox; the watch says how much it is worth to show."""


def served_by(endpoint: str) -> HintSource:
    """The product's way: a session with the service, entered when it is connected."""

    @contextmanager
    def open_client(spec: ModelSpec, inbox: HintInbox, misses: MissWatch) -> Iterator[HintClient]:
        client = HintClient(endpoint, spec, inbox, misses=lambda: misses.level)
        inbox.look_for_more, inbox.flush = client.look, client.flush
        client.start()
        try:
            wait_until(lambda: client.state is PredictorState.CONNECTED, CONNECT_DEADLINE_S)
            yield client
        finally:
            client.close()

    return open_client


def called_in_process(predictor: Predictor) -> HintSource:
    """What the process boundary is compared with."""

    @contextmanager
    def open_caller(spec: ModelSpec, inbox: HintInbox, misses: MissWatch) -> Iterator[InProcessHints]:
        caller = InProcessHints(predictor, inbox, misses)
        caller.start()
        try:
            yield caller
        finally:
            caller.close()

    return open_caller


class InProcessHints:
    """Calls a plug-in's session on a thread of its own, over a queue as bounded as the client's.

    Args:
        predictor: makes the hints.
        inbox: takes them.
        misses: how much is shown.
    """

    def __init__(self, predictor: Predictor, inbox: HintInbox, misses: MissWatch) -> None:
        self._misses = misses
        self._version = predictor.version
        self._session = predictor.open_session()
        self._inbox = inbox
        self._events: queue.Queue[StepStart | LayerSample | None] = queue.Queue(QUEUE_CAPACITY)
        self._thread = threading.Thread(target=self._run, name="in-process-hints")

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after what it was told."""
        self._events.put(None)
        self._thread.join()

    def begin_step(self, start: StepStart) -> WantedSamples | None:
        """See LayerSampler."""
        level = self._misses.level
        if level is MissLevel.HARDLY_ANY:
            return None
        self._put(start)
        observed = self._version.observed
        return WantedSamples(
            max_rows=PredictorConfig.max_rows,
            layer_input=observed is ObservedKind.LAYER_INPUT,
            router_input=observed is ObservedKind.ROUTER_INPUT,
            routing=self._version.wants_routing,
            every=1 if level is MissLevel.MANY else self._version.observe_every,
        )

    def take(self, sample: LayerSample) -> None:
        """See LayerSampler."""
        self._put(sample)

    def _put(self, event: StepStart | LayerSample) -> None:
        while True:
            try:
                return self._events.put_nowait(event)
            except queue.Full:
                self._events.get_nowait()  # the oldest, as the client does

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            if isinstance(event, StepStart):
                self._session.begin_step(event)
                if event.ended_request_ids:
                    self._session.end_requests(event.ended_request_ids)
                continue
            for hint in self._session.observe(_observed(event)):
                self._inbox.put(ReceivedHint(hint, None))


def _observed(sample: LayerSample) -> Observation:
    """With the hidden states as the service would decode them."""
    hidden_RD = None if sample.hidden is None else sample.hidden.wait().float().numpy()
    return Observation(sample.step, sample.layer, sample.rows, sample.num_tokens, hidden_RD, sample.routings)
