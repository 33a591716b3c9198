"""What the learner may do to the versions that serve. Every call says who and why, and on what numbers it was decided.

Implemented over the service's versions and registry.
"""

from collections.abc import Mapping
from typing import Final, Protocol

SOURCE_KEY: Final = "source"
SERVED_TRAFFIC: Final = "served traffic"
"""What a candidate's manifest says of its training's data: it was made by a learner, not by a person."""


class Stage(Protocol):
    """Raises PromoeError where something cannot be done; then nothing has changed."""

    def active(self) -> str:
        """The version that makes the hints."""

    def publish(self, path: str) -> str:
        """Takes a candidate's artifact into the registry; returns its version."""

    def set_shadow(self, version: str, who: str, why: str, numbers: Mapping[str, float]) -> None:
        """Lets a version run beside the active one, without effect, and be compared with it."""

    def clear_shadow(self, who: str, why: str, numbers: Mapping[str, float]) -> None:
        """Ends that; also where there is none, or somebody else's, which stays."""

    def activate(self, version: str, who: str, why: str, numbers: Mapping[str, float], expected_active: str) -> None:
        """Makes a version the active one; raises ModelMismatch where another than the expected one is."""

    def rollback(self, who: str, why: str, numbers: Mapping[str, float], expected_active: str) -> None:
        """Makes the version before the active one again; raises as `activate`."""


class Training(Protocol):
    """Where candidates come from: the learner's process."""

    def train(self, base: str, name: str) -> None:
        """Begins to train from the version `base` a candidate named `name`; what becomes of it is told later.

        Raises PromoeError where nothing begins.
        """
