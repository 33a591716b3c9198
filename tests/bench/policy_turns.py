"""Expert paths of several policies that take turns on the same routed conversations, beside all resident.

On any device; one model, whose experts come out of one path after the other.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from compute_node.device.seam import Device
from compute_node.moe_forward import EXPERTS_IMPLEMENTATION
from compute_node.schedule import POLICIES, HintUse, SchedulePolicy
from compute_node.step_ledger import StepLedger
from promoe.trace_events import HintEvent, HintFate, TraceEvent
from tests.bench.ablation_table import AblationGroup, Limits, Measured, make_group, print_group
from tests.bench.greedy_chat import run_chat
from tests.bench.hint_sources import HintSource
from tests.bench.optimum import optimum_of
from tests.bench.report import Sample
from tests.bench.side_by_side import ChatFigures, PhaseFigures, SharedModel, SidePath, path_on
from tests.bench.structured_routing import RoutedConversation, RoutingOverride

ALL_RESIDENT: Final = "all resident"
TIMELINE_TOKENS: Final = 3


@dataclass(frozen=True)
class Talk:
    """The conversations, the first one for warming up, and how they are routed.

    Attributes:
        lengths: tokens of each answer.
        override: routes the model's tokens; installed.
    """

    conversations: tuple[RoutedConversation, ...]
    lengths: Sequence[int]
    override: RoutingOverride

    def ask(self, number: int, answer: Callable[[list[int], int], ChatFigures]) -> ChatFigures:
        """One conversation."""
        self.override.number = number
        return answer(list(self.conversations[number].prompt), self.lengths[number])


def resident_chat(model: SharedModel, implementation: str, prompt_ids: list[int], num_tokens: int) -> ChatFigures:
    """All experts on the device, computed by Transformers."""
    model.loaded.model.set_experts_implementation(implementation)
    run = run_chat(model.loaded.model, StepLedger(), prompt_ids, num_tokens)
    accesses = model.spec.num_moe_layers * model.spec.experts_per_token * len(run.decode_s)
    return ChatFigures(run, _resident_figures(0), _resident_figures(accesses))


def _resident_figures(hits: int) -> PhaseFigures:
    return PhaseFigures(hits, 0, 0.0, 0.0, {})


def cached_chat(model: SharedModel, path: SidePath, prompt_ids: list[int], num_tokens: int) -> ChatFigures:
    """Experts out of the path's slots."""
    path.path.expert_cache.check_integrity()
    model.loaded.model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    return path.ask_ids(prompt_ids, num_tokens)


