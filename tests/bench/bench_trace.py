"""What recording a trace costs: gaps between tokens with nobody reading, with events, and with hidden states besides.

The node, the store, the recorder (`promoe trace record`'s own reader and writer) and the asking client are processes of
their own. While one long answer is decoded, the modes take turns every few tokens, so that whatever slows a shared
machine down slows all of a round; beside the gaps there is the CPU time of the node per token.
Goal: TPOT at most 1.03 times that without a trace.
"""

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Final

import psutil

from promoe import Client
from promoe.cli.trace_recording import RecordingState, TraceRecording
from tests.bench.bench_overhead import CONTEXT_TOKENS
from tests.bench.demo_model import PROMPTS, chat, demo_pack
from tests.bench.report import Sample, median_ratio, out_argument, write_report
from tests.running_node import RunningNode
from tests.running_store import RunningStore, wait_until

GOAL: Final = 1.03
ROWS: Final = 32


@dataclass(frozen=True)
class Mode:
    """What is recorded: nothing, events, or events with `rows` of hidden states of one kind or of both."""

    name: str
    records: bool
    rows: int = 0
    router_input: bool = False


MODES: Final = (
    Mode("off", records=False),
    Mode("events", records=True),
    Mode("layer_input", records=True, rows=ROWS),
    Mode("both", records=True, rows=ROWS, router_input=True),
)


class RecorderProcess:
    """A recorder that is told when to begin and to end."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_record_on_demand, args=(theirs, endpoint, folder), daemon=True)
        self._process.start()

    @contextmanager
    def recording(self, mode: Mode) -> Iterator[list[RecordingState]]:
        """Records within the context, if the mode does; its end leaves the state in the list."""
        states: list[RecordingState] = []
        if not mode.records:
            yield states
            return
        self._connection.send(mode)
        assert self._connection.recv() == "open", "the recorder says when the node records"
        yield states
        self._connection.send(None)
        states.append(self._connection.recv())

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join()


def _record_on_demand(connection: Connection, endpoint: str, folder: Path) -> None:
    with Client(endpoint) as client:
        while True:
            try:
                mode: Mode = connection.recv()
            except EOFError:
                return
            stream = client.trace(max_rows=mode.rows, layer_input=mode.rows > 0, router_input=mode.router_input)
            recording = TraceRecording(stream, folder / "run.trace")
            recording.start()
            connection.send("open")
            connection.recv()
            recording.close()
            connection.send(recording.finish())


@dataclass
class ModeSamples:
    """Per round, in seconds: the median gap between two tokens, and the node's CPU time per token."""

    gaps_s: list[float] = field(default_factory=list)
    cpus_s: list[float] = field(default_factory=list)
    last: RecordingState | None = None


class LongAnswer:
    """An answer that is read in a thread, however long it takes."""

    def __init__(self, endpoint: str, max_tokens: int) -> None:
        self.arrivals_s: list[float] = []
        self._client = Client(endpoint)
        self._stream = self._client.generate(chat(PROMPTS[1]), max_tokens=max_tokens, ignore_eos=True)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def wait_for(self, num_tokens: int) -> None:
        """Returns when so many more tokens have come."""
        wanted = len(self.arrivals_s) + num_tokens
        wait_until(lambda: len(self.arrivals_s) >= wanted or not self._thread.is_alive(), timeout_s=600)
        assert len(self.arrivals_s) >= wanted, "the context is full: fewer rounds, or smaller blocks"

    def close(self) -> None:
        """Ends it."""
        self._stream.cancel()
        self._thread.join()
        self._client.close()

    def _read(self) -> None:
        for delta in self._stream.deltas():
            self.arrivals_s.extend(perf_counter() for _ in delta.token_ids)


def measure(rounds: int, block_tokens: int, num_threads: int) -> dict[str, object]:
    """Rounds of all modes at batch 1 and cache rate 0.5; the order turns with each round."""
    pack_dir = demo_pack()
    settings = (
        "compute.cache_rate=0.5",
        f"compute.max_context_tokens={CONTEXT_TOKENS}",
        f"compute.num_threads={num_threads}",
    )
    samples = {mode.name: ModeSamples() for mode in MODES}
    with (
        tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder,
        RunningStore(pack_dir, Path(folder)) as store,
        RunningNode(pack_dir, store.endpoint, Path(folder), *settings) as node,
    ):
        recorder = RecorderProcess(node.endpoint(), Path(folder))
        answer = LongAnswer(node.endpoint(), CONTEXT_TOKENS - 128)
        process = psutil.Process(node.process.pid)
        answer.wait_for(block_tokens)
        for number in range(rounds):
            for mode in (*MODES[number % len(MODES) :], *MODES[: number % len(MODES)]):
                with recorder.recording(mode) as recorded:
                    _measure_block(answer, process, block_tokens, samples[mode.name])
                if recorded:
                    samples[mode.name].last = recorded[-1]
        answer.close()
        recorder.close()
    return {mode.name: _summary(mode, samples[mode.name], samples["off"]) for mode in MODES}


def _measure_block(answer: LongAnswer, process: psutil.Process, num_tokens: int, samples: ModeSamples) -> None:
    """The first token may have begun in another mode, so its gap does not count."""
    answer.wait_for(1)
    first, before = len(answer.arrivals_s) - 1, process.cpu_times()
    answer.wait_for(num_tokens)
    after, arrivals_s = process.cpu_times(), answer.arrivals_s[first:]
    samples.gaps_s.append(statistics.median(late - early for early, late in itertools.pairwise(arrivals_s)))
    used_s = after.user + after.system - before.user - before.system
    samples.cpus_s.append(used_s / (len(arrivals_s) - 1))


def _summary(mode: Mode, samples: ModeSamples, off: ModeSamples) -> dict[str, object]:
    gap = Sample(tuple(samples.gaps_s))
    summary: dict[str, object] = {
        "rows": mode.rows,
        "gap_s": gap.as_dict(),
        "node_cpu_s_per_token": Sample(tuple(samples.cpus_s)).as_dict(),
    }
    line = f"  {mode.name:11}: TPOT {gap.median * 1e3:6.1f} ms"
    if mode.records:
        assert samples.last is not None, "it was recorded"
        ratio = median_ratio(samples.gaps_s, off.gaps_s)
        cpu_ratio = median_ratio(samples.cpus_s, off.cpus_s)
        recorded = asdict(samples.last)
        summary |= {"ratio": ratio, "cpu_ratio": cpu_ratio, "goal": GOAL, "met": ratio <= GOAL, "last_file": recorded}
        line += f", ratio {ratio:.3f} (goal {GOAL}), CPU {cpu_ratio:.3f}, {samples.last.dropped_steps} steps left out"
        line += f", {samples.last.nbytes / samples.last.tokens:.0f} bytes/token"
    print(line)
    return summary


def main() -> None:
    """Prints the ratios and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--block", type=int, default=10, help="tokens of one mode in a round")
    parser.add_argument("--threads", type=int, default=1)
    out_argument(parser)
    options = parser.parse_args()
    measured = measure(options.rounds, options.block, options.threads)
    print(f"Written: {write_report('trace', measured, options.out)}")


if __name__ == "__main__":
    main()
