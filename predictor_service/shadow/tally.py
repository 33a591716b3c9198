"""How well versions predicted so far: counts that are added up, and that go from one process to another as JSON."""

from dataclasses import asdict, dataclass, fields
from typing import Final

MOST_TALLIES: Final = 16
"""Of the newest versions; there is no end to them."""


@dataclass
class VersionTally:
    """Counts of one version; see `VersionQuality`.

    Attributes:
        steps, layers, hinted, correct, ready, routed, found, observations, predict_s: see there.
    """

    steps: int = 0
    layers: int = 0
    hinted: int = 0
    correct: int = 0
    ready: int = 0
    routed: int = 0
    found: int = 0
    observations: int = 0
    predict_s: float = 0.0

    def add(self, other: "VersionTally") -> None:
        """Adds up."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class StepComparison:
    """What two versions said of the same layers of one step.

    Attributes:
        request_ids: whose tokens the step decoded.
        active_version: made the hints.
        shadow_version: looked on.
        active_score, shadow_score: recall: routed experts among the first so many of their lists, over the layers.
    """

    request_ids: tuple[str, ...]
    active_version: str
    shadow_version: str
    active_score: float
    shadow_score: float


@dataclass(frozen=True)
class ScoreReport:
    """What a shadow's process says now and then.

    Attributes:
        tallies: since its start, by version.
        comparisons: since the report before.
        ended: requests that are over, since the report before.
    """

    tallies: dict[str, VersionTally]
    comparisons: tuple[StepComparison, ...] = ()
    ended: tuple[str, ...] = ()

    def encode(self) -> dict[str, object]:
        """As JSON."""
        return {
            "tallies": {version: asdict(tally) for version, tally in self.tallies.items()},
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "ended": list(self.ended),
        }

    @classmethod
    def decode(cls, document: dict[str, object]) -> "ScoreReport":
        """From JSON; raises ValueError, KeyError or TypeError for what is none."""
        tallies, comparisons, ended = document["tallies"], document["comparisons"], document["ended"]
        if not isinstance(tallies, dict) or not isinstance(comparisons, list) or not isinstance(ended, list):
            raise ValueError("a report has tallies by version, a list of comparisons, and one of requests")
        return cls(
            {version: VersionTally(**counts) for version, counts in tallies.items()},
            tuple(_comparison(entry) for entry in comparisons),
            tuple(str(request_id) for request_id in ended),
        )


def _comparison(entry: dict[str, object]) -> StepComparison:
    request_ids = entry["request_ids"]
    if not isinstance(request_ids, list):
        raise ValueError("a comparison's request_ids are a list")
    return StepComparison(
        tuple(str(request_id) for request_id in request_ids),
        str(entry["active_version"]),
        str(entry["shadow_version"]),
        float(str(entry["active_score"])),
        float(str(entry["shadow_score"])),
    )
