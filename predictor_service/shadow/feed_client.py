"""What a shadow's process makes of the packets of the feed: a candidate's own session beside each of the service's.

Packets may be missing: what follows on what was not heard is left out, never guessed.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final

from google.protobuf.message import DecodeError

from predictor_service.feed import Overheard
from predictor_service.predictor import Predictor, PredictorSession
from predictor_service.shadow.step_scorer import StepScorer
from predictor_service.shadow.tally import MOST_TALLIES, ScoreReport, StepComparison, VersionTally
from promoe.hint import Hint, Observation, ObservedKind
from promoe.hint_wire import decode_hint, decode_observation, decode_requests_ended, decode_step_start
from promoe.v1 import predictor_pb2 as pb

MOST_SESSIONS: Final = 256
"""Whose end was not heard are forgotten, the oldest first."""

_MOST_COMPARISONS: Final = 4096
"""That wait for the next report."""


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

    def hear(self, packet: bytes) -> None:
        """Takes one packet.

        Raises:
            InvalidInput, ValueError: it is none of the feed's.
        """
        overheard = Overheard.decode(packet)
        if not overheard.said:
            gone = self._sessions.pop(overheard.session, None)
            if gone is not None:
                gone.scorer.end_step()
            return
        try:
            said = pb.PredictRequest.FromString(overheard.said)
            answer = pb.PredictResponse.FromString(overheard.answer)
        except DecodeError as error:
            raise ValueError("a packet's messages cannot be decoded") from error
        if said.HasField("requests_ended") and len(self._ended) < _MOST_COMPARISONS:
            self._ended += said.requests_ended.request_ids
        self._session(overheard.session).hear(said, [decode_hint(hint) for hint in answer.hints.hints])

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

    def hear(self, said: pb.PredictRequest, hints: list[Hint]) -> None:
        match said.WhichOneof("event"):
            case "step_start":
                start = decode_step_start(said.step_start)
                self._step = start.step
                self.scorer.begin_step(start)
                if self._predictions is not None:
                    self._predictions.begin_step(start)
            case "observation":
                observation = decode_observation(said.observation)
                self.scorer.observe(observation, [*hints, *self._predict(observation)])
            case "requests_ended":
                if self._predictions is not None:
                    self._predictions.end_requests(decode_requests_ended(said.requests_ended).request_ids)

    def _predict(self, observation: Observation) -> Sequence[Hint]:
        """The candidate's hints; processor time, since this process gives way to others."""
        candidate, predictions = self._candidate, self._predictions
        if candidate is None or predictions is None or observation.step != self._step:
            return ()
        if observation.hidden_RD is None and candidate.version.observed is not ObservedKind.NONE:
            return ()
        begin_s = time.thread_time()
        hints = predictions.observe(observation)
        tally = self._tally_of(candidate.version.version)
        tally.predict_s += time.thread_time() - begin_s
        tally.observations += 1
        return hints
