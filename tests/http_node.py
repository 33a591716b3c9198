"""The HTTP API over a real socket, on an event loop in a thread of this process, for tests with real clients."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

import httpx2
import openai
from transformers import PreTrainedTokenizerBase

from compute_node.admission import AdmissionLimits
from compute_node.engine import (
    EndReason,
    Engine,
    EngineKind,
    EngineRequest,
    EventSink,
    RequestEnded,
    RequestStarted,
    TokenDrawn,
)
from compute_node.http.api_keys import ApiKeys
from compute_node.http.app import AppSettings, build_app
from compute_node.http.edge import EdgeRules
from compute_node.http.health_routes import OPEN_PATHS
from compute_node.http.http_server import HttpListener
from compute_node.prompt import PromptLimits
from compute_node.sampling import SampledToken
from compute_node.step_ledger import RequestUse
from tests.compute_node.hand_engine import HandEngine
from tests.compute_node.tiny_serving import Serving, serving
from tests.families import VOCABULARY

MODEL = "tiny"
TIMEOUT_S = 60.0
CONTEXT = 500

TOOL_TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""What Qwen's and Hermes's templates do, in a few lines."""

_T = TypeVar("_T")


class ScriptEngine:
    """An engine that answers every request with the tokens of one text.

    Attributes:
        script: the text.
        requests: all that were submitted.
        cancelled: ids of those that were asked to end.
    """

    kind = EngineKind.INTERLEAVED
    max_request_tokens = 10_000

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: str = "") -> None:
        self.script = script
        self.requests: list[EngineRequest] = []
        self.cancelled: list[str] = []
        self._tokenizer = tokenizer

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def submit(self, request: EngineRequest, sink: EventSink) -> None:
        """All of it at once: events are taken later."""
        self.requests.append(request)
        ids: list[int] = self._tokenizer(self.script)["input_ids"]
        drawn = ids[: request.max_tokens]
        sink(RequestStarted(perf_counter()))
        for token_id in drawn:
            sink(TokenDrawn(SampledToken(token_id), perf_counter()))
        is_whole = len(drawn) == len(ids) and len(ids) < request.max_tokens
        reason = EndReason.STOP_TOKEN if is_whole else EndReason.MAX_TOKENS
        stop_token_id = min(request.stop_token_ids) if is_whole else None
        sink(RequestEnded(reason, stop_token_id, len(drawn) + is_whole, RequestUse(), perf_counter()))

    def cancel(self, request_id: str) -> None:
        """Too late, always."""
        self.cancelled.append(request_id)


class HeldEngine(HandEngine):
    """A hand-moved engine that tells when it is asked, and when it is asked to stop.

    Attributes:
        submitted: ids of requests, as they come.
        cancelled: ids of requests that were to end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.submitted: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()

    def submit(self, request: EngineRequest, sink: EventSink) -> None:
        """See HandEngine."""
        super().submit(request, sink)
        self.submitted.put(request.request_id)

    def cancel(self, request_id: str) -> None:
        """See HandEngine; told once."""
        if request_id in self.running:
            self.cancelled.put(request_id)
        super().cancel(request_id)


class HttpNode:
    """A serving node's HTTP side.

    Attributes:
        url: without a path.
        serving: what stands behind it; touched on its own loop only, by `on_loop`.
    """

    def __init__(self, url: str, behind: Serving, loop: asyncio.AbstractEventLoop) -> None:
        self.url = url
        self.serving = behind
        self._loop = loop

    def on_loop(self, ask: Callable[[Serving], _T]) -> _T:
        """The answer of a function that runs on the node's event loop."""

        async def asked() -> _T:
            return ask(self.serving)

        return asyncio.run_coroutine_threadsafe(asked(), self._loop).result(TIMEOUT_S)

    @contextmanager
    def client(self, key: str = "none") -> Iterator[openai.OpenAI]:
        """The real client, which tells failures at once."""
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S) as client:
            yield client

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        """A request as anybody can make it."""
        return httpx2.post(f"{self.url}{path}", json=body, headers=headers, timeout=TIMEOUT_S)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        """Likewise."""
        return httpx2.get(f"{self.url}{path}", headers=headers, timeout=TIMEOUT_S)


@contextmanager
def http_node(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    limits: AdmissionLimits | None = None,
    keys: tuple[str, ...] = (),
    cors_origins: tuple[str, ...] = (),
    max_context_tokens: int = CONTEXT,
) -> Iterator[HttpNode]:
    """A node whose HTTP API can be reached until the end."""
    settings = AppSettings(EdgeRules(ApiKeys(keys), OPEN_PATHS, max_body_nbytes=100_000), cors_origins)
    prompt_limits = PromptLimits(len(VOCABULARY), max_context_tokens, 4096)
    ready = threading.Event()
    nodes: list[HttpNode] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with serving(engine, tokenizer, limits, prompt_limits) as behind:
            listener = HttpListener("127.0.0.1:0")
            server = listener.serve(build_app(behind.parts, settings))
            nodes.append(HttpNode(f"http://{listener.address}", behind, loop))
            ready.set()
            await stop.wait()
            await server.stop()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            loop.close()
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(TIMEOUT_S), "the node is ready in time"
        assert nodes, "the node started"
        yield nodes[0]
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(stop.set)
        thread.join(TIMEOUT_S)
