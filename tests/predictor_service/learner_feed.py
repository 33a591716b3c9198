"""Made-up sessions as the feed tells them: packets of recorded steps, as they would have been observed."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from predictor_service.feed import Overheard
from predictor_service.predictors.frequency import VERSION as ROUTING_ONLY
from predictor_service.trace_playback import RecordedStep, observations, recorded_step
from promoe.hint import Observation, ObservedKind, PredictorVersion, RequestsEnded, StepStart
from promoe.hint_wire import encode_observation, encode_requests_ended, encode_step_start, encode_version
from promoe.model_spec import Dtype
from promoe.trace_events import StepEvent, TraceEvent
from promoe.v1 import predictor_pb2 as pb
from tests.predictor_service.made_up_traces import LAYERS, LearnableModel

ROUTER_INPUT = PredictorVersion("learned@1", "learned", ObservedKind.ROUTER_INPUT, (1, 2), True, True)
EVERY_SECOND = PredictorVersion("learned@2", "learned", ObservedKind.ROUTER_INPUT, (1, 2), True, True, observe_every=2)
LAYER_INPUT = PredictorVersion("promoe@1", "promoe", ObservedKind.LAYER_INPUT, (2,), True, True)
UNSEEN = ROUTING_ONLY


def steps_of(events: Sequence[TraceEvent]) -> list[RecordedStep]:
    starts = [index for index, event in enumerate(events) if isinstance(event, StepEvent)]
    parts = [events[first:last] for first, last in zip(starts, [*starts[1:], len(events)], strict=True)]
    return [step for part in parts if (step := recorded_step(part, LAYERS)) is not None]


def made_up_steps(documents: int, seed: int = 1) -> list[RecordedStep]:
    return steps_of(list(LearnableModel().events(documents, seed=seed)))


def welcome(session: int, version: PredictorVersion) -> bytes:
    message = pb.PredictResponse(welcome=pb.PredictWelcome(active=encode_version(version), max_rows=8))
    # Announced as an answer to a step's beginning that says nothing new.
    return Overheard(
        session, pb.PredictRequest(hello=pb.PredictHello()).SerializeToString(), message.SerializeToString()
    ).encode()


def ended(session: int) -> bytes:
    return Overheard(session, b"").encode()


def step_packets(session: int, step: RecordedStep, version: PredictorVersion) -> Iterator[bytes]:
    if step.ended_request_ids:
        over = encode_requests_ended(RequestsEnded(step.ended_request_ids))
        yield _request(session, pb.PredictRequest(requests_ended=over))
    start = StepStart(step.start.step, step.start.spans, version=version.version)
    yield _request(session, pb.PredictRequest(step_start=encode_step_start(start)))
    for observation in observations(step, version):
        yield observation_packet(session, observation)


def observation_packet(session: int, observation: Observation) -> bytes:
    return _request(session, pb.PredictRequest(observation=encode_observation(observation, Dtype.BFLOAT16)))


def session_packets(session: int, steps: Sequence[RecordedStep], version: PredictorVersion) -> Iterator[bytes]:
    """From its welcome to its end."""
    yield welcome(session, version)
    for step in steps:
        yield from step_packets(session, step, version)
    yield ended(session)


def documents_in(steps: Sequence[RecordedStep]) -> list[str]:
    return [name for name, _ in groupby(step.start.spans[0].request_id for step in steps)]


def _request(session: int, message: pb.PredictRequest) -> bytes:
    return Overheard(session, message.SerializeToString()).encode()
