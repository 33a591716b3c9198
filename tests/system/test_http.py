"""The HTTP API of real processes: a store, a node, and OpenAI's client."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from tests.bench.http_load import Load, measure
from tests.running_node import RunningNode
from tests.running_store import RunningStore, wait_until
from tests.system.tiny_stack import pack_tiny_model

KEY = "key-of-ops-1"


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_tiny_model(tmp_path_factory.mktemp("qwen"), "qwen2_moe")


@pytest.fixture(scope="module")
def store(tiny_qwen: Path, module_socket_dir: Path) -> Iterator[RunningStore]:
    with RunningStore(tiny_qwen, module_socket_dir) as running:
        running.wait_until_full()
        yield running


@pytest.mark.slow
def test_a_real_node_holds_under_load_and_drains(
    store: RunningStore, tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short form of `python -m tests.bench.http_load`; then SIGTERM while an answer streams. All with a key."""
    monkeypatch.setenv("PROMOE_API_KEYS", KEY)
    settings = ("compute.expert_slots=2", "compute.http_listen=0.0.0.0:0")
    with RunningNode(tiny_qwen, store.endpoint, tmp_path, *settings) as node:
        url = node.http_url().replace("0.0.0.0", "127.0.0.1")
        assert httpx2.get(f"{url}/v1/models", timeout=60).status_code == 401
        load = Load(num_streams=6, seconds=2.0, leave_share=0.4, num_tokens=8, seed=0)
        measured = asyncio.run(measure(url, load, None, KEY))
        assert measured["mixed_up"] == []
        assert measured["open_after"] == 0
        assert measured["ok"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            stream = client.chat.completions.create(
                model=client.models.list().data[0].id,
                messages=[{"role": "user", "content": "the sand"}],
                max_tokens=60,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            pieces = [next(stream)]
            node.process.send_signal(signal.SIGTERM)
            # The draining node says so before it refuses: until then a request would still be let in.
            wait_until(lambda: "Draining" in node.log.read_text(), log=node.log)
            assert httpx2.get(f"{url}/ready", timeout=60).status_code == 503
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                client.completions.create(model=pieces[0].model, prompt="x")
            pieces += stream
        usage = pieces[-1].usage
        assert usage is not None
        assert usage.completion_tokens == 60
        assert node.process.wait(60) == 0
        log = node.log.read_text()
        assert "Traceback" not in log
        assert KEY not in log
