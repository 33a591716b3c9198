"""The client's logic, written once: coroutines over a transport, with schema check, retries and deadlines."""

import time
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from google.protobuf.message import Message

from promoe.cache_map import CacheMap
from promoe.errors import DeadlineExceeded, Overloaded, PromoeError, Unavailable
from promoe.generation import Answer, Delta, FinishReason, encode_chat, encode_detokenize
from promoe.node_report import CacheStats, NodeInfo
from promoe.request_id import MAX_REQUEST_ID_CHARS, REQUEST_ID_HEADER, is_fit
from promoe.retry import Attempts, RetryPolicy
from promoe.rpc import INFO_DEADLINE_S
from promoe.transport import Metadata, StreamCall, Transport
from promoe.typed_message import decode_message
from promoe.v1 import inference_pb2
from promoe.wire import check_schema

_Response = TypeVar("_Response", bound=Message)

_READY_POLL_S: Final = 0.1


class NodeCalls:
    """The calls' logic over a transport: schema check, retries, deadlines."""

    def __init__(self, endpoint: str, transport: Transport, retry: RetryPolicy) -> None:
        self.endpoint = endpoint
        self.transport = transport
        self.retry = retry
        self._schema_checked = False

    async def ask(self, method: str, request: Message, response_type: type[_Response], deadline_s: float) -> _Response:
        """One idempotent call."""
        attempts = Attempts(self.retry, deadline_s)
        while True:
            try:
                await self.check_schema(attempts.remaining_s)
                return await self.transport.ask(method, request, response_type, attempts.remaining_s)
            except PromoeError as error:
                await self.transport.pause(self.delay_after(error, attempts))

    def delay_after(self, error: PromoeError, attempts: Attempts) -> float:
        """See Attempts; the peer that comes back may be another version."""
        if isinstance(error, Unavailable):
            self._schema_checked = False
        return attempts.delay_after(error)

    async def check_schema(self, timeout_s: float) -> None:
        """Asks a peer that we do not know yet for its schema version; ModelMismatch if it is not ours."""
        if not self._schema_checked:
            request = inference_pb2.InferenceGetInfoRequest()
            info = await self.transport.ask(
                "GetInfo", request, inference_pb2.InferenceGetInfoResponse, min(timeout_s, INFO_DEADLINE_S)
            )
            check_schema(info.service, f"The compute node at {self.endpoint}")
            self._schema_checked = True

    async def info(self, deadline_s: float) -> NodeInfo:
        """See AsyncClient."""
        request = inference_pb2.InferenceGetInfoRequest()
        response = await self.ask("GetInfo", request, inference_pb2.InferenceGetInfoResponse, deadline_s)
        return decode_message(response, NodeInfo)

    async def cache_stats(self, deadline_s: float) -> CacheStats:
        """See AsyncClient."""
        request = inference_pb2.CacheStatsRequest()
        response = await self.ask("CacheStats", request, inference_pb2.CacheStatsResponse, deadline_s)
        return decode_message(response, CacheStats)

    async def cache_map(self, deadline_s: float) -> CacheMap:
        """See AsyncClient."""
        request = inference_pb2.CacheMapRequest()
        response = await self.ask("CacheMap", request, inference_pb2.CacheMapResponse, deadline_s)
        return decode_message(response, CacheMap)

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]], deadline_s: float) -> list[int]:
        """See AsyncClient."""
        if isinstance(prompt, str):
            request = inference_pb2.TokenizeRequest(text=prompt)
        else:
            request = inference_pb2.TokenizeRequest(chat=encode_chat(prompt))
        response = await self.ask("Tokenize", request, inference_pb2.TokenizeResponse, deadline_s)
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], deadline_s: float) -> str:
        """See AsyncClient."""
        request = encode_detokenize(token_ids)
        response = await self.ask("Detokenize", request, inference_pb2.DetokenizeResponse, deadline_s)
        return response.text

    async def wait_until_ready(self, timeout_s: float) -> None:
        """See AsyncClient."""
        end_s = time.perf_counter() + timeout_s
        reason = "no answer yet"
        while (remaining_s := end_s - time.perf_counter()) > 0:
            try:
                if await self.transport.is_serving(min(remaining_s, INFO_DEADLINE_S)):
                    await self.check_schema(INFO_DEADLINE_S)
                    return
                reason = "it is still starting or already stopping"
            except (Unavailable, Overloaded, DeadlineExceeded) as error:
                reason = str(error).rstrip(".")
            await self.transport.pause(_READY_POLL_S)
        raise Unavailable(f"The compute node at {self.endpoint} is not ready after {timeout_s:g} s: {reason}.")


class Generation:
    """One Generate call and its answer: retried until the first token is there, never after.

    The attributes of `Answer` are there to read while it grows.
    """

    def __init__(
        self, calls: NodeCalls, request: inference_pb2.GenerateRequest, deadline_s: float, request_id: str = ""
    ) -> None:
        if request_id and not is_fit(request_id):
            allowed = f"1 to {MAX_REQUEST_ID_CHARS} of A-Z a-z 0-9 . _ : -"
            raise ValueError(f"request_id is {request_id!r}; allowed: {allowed}")
        self._metadata: Metadata = ((REQUEST_ID_HEADER, request_id),) if request_id else ()
        self._calls = calls
        self._request = request
        self._attempts = Attempts(calls.retry, deadline_s)
        self._call: StreamCall[inference_pb2.GenerateResponse] | None = None
        self._answer = Answer()

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        return self._answer

    @property
    def text(self) -> str:
        """The text so far."""
        return self._answer.text

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while the answer grows."""
        return self._answer.finish_reason

    def cancel(self) -> None:
        """Ends the generation; the node stops within one step. The stream ends without an error."""
        if self._answer.finish_reason is None:
            self._answer.finish_reason = FinishReason.CANCELLED
            if self._call is not None:
                self._call.cancel()

    async def next_delta(self) -> Delta | None:
        """What comes next; None after the end."""
        while self._answer.finish_reason is None:
            message = await self._next_message()
            if message is None:
                return None
            delta = self._answer.fold(message)
            if delta is not None:
                return delta
        return None

    async def _next_message(self) -> inference_pb2.GenerateResponse | None:
        while self._answer.finish_reason is None:
            try:
                if self._call is None:
                    await self._calls.check_schema(self._attempts.remaining_s)
                    self._call = self._calls.transport.stream(
                        "Generate",
                        self._request,
                        inference_pb2.GenerateResponse,
                        self._attempts.remaining_s,
                        self._metadata,
                    )
                    if self._answer.finish_reason is not None:  # cancelled by another thread just now
                        self._call.cancel()
                message = await self._call.read()
                if message is None:
                    raise Unavailable(f"{self._calls.endpoint} ended the answer without finishing it.")
                return message
            except PromoeError as error:
                if self._answer.finish_reason is FinishReason.CANCELLED:
                    return None
                if self._answer.token_ids or self._answer.text:
                    raise
                delay_s = self._calls.delay_after(error, self._attempts)
                self._call = None
                await self._calls.transport.pause(delay_s)
        return None
