"""The client library: text from a compute node (required: every failure is raised, after a few retries).

    with Client("127.0.0.1:50051") as client:
        for piece in client.generate([{"role": "user", "content": "Why is the sky blue?"}], max_tokens=100):
            print(piece, end="")

The logic is in `promoe.node_calls`; `AsyncClient` awaits it and `Client` runs the same coroutines over a blocking
channel.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, Unpack

from promoe.cache_map import CacheMap
from promoe.generation import Answer, Delta, GenerateOptions, Prompt, encode_generate
from promoe.node_calls import Generation, NodeCalls
from promoe.node_report import CacheStats, NodeInfo
from promoe.retry import RetryPolicy
from promoe.rpc import GENERATE_DEADLINE_S, INFO_DEADLINE_S, TOKENIZE_DEADLINE_S, TRACE_DEADLINE_S
from promoe.transport import AioTransport, BlockingTransport, run_blocking

if TYPE_CHECKING:
    # Events are arrays; a client that asks for text only needs no numpy.
    from promoe.trace_calls import AsyncTraceStream, TraceStream

_DEFAULT_RETRY: Final = RetryPolicy()


class AsyncGenerationStream(Generation):
    """The answer as it comes: iterate for pieces of text, or `deltas()` for tokens and log probabilities as well.

    As a context manager it cancels what was not read to its end.
    """

    def __aiter__(self) -> AsyncIterator[str]:
        return self._texts()

    async def _texts(self) -> AsyncIterator[str]:
        while (delta := await self.next_delta()) is not None:
            if delta.text:
                yield delta.text

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answer message by message."""
        while (delta := await self.next_delta()) is not None:
            yield delta

    async def finish(self) -> Answer:
        """Reads to the end."""
        while await self.next_delta() is not None:
            pass
        return self._answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class GenerationStream(Generation):
    """The answer as it comes: iterate for pieces of text, or `deltas()` for tokens and log probabilities as well.

    As a context manager it cancels what was not read to its end. `cancel` may be called from another thread.
    """

    def __iter__(self) -> Iterator[str]:
        return (delta.text for delta in self.deltas() if delta.text)

    def deltas(self) -> Iterator[Delta]:
        """The answer message by message."""
        while (delta := run_blocking(self.next_delta())) is not None:
            yield delta

    def finish(self) -> Answer:
        """Reads to the end."""
        for _ in self.deltas():
            pass
        return self._answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """A compute node, for asyncio. Make it inside the event loop that uses it.

    Args:
        endpoint: `host:port` or `unix:PATH`.
        retry: what to do about a node that is away or full, before the first token.

    Every method raises the errors of `promoe.errors` and ValueError for arguments that cannot be sent.
    """

    def __init__(self, endpoint: str, retry: RetryPolicy = _DEFAULT_RETRY) -> None:
        self._calls = NodeCalls(endpoint, AioTransport(endpoint), retry)

    def generate(
        self,
        prompt: Prompt,
        *,
        deadline_s: float = GENERATE_DEADLINE_S,
        request_id: str = "",
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationStream:
        """Starts a generation with the stream's first read; see Prompt and GenerateOptions.

        Args:
            prompt: what is gone on from.
            deadline_s: of the whole answer.
            request_id: what the node's log calls the request; empty: a name that the node makes.
            options: how.
        """
        return AsyncGenerationStream(self._calls, encode_generate(prompt, options), deadline_s, request_id)

    async def complete(
        self,
        prompt: Prompt,
        *,
        deadline_s: float = GENERATE_DEADLINE_S,
        request_id: str = "",
        **options: Unpack[GenerateOptions],
    ) -> Answer:
        """The whole answer at once."""
        async with self.generate(prompt, deadline_s=deadline_s, request_id=request_id, **options) as stream:
            return await stream.finish()

    async def info(self, *, deadline_s: float = INFO_DEADLINE_S) -> NodeInfo:
        """The node's model, device, limits and expert cache."""
        return await self._calls.info(deadline_s)

    async def cache_stats(self, *, deadline_s: float = INFO_DEADLINE_S) -> CacheStats:
        """The expert cache's counters by phase and layer."""
        return await self._calls.cache_stats(deadline_s)

    async def cache_map(self, *, deadline_s: float = INFO_DEADLINE_S) -> CacheMap:
        """What every expert is doing right now."""
        return await self._calls.cache_map(deadline_s)

    def trace(
        self,
        *,
        max_rows: int = 0,
        layer_input: bool = False,
        router_input: bool = False,
        deadline_s: float = TRACE_DEADLINE_S,
    ) -> "AsyncTraceStream":
        """What the expert cache is told, from the next step on, as long as the stream is read; one at a time.

        Args:
            max_rows: with hidden states of at most so many tokens of each step; 0 for none.
            layer_input, router_input: which hidden states.
            deadline_s: ends the trace with DeadlineExceeded.
        """
        from promoe.trace_calls import AsyncTraceStream, encode_trace

        return AsyncTraceStream(self._calls, encode_trace(max_rows, layer_input, router_input), deadline_s)

    async def tokenize(
        self, prompt: str | Sequence[Mapping[str, str]], *, deadline_s: float = TOKENIZE_DEADLINE_S
    ) -> list[int]:
        """Token ids of a text or of chat messages, as `generate` would read them."""
        return await self._calls.tokenize(prompt, deadline_s)

    async def detokenize(self, token_ids: Sequence[int], *, deadline_s: float = TOKENIZE_DEADLINE_S) -> str:
        """The text of tokens."""
        return await self._calls.detokenize(token_ids, deadline_s)

    async def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Returns when the node serves; raises Unavailable when it does not within `timeout_s`."""
        await self._calls.wait_until_ready(timeout_s)

    async def close(self) -> None:
        """Ends all calls."""
        await self._calls.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class Client:
    """A compute node, for ordinary blocking code; usable from several threads. See AsyncClient."""

    def __init__(self, endpoint: str, retry: RetryPolicy = _DEFAULT_RETRY) -> None:
        self._calls = NodeCalls(endpoint, BlockingTransport(endpoint), retry)

    def generate(
        self,
        prompt: Prompt,
        *,
        deadline_s: float = GENERATE_DEADLINE_S,
        request_id: str = "",
        **options: Unpack[GenerateOptions],
    ) -> GenerationStream:
        """Starts a generation with the stream's first read; see Prompt and GenerateOptions.

        Args:
            prompt: what is gone on from.
            deadline_s: of the whole answer.
            request_id: what the node's log calls the request; empty: a name that the node makes.
            options: how.
        """
        return GenerationStream(self._calls, encode_generate(prompt, options), deadline_s, request_id)

    def complete(
        self,
        prompt: Prompt,
        *,
        deadline_s: float = GENERATE_DEADLINE_S,
        request_id: str = "",
        **options: Unpack[GenerateOptions],
    ) -> Answer:
        """The whole answer at once."""
        with self.generate(prompt, deadline_s=deadline_s, request_id=request_id, **options) as stream:
            return stream.finish()

    def info(self, *, deadline_s: float = INFO_DEADLINE_S) -> NodeInfo:
        """The node's model, device, limits and expert cache."""
        return run_blocking(self._calls.info(deadline_s))

    def cache_stats(self, *, deadline_s: float = INFO_DEADLINE_S) -> CacheStats:
        """The expert cache's counters by phase and layer."""
        return run_blocking(self._calls.cache_stats(deadline_s))

    def cache_map(self, *, deadline_s: float = INFO_DEADLINE_S) -> CacheMap:
        """What every expert is doing right now."""
        return run_blocking(self._calls.cache_map(deadline_s))

    def trace(
        self,
        *,
        max_rows: int = 0,
        layer_input: bool = False,
        router_input: bool = False,
        deadline_s: float = TRACE_DEADLINE_S,
    ) -> "TraceStream":
        """What the expert cache is told, from the next step on, as long as the stream is read; one at a time.

        Args:
            max_rows: with hidden states of at most so many tokens of each step; 0 for none.
            layer_input, router_input: which hidden states.
            deadline_s: ends the trace with DeadlineExceeded.
        """
        from promoe.trace_calls import TraceStream, encode_trace

        return TraceStream(self._calls, encode_trace(max_rows, layer_input, router_input), deadline_s)

    def tokenize(
        self, prompt: str | Sequence[Mapping[str, str]], *, deadline_s: float = TOKENIZE_DEADLINE_S
    ) -> list[int]:
        """Token ids of a text or of chat messages, as `generate` would read them."""
        return run_blocking(self._calls.tokenize(prompt, deadline_s))

    def detokenize(self, token_ids: Sequence[int], *, deadline_s: float = TOKENIZE_DEADLINE_S) -> str:
        """The text of tokens."""
        return run_blocking(self._calls.detokenize(token_ids, deadline_s))

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Returns when the node serves; raises Unavailable when it does not within `timeout_s`."""
        run_blocking(self._calls.wait_until_ready(timeout_s))

    def close(self) -> None:
        """Ends all calls."""
        run_blocking(self._calls.transport.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
