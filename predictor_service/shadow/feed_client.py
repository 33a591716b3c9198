"""What a shadow's process makes of the packets of the feed: a candidate's own session beside each of the service's.

Packets may be missing: what follows on what was not heard is left out, never guessed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError

from predictor_service.feed import Overheard
from predictor_service.predictor import Predictor, PredictorSession
from predictor_service.shadow.step_scorer import StepScorer
from predictor_service.shadow.tally import MOST_TALLIES, ScoreReport, StepComparison, VersionTally
from promoe.hint import Hint, Observation, ObservedKind, RequestsEnded, StepStart
from promoe.hint_wire import decode_hint, decode_observation, decode_requests_ended, decode_step_start
from promoe.v1 import predictor_pb2 as pb

MOST_SESSIONS: Final = 256
"""Whose end was not heard are forgotten, the oldest first."""

_MOST_COMPARISONS: Final = 4096
"""That wait for the next report."""


@dataclass(frozen=True)
class HeardPacket:
    """What a packet says.

    Attributes:
        session: whose.
        event: what the node said; None where that is nothing to a shadow.
        hints: what it was answered.
        is_end: the session is over.
    """

    session: int
    event: StepStart | Observation | RequestsEnded | None
    hints: tuple[Hint, ...]
    is_end: bool


def read_packet(packet: bytes) -> HeardPacket:
    """Raises InvalidInput or ValueError for what is none of the feed's."""
    overheard = Overheard.decode(packet)
    try:
        said = pb.PredictRequest.FromString(overheard.said)
        answer = pb.PredictResponse.FromString(overheard.answer)
    except DecodeError as error:
        raise ValueError("a packet's messages cannot be decoded") from error
    hints = tuple(decode_hint(hint) for hint in answer.hints.hints)
    return HeardPacket(overheard.session, _event_of(said), hints, is_end=not overheard.said)


def _event_of(said: pb.PredictRequest) -> StepStart | Observation | RequestsEnded | None:
    match said.WhichOneof("event"):
        case "step_start":
            return decode_step_start(said.step_start)
        case "observation":
            return decode_observation(said.observation)
        case "requests_ended":
            return decode_requests_ended(said.requests_ended)
    return None


class Listener:
    """Hears what the nodes say and what they are answered; scores both sides.

    Args:
        candidate: what looks on; None where only the service's own hints are scored.
    """

    def __init__(self, candidate: Predictor | None) -> None:
        self._candidate = candidate
        self._tallies: dict[str, VersionTally] = {}
        self._comparisons: list[StepComparison] = []
        self._ended: list[str] = []
        self._sessions: dict[int, _Heard] = {}

    def hear(self, heard: HeardPacket) -> None:
        """Takes one packet; raises what the candidate raises, which is then no candidate."""
        if heard.is_end:
            gone = self._sessions.pop(heard.session, None)
            if gone is not None:
                gone.scorer.end_step()
            return
        if isinstance(heard.event, RequestsEnded) and len(self._ended) < _MOST_COMPARISONS:
            self._ended += heard.event.request_ids
        self._session(heard.session).hear(heard.event, heard.hints)

    def report(self) -> ScoreReport:
        """Everything counted so far, and the comparisons since the report before."""
        comparisons, self._comparisons = tuple(self._comparisons), []
        ended, self._ended = tuple(self._ended), []
        return ScoreReport(self._tallies, comparisons, ended)

    def _session(self, number: int) -> "_Heard":
        session = self._sessions.get(number)
        if session is None:
            while len(self._sessions) >= MOST_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            version = "" if self._candidate is None else self._candidate.version.version
            session = _Heard(self._candidate, StepScorer(self._tally, version, self._take), self._tally)
            self._sessions[number] = session
        return session

    def _tally(self, version: str) -> VersionTally:
        tally = self._tallies.get(version)
        if tally is None:
            while len(self._tallies) >= MOST_TALLIES:
                del self._tallies[next(iter(self._tallies))]
            tally = self._tallies[version] = VersionTally()
        return tally

    def _take(self, comparison: StepComparison) -> None:
        if len(self._comparisons) < _MOST_COMPARISONS:
            self._comparisons.append(comparison)


class _Heard:
    """One session of the service, and the candidate's beside it."""

    def __init__(
        self, candidate: Predictor | None, scorer: StepScorer, tally_of: Callable[[str], VersionTally]
    ) -> None:
        self.scorer = scorer
        self._candidate = candidate
        self._predictions: PredictorSession | None = None if candidate is None else candidate.open_session()
        self._tally_of = tally_of
        self._step = 0

    def hear(self, event: StepStart | Observation | RequestsEnded | None, hints: Sequence[Hint]) -> None:
        match event:
            case StepStart():
                self._step = event.step
                self.scorer.begin_step(event)
                if self._predictions is not None:
                    self._predictions.begin_step(event)
            case Observation():
                self.scorer.observe(event, [*hints, *self._predict(event)])
            case RequestsEnded():
                if self._predictions is not None:
                    self._predictions.end_requests(event.request_ids)

    def _predict(self, observation: Observation) -> Sequence[Hint]:
        """The candidate's hints; processor time, since this process gives way to others."""
        candidate, predictions = self._candidate, self._predictions
        if candidate is None or predictions is None or observation.step != self._step:
            return ()
        hidden_RD = observation.hidden_RD
        if hidden_RD is None and candidate.version.observed is not ObservedKind.NONE:
            return ()
        if hidden_RD is not None and not np.isfinite(hidden_RD).all():  # the service shows it to nobody either
            return ()
        begin_s = time.thread_time()
        hints = predictions.observe(observation)
        tally = self._tally_of(candidate.version.version)
        tally.predict_s += time.thread_time() - begin_s
        tally.observations += 1
        return hints
