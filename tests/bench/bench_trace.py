"""What recording a trace costs: the same answers with nobody reading, with a trace, and with hidden states besides.

The node, the store, the recorder (`promoe trace record`'s own reader and writer) and the asking client are processes of
their own. The three take turns, so that a slow minute of a shared machine slows all of a round; beside TPOT there is
the CPU time of the node per token, which neighbours disturb less.
Goal: TPOT at most 1.03 times that without a trace.
"""

import argparse
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import psutil

from promoe import Client
from promoe.cli.trace_recording import RecordingState, TraceRecording
from tests.bench.bench_overhead import CONTEXT_TOKENS, PromoeSide
from tests.bench.demo_model import demo_pack
from tests.bench.report import Sample, median_ratio, out_argument, write_report
from tests.running_node import RunningNode
from tests.running_store import RunningStore

GOAL: Final = 1.03
ROWS: Final = 32


@dataclass(frozen=True)
class Mode:
    """What is recorded; `rows` of both kinds of hidden states."""

    name: str
    records: bool
    rows: int = 0


MODES: Final = (Mode("off", records=False), Mode("trace", records=True), Mode("hidden", records=True, rows=ROWS))


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
            hidden = mode.rows > 0
            stream = client.trace(max_rows=mode.rows, layer_input=hidden, router_input=hidden)
            recording = TraceRecording(stream, folder / "run.trace")
            recording.start()
            connection.send("open")
            connection.recv()
            recording.close()
            connection.send(recording.finish())


def measure(rounds: int, num_tokens: int, num_threads: int) -> dict[str, object]:
    """Rounds of all modes at batch 1 and cache rate 0.5; the order turns with each round."""
    pack_dir = demo_pack()
    settings = (
        "compute.cache_rate=0.5",
        f"compute.max_context_tokens={CONTEXT_TOKENS}",
        f"compute.num_threads={num_threads}",
    )
    tpots_s: dict[str, list[float]] = {mode.name: [] for mode in MODES}
    cpus_s: dict[str, list[float]] = {mode.name: [] for mode in MODES}
    states: dict[str, RecordingState] = {}
    with (
        tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder,
        RunningStore(pack_dir, Path(folder)) as store,
        RunningNode(pack_dir, store.endpoint, Path(folder), *settings) as node,
    ):
        promoe, process = PromoeSide(node.endpoint()), psutil.Process(node.process.pid)
        recorder = RecorderProcess(node.endpoint(), Path(folder))
        promoe.run(1, num_tokens)
        for number in range(rounds):
            for mode in (*MODES[number % 3 :], *MODES[: number % 3]):
                with recorder.recording(mode) as recorded:
                    before = process.cpu_times()
                    tpots_s[mode.name].append(promoe.run(1, num_tokens).tpot_s)
                    after = process.cpu_times()
                used_s = after.user + after.system - before.user - before.system
                cpus_s[mode.name].append(used_s / num_tokens)
                if recorded:
                    states[mode.name] = recorded[-1]
        recorder.close()
    return {mode.name: _summary(mode, tpots_s, cpus_s, states.get(mode.name)) for mode in MODES}


def _summary(
    mode: Mode, tpots_s: dict[str, list[float]], cpus_s: dict[str, list[float]], state: RecordingState | None
) -> dict[str, object]:
    summary: dict[str, object] = {
        "rows": mode.rows,
        "tpot_s": Sample(tuple(tpots_s[mode.name])).as_dict(),
        "node_cpu_s_per_token": Sample(tuple(cpus_s[mode.name])).as_dict(),
    }
    line = f"  {mode.name:6}: TPOT {Sample(tuple(tpots_s[mode.name])).median * 1e3:6.1f} ms"
    if state is not None:
        ratio = median_ratio(tpots_s[mode.name], tpots_s["off"])
        cpu_ratio = median_ratio(cpus_s[mode.name], cpus_s["off"])
        summary |= {"ratio": ratio, "cpu_ratio": cpu_ratio, "goal": GOAL, "met": ratio <= GOAL, "last": asdict(state)}
        line += f", ratio {ratio:.3f} (goal {GOAL}), CPU {cpu_ratio:.3f}, {state.nbytes / state.tokens:.0f} bytes/token"
        line += f", {state.dropped_steps} steps left out"
    print(line)
    return summary


def main() -> None:
    """Prints the ratios and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    out_argument(parser)
    options = parser.parse_args()
    measured = measure(options.rounds, options.tokens, options.threads)
    print(f"Written: {write_report('trace', measured, options.out)}")


if __name__ == "__main__":
    main()
