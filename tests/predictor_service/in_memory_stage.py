"""A Stage without a service: what is active, the shadow, and every decision with its numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from promoe.errors import ModelMismatch, PromoeError


@dataclass(frozen=True)
class Decision:
    """What the learner did."""

    action: str
    version: str
    who: str
    why: str
    numbers: dict[str, float] = field(default_factory=dict)


class InMemoryStage:
    """Keeps the previous version, as the service does; `fault`, where set, is raised by the next change."""

    def __init__(self, active: str) -> None:
        self.decisions: list[Decision] = []
        self.shadow: str | None = None
        self.previous: str | None = None
        self.fault: PromoeError | None = None
        self._active = active

    def active(self) -> str:
        return self._active

    def publish(self, path: str) -> str:
        self._raise_fault()
        self.decisions.append(Decision("publish", Path(path).name, "", ""))
        return Path(path).name

    def set_shadow(self, version: str, who: str, why: str, numbers: Mapping[str, float]) -> None:
        self._raise_fault()
        self.shadow = version
        self.decisions.append(Decision("shadow", version, who, why, dict(numbers)))

    def clear_shadow(self, who: str, why: str, numbers: Mapping[str, float]) -> None:
        self._raise_fault()
        self.decisions.append(Decision("clear", self.shadow or "", who, why, dict(numbers)))
        self.shadow = None

    def activate(self, version: str, who: str, why: str, numbers: Mapping[str, float], expected_active: str) -> None:
        self._expect(expected_active)
        self._active, self.previous = version, self._active
        self.decisions.append(Decision("activate", version, who, why, dict(numbers)))

    def rollback(self, who: str, why: str, numbers: Mapping[str, float], expected_active: str) -> None:
        self._expect(expected_active)
        assert self.previous is not None, "something was active before"
        self._active, self.previous = self.previous, self._active
        self.decisions.append(Decision("rollback", self._active, who, why, dict(numbers)))

    def activate_by_hand(self, version: str) -> None:
        """Somebody does, whatever the learner is at."""
        self._active, self.previous = version, self._active

    def _expect(self, version: str) -> None:
        self._raise_fault()
        if version != self._active:
            raise ModelMismatch(f"{version} was expected, and {self._active} is active.")

    def _raise_fault(self) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
