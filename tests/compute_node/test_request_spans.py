"""Spans of answers: what they say, below whose they go, how they reach a collector, what lacks without the extra."""

import logging
import queue
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import perf_counter
from typing import Final, TypeAlias

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from compute_node.answer_record import AnswerRecord, AnswerTimes
from compute_node.request_metrics import Outcome
from compute_node.request_spans import ENDPOINT_VARIABLES, RequestSpans, request_spans
from compute_node.step_ledger import ExpertUse, RequestUse
from promoe.config import SettingUnfit

CALLER: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
USE: Final = RequestUse(prefill=ExpertUse(3, 2, 200, 0.5), decode=ExpertUse(7, 1, 100, 0.25))
DEADLINE_S: Final = 30.0


Marks: TypeAlias = dict[str, float | None]
WHOLE: Final[Marks] = {"started_s": 1.0, "first_s": 3.0, "last_s": 6.0}


def record(outcome: Outcome = Outcome.FINISHED, traceparent: str = "", times: Marks = WHOLE) -> AnswerRecord:
    """A second in the queue, two of prefill, three of decode, and half a one until the caller had it all."""
    began_s = perf_counter() - 10
    later = {name: None if mark is None else began_s + mark for name, mark in (WHOLE | times).items()}
    answer_times = AnswerTimes(arrived_s=began_s, ended_s=began_s + 6.5, **later)
    return AnswerRecord("job-17.0a", traceparent, outcome, 5, 4, answer_times, USE)


def told(answer: AnswerRecord) -> dict[str, ReadableSpan]:
    exporter = InMemorySpanExporter()
    spans = RequestSpans(SimpleSpanProcessor(exporter), "tiny")
    spans.tell(answer)
    spans.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_an_answer_is_four_spans_with_its_times_and_uses() -> None:
    spans = told(record())
    lengths = {
        name: pytest.approx(length, abs=1e-3)
        for name, length in {"answer": 6.5, "queue": 1.0, "prefill": 2.0, "decode": 3.0}.items()
    }
    assert {name: seconds(span) for name, span in spans.items()} == lengths
    whole = spans["answer"]
    assert (whole.kind, whole.parent, whole.status.status_code) == (SpanKind.SERVER, None, StatusCode.UNSET)
    assert whole.attributes == {
        "promoe.request_id": "job-17", "promoe.answer_id": "job-17.0a", "promoe.outcome": "finished",
        "gen_ai.request.model": "tiny", "gen_ai.usage.input_tokens": 5, "gen_ai.usage.output_tokens": 4,
    }  # fmt: skip
    assert {span.parent.span_id for span in spans.values() if span.parent} == {whole.context.span_id}
    assert spans["decode"].attributes == {
        "promoe.expert_hits": 7, "promoe.expert_misses": 1, "promoe.loaded_bytes": 100, "promoe.stall_s": 0.25
    }  # fmt: skip
    assert whole.resource.attributes["service.name"] == "promoe-compute-node"


def test_the_callers_trace_goes_on() -> None:
    whole = told(record(traceparent=CALLER))["answer"]
    assert whole.parent is not None
    assert f"{whole.context.trace_id:032x}-{whole.parent.span_id:016x}" == CALLER[3:-3]
    assert told(record(traceparent="nonsense"))["answer"].parent is None


@pytest.mark.parametrize(
    ("outcome", "times", "names"),
    [
        (Outcome.CANCELLED, {"started_s": None, "first_s": None, "last_s": None}, {"answer", "queue"}),
        (Outcome.DEADLINE, {"first_s": None, "last_s": None}, {"answer", "queue", "prefill"}),
        (Outcome.FAILED, {}, {"answer", "queue", "prefill", "decode"}),
    ],
)
def test_what_an_answer_did_not_come_to_has_no_span(outcome: Outcome, times: Marks, names: set[str]) -> None:
    spans = told(record(outcome, times=times))
    assert spans.keys() == names
    is_bad = spans["answer"].status.status_code is StatusCode.ERROR
    assert is_bad == (outcome is not Outcome.CANCELLED)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: queue.SimpleQueue[str] = queue.SimpleQueue()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span.name)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collector() -> Iterator[tuple[Collector, str]]:
    """One that listens, and its endpoint."""
    servicer = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    # Generated without stubs.
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield servicer, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("variable", ["", *ENDPOINT_VARIABLES])
def test_spans_reach_the_collector_that_is_asked_for(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (servicer, endpoint):
        if variable:
            monkeypatch.setenv(variable, endpoint)
        with request_spans("" if variable else endpoint, "tiny") as listener:
            assert listener is not None
            listener(record())
        names = {servicer.spans.get(timeout=DEADLINE_S) for _ in range(4)}
    assert names == {"answer", "queue", "prefill", "decode"}


def test_without_a_wish_there_are_none() -> None:
    with request_spans("", "tiny") as listener:
        assert listener is None


def test_without_the_extra_the_setting_is_refused_and_the_environment_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    sentence = r"compute\.otlp_endpoint is 'http://x:1', but .* is not installed: pip install 'promoe\[otel\]'"
    with pytest.raises(SettingUnfit, match=sentence), request_spans("http://x:1", "tiny"):
        pass
    monkeypatch.setenv(ENDPOINT_VARIABLES[1], "http://x:1")
    with caplog.at_level(logging.WARNING), request_spans("", "tiny") as listener:
        assert listener is None
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set, but no spans are made" in caplog.text
