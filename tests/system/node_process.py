"""Starts and asks `attached_node` processes."""

import re
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from promoe.ids import ExpertId
from promoe.model_spec import ModelSpec
from tests.packs import synthetic_blob
from tests.running_store import ROOT, RunningStore, wait_until


class NodeProcess:
    """One attached compute node; killed at the end of the `with` block.

    Args:
        log: standard error goes there.
    """

    def __init__(self, store: RunningStore, spec: ModelSpec, log: Path) -> None:
        self.log = log
        numbers = (spec.num_moe_layers, spec.num_experts, spec.layout.blob_nbytes)
        command = [sys.executable, "-m", "tests.system.attached_node", store.endpoint, *map(str, numbers)]
        with log.open("a") as stderr:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    def kill(self) -> None:
        """kill -9; returns when the process is gone."""
        self.process.kill()
        self.process.wait(timeout=20)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def wait_until_attached(self) -> Self:
        """Returns when every expert is mapped."""
        assert self._read_line() == "attached", self.log.read_text()
        return self

    def ask(self, command: str) -> str:
        """One command, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self._read_line()

    def wait_for_state(self, state: str) -> None:
        """Returns when the client says so."""
        wait_until(lambda: self.ask("state") == state, log=self.log)

    def arena_nbytes(self, field: str) -> int:
        """`Rss` or `Pss` of this process's mapping of the arena."""
        return arena_nbytes(self.pid, field)

    def _read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")


def arena_nbytes(pid: int, field: str) -> int:
    """`Rss` or `Pss` of a process's mappings of an arena, as the kernel accounts them."""
    total, in_arena = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            in_arena = "memfd:promoe-arena" in line
        elif in_arena and line.startswith(f"{field}:"):
            total += int(line.split()[1]) << 10
    return total


def checksum_of_pack(spec: ModelSpec, seed: int = 0) -> str:
    """What `checksum` answers for a synthetic pack's blobs."""
    digest = xxhash.xxh3_64()
    for layer in range(spec.num_moe_layers):
        for expert in range(spec.num_experts):
            digest.update(synthetic_blob(seed, ExpertId(layer, expert), spec.layout.blob_nbytes))
    return str(digest.hexdigest())
