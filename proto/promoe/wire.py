"""Between the contract's own nouns and their protobuf messages."""

from importlib.metadata import version
from typing import Final

from promoe.errors import ModelMismatch
from promoe.ids import ExpertId
from promoe.model_spec import Dtype, ModelSpec
from promoe.schema import OUR_SCHEMA, Schema
from promoe.v1 import model_pb2

SCHEMA_VERSION: Final = str(OUR_SCHEMA)

DTYPE_TO_WIRE: Final = {
    Dtype.FLOAT32: model_pb2.DTYPE_FLOAT32,
    Dtype.FLOAT16: model_pb2.DTYPE_FLOAT16,
    Dtype.BFLOAT16: model_pb2.DTYPE_BFLOAT16,
}


def encode_expert(expert: ExpertId) -> model_pb2.ExpertId:
    """To the wire."""
    return model_pb2.ExpertId(layer=expert.layer, expert=expert.expert)


def decode_expert(message: model_pb2.ExpertId) -> ExpertId:
    """From the wire."""
    return ExpertId(message.layer, message.expert)


def encode_spec(spec: ModelSpec) -> model_pb2.ModelSpec:
    """To the wire."""
    return model_pb2.ModelSpec(
        name=spec.name,
        family=spec.family,
        fingerprint=spec.fingerprint,
        dtype=DTYPE_TO_WIRE[spec.layout.dtype],
        num_moe_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
        experts_per_token=spec.experts_per_token,
        expert_nbytes=spec.layout.blob_nbytes,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_context_tokens=spec.max_context_tokens,
    )


def check_schema(peer: model_pb2.ServiceInfo, peer_name: str) -> Schema:
    """What both ends know: the older one's schema, where the newer one can do without what it added.

    Raises:
        ModelMismatch: they are further apart than that; the text shows both sides.
    """
    theirs = Schema.parse(peer.schema_version)
    if theirs is None or not OUR_SCHEMA.speaks_with(theirs):
        raise ModelMismatch(
            f"{peer_name} speaks schema {peer.schema_version or 'unknown'} (promoe {peer.version or 'unknown'}); "
            f"this process speaks {OUR_SCHEMA} (promoe {version('promoe')}), and works with the same major and a minor "
            "that differs by one at most. Upgrade the older one."
        )
    return min(OUR_SCHEMA, theirs)
