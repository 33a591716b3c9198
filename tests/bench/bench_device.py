"""Cache rate sweep on a full-size architecture with random weights: reactive LRU on the device at hand.

Beside each row: the whole model on the device with Transformers' fastest experts implementation (taking turns with
ours), the offline optimum (Belady) of the same routing, and the floor, max(all resident, Belady bytes / peak link
rate). Once: accelerate's CPU offload of the experts. Requests are decoded by a loop of our own at batch 1, without gRPC
and scheduling; experts come through the node's own mapping, registration, transfer engine, expert cache and experts
function, from an arena that was filled in memory, without a store process.
"""

import argparse
import copy
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from accelerate import cpu_offload
from prometheus_client import CollectorRegistry
from transformers import PreTrainedModel

from compute_node.cache_stats import CacheMetrics, StepRecorder
from compute_node.config import DeviceChoice
from compute_node.device.choice import choose_device
from compute_node.device.seam import Device
from compute_node.expert_path import ExpertPath
from compute_node.hint_inbox import HintInbox
from compute_node.layer_observer import LayerObserver
from compute_node.memory_plan import MemoryPlan
from compute_node.model_loader import LoadedModel
from compute_node.moe_forward import EXPERTS_IMPLEMENTATION, register_experts_function
from compute_node.replay.belady import HitCount, Visit, belady
from compute_node.schedule import POLICIES
from compute_node.step_ledger import Phase, StepLedger, TokenSpan
from tests.bench.decode_loop import Conversation, Timing, decode, recorded_routing, zipf_conversation
from tests.bench.link_rates import (
    LinkSettings,
    burst_rows,
    gentlest_within,
    peak_bytes_per_s,
    registered_bytes_per_s,
)
from tests.bench.random_moe import SHAPES, MoeShape, RandomArena, build_model, open_arena
from tests.bench.report import Sample, median_ratio, out_argument, write_report

CACHE_RATES: Final = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
IMPLEMENTATIONS: Final = ("grouped_mm", "batched_mm", "eager")
SIZE_FLAGS: Final = ("num_layers", "num_experts", "experts_per_token", "hidden_size", "expert_hidden")
GOOD_SHARE: Final = 0.97
"""Of the best burst rate, from where on fewer bytes in flight are worth more."""


class CountedNode:
    """The node's expert path at one cache rate, around a model that is decoded elsewhere."""

    def __init__(
        self, loaded: LoadedModel, arena: RandomArena, device: Device, rate: float, link: LinkSettings
    ) -> None:
        spec = arena.spec
        self.slots = max(1, int(rate * spec.num_experts + 0.5))
        self.ledger = StepLedger()
        self.host_wait_s = 0.0
        self._take_compute_stall_s = device.take_compute_stall_s
        self.recorder = StepRecorder(self.ledger, CacheMetrics.register(CollectorRegistry()), self._take_stall_s)
        policy = dataclasses.replace(
            POLICIES["lru"],
            early_preemption=True,
            reorder=True,
            chunk_nbytes=link.chunk_nbytes,
            max_chunks_in_flight=link.max_chunks_in_flight,
        )
        plan = MemoryPlan(
            slots_per_layer=self.slots,
            slot_nbytes=spec.layout.blob_stride_nbytes,
            max_context_tokens=spec.max_context_tokens,
            num_kv_blocks=0,
            kv_nbytes=0,
            workspace_nbytes=0,
            dense_nbytes=loaded.dense_nbytes,
            num_layers=spec.num_moe_layers,
        )
        self.path = ExpertPath.build(spec, policy, plan, device, arena.address_of, HintInbox())
        observer = LayerObserver(spec.num_moe_layers, device, ())
        self.ledger.listeners = (observer.begin_step, self.path.expert_cache.begin_step)
        self.path.expert_cache.sinks.append(self.recorder)
        self.path.install(loaded, spec, self.recorder, observer)

    def begin(self) -> None:
        """Counts from here, with each layer's first experts in its slots."""
        self.path.expert_cache.warm()
        self.recorder.begin()
        self.host_wait_s = 0.0

    @contextmanager
    def mark(self, phase: Phase, num_tokens: int) -> Iterator[None]:
        """Around one forward pass."""
        self.ledger.begin_step([TokenSpan("bench", num_tokens, phase)])
        yield
        self.ledger.end_step()

    def _take_stall_s(self, host_wait_s: float) -> float:
        if self.ledger.spans and self.ledger.spans[0].phase is Phase.DECODE:
            self.host_wait_s += host_wait_s
        return self._take_compute_stall_s(host_wait_s)


