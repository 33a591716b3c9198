"""What the compute node tells about hints and the predictor that makes them."""

from dataclasses import dataclass
from typing import Final

from compute_node.hint_inbox import HintInbox
from compute_node.hint_link import Connection
from compute_node.hint_quality import DurationCounts, HintScore, HintScores, ScoreKey
from compute_node.hint_session import HintTraffic
from compute_node.step_ledger import Phase
from compute_node.takeovers import TakeoverCounts, Takeovers
from promoe.hint import PredictorVersion
from promoe.node_report import (
    ActivePredictor,
    HintQuality,
    HintStats,
    Histogram,
    ObservedKind,
    PredictorLink,
    PredictorState,
    StepPhase,
)
from promoe.trace_events import HintFate

_PHASES: Final = {Phase.PREFILL: StepPhase.PREFILL, Phase.DECODE: StepPhase.DECODE}


@dataclass(frozen=True)
class HintReport:
    """Reads what other threads count.

    Attributes:
        scores: of the hints that came.
        inbox: where they wait.
        takeovers: which predictor makes them; None where none is listened to.
    """

    scores: HintScores
    inbox: HintInbox
    takeovers: Takeovers | None

    def predictor_link(self) -> PredictorLink:
        """The predictor, as it is now."""
        takeovers = self.takeovers
        if takeovers is None:
            return PredictorLink("", PredictorState.NONE, None)
        incumbent = takeovers.link.roles.incumbent
        active = None if incumbent is None else incumbent.client.active
        return PredictorLink(
            endpoint="" if incumbent is None else incumbent.endpoint,
            state=_state_of(incumbent, active),
            active=None if active is None else _active_predictor(active),
            candidate=takeovers.candidate,
            previous=takeovers.previous,
            last_switch=takeovers.last_switch,
        )

    def takeover_counts(self) -> TakeoverCounts:
        """How often another predictor was wished for, and what came of it."""
        return TakeoverCounts() if self.takeovers is None else self.takeovers.counts

    def hint_stats(self) -> HintStats:
        """The counters, as they are now."""
        traffic = HintTraffic() if self.takeovers is None else self.takeovers.link.traffic
        fates = self.scores.fates
        return HintStats(
            taken=fates[HintFate.TAKEN],
            late=fates[HintFate.LATE],
            # Found by the client, or by the cache: for a step that there will not be.
            invalid=traffic.invalid + fates[HintFate.INVALID],
            wrong_version=traffic.wrong_version,
            overflow=self.inbox.num_overflowed,
            observations_sent=traffic.observations_sent,
            observations_dropped=traffic.observations_dropped,
            qualities=tuple(_quality(key, score) for key, score in self.scores.scores()),
            latency=_histogram(self.scores.latency_s),
            time_until_use=_histogram(self.scores.time_until_use_s),
            withheld=0 if self.takeovers is None else self.takeovers.link.num_withheld,
        )


def _state_of(incumbent: Connection | None, active: PredictorVersion | None) -> PredictorState:
    if incumbent is None:
        return PredictorState.NONE
    return PredictorState.AWAY if active is None else PredictorState.CONNECTED


def _active_predictor(version: PredictorVersion) -> ActivePredictor:
    return ActivePredictor(
        version=version.version,
        predictor=version.predictor,
        observed=ObservedKind(version.observed.value),
        lookaheads=version.lookaheads,
        calibrated=version.calibrated,
        wants_routing=version.wants_routing,
    )


def _quality(key: ScoreKey, score: HintScore) -> HintQuality:
    return HintQuality(
        version=key.version,
        layer=key.layer,
        lookahead=key.lookahead,
        phase=_PHASES[key.phase],
        hints=score.hints,
        hinted=score.hinted,
        correct=score.correct,
        ready=score.ready,
        routed=score.routed,
        found=score.found,
    )


def _histogram(counts: DurationCounts) -> Histogram:
    return Histogram(counts.bounds_s, tuple(counts.counts))
