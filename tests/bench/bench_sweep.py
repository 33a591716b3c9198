"""TPOT, hit rate, bytes and stalls over the cache rate, reactive LRU, on the demo model's own chats.

All cache rates serve the same greedy chats in one run, taking turns, once with plain memcpy as the link and once with
an emulated link on which loading every expert of a token takes twice as long as computing it all resident. Beside each
row: all resident, the offline optimum (Belady) of the same routing, and the floor, max(compute all resident,
Belady bytes / link rate). Exactness makes the comparison fair: every rate routes every token alike.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Final

import torch

from compute_node.config import ComputeConfig, DeviceChoice
from compute_node.replay.belady import HitCount, Visit, belady
from promoe import Client
from promoe.model_spec import ModelSpec
from tests.bench.demo_model import PROMPTS, chat, demo_pack
from tests.bench.report import RESULTS, Sample, out_argument, write_report
from tests.bench.sweep_plot import plot_sweep
from tests.running_node import NodeThread, RunningNode
from tests.running_store import RunningStore

CACHE_RATES: Final = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
CONTEXT_TOKENS: Final = 1024
ALL_MISS_SHARE: Final = 2.0
"""All-miss copy time divided by all-resident compute time on the emulated link (ProMoE's DS-1 in its Figure 3)."""


@dataclass(frozen=True)
class ChatFigures:
    """One chat's decode, from the usage the node reports."""

    tpot_s: float
    ttft_s: float
    hits: int
    misses: int
    loaded_bytes: int
    stall_s: float
    num_decode_tokens: int


class Node:
    """One cache rate's node process and its client; the client connects when it is first asked."""

    def __init__(self, process: RunningNode, stack: ExitStack) -> None:
        self._process = process
        self._stack = stack

    @cached_property
    def client(self) -> Client:
        """Waits until the node serves."""
        return self._stack.enter_context(Client(self._process.endpoint()))

    def ask(self, prompt: str, num_tokens: int) -> ChatFigures:
        """One chat, alone."""
        return figures_of(self.client, prompt, num_tokens)


def figures_of(client: Client, prompt: str, num_tokens: int) -> ChatFigures:
    """One chat's figures, from its usage."""
    answer = client.complete(chat(prompt), max_tokens=num_tokens, ignore_eos=True)
    usage = answer.usage
    assert usage is not None, "a finished answer has its usage"
    assert usage.tpot_s is not None, "an answer of several tokens has a TPOT"
    decode = usage.decode
    return ChatFigures(
        usage.tpot_s, usage.ttft_s, decode.hits, decode.misses, decode.loaded_bytes, decode.stall_s, num_tokens - 1
    )


@contextmanager
def open_nodes(pack_dir: Path, num_threads: int, link_bytes_per_s: float | None) -> Iterator[dict[float, Node]]:
    """One store, one node per cache rate, all in this process."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp"))
        store = stack.enter_context(RunningStore(pack_dir, Path(folder)))
        fixed = [
            f"compute.max_context_tokens={CONTEXT_TOKENS}",
            "compute.max_concurrent_requests=1",
            f"compute.num_threads={num_threads}",
            # Reactive: loads overlap compute within a layer, nothing is loaded ahead.
            "compute.policy=promoe",
            "compute.eviction=lru",
            "compute.hints=ignore",
        ]
        if link_bytes_per_s is not None:
            fixed.append(f"compute.link_bytes_per_s={link_bytes_per_s}")
        nodes: dict[float, Node] = {}
        for rate in CACHE_RATES:
            process = RunningNode(
                pack_dir, store.endpoint, Path(folder), f"compute.cache_rate={rate}", *fixed, name=f"node-{rate}"
            )
            nodes[rate] = Node(stack.enter_context(process), stack)
        yield nodes


def record_routing(pack_dir: Path, prompts: Sequence[str], num_tokens: int) -> tuple[ModelSpec, list[list[Visit]]]:
    """Every layer's routing of the chats, one after the other, from a node in this process; unmeasured."""
    with (
        tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder,
        RunningStore(pack_dir, Path(folder)) as store,
    ):
        config = ComputeConfig(
            pack=pack_dir,
            store_endpoint=store.endpoint,
            device=DeviceChoice.CPU,
            cache_rate=1.0,
            max_context_tokens=CONTEXT_TOKENS,
        )
        with NodeThread(config) as node, Client(node.endpoint) as client:
            modules = node.node.experts_modules
            steps: list[list[Visit]] = [[] for _ in modules]
            for layer, module in enumerate(modules):
                module.register_forward_pre_hook(partial(_note_routing, steps[layer]))
            for prompt in prompts:
                figures_of(client, prompt, num_tokens)
            return node.node.spec, steps


def _note_routing(steps: list[Visit], module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    ids_TK = arguments[1]
    steps.append(Visit(frozenset(ids_TK.reshape(-1).tolist()), ids_TK.shape[0] == 1))


def sweep(
    nodes: dict[float, Node], prompts: Sequence[str], num_tokens: int, rounds: int
) -> dict[float, list[ChatFigures]]:
    """Rounds over rates: neighbours in time differ in the rate only."""
    figures: dict[float, list[ChatFigures]] = {rate: [] for rate in nodes}
    for node in nodes.values():
        node.ask(prompts[-1], 4)
    for number in range(rounds):
        for rate, node in nodes.items():
            figures[rate].append(node.ask(prompts[number % len(prompts)], num_tokens))
    return figures


def rows_of(
    figures: dict[float, list[ChatFigures]],
    optimum: dict[float, HitCount],
    spec: ModelSpec,
    link_bytes_per_s: float | None,
) -> list[dict[str, object]]:
    """The table, one row a cache rate."""
    resident_tpot_s = Sample(tuple(chat.tpot_s for chat in figures[1.0])).median
    rows: list[dict[str, object]] = []
    for rate, chats in figures.items():
        tpot = Sample(tuple(chat.tpot_s for chat in chats))
        hits = sum(chat.hits for chat in chats)
        misses = sum(chat.misses for chat in chats)
        tokens = sum(chat.num_decode_tokens for chat in chats)
        accesses_per_token = spec.num_moe_layers * spec.experts_per_token
        belady_bytes = (1 - optimum[rate].hit_rate) * accesses_per_token * spec.layout.blob_nbytes
        floor_s = max(resident_tpot_s, belady_bytes / link_bytes_per_s) if link_bytes_per_s else resident_tpot_s
        rows.append(
            {
                "cache_rate": rate,
                "tpot_s": tpot.as_dict(),
                "ttft_s": Sample(tuple(chat.ttft_s for chat in chats)).as_dict(),
                "hit_rate": hits / (hits + misses),
                "bytes_per_token": sum(chat.loaded_bytes for chat in chats) / tokens,
                "stall_share": sum(c.stall_s for c in chats) / sum(c.tpot_s * c.num_decode_tokens for c in chats),
                "all_resident_tpot_s": resident_tpot_s,
                "belady_hit_rate": optimum[rate].hit_rate,
                "belady_bytes_per_token": belady_bytes,
                "floor_tpot_s": floor_s,
            }
        )
    return rows


def print_table(title: str, rows: Sequence[dict[str, object]]) -> None:
    """For people; the JSON has the raw values."""
    print(f"\n{title}\n")
    print("| cache rate | TPOT ms | hit rate | MB/token | stall share | Belady hit rate | floor ms |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        tpot = row["tpot_s"]
        assert isinstance(tpot, dict), "a sample"
        print(
            f"| {row['cache_rate']} | {tpot['median'] * 1e3:.1f} | {row['hit_rate']:.3f} | "
            f"{float(str(row['bytes_per_token'])) / 1e6:.2f} | {row['stall_share']:.1%} | "
            f"{row['belady_hit_rate']:.3f} | {float(str(row['floor_tpot_s'])) * 1e3:.1f} |"
        )


def optimum_of(steps: list[list[Visit]], spec: ModelSpec) -> dict[float, HitCount]:
    """Belady over all layers, for every rate; each layer starts with the experts it is warmed with."""
    counts: dict[float, HitCount] = {}
    for rate in CACHE_RATES:
        slots = round(rate * spec.num_experts)
        layers = [belady(layer, slots, range(slots)).decode for layer in steps]
        counts[rate] = sum(layers, HitCount(0, 0))
    return counts


def measure(rounds: int, num_tokens: int, num_threads: int) -> dict[str, object]:
    """Both links."""
    pack_dir = demo_pack()
    prompts = PROMPTS[: min(rounds, len(PROMPTS))]
    spec, routing = record_routing(pack_dir, prompts, num_tokens)
    optimum = optimum_of(routing, spec)
    with open_nodes(pack_dir, num_threads, None) as nodes:
        memcpy = rows_of(sweep(nodes, prompts, num_tokens, rounds), optimum, spec, None)
    resident_tpot_s = float(str(memcpy[-1]["all_resident_tpot_s"]))
    token_nbytes = spec.num_moe_layers * spec.experts_per_token * spec.layout.blob_nbytes
    link_bytes_per_s = token_nbytes / (ALL_MISS_SHARE * resident_tpot_s)
    with open_nodes(pack_dir, num_threads, link_bytes_per_s) as nodes:
        emulated = rows_of(sweep(nodes, prompts, num_tokens, rounds), optimum, spec, link_bytes_per_s)
    print_table("memcpy link", memcpy)
    print_table(f"emulated link, {link_bytes_per_s / 1e6:.0f} MB/s", emulated)
    return {
        "num_threads": num_threads,
        "num_tokens": num_tokens,
        "rounds": rounds,
        "memcpy": {"rows": memcpy},
        "emulated": {"link_bytes_per_s": link_bytes_per_s, "rows": emulated},
    }


def main() -> None:
    """Prints the tables, writes the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    out_argument(parser)
    options = parser.parse_args()
    path = write_report("sweep", measure(options.rounds, options.tokens, options.threads), options.out)
    plot_sweep(path, (options.out or RESULTS / "sweep.json").with_suffix(".png"))
    print(f"Written: {path} and the plot beside it")


if __name__ == "__main__":
    main()