@dataclass(frozen=True)
class Sweep:
    """What every row is measured with.

    Attributes:
        resident: Transformers' experts implementation for the model that is all on the device.
        warm_up: decoded before anything is measured.
        conversations: one a round.
    """

    loaded: LoadedModel
    arena: RandomArena
    device: Device
    resident: str
    warm_up: Conversation
    conversations: tuple[Conversation, ...]

    def decode_resident(self, conversation: Conversation) -> Timing:
        """All experts on the device."""
        self.loaded.model.set_experts_implementation(self.resident)
        return decode(self.loaded.model, conversation)

    def decode_cached(self, node: CountedNode, conversation: Conversation) -> Timing:
        """Experts out of the cache."""
        self.loaded.model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        return decode(self.loaded.model, conversation, node.mark)

    def row(self, rate: float, link: LinkSettings, steps: list[list[Visit]], peak: float) -> dict[str, object]:
        """One cache rate, taking turns with all resident."""
        node = CountedNode(self.loaded, self.arena, self.device, rate, link)
        with node.path.transfers:
            self.decode_resident(self.warm_up)
            self.decode_cached(node, self.warm_up)
            node.begin()
            pairs = [(self.decode_resident(c), self.decode_cached(node, c)) for c in self.conversations]
            node.path.expert_cache.check_integrity()
        return {"cache_rate": rate, **_figures(node, pairs, steps, peak)}


def _figures(
    node: CountedNode, pairs: list[tuple[Timing, Timing]], steps: list[list[Visit]], peak: float
) -> dict[str, object]:
    resident = Sample(tuple(token_s for pair in pairs for token_s in pair[0].token_s))
    cached = Sample(tuple(token_s for pair in pairs for token_s in pair[1].token_s))
    decode_counters = node.recorder.phases[Phase.DECODE]
    geometry = node.path.expert_cache.geometry
    num_tokens = len(cached.values)
    optimum = sum((belady(layer, node.slots, range(node.slots)).decode for layer in steps), HitCount(0, 0))
    belady_nbytes = optimum.misses * geometry.blob_nbytes / num_tokens
    stall_s = decode_counters.stall_s
    return {
        "slots_per_layer": node.slots,
        "tpot_s": cached.as_dict(),
        "all_resident_tpot_s": resident.as_dict(),
        "tpot_ratio": median_ratio(
            [Sample(tuple(pair[1].token_s)).median for pair in pairs],
            [Sample(tuple(pair[0].token_s)).median for pair in pairs],
        ),
        "ttft_s": Sample(tuple(pair[1].ttft_s for pair in pairs)).as_dict(),
        "all_resident_ttft_s": Sample(tuple(pair[0].ttft_s for pair in pairs)).as_dict(),
        "hits": decode_counters.hits,
        "misses": decode_counters.misses,
        "hit_rate": decode_counters.hits / (decode_counters.hits + decode_counters.misses),
        "bytes_per_token": decode_counters.demand_nbytes / num_tokens,
        "stall_s_per_token": stall_s / num_tokens,
        "host_wait_s_per_token": node.host_wait_s / num_tokens,
        "stall_share": stall_s / sum(cached.values),
        "bytes_per_stall_s": decode_counters.demand_nbytes / stall_s if stall_s else None,
        "belady_hit_rate": optimum.hit_rate,
        "belady_bytes_per_token": belady_nbytes,
        "floor_tpot_s": max(resident.median, belady_nbytes / peak),
    }


def fastest_resident(model: PreTrainedModel, conversation: Conversation) -> tuple[str, dict[str, object]]:
    """Transformers' experts implementations, each on one conversation after an unmeasured one."""
    found: dict[str, object] = {}
    medians: dict[str, float] = {}
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        try:
            decode(model, conversation)
            sample = Sample(tuple(decode(model, conversation).token_s))
        except (RuntimeError, NotImplementedError) as error:  # not every kernel is there for every device
            found[name] = f"cannot be used here: {str(error).splitlines()[0]}"
            continue
        medians[name], found[name] = sample.median, {"tpot_s": sample.as_dict()}
    return min(medians, key=lambda name: medians[name]), found


def offloaded(loaded: LoadedModel, device: Device, conversation: Conversation) -> dict[str, object]:
    """accelerate keeps the experts in host memory and brings a whole layer's to the device in each forward pass."""
    tensors = (*loaded.model.parameters(), *loaded.model.buffers())
    twin: PreTrainedModel = copy.deepcopy(loaded.model, {id(tensor): tensor for tensor in tensors})
    names = {id(module): name for name, module in loaded.model.named_modules()}
    for module in loaded.experts_modules:
        cpu_offload(twin.get_submodule(names[id(module)]), execution_device=device.torch_device)
    timing = decode(twin, conversation)
    tpot = Sample(tuple(timing.token_s))
    return {"median_tpot_s": tpot.median, "tpot_s": tpot.as_dict(), "ttft_s": timing.ttft_s}


@dataclass(frozen=True)
class Length:
    """How much is measured."""

    rounds: int
    num_prompt: int
    num_tokens: int
    num_offloaded: int


