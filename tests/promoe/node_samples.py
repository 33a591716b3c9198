"""What a node may say at a moment, for everything that shows it; built through the wire messages it would come in."""

import random
from dataclasses import replace

from promoe.cache_map import CacheMap, ExpertBit
from promoe.cli.node_history import NodeSample
from promoe.node_report import CacheStats, NodeInfo
from promoe.typed_message import decode_message
from promoe.v1 import inference_pb2, model_pb2, predictor_pb2

VERSION = "learned@3"
LINK_BYTES_PER_S = 74e6


def node_info(num_layers: int = 30, num_experts: int = 32, instance_id: str = "i1") -> NodeInfo:
    """The demo model's, with another geometry where that is asked for."""
    message = inference_pb2.InferenceGetInfoResponse(
        service=model_pb2.ServiceInfo(version="0.1.0", schema_version="1.0", instance_id=instance_id),
        model=model_pb2.ModelSpec(
            name="demo", family="qwen2_moe", num_moe_layers=num_layers, num_experts=num_experts, experts_per_token=8
        ),
        device=inference_pb2.DeviceInfo(kind="cpu", link="emulated", emulated_link_bytes_per_s=int(LINK_BYTES_PER_S)),
        expert_cache=inference_pb2.CacheShape(
            slots_per_layer=num_experts // 2, cache_rate=0.5, eviction="next_use", policy="proactive",
            slot_split="global",
        ),
        predictor=inference_pb2.PredictorLink(
            endpoint="unix:/p",
            state=inference_pb2.PREDICTOR_STATE_CONNECTED,
            active=predictor_pb2.PredictorVersion(version=VERSION, predictor="learned", lookaheads=[2]),
        ),
    )  # fmt: skip
    return decode_message(message, NodeInfo)


def cache_stats(num_steps: int, num_layers: int = 30) -> CacheStats:
    """After so many steps, each of which adds the same to every counter."""
    expert_nbytes = 83_000

    def phase(steps: int, tokens: int) -> inference_pb2.PhaseStats:
        return inference_pb2.PhaseStats(
            hits=steps * 192, misses=steps * 48, steps=steps, tokens=tokens, stall_s=steps * 0.02,
            demand_bytes=steps * 10 * expert_nbytes, late_prefetches=steps * 5, late_prefetch_stall_s=steps * 0.005,
        )  # fmt: skip

    qualities = [
        inference_pb2.HintQuality(
            version=VERSION, layer=layer, lookahead=lookahead, phase=predictor_pb2.STEP_PHASE_DECODE, hints=num_steps,
            hinted=num_steps * 8, correct=num_steps * (8 - lookahead), ready=num_steps * 6, routed=num_steps * 8,
        )
        for layer in range(num_layers)
        for lookahead in (1, 2)
    ]  # fmt: skip
    message = inference_pb2.CacheStatsResponse(
        prefill=phase(num_steps // 20, 9 * (num_steps // 20)),
        decode=phase(num_steps, num_steps),
        layers=[inference_pb2.LayerStats(layer=layer, prefetching=layer != 3) for layer in range(num_layers)],
        uploaded_bytes=num_steps * 40 * expert_nbytes,
        running_requests=2,
        queued_requests=1,
        prefetch=inference_pb2.PrefetchStats(
            useful_bytes=num_steps * 20 * expert_nbytes, late_bytes=num_steps * 5 * expert_nbytes,
            wasted_bytes=num_steps * 5 * expert_nbytes, streamed_bytes=0, link_bytes_per_s=LINK_BYTES_PER_S,
        ),
        hints=inference_pb2.HintStats(
            taken=num_steps * 30, late=num_steps, qualities=qualities,
            latency=inference_pb2.Histogram(bounds_s=[0.001, 0.005], counts=[num_steps * 29, num_steps, 0]),
        ),
    )  # fmt: skip
    return decode_message(message, CacheStats)


def cache_map(num_layers: int = 30, num_experts: int = 32, seed: int = 7) -> CacheMap:
    """Half of the experts resident, some of each kind of everything else."""
    drawn = random.Random(seed)
    residents = (0, ExpertBit.RESIDENT)
    others = (0, 0, 0, 0, ExpertBit.LOADING, ExpertBit.HINTED, ExpertBit.ROUTED, ExpertBit.ROUTED | ExpertBit.MISSED)
    experts = bytes(drawn.choice(residents) | drawn.choice(others) for _ in range(num_layers * num_experts))
    return CacheMap(num_layers, num_experts, experts, step=812, layer=17)


def node_sample(at_s: float, num_steps: int, instance_id: str = "i1") -> NodeSample:
    """One look at the demo model's node."""
    return NodeSample(at_s, node_info(instance_id=instance_id), cache_stats(num_steps), cache_map())


def sized_sample(num_layers: int, num_experts: int) -> NodeSample:
    """One look at a model of another size."""
    sample = node_sample(1.0, 100)
    info, drawn = node_info(num_layers, num_experts), cache_map(num_layers, num_experts)
    return replace(sample, info=info, cache_map=drawn, stats=cache_stats(100, num_layers))
