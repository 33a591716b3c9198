"""Chats that no packaged predictor was trained on, recorded from a node with hidden states."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from promoe import Client
from promoe.cli.prompt_source import packaged_prompts
from promoe.cli.trace_recording import TraceRecording
from tests.bench.demo_model import PROMPTS, chat
from tests.running_node import RunningNode
from tests.running_store import RunningStore

CONTEXT_TOKENS: Final = 512
ROWS: Final = 8
"""Sampled of each step, as the node samples for a predictor."""


def held_out_prompts() -> list[str]:
    """Those of the benchmarks and every sixth of the packaged ones: the packaged predictors' training left them out."""
    return [*PROMPTS, *(item.text for item in packaged_prompts()[5::6])]


def record_chats(pack_dir: Path, prompts: Sequence[str], max_tokens: int, path: Path) -> None:
    """Asks one after the other; every second answer is sampled, the others are greedy."""
    settings = ("compute.cache_rate=1.0", f"compute.max_context_tokens={CONTEXT_TOKENS}")
    with (
        tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder,
        RunningStore(pack_dir, Path(folder)) as store,
        RunningNode(pack_dir, store.endpoint, Path(folder), *settings) as node,
        Client(node.endpoint()) as client,
    ):
        recording = TraceRecording(client.trace(max_rows=ROWS, layer_input=True, router_input=True), path)
        recording.start()
        for number, prompt in enumerate(prompts):
            temperature = 0.8 if number % 2 else 0.0
            with client.generate(chat(prompt), max_tokens=max_tokens, temperature=temperature, seed=number) as stream:
                for _ in stream.deltas():
                    pass
        recording.close()
        recording.finish()
