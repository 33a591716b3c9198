"""`none`: no hints, the reactive baseline; it wants to see nothing."""

from collections.abc import Sequence
from typing import Final

from predictor_service.predictor import PredictorSource
from promoe.hint import Hint, Observation, ObservedKind, PredictorVersion, StepStart

VERSION: Final = PredictorVersion(
    version="none@1",
    predictor="none",
    observed=ObservedKind.NONE,
    lookaheads=(),
    calibrated=True,
    wants_routing=False,
)


class NonePredictor:
    """Knows nothing; its session is itself, since it keeps nothing."""

    def __init__(self, _source: PredictorSource) -> None:
        self.version = VERSION

    def open_session(self) -> "NonePredictor":
        """See Predictor."""
        return self

    def begin_step(self, start: StepStart) -> None:
        """See PredictorSession."""

    def observe(self, _observation: Observation) -> Sequence[Hint]:
        """See PredictorSession."""
        return ()

    def end_requests(self, request_ids: Sequence[str]) -> None:
        """See PredictorSession."""
