"""Plays recorded steps to two predictors and compares their hints, as the service's shadow does."""

from collections.abc import Sequence

import numpy as np

from predictor_service.predictor import Predictor, PredictorSession
from predictor_service.shadow.tally import StepComparison
from predictor_service.trace_playback import RecordedStep, observations
from promoe.hint import Hint


class PlayedPredictor:
    """One predictor's session over steps of single tokens."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._session: PredictorSession = predictor.open_session()
        self._pending: list[Hint] = []

    @property
    def version(self) -> str:
        return self._predictor.version.version

    def play(self, step: RecordedStep) -> float | None:
        """Recall among as many of the first hinted experts as were routed, over the layers; None for a prompt."""
        if step.ended_request_ids:
            self._session.end_requests(step.ended_request_ids)
        self._session.begin_step(step.start)
        hints = [hint for seen in observations(step, self._predictor.version) for hint in self._session.observe(seen)]
        due = {hint.layer: hint for hint in [*self._pending, *hints] if hint.step == step.start.step}
        self._pending = [hint for hint in hints if hint.step > step.start.step]
        if step.is_prefill:
            return None
        recalls = []
        for event in step.layers:
            routed = np.unique(event.topk_ids_TK)
            hint = due.get(event.layer)
            found = 0 if hint is None else np.isin(hint.experts[: len(routed)], routed).sum()
            recalls.append(found / len(routed))
        return float(np.mean(recalls))


def scores(steps: Sequence[RecordedStep], predictor: Predictor) -> list[float | None]:
    """Of each step, in a session of its own."""
    played = PlayedPredictor(predictor)
    return [played.play(step) for step in steps]


def compared(
    steps: Sequence[RecordedStep],
    active_scores: Sequence[float | None],
    shadow_scores: Sequence[float | None],
    active: Predictor,
    shadow: Predictor,
) -> list[StepComparison]:
    """Of every step that decodes."""
    versions = active.version.version, shadow.version.version
    return [
        StepComparison(tuple(span.request_id for span in step.start.spans), *versions, one, other)
        for step, one, other in zip(steps, active_scores, shadow_scores, strict=True)
        if one is not None and other is not None
    ]
