"""Model specs and manifests of any geometry, for tests of the contract."""

from hypothesis import strategies as st

from promoe.model_spec import Dtype, ExpertLayout, ModelSpec
from promoe.pack_manifest import PackManifest

SHAPES = st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple)
LAYOUTS = st.builds(
    ExpertLayout.of,
    st.sampled_from(Dtype),
    st.dictionaries(st.text("abc_", min_size=1, max_size=8), SHAPES, min_size=1, max_size=5),
)


def small_spec(num_moe_layers: int = 2, num_experts: int = 3, fingerprint: str = "00c0ffee") -> ModelSpec:
    """A gated expert of hidden size 8 and expert hidden size 5."""
    layout = ExpertLayout.of(Dtype.BFLOAT16, {"gate_up_proj": (10, 8), "down_proj": (8, 5)})
    return ModelSpec(
        name="tiny × test",
        family="qwen2_moe",
        fingerprint=fingerprint,
        num_moe_layers=num_moe_layers,
        num_experts=num_experts,
        experts_per_token=2,
        hidden_size=8,
        vocab_size=32,
        max_context_tokens=128,
        layout=layout,
    )


def manifest_of(spec: ModelSpec) -> PackManifest:
    """A consistent manifest; its checksums are made up from the experts' places."""
    return PackManifest(
        spec=spec,
        blob_checksums=tuple(
            tuple(f"{layer * 1000 + expert:016x}" for expert in range(spec.num_experts))
            for layer in range(spec.num_moe_layers)
        ),
        layer_modules=tuple(f"model.layers.{layer}.mlp.experts" for layer in range(spec.num_moe_layers)),
        dense_checksums={"dense/config.json": "0123456789abcdef", "routers.safetensors": "fedcba9876543210"},
        packed_with={"promoe": "0.1.0", "transformers": "5.23.0"},
    )