def measure(
    shape: MoeShape, device: Device, rates: Sequence[float], length: Length, link: LinkSettings | None
) -> dict[str, object]:
    """Everything; prints as it goes."""

    def conversation(seed: int, num_tokens: int = length.num_tokens) -> Conversation:
        return zipf_conversation(seed, shape.vocab_size, length.num_prompt, num_tokens)

    spec = shape.spec()
    say(f"{device.name}: {spec.num_blobs} experts, {spec.experts_nbytes / 1e9:.1f} GB")
    register_experts_function()
    loaded = build_model(shape, device.torch_device)
    resident, implementations = fastest_resident(loaded.model, conversation(0))
    loaded.model.set_experts_implementation(resident)
    say(f"all resident: {resident}, the fastest of {', '.join(implementations)}")
    offload = offloaded(loaded, device, conversation(0, length.num_offloaded))
    gc.collect()  # accelerate's copy of the experts, before the arena takes as much again
    say(f"accelerate's CPU offload: TPOT {offload['median_tpot_s']} s")
    peak = peak_bytes_per_s(device)
    with open_arena(loaded, spec, device) as arena:
        registered = registered_bytes_per_s(device, arena)
        bursts = burst_rows(device, arena)
        link = link or gentlest_within(bursts, GOOD_SHARE)
        say(f"link: {peak.median / 1e9:.2f} GB/s pinned, {registered.median / 1e9:.2f} GB/s registered; {link}")
        conversations = tuple(conversation(1 + number) for number in range(length.rounds))
        sweep = Sweep(loaded, arena, device, resident, conversation(0), conversations)
        with recorded_routing(loaded.experts_modules) as steps:
            for each in conversations:
                sweep.decode_resident(each)
        rows: list[dict[str, object]] = []
        for rate in rates:
            rows.append(sweep.row(rate, link, steps, peak.median))
            say(row_line(rows[-1]))
        register_s = arena.register_s
    return {
        "shape": dataclasses.asdict(shape),
        "experts_bytes": spec.experts_nbytes,
        "device": {"kind": device.kind, "name": device.name},
        "engine": "a decode loop of the benchmark's own, batch 1, tokens given; no gRPC, no store process",
        "routing": "random weights, tokens drawn by Zipf's law: hit rates are not those of a trained model",
        **dataclasses.asdict(length),
        "all_resident": {"implementation": resident, "tried": implementations},
        "accelerate_cpu_offload": offload,
        "peak_link_bytes_per_s": peak.as_dict(),
        "registered_link_bytes_per_s": registered.as_dict(),
        "register_bytes_per_s": spec.num_blobs * spec.layout.blob_stride_nbytes / register_s,
        "bursts": [row.as_dict() for row in bursts],
        "link": dataclasses.asdict(link),
        "rows": rows,
    }


def row_line(row: dict[str, object]) -> str:
    """For people; the JSON has the raw values."""
    tpot, resident = row["tpot_s"], row["all_resident_tpot_s"]
    assert isinstance(tpot, dict), "a sample"
    assert isinstance(resident, dict), "a sample"
    return (
        f"cache rate {row['cache_rate']}: TPOT {tpot['median'] * 1e3:.2f} ms (all resident "
        f"{resident['median'] * 1e3:.2f}, floor {float(str(row['floor_tpot_s'])) * 1e3:.2f}), hit rate "
        f"{row['hit_rate']:.3f} (Belady {row['belady_hit_rate']:.3f}), "
        f"{float(str(row['bytes_per_token'])) / 1e6:.1f} MB/token, stall {row['stall_share']:.1%}"
    )


def say(line: str) -> None:
    """At once, also into a file: a run that is cut off has said what it knew."""
    print(line, flush=True)


def shape_of(options: argparse.Namespace, device: Device) -> MoeShape:
    """The named shape, or the one that the device can compute in minutes, with single sizes replaced."""
    shape = SHAPES[options.shape or ("lite" if device.kind == "cuda" else "tiny")]
    given = {name: getattr(options, name) for name in SIZE_FLAGS if getattr(options, name) is not None}
    return dataclasses.replace(shape, **given)


def link_of(options: argparse.Namespace) -> LinkSettings | None:
    """As asked for; None takes the best of the bursts."""
    if options.chunk_bytes is None:
        return None
    return LinkSettings(options.chunk_bytes, options.max_chunks_in_flight)


def main() -> None:
    """Prints the rows, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: lite on a GPU, tiny on the CPU")
    for name in SIZE_FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--device", type=DeviceChoice, default=DeviceChoice.AUTO, help="auto, cuda or cpu")
    parser.add_argument("--rates", type=float, nargs="+", default=CACHE_RATES)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a round")
    parser.add_argument("--offloaded-tokens", type=int, default=3, help="decoded with accelerate's CPU offload")
    parser.add_argument("--chunk-bytes", type=int, help="default: the best of the measured bursts")
    parser.add_argument("--max-chunks-in-flight", type=int, default=2)
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU")
    out_argument(parser)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device, None).device
    length = Length(options.rounds, options.prompt, options.tokens, options.offloaded_tokens)
    measured = measure(shape_of(options, device), device, options.rates, length, link_of(options))
    say(f"Written: {write_report('device', measured, options.out)}")


if __name__ == "__main__":
    main()
