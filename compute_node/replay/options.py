"""The command line of a replay: what is asked for, and which settings follow from it."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from compute_node.clocked_transfers import LinkModel
from compute_node.replay.hint_plan import HintSettings, HintSource
from compute_node.replay.measured_link import measured_link
from compute_node.replay.recorded_policy import policy_with, recorded_policy
from compute_node.replay.recorded_run import RecordedRun
from compute_node.replay.simulation import WhatIf
from compute_node.schedule import POLICIES, HintUse, SlotSplit, policy_named
from promoe.config import SettingUnfit

_POLICY_FLAGS: Final = (
    "eviction",
    "slot_split",
    "hints",
    "early_preemption",
    "reorder",
    "stream_prefill",
    "chunk_nbytes",
    "max_chunks_in_flight",
)
"""Flags that replace a setting of the policy by the same name."""

_EPILOG: Final = """Without any setting the run is repeated with its own policy, arrivals and hints in the recorded
order: its hits must come out exactly. With settings it is simulated in virtual time. --policy and --cache-rate may be
given several times: every combination is a row."""


@dataclass(frozen=True)
class ReplayOptions:
    """What was asked for; None: as recorded.

    Attributes:
        trace: the file.
        policies: named sets.
        cache_rates: device slots divided by all experts.
        settings: single settings of the policy.
        link: bytes per second.
        chunk_s: what each copy costs beside its bytes.
        hints: where hints come from.
        as_json: for machines.
    """

    trace: Path
    policies: tuple[str, ...]
    cache_rates: tuple[float, ...]
    settings: dict[str, object]
    link: float | None
    chunk_s: float
    hints: HintSettings
    as_json: bool

    @property
    def is_what_if(self) -> bool:
        """Anything is asked for that is not as recorded."""
        is_other_policy = self.policies or any(value is not None for value in self.settings.values())
        is_other_machine = self.cache_rates or self.link is not None or self.chunk_s
        return bool(is_other_policy or is_other_machine or self.hints != HintSettings())

    def what_ifs(self, run: RecordedRun) -> Iterator[WhatIf]:
        """Every combination of policies and cache rates.

        Raises:
            SettingUnfit: a setting that is not in its table, a cache rate of no slot, or no link rate anywhere.
        """
        link = measured_link(run) if self.link is None else LinkModel(self.link)
        link = replace(link, chunk_s=self.chunk_s)
        bases = [policy_named(name) for name in self.policies] or [recorded_policy(run.header)]
        for base in bases:
            policy = policy_with(base, self.settings)
            for slots in self._slots(run):
                yield WhatIf(policy, slots, link, self.hints)

    def _slots(self, run: RecordedRun) -> Iterator[int]:
        num_experts = run.geometry.num_experts
        if not self.cache_rates:
            yield run.geometry.slots_per_layer
        for rate in self.cache_rates:
            slots = round(rate * num_experts)
            if not 1 <= slots <= num_experts:
                raise SettingUnfit(
                    f"--cache-rate is {rate}; allowed: from {1 / num_experts:.4g} (a slot per layer) to 1"
                )
            yield slots


def parse_options(arguments: Sequence[str]) -> ReplayOptions:
    """Ends the process with a message where the command line is wrong."""
    given = _parser().parse_args(arguments)
    latency_ms: float | None = given.hint_latency_ms
    hints = HintSettings(HintSource(given.predictor), given.lookahead, None if latency_ms is None else latency_ms / 1e3)
    return ReplayOptions(
        trace=given.trace,
        policies=tuple(given.policy),
        cache_rates=tuple(given.cache_rate),
        settings={name: getattr(given, name) for name in _POLICY_FLAGS},
        link=given.link,
        chunk_s=given.chunk_us / 1e6,
        hints=hints,
        as_json=given.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="promoe trace replay",
        description="Replay a recorded run: repeat it exactly, or ask what other settings would have done.",
        epilog=_EPILOG,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="File that `promoe trace record` wrote.")
    policy = parser.add_argument_group("schedule")
    policy.add_argument(
        "--policy", action="append", default=[], choices=tuple(POLICIES), help="Named set of settings, repeatable."
    )
    policy.add_argument("--eviction", help="Row of the eviction table.")
    policy.add_argument("--slot-split", type=SlotSplit, help="layer (equal shares) or global (one pool).")
    policy.add_argument("--hints", type=HintUse, help="What is done with hints: ignore, top or budgeted.")
    for name in ("early-preemption", "reorder", "stream-prefill"):
        policy.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help="See compute.* in the README.")
    policy.add_argument("--chunk", dest="chunk_nbytes", type=_positive, metavar="BYTES", help="Unit of one copy.")
    policy.add_argument(
        "--in-flight", dest="max_chunks_in_flight", type=_positive, metavar="N", help="Chunks handed to the link ahead."
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--cache-rate", action="append", default=[], type=float, metavar="R", help="Slots / experts, repeatable."
    )
    machine.add_argument("--link", type=_rate, metavar="BYTES_PER_S", help="For example 25e9; default: as measured.")
    machine.add_argument(
        "--chunk-us", type=float, default=0.0, metavar="US", help="Cost of every copy beside its bytes, microseconds."
    )
    hints = parser.add_argument_group("predictor")
    hints.add_argument(
        "--predictor",
        choices=[source.value for source in HintSource],
        default=HintSource.RECORDED.value,
        help="Whose hints: those of the run, a perfect predictor's, or none.",
    )
    hints.add_argument("--lookahead", type=_positive, default=2, metavar="L", help="The oracle's, in MoE layers.")
    hints.add_argument(
        "--hint-latency-ms", type=float, metavar="MS", help="From observation to hint; default: as recorded."
    )
    parser.add_argument("--json", action="store_true", help="Print a JSON document.")
    return parser


def _positive(text: str) -> int:
    number = int(float(text))
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: allowed: 1 or more")
    return number


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: allowed: above 0")
    return rate
