"""The HTTP API under load: streams that come, go and leave in the middle, for some time.

What must hold, and the exit status says whether it did: every answer that was read to its end is the one that its
prompt and seed got alone (no cross-talk), nothing stays running or waiting behind clients that left, and the node's
memory stays flat. ITL is measured where a client sees it; beside it stands what the node says its steps took, and who
used the processors. Without `--url` a tiny model of random weights is served for the occasion, in float32.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Final

import httpx2
import openai
import psutil

from tests.bench.report import out_argument, write_report
from tests.running_node import RunningNode
from tests.running_store import RunningStore
from tests.system.tiny_stack import pack_tiny_model

NUM_PROMPTS: Final = 24
MAX_RSS_GROWTH: Final = 0.02
RSS_INTERVAL_S: Final = 5.0
STEP_FIGURE: Final = re.compile(r'promoe_step_seconds_(sum|count)\{phase="(\w+)"\} (\S+)')
DRAIN_DEADLINE_S: Final = 30.0


@dataclass(frozen=True)
class Load:
    """What is asked of the node.

    Attributes:
        num_streams: open at once.
        seconds: how long.
        leave_share: of all streams, those that are left in the middle.
        num_tokens: of each answer at most.
        seed: of everything that is drawn here.
    """

    num_streams: int
    seconds: float
    leave_share: float
    num_tokens: int
    seed: int


@dataclass
class Tally:
    """What came of it."""

    finished: int = 0
    left: int = 0
    refused: int = 0
    tokens: int = 0
    mixed_up: list[str] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)


class Caller:
    """Asks one node, again and again.

    Args:
        client: OpenAI's own.
        model: as the node calls it.
        load: how much.
    """

    def __init__(self, client: openai.AsyncOpenAI, model: str, load: Load) -> None:
        self._client = client
        self._model = model
        self._load = load
        self._random = random.Random(load.seed)
        self._alone: dict[int, str] = {}
        self.tally = Tally()

    async def learn(self) -> None:
        """What each prompt is answered alone; also warms the node up."""
        for number in range(NUM_PROMPTS):
            self._alone[number] = await self._ask(number, self._load.num_tokens, Tally())

    async def press(self, seconds: float) -> None:
        """All streams, until the time is over; what came of an earlier time is forgotten."""
        self.tally = Tally()
        end_s = perf_counter() + seconds
        await asyncio.gather(*(self._keep_asking(end_s) for _ in range(self._load.num_streams)))

    async def _keep_asking(self, end_s: float) -> None:
        while perf_counter() < end_s:
            number = self._random.randrange(NUM_PROMPTS)
            leaves = self._random.random() < self._load.leave_share
            most = self._random.randrange(1, self._load.num_tokens) if leaves else self._load.num_tokens
            try:
                text = await self._ask(number, most, self.tally)
            except openai.RateLimitError as refusal:
                self.tally.refused += 1
                await asyncio.sleep(float(refusal.response.headers["retry-after-ms"]) / 1000)
                continue
            if leaves:
                self.tally.left += 1
            else:
                self.tally.finished += 1
            is_right = self._alone[number].startswith(text) if leaves else self._alone[number] == text
            if not is_right:
                self.tally.mixed_up.append(f"prompt {number}: {text!r} instead of {self._alone[number]!r}")

    async def _ask(self, number: int, most: int, tally: Tally) -> str:
        """The first `most` pieces of an answer; the stream is left behind them."""
        began_s = last_s = perf_counter()
        pieces: list[str] = []
        async with await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": f"{number} and " + "the sand and the sea " * (number % 5)}],
            max_tokens=self._load.num_tokens,
            temperature=0.8,
            seed=number,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:
            async for chunk in stream:
                text = chunk.choices[0].delta.content
                if not text:
                    continue
                now_s = perf_counter()
                (tally.itl_s if pieces else tally.ttft_s).append(now_s - (last_s if pieces else began_s))
                last_s = now_s
                pieces.append(text)
                tally.tokens += 1
                if len(pieces) >= most:
                    break
        return "".join(pieces)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of all are not above; None without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


async def measure(url: str, load: Load, pid: int | None, key: str = "none") -> dict[str, object]:
    """One run against a serving node.

    Args:
        url: without `/v1`.
        load: how much.
        pid: the node's process; None where its memory cannot be seen.
        key: the API key, where one is needed.
    """
    limits = httpx2.Limits(max_connections=None)
    async with (
        httpx2.AsyncClient(limits=limits, timeout=120.0) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http) as client,
    ):
        model = (await client.models.list()).data[0].id
        caller = Caller(client, model, load)
        await caller.learn()
        # The first streams open connections and fill pools: what is measured is what is added after them.
        await caller.press(load.seconds / 6)
        http.headers["authorization"] = f"Bearer {key}"
        steps = await _steps(http, url)
        use = ProcessUse(pid)
        watch = asyncio.create_task(use.watch())
        began_s = perf_counter()
        await caller.press(load.seconds)
        elapsed_s = perf_counter() - began_s
        watch.cancel()
        remaining = await _remaining(http, url)
        used = use.as_dict(elapsed_s)
        steps = {phase: after.since(steps[phase]) for phase, after in (await _steps(http, url)).items()}
    tally = caller.tally
    return {
        "streams": load.num_streams,
        "seconds": elapsed_s,
        "finished": tally.finished,
        "left": tally.left,
        "refused": tally.refused,
        "mixed_up": tally.mixed_up,
        "open_after": remaining,
        "tokens_per_s": tally.tokens / elapsed_s,
        "ttft_p50_s": percentile(tally.ttft_s, 0.5),
        "ttft_p99_s": percentile(tally.ttft_s, 0.99),
        "itl_p50_s": percentile(tally.itl_s, 0.5),
        "itl_p90_s": percentile(tally.itl_s, 0.9),
        "itl_p99_s": percentile(tally.itl_s, 0.99),
        "itl_max_s": max(tally.itl_s, default=None),
        "steps": {phase: {"num": taken.num, "mean_s": taken.mean_s} for phase, taken in steps.items()},
        **used,
        "ok": not tally.mixed_up and remaining == 0 and tally.finished > 0 and use.growth <= MAX_RSS_GROWTH,
    }


@dataclass(frozen=True)
class Steps:
    """Forward passes of one phase; those with any prompt token are `prefill`, decoding rows in them included."""

    num: int
    seconds: float

    @property
    def mean_s(self) -> float | None:
        """Of one; None where there was none."""
        return self.seconds / self.num if self.num else None

    def since(self, before: "Steps") -> "Steps":
        """Those that came after."""
        return Steps(self.num - before.num, self.seconds - before.seconds)


async def _steps(http: httpx2.AsyncClient, url: str) -> dict[str, Steps]:
    """Since the node's start, by phase."""
    found: dict[str, dict[str, float]] = {}
    for figure, phase, value in STEP_FIGURE.findall((await http.get(f"{url}/metrics")).text):
        found.setdefault(phase, {})[figure] = float(value)
    return {phase: Steps(int(figures["count"]), figures["sum"]) for phase, figures in found.items()}


