"""Answers of the store and the node for plans, as their modules give them."""

from promoe.cli.plan_inquiry import StoreAnswer
from promoe.footprint import HostRoom, ModelFootprint
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec

GIB = 1 << 30


def footprint(dtype: Dtype = Dtype.BFLOAT16, source_folder: str = "", *, is_packed: bool = False) -> ModelFootprint:
    """Of a model with 2 layers of 4 experts, whose sizes are round numbers."""
    spec = ModelSpec(
        name="small",
        family="qwen3_moe",
        fingerprint="",
        num_moe_layers=2,
        num_experts=4,
        experts_per_token=2,
        hidden_size=8,
        vocab_size=100,
        max_context_tokens=64,
        layout=ExpertLayout.of(dtype, {"down_proj": (8, 8)}),
    )
    return ModelFootprint(
        spec=spec,
        config={"model_type": "qwen3_moe"},
        dense_nbytes=GIB,
        lookup_nbytes=0,
        arena_nbytes=4 * GIB,
        pack_nbytes=5 * GIB,
        source_nbytes=6 * GIB if source_folder else 0,
        source_folder=source_folder,
        is_packed=is_packed,
        read_from="the headers in a test",
    )


def store_answer(room_nbytes: int = 16 * GIB, **settings: object) -> StoreAnswer:
    """Of that model, on a host with so much room."""
    return StoreAnswer(footprint(**settings), HostRoom(room_nbytes, "free memory", GIB))  # type: ignore[arg-type]


def node_answer(slots_short_nbytes: int = 0) -> dict[str, object]:
    """Of a node with 2 of 4 slots a layer; with something short, 1 would fit."""
    names = ("dense weights", "workspace", "KV blocks", "expert slots")
    short = {"expert slots": slots_short_nbytes}
    parts = [
        {
            "name": name,
            "need_nbytes": GIB,
            "have_nbytes": GIB - short.get(name, 0),
            "short_nbytes": short.get(name, 0),
            "detail": "as planned",
        }
        for name in names
    ]
    slots = 1 if slots_short_nbytes else 2
    rows = [
        {
            "slots_per_layer": number,
            "cache_rate": number / 4,
            "device_nbytes": number * GIB,
            "tpot_low_s": 0.1 / number,
            "tpot_high_s": 0.2 / number,
            "hit_rate_low": 0.2 * number,
            "hit_rate_high": 0.25 * number,
        }
        for number in (1, 2, 3, 4)
    ]
    return {
        "device": {
            "kind": "cuda",
            "description": "a GPU of the size given",
            "budget_nbytes": 4 * GIB,
            "is_here": False,
        },
        "fits": not slots_short_nbytes,
        "parts": parts,
        "mends": ["--cache-rate 0.25", "--max-context 32"] if slots_short_nbytes else [],
        "memory_plan": None,
        "suggested_slots": slots,
        "most_slots": slots,
        "forecast": {
            "link": {"bytes_per_s": 25e9, "source": "given"},
            "memory_bandwidth": {"bytes_per_s": 900e9, "source": "assumed: a large desktop GPU"},
            "routing": "made up",
            "num_requests": 4,
            "policy": "proactive",
            "all_resident_s": [0.01, 0.02],
            "is_resident_given": False,
            "layer_overhead_s": 0.0005,
            "rows": rows,
        },
    }
