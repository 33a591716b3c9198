"""Belady for a whole model's routing: what no eviction can beat."""

from compute_node.replay.belady import PhaseHits, Visit, belady
from promoe.model_spec import ModelSpec


def optimum_of(routing: list[list[Visit]], spec: ModelSpec, slots_per_layer: int) -> tuple[PhaseHits, PhaseHits]:
    """Belady with slots shared by all layers, and with equal ones; both begin with the warmed experts."""
    layers = range(spec.num_moe_layers)
    per_layer = [belady(routing[layer], slots_per_layer, range(slots_per_layer)) for layer in layers]
    numbered = [
        Visit(frozenset(layer * spec.num_experts + expert for expert in visit.experts), visit.is_decode)
        for step in zip(*routing, strict=True)
        for layer, visit in enumerate(step)
    ]
    resident = [layer * spec.num_experts + expert for layer in layers for expert in range(slots_per_layer)]
    shared = belady(numbered, slots_per_layer * spec.num_moe_layers, resident)
    first, *others = per_layer
    return shared, sum(others, first)