class HintFates:
    """Counts what became of hints; a sink."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(HintFate, 0)

    def __call__(self, event: TraceEvent) -> None:
        """The next event."""
        if isinstance(event, HintEvent):
            self.counts[event.fate] += 1


@dataclass(frozen=True)
class PolicyTurns:
    """What every cache rate is measured with; `resident`: Transformers' experts implementation for all resident."""

    device: Device
    model: SharedModel
    resident: str
    talk: Talk
    hints: HintSource
    policies: dict[str, SchedulePolicy]
    link_bytes_per_s: float

    def measure_rate(self, cache_rate: float, rounds: int) -> dict[str, object]:
        """Every policy at one cache rate, taking turns."""
        slots = self._slots(cache_rate)
        fates = {name: HintFates() for name in self.policies}
        with ExitStack() as stack:
            paths = {name: stack.enter_context(self._open(policy, slots)) for name, policy in self.policies.items()}
            figures = self._take_turns(paths, fates, rounds)
            measured = {name: Measured(figures[name], path.good_pred()) for name, path in paths.items()}
            links = {name: _link_figures(path) for name, path in paths.items()}
        group = self._group(cache_rate, slots, figures[ALL_RESIDENT], measured)
        print_group(group)
        hint_fates = {name: {fate.value: n for fate, n in each.counts.items() if n} for name, each in fates.items()}
        answers = {name: [chat.run.token_ids for chat in figures[name]] for name in paths}
        same_tokens = all(answer == next(iter(answers.values())) for answer in answers.values())
        return {
            **group, "slots_per_layer": slots, "same_tokens": same_tokens, "links": links, "hint_fates": hint_fates,
        }  # fmt: skip

    @contextmanager
    def _open(self, policy: SchedulePolicy, slots: int) -> Iterator[SidePath]:
        hints = None if policy.hints is HintUse.IGNORE else self.hints
        with path_on(self.device, self.model, policy, slots, hints) as path:
            yield path

    def _take_turns(
        self, paths: dict[str, SidePath], fates: dict[str, HintFates], rounds: int
    ) -> dict[str, list[ChatFigures]]:
        """The first of each round is another one each time."""
        answers: dict[str, Callable[[list[int], int], ChatFigures]] = {
            ALL_RESIDENT: partial(resident_chat, self.model, self.resident)
        }
        answers |= {name: partial(cached_chat, self.model, path) for name, path in paths.items()}
        figures: dict[str, list[ChatFigures]] = {name: [] for name in answers}
        for answer in answers.values():
            self.talk.ask(0, answer)
        for name, path in paths.items():
            path.scores.restart()
            path.path.expert_cache.sinks.append(fates[name])
        names = list(answers)
        for number in range(1, rounds + 1):
            first = number % len(names)
            for name in (*names[first:], *names[:first]):
                figures[name].append(self.talk.ask(number, answers[name]))
        return figures

    def _group(
        self, cache_rate: float, slots: int, resident: Sequence[ChatFigures], measured: dict[str, Measured]
    ) -> AblationGroup:
        spec, layers = self.model.spec, range(self.model.spec.num_moe_layers)
        routing = [
            [visit for each, length in zip(self.talk.conversations, self.talk.lengths, strict=True)
             for visit in each.visits(layer)[:length]]
            for layer in layers
        ]  # fmt: skip
        prefill_accesses = [
            sum(len(each.visits(layer)[0].experts) for layer in layers) for each in self.talk.conversations[1:]
        ]
        resident = [
            dataclasses.replace(chat, prefill=_resident_figures(accesses))
            for chat, accesses in zip(resident, prefill_accesses, strict=True)
        ]
        optimum, layer_optimum = optimum_of(routing, spec, slots)
        limits = Limits(resident, optimum, layer_optimum, self.link_bytes_per_s, spec.layout.blob_nbytes)
        tpot_s = Sample(tuple(chat.run.tpot_s for chat in resident)).median
        link_share = self.model.all_miss_nbytes / self.link_bytes_per_s / tpot_s
        return make_group(link_share, cache_rate, measured, limits)

    def timeline(self, cache_rate: float, folder: Path) -> dict[str, object]:
        """Draws a few tokens under our policy: as the product draws a trace, and as the device saw them."""
        from promoe.cli.trace_picture import TracePainter

        events: list[TraceEvent] = []
        activity = torch.profiler.ProfilerActivity
        with self._open(POLICIES["proactive"], self._slots(cache_rate)) as path:
            answer = partial(cached_chat, self.model, path)
            self.talk.ask(0, answer)
            path.path.expert_cache.sinks.append(events.append)
            few = dataclasses.replace(self.talk, lengths=[TIMELINE_TOKENS] * len(self.talk.lengths))
            with torch.profiler.profile(activities=[getattr(activity, self.device.kind.upper())]) as profile:
                few.ask(1, answer)
        painter = TracePainter(self.model.spec.num_moe_layers)
        painter.add_all(events)
        drawn, seen = folder / "gpu_ablation_timeline.json", folder / "gpu_ablation_device.json.gz"
        drawn.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": list(painter.finish().json_events())}))
        profile.export_chrome_trace(str(seen))
        return {"drawn_as_a_trace": drawn.name, "seen_by_the_device": seen.name, "num_events": len(events)}

    def _slots(self, cache_rate: float) -> int:
        return max(1, int(cache_rate * self.model.spec.num_experts + 0.5))


def _link_figures(path: SidePath) -> dict[str, object]:
    """Over all rounds, the warm-up included."""
    stats = path.path.transfers.stats()
    return {
        "bytes": stats.uploaded_nbytes,
        "busy_s": stats.link_busy_s,
        "busy_bytes_per_s": stats.uploaded_nbytes / stats.link_busy_s if stats.link_busy_s else None,
        "recent_bytes_per_s": path.path.transfers.link_bytes_per_s(),
        "description": path.path.transfers.link_description,
        "prefetch": dataclasses.asdict(path.path.expert_cache.prefetch_counters),
    }
