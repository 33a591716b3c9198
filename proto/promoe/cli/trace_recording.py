"""Writes a node's trace to a file in a thread, whole steps only, and counts what it has."""

import threading
from dataclasses import dataclass, replace
from pathlib import Path

from promoe.errors import PromoeError
from promoe.trace_calls import TraceStream
from promoe.trace_events import LayerEvent, StepEvent, TraceEvent
from promoe.trace_file import TraceWriter


@dataclass(frozen=True)
class RecordingState:
    """What is in the file so far; `dropped_steps` were left out by the node because we were too slow."""

    steps: int = 0
    tokens: int = 0
    requests: int = 0
    nbytes: int = 0
    dropped_steps: int = 0


class WholeSteps:
    """Holds the events of a step back until its last layer has come: a trace does not end in the middle of one."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._held: list[TraceEvent] = []

    def add(self, event: TraceEvent) -> list[TraceEvent]:
        """What can be written now."""
        if isinstance(event, StepEvent):
            # The step before failed half way, or these came between the two steps: it was all that there is.
            whole, self._held = self._held, [event]
            return whole
        self._held.append(event)
        if isinstance(event, LayerEvent) and event.layer == self._num_layers - 1:
            whole, self._held = self._held, []
            return whole
        return []


class TraceRecording:
    """Reads a trace to its end and keeps what came, also when the node dies.

    Args:
        stream: of the node; not read by anybody else.
        path: of the file; there is none when not even one step came.
    """

    def __init__(self, stream: TraceStream, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._state = RecordingState()
        self._request_ids: set[str] = set()
        self._failure: PromoeError | OSError | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)

    @property
    def state(self) -> RecordingState:
        """As of now."""
        return self._state

    @property
    def is_over(self) -> bool:
        """Nothing more will come."""
        return not self._thread.is_alive()

    def start(self) -> None:
        """Begins to read, once the node records."""
        self._stream.wait_until_open()
        self._thread.start()

    def close(self) -> None:
        """Ends the trace and closes the file."""
        self._stream.cancel()
        self._thread.join()

    def finish(self) -> RecordingState:
        """What there is in the end; raises what had ended it before it was closed."""
        if self._failure is not None:
            raise self._failure
        return self._state

    def _read(self) -> None:
        try:
            self._write_batches()
        except (PromoeError, OSError) as error:
            self._failure = error

    def _write_batches(self) -> None:
        writer: TraceWriter | None = None
        whole_steps = WholeSteps(0)
        try:
            for batch in self._stream:
                if writer is None:
                    header = self._stream.header()
                    writer, whole_steps = TraceWriter(self._path, header), WholeSteps(header.model.num_moe_layers)
                for event in batch.events:
                    for whole in whole_steps.add(event):
                        writer.append(whole)
                        self._count(whole)
                writer.dropped_steps = batch.dropped_steps
                self._state = replace(self._state, nbytes=writer.written_nbytes, dropped_steps=batch.dropped_steps)
        finally:
            if writer is not None:
                writer.close()
                self._state = replace(self._state, nbytes=self._path.stat().st_size)

    def _count(self, event: TraceEvent) -> None:
        if isinstance(event, StepEvent):
            self._request_ids.update(span.request_id for span in event.spans)
            self._state = replace(
                self._state,
                steps=self._state.steps + 1,
                tokens=self._state.tokens + sum(span.num_tokens for span in event.spans),
                requests=len(self._request_ids),
            )
