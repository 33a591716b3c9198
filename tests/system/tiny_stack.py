"""A store process and a compute node process of a tiny model whose link is slow: its answers can be met half way.

With one slot per layer and 9 KiB experts over a link of 1 MB/s a token takes some 50 ms, nearly all of it loads from
the arena: what happens to the store or to the node happens while experts are on their way.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch

from expert_store.pack.packer import pack_checkpoint
from promoe import Client
from promoe.client import GenerationStream
from promoe.model_spec import Dtype
from promoe.node_report import StoreState
from promoe.retry import RetryPolicy
from tests.families import save_tiny_checkpoint
from tests.running_node import RunningNode
from tests.running_store import RunningStore, wait_until

PROMPT = "the cat and the hat "
NUM_TOKENS = 50
NODE_SETTINGS = (
    "compute.expert_slots=1",
    "compute.link_bytes_per_s=1000000",
    "compute.max_context_tokens=256",
)
NO_RETRY = RetryPolicy(max_attempts=1)


def pack_tiny_model(folder: Path, family: str = "mixtral") -> Path:
    """Saves and packs the family's tiny model in float32; returns the pack's folder."""
    checkpoint = save_tiny_checkpoint(family, folder / f"{family}-checkpoint", torch.float32)
    pack_dir = folder / f"{family}-pack"
    pack_checkpoint(checkpoint, pack_dir, dtype=Dtype.FLOAT32)
    return pack_dir


class TinyStack:
    """One store and one node, each a process of its own."""

    def __init__(self, pack_dir: Path, folder: Path, *node_settings: str, config: Path | None = None) -> None:
        self.pack_dir = pack_dir
        self.folder = folder
        self.store = RunningStore(pack_dir, folder)
        settings = (*NODE_SETTINGS, *node_settings)
        self.node = RunningNode(pack_dir, self.store.endpoint, folder, *settings, config=config)

    def restart_store(self) -> None:
        """Starts the next store in the folder of the one that is gone."""
        self.store = RunningStore(self.pack_dir, self.folder)

    def client(self) -> Client:
        """A client that tells failures at once."""
        return Client(self.node.endpoint(), NO_RETRY)

    def close(self) -> None:
        """Kills both."""
        self.node.kill()
        self.store.kill()


@contextmanager
def running_stack(pack_dir: Path, folder: Path, *node_settings: str, config: Path | None = None) -> Iterator[TinyStack]:
    """A stack, killed at the end."""
    stack = TinyStack(pack_dir, folder, *node_settings, config=config)
    try:
        yield stack
    finally:
        stack.close()


def quiet_answer(client: Client, prompt: str = PROMPT, num_tokens: int = NUM_TOKENS) -> list[int]:
    """Greedy tokens, with nothing happening meanwhile."""
    return list(client.complete(prompt, max_tokens=num_tokens, ignore_eos=True).token_ids)


class BackgroundAnswer:
    """A greedy answer that is read in a thread.

    Args:
        client: used by the thread until `tokens` has returned.
    """

    def __init__(self, client: Client, prompt: str = PROMPT, num_tokens: int = NUM_TOKENS) -> None:
        self.stream: GenerationStream = client.generate(prompt, max_tokens=num_tokens, ignore_eos=True)
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @property
    def token_ids(self) -> list[int]:
        """The tokens that have come so far."""
        return list(self.stream.answer.token_ids)

    @property
    def is_done(self) -> bool:
        """It has ended, one way or the other."""
        return not self._thread.is_alive()

    def in_the_middle(self) -> Self:
        """Returns when its third token is there."""
        wait_until(lambda: len(self.token_ids) >= 3 or not self._thread.is_alive())
        assert self._thread.is_alive(), f"the answer goes on for some time: {self._failure}"
        return self

    def tokens(self) -> list[int]:
        """All tokens, when the answer has ended; raises what it failed with."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "the answer ends"
        if self._failure is not None:
            raise self._failure
        return self.token_ids

    def _read(self) -> None:
        try:
            self.stream.finish()
        except Exception as failure:  # noqa: BLE001 - raised again in the test's thread
            self._failure = failure


def wait_for_store_state(client: Client, state: StoreState) -> None:
    """Returns when the node says so."""
    wait_until(lambda: client.info().store.state is state)
