"""Policies side by side on a full-size architecture, on the device at hand, with a routing that is not random.

The weights are random; the routing is made up by a seeded process with the skew and persistence of a recorded one (see
`structured_routing`), the same for everybody. Hints come from an oracle that is wrong as often as a learned predictor
(see `noisy_oracle`), after the time that a predictor's process takes. All policies of one cache rate take turns on the
same conversations, greedy and at batch 1, without gRPC and scheduling; experts come through the node's own mapping,
registration, transfer engine, cache and experts function. Every policy must give the same tokens.
"""

import argparse
import dataclasses
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from time import perf_counter
from typing import Final, TypeAlias

import numpy as np
import torch

from compute_node.config import DeviceChoice
from compute_node.device.choice import choose_device
from compute_node.device.seam import Device
from compute_node.moe_forward import register_experts_function
from compute_node.planning.made_up_routing import (
    RoutingFigures,
    RoutingGeometry,
    RoutingLaw,
    fitted_law,
    structured_routing,
)
from compute_node.schedule import POLICIES, HintUse, SchedulePolicy
from tests.bench.bench_device import SIZE_FLAGS, fastest_resident, say, shape_of
from tests.bench.decode_loop import Conversation, zipf_conversation
from tests.bench.link_rates import (
    BurstRow,
    LinkSettings,
    burst_rows,
    gentlest_within,
    peak_bytes_per_s,
    registered_bytes_per_s,
)
from tests.bench.noisy_oracle import FIRST_LAYERS_RECALL, RECALLS, NoisyOracle, hinted_by
from tests.bench.policy_turns import PolicyTurns, Talk
from tests.bench.random_moe import SHAPES, MoeShape, RandomArena, build_model, open_arena
from tests.bench.report import RESULTS, Sample, out_argument, write_report
from tests.bench.side_by_side import SharedModel
from tests.bench.structured_routing import RoutedConversation, RoutingOverride

CACHE_RATES: Final = (0.25, 0.5)
BURST_SHARE: Final = 0.97
"""Of the best burst rate, from where on fewer bytes in flight are worth more."""

WARM_UP_TOKENS: Final = 6


@dataclass(frozen=True)
class Effort:
    """What is measured.

    Attributes:
        cache_rates: one after the other.
        rounds: conversations of each policy.
        num_prompt, num_tokens: of a conversation.
        hint_latency_s: from a layer's hidden states on the host to its hints in the inbox.
    """

    cache_rates: tuple[float, ...]
    rounds: int
    num_prompt: int
    num_tokens: int
    hint_latency_s: float


Save: TypeAlias = Callable[[dict[str, object]], None]


def gpu_policies(burst: LinkSettings) -> dict[str, SchedulePolicy]:
    """By name; those that take hints get the same ones. The last one's chunks are those of the best bursts."""
    lru, ours = POLICIES["lru"], POLICIES["proactive"]
    overlapped = dataclasses.replace(
        lru, early_preemption=True, reorder=True, chunks_per_expert=ours.chunks_per_expert,
        max_chunks_in_flight=ours.max_chunks_in_flight,
    )  # fmt: skip
    policies = {
        "LRU": lru,
        "LRU, overlapped": overlapped,
        "ProMoE": POLICIES["promoe"],
        "promoe, no hints": dataclasses.replace(ours, hints=HintUse.IGNORE),
        "promoe": ours,
    }
    burst_chunks = dataclasses.replace(
        ours, chunk_nbytes=burst.chunk_nbytes, max_chunks_in_flight=burst.max_chunks_in_flight
    )
    return policies | {"promoe, burst's chunks": burst_chunks}


def made_conversations(shape: MoeShape, law: RoutingLaw, effort: Effort) -> tuple[RoutedConversation, ...]:
    """One for warming up and one a round; prompts by Zipf's law."""
    geometry = geometry_of(shape)
    num_tokens = effort.num_prompt + effort.num_tokens
    return tuple(
        RoutedConversation(
            zipf_conversation(number, shape.vocab_size, effort.num_prompt, 1).prompt,
            structured_routing(geometry, law, num_tokens, number),
        )
        for number in range(1 + effort.rounds)
    )


def geometry_of(shape: MoeShape) -> RoutingGeometry:
    """Of the model's MoE layers."""
    return RoutingGeometry(shape.num_layers, shape.num_experts, shape.experts_per_token)


@dataclass(frozen=True)
class LinkReport:
    """What the link can do. `gentlest`: with the fewest bytes in flight that reach nearly the best burst."""

    peak: Sample
    registered: Sample
    bursts: list[BurstRow]
    gentlest: LinkSettings
    register_bytes_per_s: float

    @classmethod
    def of(cls, device: Device, arena: RandomArena) -> "LinkReport":
        """Measured now, while nothing else is moved."""
        peak, registered, bursts = (
            peak_bytes_per_s(device),
            registered_bytes_per_s(device, arena),
            burst_rows(device, arena),
        )
        nbytes = arena.spec.num_blobs * arena.spec.layout.blob_stride_nbytes
        return cls(peak, registered, bursts, gentlest_within(bursts, BURST_SHARE), nbytes / arena.register_s)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "peak_link_bytes_per_s": self.peak.as_dict(),
            "registered_link_bytes_per_s": self.registered.as_dict(),
            "register_bytes_per_s": self.register_bytes_per_s,
            "bursts": [row.as_dict() for row in self.bursts],
            "gentlest": dataclasses.asdict(self.gentlest),
        }


