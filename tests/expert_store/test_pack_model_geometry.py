"""A model's numbers, whatever its family calls them, and the dtype it is packed in."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from expert_store.pack.checkpoint import Checkpoint, StoredTensor
from expert_store.pack.meta_model import MetaModel
from expert_store.pack.model_geometry import model_spec, packed_dtype
from promoe.errors import ModelUnsupported
from promoe.model_spec import Dtype
from tests.families import EXPERTS_PER_TOKEN, FAMILIES, HIDDEN_SIZE, NUM_EXPERTS, VOCABULARY


def checkpoint_of(**nbytes_by_dtype: int) -> Checkpoint:
    """One tensor per element type, of so many bytes."""
    tensors = {dtype: StoredTensor(Path("x"), dtype, (), 0, nbytes) for dtype, nbytes in nbytes_by_dtype.items()}
    return Checkpoint("x", Path(), {}, tensors, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_numbers(family: str) -> None:
    model = MetaModel(FAMILIES[family](), Dtype.FLOAT32)
    spec = model_spec("tiny", family, model, model.layout())
    assert (spec.num_experts, spec.experts_per_token) == (NUM_EXPERTS, EXPERTS_PER_TOKEN)
    assert (spec.hidden_size, spec.vocab_size, spec.max_context_tokens) == (HIDDEN_SIZE, len(VOCABULARY), 512)
    assert 1 <= spec.num_moe_layers <= 3


def test_a_number_per_layer_counts_with_its_largest() -> None:
    model = MetaModel(FAMILIES["hunyuan_v1_moe"](), Dtype.FLOAT32)
    model.config.moe_topk = [1, 2, 4]
    assert model_spec("tiny", "hunyuan_v1_moe", model, model.layout()).experts_per_token == 4


def test_a_config_without_a_number_is_refused() -> None:
    model = MetaModel(FAMILIES["mixtral"](), Dtype.FLOAT32)
    object.__setattr__(model.config, "max_position_embeddings", None)  # past the config's own validation
    with pytest.raises(ModelUnsupported, match="has none of max_position_embeddings"):
        model_spec("tiny", "mixtral", model, model.layout())


@pytest.mark.parametrize("dtype", list(Dtype))
def test_the_config_names_the_dtype(dtype: Dtype) -> None:
    assert packed_dtype(AutoConfig.for_model("mixtral", dtype=dtype.value), checkpoint_of(F32=1)) is dtype


def test_else_most_of_the_bytes_decide() -> None:
    silent = AutoConfig.for_model("mixtral")
    assert packed_dtype(silent, checkpoint_of(F32=10, BF16=90, I64=500)) is Dtype.BFLOAT16
    assert packed_dtype(silent, checkpoint_of(F32=90, F16=10)) is Dtype.FLOAT32
    with pytest.raises(ModelUnsupported, match="no floating-point weights"):
        packed_dtype(silent, checkpoint_of(I64=500))
