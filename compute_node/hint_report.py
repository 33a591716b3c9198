"""What the compute node tells about hints and the predictor that makes them."""

from dataclasses import dataclass
from typing import Final

from compute_node.hint_client import HintClient
from compute_node.hint_inbox import HintInbox
from compute_node.hint_quality import DurationCounts, HintScore, HintScores, ScoreKey
from compute_node.hint_session import HintTraffic
from compute_node.step_ledger import Phase
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
        client: of the predictor; None where the node was started without one.
    """

    scores: HintScores
    inbox: HintInbox
    client: HintClient | None

    def predictor_link(self) -> PredictorLink:
        """The predictor, as it is now."""
        if self.client is None:
            return PredictorLink("", PredictorState.NONE, None)
        active = self.client.active
        if active is None:
            return PredictorLink(self.client.endpoint, PredictorState.AWAY, None)
        return PredictorLink(self.client.endpoint, PredictorState.CONNECTED, _active_predictor(active))

    def hint_stats(self) -> HintStats:
        """The counters, as they are now."""
        traffic = HintTraffic() if self.client is None else self.client.traffic
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
        )


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