def measure(shape: MoeShape, device: Device, effort: Effort, folder: Path, save: Save) -> dict[str, object]:
    """Everything; prints as it goes, and saves after each cache rate, so that a run that is cut off has said something.

    Args:
        folder: for the timelines, which are drawn last.
        save: called with everything so far.
    """
    tell, spec = _stopwatch(), shape.spec()
    register_experts_function()
    law = fitted_law(geometry_of(shape))
    conversations = made_conversations(shape, law, effort)
    tell(f"{device.name}: {spec.num_blobs} experts, {spec.experts_nbytes / 1e9:.1f} GB; routing by {law}")
    loaded = build_model(shape, device.torch_device)
    override = RoutingOverride(loaded.experts_modules, conversations, device.torch_device)
    names = {id(module): name for name, module in loaded.model.named_modules()}
    layer_modules = tuple(names[id(module)] for module in loaded.experts_modules)
    groups: list[dict[str, object]] = []
    with override.installed():
        trial = Conversation(conversations[0].prompt, conversations[0].prompt[:WARM_UP_TOKENS])
        resident, implementations = fastest_resident(loaded.model, trial)
        tell(f"all resident: {resident}, the fastest of {', '.join(implementations)}")
        with open_arena(loaded, spec, device) as arena:
            link = LinkReport.of(device, arena)
            tell(f"link: {link.peak.median / 1e9:.2f} GB/s pinned, {link.registered.median / 1e9:.2f} GB/s registered")
            policies = gpu_policies(link.gentlest)
            turns = PolicyTurns(
                device=device,
                model=SharedModel(loaded, spec, layer_modules, None, arena.address_of),
                resident=resident,
                talk=Talk(conversations, (WARM_UP_TOKENS, *[effort.num_tokens] * effort.rounds), override),
                hints=hinted_by(NoisyOracle(conversations, shape.num_experts), effort.hint_latency_s),
                policies=policies,
                link_bytes_per_s=max(link.peak.median, link.registered.median),
            )
            report: dict[str, object] = {
                **_conditions(shape, device, effort),
                "routing": _routing_report(law, conversations, shape.num_experts),
                "all_resident": {"implementation": resident, "tried": implementations},
                **link.as_dict(),
                "policies": {name: _settings_of(policy, spec.layout.blob_nbytes) for name, policy in policies.items()},
                "groups": groups,
            }
            for cache_rate in effort.cache_rates:
                groups.append(turns.measure_rate(cache_rate, effort.rounds))
                save(report)
                _free(device)
                tell(f"cache rate {cache_rate} is measured")
            report["timeline"] = turns.timeline(effort.cache_rates[0], folder)
    save(report)
    return report


def _conditions(shape: MoeShape, device: Device, effort: Effort) -> dict[str, object]:
    return {
        "shape": dataclasses.asdict(shape),
        "experts_bytes": shape.spec().experts_nbytes,
        "device": {"kind": device.kind, "name": device.name},
        "engine": "greedy forward passes of the benchmark's own at batch 1; no gRPC, no store process",
        "hints": _hints_report(effort),
        **dataclasses.asdict(effort),
    }


def _stopwatch() -> Callable[[str], None]:
    """Says a line, and since when."""
    started_s = perf_counter()
    return lambda line: say(f"{line}; {perf_counter() - started_s:.0f} s")


def _routing_report(
    law: RoutingLaw, conversations: Sequence[RoutedConversation], num_experts: int
) -> dict[str, object]:
    ids_TLK = np.concatenate([each.ids_TLK for each in conversations])
    return {
        "kind": "structured: made up, not recorded; per layer Zipf popularity, and each routed expert stays for the "
        "next token with one probability; the routers compute, but are not asked; weights are uniform",
        "law": dataclasses.asdict(law),
        "figures": dataclasses.asdict(RoutingFigures.of(ids_TLK, num_experts)),
    }


def _hints_report(effort: Effort) -> dict[str, object]:
    return {
        "kind": "an oracle that knows the routing and is wrong at random; in process, delivered later",
        "recall_by_lookahead": {str(lookahead): recall for lookahead, recall in RECALLS.items()},
        "recall_of_next_steps_first_layers": FIRST_LAYERS_RECALL,
        "latency_s": effort.hint_latency_s,
    }


def _settings_of(policy: SchedulePolicy, blob_nbytes: int) -> dict[str, object]:
    said = {name: value.value if isinstance(value, Enum) else value for name, value in asdict(policy).items()}
    return said | {"chunk_nbytes": policy.chunk_settings(blob_nbytes).chunk_nbytes}


def _free(device: Device) -> None:
    """The slots of one cache rate before those of the next are asked for."""
    gc.collect()
    if device.kind == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: lite on a GPU, tiny on the CPU")
    for name in SIZE_FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--device", type=DeviceChoice, default=DeviceChoice.AUTO, help="auto, cuda or cpu")
    parser.add_argument("--rates", type=float, nargs="+", default=CACHE_RATES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--hint-latency-ms", type=float, default=1.0)
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU")
    out_argument(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    device = choose_device(options.device, None).device
    effort = Effort(tuple(options.rates), options.rounds, options.prompt, options.tokens, options.hint_latency_ms / 1e3)
    folder: Path = options.out.parent if options.out is not None else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    measured = measure(
        shape_of(options, device), device, effort, folder, lambda report: _say_where(report, options.out)
    )
    groups = measured["groups"]
    assert isinstance(groups, list), "one for each cache rate"
    if not all(group["same_tokens"] for group in groups):
        raise SystemExit("The policies did not give the same tokens.")


def _say_where(report: dict[str, object], out: Path | None) -> None:
    say(f"Written: {write_report('gpu_ablation', report, out)}")


if __name__ == "__main__":
    main()
