"""Who makes the hints now, and who only looks on: changed as one, so that a session sees one lineup during a step."""

from dataclasses import dataclass, replace
from typing import Final
from zlib import crc32

from predictor_service.predictor import Predictor
from promoe.errors import InvalidInput
from promoe.hint import ObservedKind, PredictorVersion

_NUM_DRAWS: Final = 1 << 32


@dataclass(frozen=True)
class Canary:
    """A version that makes the hints of some requests.

    Attributes:
        predictor: that version.
        share: of the requests, more than 0 and less than 1.
    """

    predictor: Predictor
    share: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise InvalidInput(f"The canary's share is {self.share:g}; allowed: more than 0 and less than 1.")

    def takes(self, request_id: str) -> bool:
        """Drawn by the request's id: the same in every step, and whoever asks."""
        return crc32(request_id.encode()) < self.share * _NUM_DRAWS


@dataclass(frozen=True)
class Lineup:
    """The versions of the steps that begin now.

    Attributes:
        active: makes the hints of all requests that no canary takes.
        canary: None where there is none.
        onlookers: versions that are shown what the nodes show, without effect.
        is_scored: routings are wanted with what was READY, to score hints by.
        gatherer: wishes of who gathers what there is to learn from; they count where they go together with the others'.
    """

    active: Predictor
    canary: Canary | None = None
    onlookers: tuple[PredictorVersion, ...] = ()
    is_scored: bool = False
    gatherer: PredictorVersion | None = None

    @property
    def announced(self) -> PredictorVersion:
        """The active version, with the wishes of all."""
        wishes = [self.active.version, *self.onlookers]
        if self.canary is not None:
            wishes.append(self.canary.predictor.version)
        if self.gatherer is not None and not {ObservedKind.NONE, self.gatherer.observed}.issuperset(
            {observed_by(wishes)}
        ):
            # Nothing is gathered, and what was asked for goes on.
            return replace(self, gatherer=None).announced
        wishes += [] if self.gatherer is None else [self.gatherer]
        return replace(
            self.active.version,
            observed=observed_by(wishes),
            wants_routing=self.is_scored or any(wish.wants_routing for wish in wishes),
            observe_every=min(wish.observe_every for wish in wishes),
            wants_ready=self.is_scored,
        )


def observed_by(wishes: list[PredictorVersion]) -> ObservedKind:
    """The hidden states that all of them can do with.

    Raises:
        InvalidInput: they read different ones, and a node shows one kind.
    """
    readers = {wish.observed: wish.version for wish in wishes if wish.observed is not ObservedKind.NONE}
    if len(readers) > 1:
        told = " and ".join(f"{version} reads {kind.value}" for kind, version in readers.items())
        raise InvalidInput(f"{told}: a node shows one kind of hidden states at a time. Activate one after the other.")
    return next(iter(readers), ObservedKind.NONE)
