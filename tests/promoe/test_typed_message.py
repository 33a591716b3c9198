"""Every dataclass names fields its message has, and enums of a newer server do not break an older client."""

import dataclasses

import pytest
from google.protobuf.message import Message

from promoe import generation, node_report
from promoe.cache_map import CacheMap
from promoe.generation import GenerateOptions
from promoe.node_report import EngineKind, NodeInfo
from promoe.trace_header import TraceHeader
from promoe.typed_message import decode_message, encode_message
from promoe.v1 import inference_pb2, model_pb2, predictor_pb2

PAIRS: list[tuple[type, type[Message]]] = [
    (node_report.ServiceInfo, model_pb2.ServiceInfo),
    (node_report.ModelInfo, model_pb2.ModelSpec),
    (node_report.DeviceInfo, inference_pb2.DeviceInfo),
    (node_report.Limits, inference_pb2.Limits),
    (node_report.CacheShape, inference_pb2.CacheShape),
    (node_report.StoreLink, inference_pb2.StoreLink),
    (node_report.ActivePredictor, predictor_pb2.PredictorVersion),
    (node_report.PredictorLink, inference_pb2.PredictorLink),
    (node_report.NodeInfo, inference_pb2.InferenceGetInfoResponse),
    (node_report.PhaseStats, inference_pb2.PhaseStats),
    (node_report.LayerStats, inference_pb2.LayerStats),
    (node_report.PrefetchStats, inference_pb2.PrefetchStats),
    (node_report.HintQuality, inference_pb2.HintQuality),
    (node_report.Histogram, inference_pb2.Histogram),
    (node_report.HintStats, inference_pb2.HintStats),
    (node_report.CacheStats, inference_pb2.CacheStatsResponse),
    (CacheMap, inference_pb2.CacheMapResponse),
    (TraceHeader, inference_pb2.TraceHeader),
    (generation.TokenLogprob, inference_pb2.TokenLogprob),
    (generation.GeneratedToken, inference_pb2.GeneratedToken),
    (generation.Delta, inference_pb2.TextDelta),
    (generation.ExpertUse, inference_pb2.ExpertUse),
    (generation.Usage, inference_pb2.Usage),
]


@pytest.mark.parametrize(("record_type", "message_type"), PAIRS)
def test_fields_are_those_of_the_message(record_type: type, message_type: type[Message]) -> None:
    wire = {field.name for field in message_type.DESCRIPTOR.fields}
    assert dataclasses.is_dataclass(record_type)
    assert {field.name for field in dataclasses.fields(record_type)} <= wire
    decode_message(message_type(), record_type)


def test_options_are_those_of_the_wire() -> None:
    assert set(GenerateOptions.__annotations__) == {f.name for f in inference_pb2.SamplingParams.DESCRIPTOR.fields}


def test_absent_optionals_are_none_and_present_zeros_are_not() -> None:
    absent = decode_message(inference_pb2.Usage(), generation.Usage)
    present = decode_message(inference_pb2.Usage(tpot_s=0.0), generation.Usage)
    assert (absent.tpot_s, present.tpot_s) == (None, 0.0)
    assert absent.decode.hit_rate is None


def test_repeated_messages_become_tuples_of_records() -> None:
    alternative = inference_pb2.TokenLogprob(token_id=4, text="b", logprob=-2.0)
    token = inference_pb2.GeneratedToken(
        token=inference_pb2.TokenLogprob(token_id=3, text="a", logprob=-0.5), alternatives=[alternative]
    )
    delta = decode_message(inference_pb2.TextDelta(text="a", token_ids=[3], logprobs=[token]), generation.Delta)
    assert delta.logprobs[0].token == generation.TokenLogprob(3, "a", -0.5)
    assert delta.logprobs[0].alternatives == (generation.TokenLogprob(4, "b", -2.0),)


def test_an_enum_value_of_a_newer_server_is_unspecified() -> None:
    newer = inference_pb2.InferenceGetInfoResponse()
    newer.MergeFromString(b"\x18\x63")  # field 3 (engine), value 99
    assert decode_message(newer, NodeInfo).engine is EngineKind.UNSPECIFIED
    newer.engine = inference_pb2.ENGINE_KIND_INTERLEAVED
    assert decode_message(newer, NodeInfo).engine is EngineKind.INTERLEAVED


@pytest.mark.parametrize(("record_type", "message_type"), PAIRS)
def test_encoding_is_the_inverse(record_type: type, message_type: type[Message]) -> None:
    """Of a message whose every field is filled."""
    message = message_type()
    _fill_every_field(message, {field.name for field in dataclasses.fields(record_type)})
    record: object = decode_message(message, record_type)
    assert decode_message(encode_message(record, message_type), record_type) == record
    assert encode_message(record, message_type).ByteSize() > 0


def _fill_every_field(message: Message, names: set[str] | None = None) -> None:
    for field in message.DESCRIPTOR.fields:
        if names is not None and field.name not in names:
            continue
        value = getattr(message, field.name)
        if field.message_type is not None:
            _fill_every_field(value.add() if hasattr(value, "add") else value)
        elif hasattr(value, "append"):
            value.extend([field.number, field.number + 1])
        elif isinstance(value, str):
            setattr(message, field.name, field.name)
        elif isinstance(value, bytes):
            setattr(message, field.name, field.name.encode())
        else:
            setattr(message, field.name, 1)
