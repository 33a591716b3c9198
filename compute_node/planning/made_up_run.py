"""Runs for the simulation: a made-up conversation, or a recorded one, whose compute takes what an estimate says.

Shapes: T tokens, L MoE layers, K experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from compute_node.planning.compute_cost import ComputeCost
from compute_node.planning.made_up_routing import IdsTLK, RoutingGeometry, fitted_law, structured_routing
from compute_node.replay.recorded_run import RecordedLayer, RecordedRun, RecordedStep, needed_experts
from compute_node.slots import CacheGeometry
from compute_node.step_ledger import Phase
from promoe.config import SettingUnfit
from promoe.hint import IdArray, StepSpan, StepStart
from promoe.model_spec import ModelSpec
from promoe.node_report import CacheShape, DeviceInfo, ModelInfo, Number, ServiceInfo
from promoe.trace_events import LayerEvent
from promoe.trace_header import TraceHeader

PROMPT_TOKENS: Final = 32
"""Of each made-up request; what its prefill leaves in the slots is what decoding begins with."""

MOST_STEPS: Final = 48
LEAST_STEPS: Final = 16
MOST_VISITS: Final = 4000
"""Decode steps are as many as keep layers × requests × steps about there: a forecast is to take seconds."""


@dataclass(frozen=True)
class Conversation:
    """Some requests that are decoded together: the routing of each, prompt first."""

    routings: tuple[IdsTLK, ...]

    @classmethod
    def of(cls, spec: ModelSpec, num_requests: int) -> "Conversation":
        """As skewed and as persistent as the demo model's routing of English text."""
        geometry = RoutingGeometry(spec.num_moe_layers, spec.num_experts, spec.experts_per_token)
        law = fitted_law(geometry)
        num_tokens = PROMPT_TOKENS + _num_steps(spec, num_requests)
        return cls(tuple(structured_routing(geometry, law, num_tokens, seed) for seed in range(num_requests)))

    def run(self, spec: ModelSpec) -> RecordedRun:
        """A step for all prompts, then one for every token; compute takes no time yet."""
        geometry = CacheGeometry(
            spec.num_moe_layers, spec.num_experts, spec.num_experts, spec.layout.blob_nbytes, spec.experts_per_token
        )
        return RecordedRun(_header(spec), geometry, tuple(self._steps(spec)))

    def _steps(self, spec: ModelSpec) -> Iterator[RecordedStep]:
        for number in range(1 + _num_steps(spec, len(self.routings))):
            is_prefill = number == 0
            rows = slice(0, PROMPT_TOKENS) if is_prefill else slice(PROMPT_TOKENS + number - 1, PROMPT_TOKENS + number)
            num_tokens = rows.stop - rows.start
            spans = tuple(StepSpan(f"r{each}", num_tokens, is_prefill) for each in range(len(self.routings)))
            ids_TLK = np.concatenate([routing[rows] for routing in self.routings]).astype(np.uint16)
            yield RecordedStep(
                start=StepStart(number + 1, spans),
                began_s=0.0,
                layers=tuple(_layer(number + 1, layer, ids_TLK[:, layer]) for layer in range(spec.num_moe_layers)),
                tail_s=0.0,
                events=(),
                phase=Phase.PREFILL if is_prefill else Phase.DECODE,
                link_bytes_per_s=0.0,
            )


def of_this_model(run: RecordedRun, spec: ModelSpec) -> RecordedRun:
    """A recorded run as one of this model's, from a cache that was warmed at start-up.

    Raises:
        SettingUnfit: it is of a model with other layers or experts.
    """
    found, wanted = (
        (shape.num_layers, shape.num_experts, shape.experts_per_token)
        for shape in (run.geometry, RoutingGeometry(spec.num_moe_layers, spec.num_experts, spec.experts_per_token))
    )
    if found != wanted:
        raise SettingUnfit(
            f"--trace is of a model with {found[0]} MoE layers, {found[1]} experts and {found[2]} per token; "
            f"{spec.name} has {wanted[0]}, {wanted[1]} and {wanted[2]}."
        )
    geometry = replace(run.geometry, blob_nbytes=spec.layout.blob_nbytes)
    return replace(run, geometry=geometry, header=replace(run.header, resident=(), history_json="{}"))


def with_cost(run: RecordedRun, cost: ComputeCost) -> RecordedRun:
    """The same routing, computed in the estimate's time."""
    return replace(run, steps=tuple(_costed(step, cost) for step in run.steps))


def distinct_experts(run: RecordedRun) -> float:
    """That a layer needs in a decode step, on average; 0 for a run without any."""
    needed = [len(layer.needed) for step in run.steps if step.phase is Phase.DECODE for layer in step.layers]
    return sum(needed) / max(1, len(needed))


def _num_steps(spec: ModelSpec, num_requests: int) -> int:
    return max(LEAST_STEPS, min(MOST_STEPS, MOST_VISITS // (spec.num_moe_layers * num_requests)))


def _costed(step: RecordedStep, cost: ComputeCost) -> RecordedStep:
    layers = tuple(
        replace(layer, lead_s=cost.lead_s, experts_s=cost.experts_s(len(layer.needed))) for layer in step.layers
    )
    return replace(step, layers=layers, tail_s=0.0)


def _layer(step: int, layer: int, ids_TK: IdArray) -> RecordedLayer:
    event = LayerEvent(0.0, 0.0, step, layer, ids_TK, hits=(), misses=(), late=(), stall_s=0.0)
    return RecordedLayer(event, needed_experts(ids_TK), lead_s=0.0, experts_s=0.0)


def _header(spec: ModelSpec) -> TraceHeader:
    """Of a run that nobody recorded: the model is this one, the slots are warmed as at start-up."""
    model = ModelInfo(
        name=spec.name,
        family=spec.family,
        fingerprint=spec.fingerprint,
        dtype=Number(spec.layout.dtype.value),
        num_moe_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
        experts_per_token=spec.experts_per_token,
        expert_nbytes=spec.layout.blob_nbytes,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_context_tokens=spec.max_context_tokens,
    )
    shape = CacheShape(
        slots_per_layer=spec.num_experts,
        slot_nbytes=spec.layout.blob_stride_nbytes,
        cache_rate=1.0,
        eviction="next_use",
        chunk_nbytes=spec.layout.blob_nbytes,
        max_chunks_in_flight=1,
        policy="proactive",
        slot_split="global",
        hints="budgeted",
        early_preemption=True,
        reorder=True,
        stream_prefill=True,
        chunks_demand=True,
        serial=False,
    )
    nobody = ServiceInfo(version="", schema_version="", instance_id="")
    nowhere = DeviceInfo("planned", "", "Made up for a plan.", "", None)
    return TraceHeader(nobody, model, shape, nowhere, 0.0, 0.0, resident=(), history_json="{}")
