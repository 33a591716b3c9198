"""A node's trace as it is recorded: the client's side, written once as coroutines over a transport."""

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Self

from promoe.errors import InternalError, PromoeError, Unavailable
from promoe.node_calls import NodeCalls
from promoe.retry import Attempts, RetryPolicy
from promoe.trace_events import TraceBatch
from promoe.trace_header import TraceHeader
from promoe.trace_wire import decode_batch
from promoe.transport import StreamCall, run_blocking
from promoe.typed_message import decode_message
from promoe.v1 import inference_pb2


def encode_trace(max_rows: int, layer_input: bool, router_input: bool) -> inference_pb2.TraceRequest:
    """To the wire; raises ValueError when `max_rows` is no count."""
    if max_rows < 0:
        raise ValueError(f"max_rows is {max_rows}; allowed: 0 or more")
    return inference_pb2.TraceRequest(max_rows=max_rows, layer_input=layer_input, router_input=router_input)


class TraceCall:
    """One Trace call. Not retried: a trace with a gap is none."""

    def __init__(self, calls: NodeCalls, request: inference_pb2.TraceRequest, deadline_s: float) -> None:
        self._calls = calls
        self._request = request
        self._attempts = Attempts(RetryPolicy(max_attempts=1), deadline_s)
        self._call: StreamCall[inference_pb2.TraceResponse] | None = None
        self._is_cancelled = False
        self._is_open = False
        self._header: TraceHeader | None = None

    def cancel(self) -> None:
        """Ends the recording at once; the stream ends without an error. May be called from another thread."""
        self._is_cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def open(self) -> None:
        """Returns when the node records: its next step is the first one. Raises Unavailable when it was cancelled."""
        if not self._is_open:
            self._is_open = await self._read() is not None
        if not self._is_open:
            raise Unavailable("The trace was ended before it began.")

    async def begin(self) -> TraceHeader:
        """The header; waits for the first step. Raises Unavailable when it was cancelled before."""
        if self._header is None:
            await self.open()
            message = await self._read()
            if message is None:
                raise Unavailable("The trace was ended before its first step.")
            if not message.HasField("header"):
                raise InternalError(f"The trace from {self._calls.endpoint} does not begin with its header.")
            self._header = decode_message(message.header, TraceHeader)
        return self._header

    async def next_batch(self) -> TraceBatch | None:
        """What comes next; None after `cancel`."""
        try:
            await self.begin()
        except Unavailable:
            if self._is_cancelled:
                return None
            raise
        message = await self._read()
        if message is None:
            return None
        try:
            return decode_batch(message)
        except ValueError as error:
            raise InternalError(f"The trace from {self._calls.endpoint} has an event that is none: {error}.") from error

    async def _read(self) -> inference_pb2.TraceResponse | None:
        try:
            if self._call is None:
                await self._calls.check_schema(self._attempts.remaining_s)
                self._call = self._calls.transport.stream(
                    "Trace", self._request, inference_pb2.TraceResponse, self._attempts.remaining_s
                )
                if self._is_cancelled:  # by another thread just now
                    self._call.cancel()
            message = await self._call.read()
        except PromoeError:
            if self._is_cancelled:
                return None
            raise
        if message is None and not self._is_cancelled:
            raise Unavailable(f"{self._calls.endpoint} ended the trace: it is shutting down.")
        return message


class AsyncTraceStream(TraceCall):
    """Iterate for batches of events; as a context manager it ends the recording."""

    async def wait_until_open(self) -> None:
        """Returns when the node records: its next step is the first one."""
        await self.open()

    async def header(self) -> TraceHeader:
        """What a replay must know; waits for the first step."""
        return await self.begin()

    async def __aiter__(self) -> AsyncIterator[TraceBatch]:
        while (batch := await self.next_batch()) is not None:
            yield batch

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class TraceStream(TraceCall):
    """Iterate for batches of events; as a context manager it ends the recording."""

    def wait_until_open(self) -> None:
        """Returns when the node records: its next step is the first one."""
        run_blocking(self.open())

    def header(self) -> TraceHeader:
        """What a replay must know; waits for the first step."""
        return run_blocking(self.begin())

    def __iter__(self) -> Iterator[TraceBatch]:
        while (batch := run_blocking(self.next_batch())) is not None:
            yield batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
