"""How good a predictor's hints are on a recorded trace, through the interface that serves them.

Shapes: K experts per token, E experts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from predictor_service.predictor import Predictor, PredictorSession
from predictor_service.trace_playback import RecordedStep, observations, recorded_steps
from promoe.hint import Hint, IdArray, ObservedKind
from promoe.trace_file import TraceReader

NUM_BINS: Final = 20
"""Of scores, for the calibration error."""


@dataclass(frozen=True)
class LookaheadQuality:
    """Hints of one lookahead for steps that decode one token.

    Attributes:
        lookahead: in MoE layers.
        is_next_step: they were for the step after the observed one; these are harder, and told apart.
        hints: that were measured.
        recall: share of the routed experts among the first k of the hint.
        recall_wide: among the first 1.5k.
        calibration_error: expected |score - share that was routed| over bins of scores; None if not calibrated.
        mean_score_sum: what the scores of a hint add up to; k if they are right.
    """

    lookahead: int
    is_next_step: bool
    hints: int
    recall: float
    recall_wide: float
    calibration_error: float | None
    mean_score_sum: float


@dataclass(frozen=True)
class PredictorQuality:
    """One predictor on one trace.

    Attributes:
        version: which.
        lookaheads: see LookaheadQuality.
        observations: that were made.
        median_observe_s, p99_observe_s: what one cost, all its hints included, in decode steps.
    """

    version: str
    lookaheads: tuple[LookaheadQuality, ...]
    observations: int
    median_observe_s: float
    p99_observe_s: float


def play(trace: TraceReader, evaluations: Sequence["Evaluation"]) -> None:
    """Plays a trace from its beginning to all of them, reading it once.

    Raises:
        InvalidInput: it lacks hidden states that one of them observes.
    """
    for evaluation in evaluations:
        evaluation.begin()
    for step in recorded_steps(trace, hidden=any(evaluation.wants_hidden for evaluation in evaluations)):
        for evaluation in evaluations:
            evaluation.add_step(step)


class _Tally:
    """Sums over the hints of one lookahead."""

    def __init__(self, experts_per_token: int) -> None:
        self._k, self._wide = experts_per_token, experts_per_token * 3 // 2
        self.hints = 0
        self._found = 0
        self._found_wide = 0
        self._score_sum = 0.0
        self._routed_per_bin = np.zeros(NUM_BINS)
        self._scores_per_bin = np.zeros(NUM_BINS)
        self._experts_per_bin = np.zeros(NUM_BINS)

    def add(self, hint: Hint, topk_ids_K: IdArray) -> None:
        """One hint for one token."""
        is_routed = np.isin(hint.experts, topk_ids_K)
        self.hints += 1
        self._found += int(is_routed[: self._k].sum())
        self._found_wide += int(is_routed[: self._wide].sum())
        scores = hint.scores.astype(np.float64)
        self._score_sum += float(scores.sum())
        bins = np.clip((scores * NUM_BINS).astype(np.intp), 0, NUM_BINS - 1)
        np.add.at(self._routed_per_bin, bins, is_routed)
        np.add.at(self._scores_per_bin, bins, scores)
        np.add.at(self._experts_per_bin, bins, 1)

    def quality(self, lookahead: int, is_next_step: bool, is_calibrated: bool) -> LookaheadQuality:
        """The shares."""
        routed = max(self.hints * self._k, 1)
        gap = np.abs(self._routed_per_bin - self._scores_per_bin).sum() / max(self._experts_per_bin.sum(), 1)
        return LookaheadQuality(
            lookahead=lookahead,
            is_next_step=is_next_step,
            hints=self.hints,
            recall=self._found / routed,
            recall_wide=self._found_wide / routed,
            calibration_error=float(gap) if is_calibrated else None,
            mean_score_sum=self._score_sum / max(self.hints, 1),
        )


class Evaluation:
    """Plays traces to one predictor, as one session.

    Args:
        predictor: what is measured.
        is_measured: of a request id: hints for its tokens count; all of them teach the predictor.
    """

    def __init__(self, predictor: Predictor, is_measured: Callable[[str], bool] = lambda _: True) -> None:
        self._predictor = predictor
        self._is_measured = is_measured
        self._tallies: dict[tuple[bool, int], _Tally] = {}
        self._observe_s: list[float] = []
        self._observations = 0
        self._session: PredictorSession = predictor.open_session()
        self._pending: list[Hint] = []

    def begin(self) -> None:
        """A trace begins: a session of its own."""
        self._session = self._predictor.open_session()
        self._pending = []

    def add_step(self, step: RecordedStep) -> None:
        """Its next step, with the hidden states that the predictor observes.

        Raises:
            InvalidInput: it lacks them.
        """
        if step.ended_request_ids:
            self._session.end_requests(step.ended_request_ids)
        self._session.begin_step(step.start)
        hints: list[Hint] = []
        for observation in observations(step, self._predictor.version):
            begin_s = time.perf_counter()
            hints.extend(self._session.observe(observation))
            if not step.is_prefill:
                self._observe_s.append(time.perf_counter() - begin_s)
            self._observations += 1
        self._measure(step, [*self._pending, *hints])
        self._pending = [hint for hint in hints if hint.step > step.start.step]

    @property
    def wants_hidden(self) -> bool:
        """The predictor observes hidden states."""
        return self._predictor.version.observed is not ObservedKind.NONE

    def quality(self) -> PredictorQuality:
        """Of everything played."""
        is_calibrated = self._predictor.version.calibrated
        observe_s = self._observe_s or [0.0]
        return PredictorQuality(
            version=self._predictor.version.version,
            lookaheads=tuple(
                tally.quality(lookahead, is_next_step, is_calibrated)
                for (is_next_step, lookahead), tally in sorted(self._tallies.items())
            ),
            observations=self._observations,
            median_observe_s=float(np.median(observe_s)),
            p99_observe_s=float(np.quantile(observe_s, 0.99)),
        )

    def _measure(self, step: RecordedStep, hints: Sequence[Hint]) -> None:
        if step.is_prefill or step.start.num_tokens != 1 or not self._is_measured(step.start.spans[0].request_id):
            return
        num_layers = len(step.layers)
        for hint in hints:
            if hint.step != step.start.step:
                continue
            topk_ids_K = step.layers[hint.layer].topk_ids_TK[0]
            is_next_step = hint.observed_step < hint.step
            lookahead = hint.layer - hint.observed_layer + (num_layers if is_next_step else 0)
            tally = self._tallies.setdefault((is_next_step, lookahead), _Tally(len(topk_ids_K)))
            tally.add(hint, topk_ids_K)
