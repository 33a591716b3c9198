"""The seam to a predictor: a plug-in named in the entry points `promoe.predictors`, found by its name.

An entry point is a `PredictorFactory`: it is given what a predictor may be made from and returns one `Predictor`, one
version that never changes. What depends on a stream's past lives in its sessions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from promoe.hint import Hint, Observation, PredictorVersion, StepStart
from promoe.model_spec import ModelSpec

ENTRY_POINT_GROUP: Final = "promoe.predictors"


@dataclass(frozen=True)
class PredictorSource:
    """What a predictor may be made from.

    Attributes:
        spec: the model whose experts are predicted.
        pack: folder of the expert pack, for the routers' weights.
        artifact: a trained artifact, or a trace for the oracle; None where none was given.
        lookahead: in MoE layers, if one was asked for; a predictor that was trained for others is refused with it.
    """

    spec: ModelSpec
    pack: Path
    artifact: Path | None = None
    lookahead: int | None = None


class PredictorSession(Protocol):
    """One compute node's stream; called from one thread, in the order of the events."""

    def begin_step(self, start: StepStart) -> None:
        """A forward pass begins."""

    def observe(self, observation: Observation) -> Sequence[Hint]:
        """Hints that can be given now; for layers after the observed one, or for the next step."""

    def end_requests(self, request_ids: Sequence[str]) -> None:
        """Forgets what was kept for these requests."""


@runtime_checkable
class AdoptingSession(Protocol):
    """What a session may be, too: one that goes on where another version's stops."""

    def adopt(self, former: PredictorSession) -> None:
        """Takes over what another version's session remembers, as far as it has a use for it and does not know itself.

        A canary that becomes the active version, or an active one whose canary is over, has requests of its own.
        """


class Predictor(Protocol):
    """One version: immutable, shared by sessions."""

    @property
    def version(self) -> PredictorVersion:
        """Its name, and what it wants to observe."""

    def open_session(self) -> PredictorSession:
        """State for one compute node."""


class PredictorFactory(Protocol):
    """What an entry point names."""

    def __call__(self, source: PredictorSource) -> Predictor:
        """Raises ModelNotFound, InvalidInput or ModelMismatch: no artifact, a damaged one, one for another model."""