class ProcessUse:
    """Memory of the node's process over time, and processor time of the node and of this client.

    Args:
        pid: the node's; None where it cannot be seen.
    """

    def __init__(self, pid: int | None) -> None:
        self._node = None if pid is None else psutil.Process(pid)
        self._client = psutil.Process()
        self._before_s = self._cpu_s()
        self._rss = [] if self._node is None else [self._node.memory_info().rss]

    async def watch(self) -> None:
        """Looks again and again, until it is cancelled."""
        while self._node is not None:
            await asyncio.sleep(RSS_INTERVAL_S)
            self._rss.append(self._node.memory_info().rss)

    @property
    def growth(self) -> float:
        """From the first look to the largest later one."""
        return max(self._rss) / self._rss[0] - 1 if self._rss else 0.0

    def as_dict(self, elapsed_s: float) -> dict[str, object]:
        """For JSON; processors are shares of one."""
        if self._node is not None:
            self._rss.append(self._node.memory_info().rss)
        node_s, client_s = (after - before for after, before in zip(self._cpu_s(), self._before_s, strict=True))
        return {
            "node_cpus": node_s / elapsed_s if self._node is not None else None,
            "client_cpus": client_s / elapsed_s,
            "rss_bytes": self._rss,
            "rss_growth": self.growth if self._rss else None,
        }

    def _cpu_s(self) -> tuple[float, float]:
        return _cpu_s(self._node) if self._node is not None else 0.0, _cpu_s(self._client)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _remaining(http: httpx2.AsyncClient, url: str) -> int:
    """Requests that are still open when all clients have gone, after a moment."""
    end_s = perf_counter() + DRAIN_DEADLINE_S
    while True:
        load = (await http.get(f"{url}/ready")).json()
        num_open = int(load["running_requests"]) + int(load["queued_requests"])
        if num_open == 0 or perf_counter() > end_s:
            return num_open
        await asyncio.sleep(0.05)


@contextmanager
def tiny_node() -> Iterator[tuple[str, int]]:
    """A node of a tiny model with its store: its URL and its process."""
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        pack_dir = pack_tiny_model(Path(folder), "qwen2_moe")
        settings = ("compute.http_listen=127.0.0.1:0", "compute.max_concurrent_requests=32", "compute.cache_rate=0.5")
        with (
            RunningStore(pack_dir, Path(folder)) as store,
            RunningNode(pack_dir, store.endpoint, Path(folder), *settings) as node,
        ):
            yield node.http_url(), node.process.pid


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when everything held, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--leave-share", type=float, default=0.3, help="streams that are left in the middle")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a serving node's HTTP API, without /v1; default: a tiny model's")
    parser.add_argument("--key", default="none", help="that node's API key")
    parser.add_argument("--pid", type=int, help="that node's process, to see its memory")
    out_argument(parser)
    options = parser.parse_args(arguments)
    load = Load(options.streams, options.seconds, options.leave_share, options.tokens, options.seed)
    if options.url is not None:
        measured = asyncio.run(measure(options.url, load, options.pid, options.key))
    else:
        with tiny_node() as (url, pid):
            measured = asyncio.run(measure(url, load, pid))
    path = write_report("http_load", measured, options.out)
    print(json.dumps(measured, indent=1))
    print(f"Written: {path}")
    return 0 if measured["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
