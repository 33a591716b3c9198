"""The client against a real server with a scripted servicer: streaming, retries, errors, deadlines, schema."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from promoe import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    FinishReason,
    InternalError,
    InvalidInput,
    ModelMismatch,
    Overloaded,
    PromoeError,
    RetryPolicy,
    Unavailable,
)
from promoe.cache_map import ExpertBit
from promoe.errors import STATUS_OF_ERROR
from promoe.node_report import EngineKind, Number, StoreState
from tests.promoe.scripted_inference import (
    HELLO,
    Act,
    ScriptedInference,
    ScriptedNode,
    accepted,
    delta,
    finish,
    serve_in_thread,
)

QUICK = RetryPolicy(max_attempts=3, first_delay_s=0.01, max_delay_s=0.02)
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def node() -> ScriptedInference:
    return ScriptedInference(HELLO)


@pytest.fixture
def client(node: ScriptedInference) -> Iterator[Client]:
    with serve_in_thread(node) as endpoint, Client(endpoint, QUICK) as client:
        yield client


def test_stream_gives_text_pieces_and_ends_with_figures(client: Client) -> None:
    with client.generate("Say hello") as stream:
        assert list(stream) == ["Hel", "lo"]
        answer = stream.answer
    assert stream.text == answer.text == "Hello"
    assert answer.token_ids == [11, 12]
    assert (answer.request_id, answer.prompt_tokens, answer.seed) == ("r1", 3, 7)
    assert (answer.finish_reason, answer.stop_string, answer.stop_token_id) == (FinishReason.STOP_STRING, "\n", None)
    assert answer.usage is not None
    assert answer.usage.ttft_s == 0.5
    assert answer.usage.decode.hit_rate == 0.75


def test_deltas_carry_tokens_and_an_incomplete_character_has_no_text(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(accepted(), delta("", 1), delta("é", 2), finish())]
    deltas = list(client.generate("x").deltas())
    assert [(d.text, d.token_ids) for d in deltas] == [("", (1,)), ("é", (2,))]
    assert list(client.generate("x")) == ["é"]


def test_every_form_of_prompt_and_every_option_reaches_the_server(client: Client, node: ScriptedInference) -> None:
    client.complete("text", max_tokens=5, temperature=0.5, top_k=3, top_p=0.9, seed=1, repetition_penalty=1.1)
    client.complete(CHAT, stop_strings=["a", "b"], stop_token_ids=(4,), top_logprobs=2, ignore_eos=True)
    client.complete([1, 2, 3])
    text, chat, ids = node.requests
    assert text.text == "text"
    assert (text.sampling.max_tokens, text.sampling.temperature, text.sampling.top_k) == (5, 0.5, 3)
    assert (text.sampling.top_p, text.sampling.seed, text.sampling.repetition_penalty) == (0.9, 1, 1.1)
    assert not text.sampling.HasField("ignore_eos")
    assert [(m.role, m.content) for m in chat.chat.messages] == [("user", "Hi")]
    assert list(chat.sampling.stop_strings) == ["a", "b"]
    assert (list(chat.sampling.stop_token_ids), chat.sampling.top_logprobs, chat.sampling.ignore_eos) == ([4], 2, True)
    assert list(ids.token_ids.ids) == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "options", "names"),
    [
        ("x", {"temprature": 1.0}, "temprature is not a sampling option; known: max_tokens, temperature"),
        ("x", {"max_tokens": -1}, "max_tokens is -1"),
        ("x", {"temperature": "hot"}, "temperature is 'hot'"),
        ("x", {"stop_strings": "ab"}, "stop_strings is 'ab'"),
        ([], {}, "prompt is empty"),
        ([1, "2"], {}, "prompt holds '2'"),
        ([-1], {}, "prompt holds -1"),
        ([{"role": "user"}], {}, "mapping of role and content"),
        ("x" * (33 << 20), {}, "at most 33554432 can be sent"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_it_is(
    client: Client, node: ScriptedInference, prompt: str, options: dict[str, int], names: str
) -> None:
    with pytest.raises(ValueError, match=names):
        client.generate(prompt, **options)  # type: ignore[arg-type]  # the wrong types are the test
    assert node.requests == []


def test_cancel_ends_the_stream_quietly_and_reaches_the_server(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(accepted(), delta("Hel", 11), Act.HANG)]
    with client.generate("x") as stream:
        pieces = iter(stream)
        assert next(pieces) == "Hel"
        stream.cancel()
        assert list(pieces) == []
    assert stream.finish_reason is FinishReason.CANCELLED
    assert node.hung_up.wait(10)


def test_cancel_from_another_thread_wakes_the_reader(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(accepted(), Act.HANG)]
    stream = client.generate("x")

    def cancel_when_it_hangs() -> None:
        node.hanging.wait(10)
        stream.cancel()

    canceller = threading.Thread(target=cancel_when_it_hangs)
    canceller.start()
    assert stream.finish().text == ""
    canceller.join()
    assert stream.finish_reason is FinishReason.CANCELLED
    assert node.hung_up.wait(10)


def test_leaving_the_context_cancels_and_a_finished_answer_stays_finished(
    client: Client, node: ScriptedInference
) -> None:
    node.scripts = [(accepted(), delta("Hel", 11), Act.HANG), HELLO]
    with client.generate("x") as stream:
        assert next(iter(stream)) == "Hel"
    assert node.hung_up.wait(10)
    with client.generate("x") as stream:
        stream.finish()
    assert stream.finish_reason is FinishReason.STOP_STRING


@pytest.mark.parametrize("error_type", [error_type for error_type, _ in STATUS_OF_ERROR])
def test_the_client_raises_what_the_server_raised(
    client: Client, node: ScriptedInference, error_type: type[PromoeError]
) -> None:
    node.scripts = [(accepted(), delta("Hel", 11), error_type("What went wrong."))]
    node.unary_errors = [error_type("What went wrong.")] * QUICK.max_attempts
    with pytest.raises(error_type, match="What went wrong") as raised:
        client.complete("x")
    assert type(raised.value) is error_type
    if error_type is not Overloaded:  # its own pause, a second, is tried below
        with pytest.raises(error_type, match="What went wrong"):
            client.cache_stats()


def test_a_bug_in_the_server_is_an_internal_error_without_details(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(KeyError("secret"),)]
    with pytest.raises(InternalError, match="log has the details") as raised:
        client.complete("x")
    assert "secret" not in str(raised.value)


def test_retries_until_the_first_token(client: Client, node: ScriptedInference) -> None:
    gone = Unavailable("Draining.")
    node.scripts = [(gone,), (accepted("lost"), Overloaded("Full.", retry_after_ms=1)), HELLO]
    answer = client.complete("x")
    assert (answer.text, answer.request_id) == ("Hello", "r1")
    assert len(node.requests) == 3


def test_never_retries_after_the_first_token(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(accepted(), delta("", 11), Unavailable("Gone.")), HELLO]
    with pytest.raises(Unavailable, match=r"Gone\."):
        client.complete("x")
    assert len(node.requests) == 1


def test_retries_are_bounded(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(Unavailable("Draining."),)]
    with pytest.raises(Unavailable, match="Draining"):
        client.complete("x")
    assert len(node.requests) == QUICK.max_attempts


def test_a_stream_without_an_end_is_an_error(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(accepted(), delta("Hel", 11), Act.END)]
    with pytest.raises(Unavailable, match="without finishing it"):
        client.complete("x")


def test_honours_the_servers_retry_hint(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(Overloaded("Full.", retry_after_ms=150),), HELLO]
    begin_s = time.perf_counter()
    assert client.complete("x").text == "Hello"
    assert time.perf_counter() - begin_s >= 0.15


def test_a_retry_that_would_miss_the_deadline_is_not_waited_for(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(Overloaded("Full.", retry_after_ms=60_000),), HELLO]
    begin_s = time.perf_counter()
    with pytest.raises(Overloaded, match="Full") as raised:
        client.complete("x", deadline_s=5)
    assert raised.value.retry_after_ms == 60_000
    assert time.perf_counter() - begin_s < 5


def test_unary_calls_are_retried(client: Client, node: ScriptedInference) -> None:
    node.unary_errors = [Unavailable("Starting."), Unavailable("Starting.")]
    assert client.tokenize("ab") == [97, 98]


def test_deadline_ends_a_hanging_answer(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(accepted(), Act.HANG)]
    with pytest.raises(DeadlineExceeded, match="did not answer in time"):
        client.complete("x", deadline_s=0.3)
    assert node.hung_up.wait(10)
    with pytest.raises(ValueError, match="deadline_s is 0"):
        client.generate("x", deadline_s=0)


def test_tokenize_and_detokenize(client: Client) -> None:
    assert client.detokenize(client.tokenize("Grüße")) == "Grüße"
    assert client.detokenize(client.tokenize(CHAT)) == "user:Hi"
    with pytest.raises(ValueError, match="token_ids holds -3"):
        client.detokenize([-3])


def test_info_and_stats_come_as_dataclasses(client: Client) -> None:
    info = client.info()
    assert (info.model.name, info.model.dtype, info.model.experts_nbytes) == ("tiny", Number.BFLOAT16, 32 << 20)
    assert (info.engine, info.store.state) == (EngineKind.CONTINUOUS, StoreState.FROZEN)
    assert info.device.emulated_link_bytes_per_s == 10**9
    assert info.expert_cache.cache_rate == 0.5
    stats = client.cache_stats()
    assert (stats.prefill.hit_rate, stats.decode.hit_rate) == (0.25, 0.75)
    assert stats.layers[0].evictions == 9
    assert (stats.running_requests, stats.queued_requests, stats.uploaded_bytes) == (1, 2, 13 << 20)


def test_the_cache_map_is_a_table_of_bits(client: Client) -> None:
    cache_map = client.cache_map()
    assert (cache_map.num_moe_layers, cache_map.num_experts, cache_map.step, cache_map.layer) == (4, 8, 21, 2)
    assert cache_map.by_layer == tuple(bytes(range(8 * layer, 8 * layer + 8)) for layer in range(4))
    assert ExpertBit(cache_map.by_layer[1][5]) == ExpertBit.RESIDENT | ExpertBit.HINTED | ExpertBit.ROUTED


def test_another_schema_is_refused_and_the_right_one_asked_once(client: Client, node: ScriptedInference) -> None:
    node.schema_version = "99.0"
    with pytest.raises(ModelMismatch, match=r"speaks schema 99\.0"):
        client.complete("x")
    assert node.requests == []
    node.schema_version = "1.0"
    client.complete("x")
    client.complete("x")
    assert node.num_info_calls == 2


def test_a_node_that_went_away_is_checked_again(client: Client, node: ScriptedInference) -> None:
    client.complete("x")
    node.scripts = [(Unavailable("Draining."),), HELLO]
    client.complete("x")
    assert node.num_info_calls == 2


def test_nobody_there_is_a_sentence_with_the_endpoint(socket_dir: Path) -> None:
    with Client(f"unix:{socket_dir}/none.sock", QUICK) as client:
        with pytest.raises(Unavailable, match=r"There is no connection to unix:.*none\.sock"):
            client.complete("x")
        with pytest.raises(Unavailable, match=r"not ready after 0\.3 s"):
            client.wait_until_ready(0.3)


def test_waits_for_a_node_that_comes_late(socket_dir: Path) -> None:
    endpoint = f"unix:{socket_dir}/late.sock"
    ready = threading.Event()

    def wait() -> None:
        with Client(endpoint) as client:
            client.wait_until_ready(20)
            ready.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    with serve_in_thread(ScriptedInference(HELLO), endpoint):
        assert ready.wait(20)
    waiter.join()


def test_a_starting_node_is_not_ready() -> None:
    with serve_in_thread(ScriptedInference(HELLO), serving=False) as endpoint, Client(endpoint) as client:
        with pytest.raises(Unavailable, match="still starting"):
            client.wait_until_ready(0.3)
        assert client.info().model.name == "tiny"


def test_a_killed_connection_mid_answer_is_unavailable(node: ScriptedInference, socket_dir: Path) -> None:
    node.scripts = [(accepted(), delta("Hel", 11), Act.HANG)]
    endpoint = f"unix:{socket_dir}/n.sock"
    with Client(endpoint, QUICK) as client:
        with serve_in_thread(node, endpoint):
            pieces = iter(client.generate("x"))
            assert next(pieces) == "Hel"
        with pytest.raises(Unavailable):
            next(pieces)


def test_the_async_client_does_the_same() -> None:
    async def main() -> None:
        servicer = ScriptedInference((Unavailable("Starting."),), HELLO)
        async with ScriptedNode(servicer) as node, AsyncClient(node.endpoint, QUICK) as client:
            await client.wait_until_ready(10)
            async with client.generate("x", max_tokens=2) as stream:
                assert [piece async for piece in stream] == ["Hel", "lo"]
            assert [d.token_ids async for d in client.generate("x").deltas()] == [(11,), (12,)]
            answer = await client.complete(CHAT)
            assert answer.usage is not None
            assert (answer.text, answer.usage.output_tokens) == ("Hello", 2)
            assert (await client.info()).model.family == "mixtral"
            assert (await client.cache_stats()).decode.steps == 20
            assert (await client.cache_map()).step == 21
            assert await client.detokenize(await client.tokenize("hi")) == "hi"
            servicer.scripts = [(InvalidInput("temperature is -1."),)]
            with pytest.raises(InvalidInput, match="temperature is -1"):
                await client.complete("x")

    asyncio.run(main())


def test_the_async_stream_is_cancelled_by_call_by_context_and_by_task() -> None:
    async def main() -> None:
        servicer = ScriptedInference((accepted(), delta("Hel", 11), Act.HANG))
        async with ScriptedNode(servicer) as node, AsyncClient(node.endpoint, QUICK) as client:
            async with client.generate("x") as stream:
                async for _ in stream:
                    asyncio.get_running_loop().call_soon(stream.cancel)
            assert stream.finish_reason is FinishReason.CANCELLED
            assert await asyncio.to_thread(servicer.hung_up.wait, 10)

            servicer.hanging.clear()
            servicer.hung_up.clear()
            task = asyncio.create_task(client.complete("x"))
            assert await asyncio.to_thread(servicer.hanging.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(servicer.hung_up.wait, 10)

    asyncio.run(main())


def test_many_threads_share_one_client(client: Client) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(client.complete("x").text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["Hello"] * 8
