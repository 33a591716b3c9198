"""Spans of answers for OpenTelemetry (`pip install promoe[otel]`): queue, prefill, decode, below the caller's own span.

An answer is told of when it is over; a thread of OpenTelemetry's sends what was told. Nothing of it is on the way of a
token.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from compute_node.answer_record import AnswerListener, AnswerRecord
from compute_node.request_metrics import Outcome
from compute_node.step_ledger import ExpertUse
from promoe.config import SettingUnfit
from promoe.request_id import TRACEPARENT_HEADER, answered_request_id

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own, which its exporter reads; so are all others that begin with OTEL_."""

_MEND: Final = "OpenTelemetry's exporter is not installed: pip install 'promoe[otel]'."

_BAD_OUTCOMES: Final = frozenset({Outcome.FAILED, Outcome.DEADLINE})


class RequestSpans:
    """Makes four spans of every answer.

    Args:
        processor: takes finished spans.
        model: its name.
    """

    def __init__(self, processor: "SpanProcessor", model: str) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider

        ours = Resource({"service.name": "promoe-compute-node", "service.version": version("promoe")})
        # What the environment says (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) goes first.
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("promoe.compute_node", version("promoe"))
        self._model = model

    def tell(self, record: AnswerRecord) -> None:
        """See AnswerListener."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        times = record.times
        # The wall clock is looked at once: spans of one answer keep their distances.
        offset_unix_ns = time.time_ns() - int(time.perf_counter() * 1e9)

        def unix_ns(at_s: float) -> int:
            return offset_unix_ns + int(at_s * 1e9)

        caller = TraceContextTextMapPropagator().extract({TRACEPARENT_HEADER: record.traceparent})
        whole = self._tracer.start_span(
            "answer", caller, SpanKind.SERVER, self._attributes(record), start_time=unix_ns(times.arrived_s)
        )
        within = set_span_in_context(whole)
        for name, begin_s, end_s, attributes in _parts(record):
            part = self._tracer.start_span(name, within, attributes=attributes, start_time=unix_ns(begin_s))
            part.end(unix_ns(end_s))
        if record.outcome in _BAD_OUTCOMES:
            whole.set_status(StatusCode.ERROR, record.outcome.value)
        whole.end(unix_ns(times.ended_s))

    def close(self) -> None:
        """Sends what was told and ends the thread; a collector that is away is not waited for."""
        self._provider.shutdown()

    def _attributes(self, record: AnswerRecord) -> dict[str, str | int]:
        """By OpenTelemetry's conventions for generative models where there is one."""
        return {
            "promoe.request_id": answered_request_id(record.answer_id),
            "promoe.answer_id": record.answer_id,
            "promoe.outcome": record.outcome.value,
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_output_tokens,
        }


def _parts(record: AnswerRecord) -> Iterator[tuple[str, float, float, dict[str, int | float]]]:
    """Name, begin, end and attributes of each part that it came to."""
    times, use = record.times, record.use
    yield "queue", times.arrived_s, times.started_s or times.ended_s, {}
    if times.started_s is not None:
        yield (
            "prefill",
            times.started_s,
            times.first_s or times.ended_s,
            _expert_use(None if use is None else use.prefill),
        )
    if times.first_s is not None and times.last_s is not None:
        yield "decode", times.first_s, times.last_s, _expert_use(None if use is None else use.decode)


def _expert_use(use: ExpertUse | None) -> dict[str, int | float]:
    if use is None:
        return {}
    return {
        "promoe.expert_hits": use.hits,
        "promoe.expert_misses": use.misses,
        "promoe.loaded_bytes": use.loaded_nbytes,
        "promoe.stall_s": use.stall_s,
    }


def check_spans(endpoint: str) -> None:
    """Raises SettingUnfit when the setting asks for spans, and what sends them is not installed."""
    if not endpoint:
        return
    try:
        import opentelemetry.exporter.otlp.proto.grpc.trace_exporter  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise SettingUnfit(f"compute.otlp_endpoint is {endpoint!r}, but {_MEND}") from error


@contextmanager
def request_spans(endpoint: str, model: str) -> Iterator[AnswerListener | None]:
    """Who makes spans and sends them over OTLP (gRPC), while entered; None where nobody asked for them.

    Args:
        endpoint: `http://host:port` of a collector; empty: as the environment says, if it does.
        model: its name.

    Raises:
        SettingUnfit: asked for by the setting, and not installed. What the environment says may be meant for others: it
            is a warning in the log then.
    """
    variable = next((name for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)
    if not endpoint and variable is None:
        yield None
        return
    check_spans(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logger.warning("%s is set, but no spans are made: %s", variable, _MEND)
        yield None
        return
    spans = RequestSpans(BatchSpanProcessor(OTLPSpanExporter(endpoint or None)), model)
    try:
        yield spans.tell
    finally:
        spans.close()
