"""The service's versions and registry in the learner's name: what is a person's is left alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from predictor_service.admin.in_use import versions_in_use
from predictor_service.learner.stage import SERVED_TRAFFIC, SOURCE_KEY
from predictor_service.registry import Registry, RegistryEntry
from predictor_service.stage import Stage
from predictor_service.version_log import Wish
from promoe.errors import ResourceExhausted
from promoe.predictor_versions import VersionMetric

KEPT_CANDIDATES: Final = 32
"""Of one name, in the registry: the newest, and those in use. What a person published does not count."""


class LearnersStage:
    """See `learner.stage.Stage`; called from one thread.

    Args:
        stage: the versions.
        registry: takes the candidates.
        tell_news: is told of every change.
    """

    def __init__(self, stage: Stage, registry: Registry, tell_news: Callable[[str], None]) -> None:
        self._stage = stage
        self._registry = registry
        self._tell_news = tell_news
        self._shadow: str | None = None

    def active(self) -> str:
        """See Stage."""
        return self._stage.versions.active.version.version

    def publish(self, path: str) -> str:
        """See Stage; the oldest candidates that nobody uses make room."""
        try:
            name = self._registry.publish(Path(path)).name
            in_use = versions_in_use(self._registry.folder) | {name}
            self._registry.prune(name.name, KEPT_CANDIDATES, in_use, _is_candidate)
        except OSError as error:
            raise ResourceExhausted(f"{path} cannot be published ({error.strerror or error}).") from error
        return str(name)

    def set_shadow(self, version: str, who: str, why: str, numbers: Mapping[str, float]) -> None:
        """See Stage; a shadow of the learner's own that could not be cleared gives way."""
        shadow = self._stage.versions.shadow
        if shadow is not None and shadow.version.version != self._shadow:
            raise ResourceExhausted(f"{shadow.version.version} looks on already, for somebody else.")
        self._stage.set_shadow(version, _wish(who, why, numbers))
        self._shadow = version
        self._tell_news(f"{version} looks on: {why}.")

    def clear_shadow(self, who: str, why: str, numbers: Mapping[str, float]) -> None:
        """See Stage; somebody else's stays."""
        shadow = self._stage.versions.shadow
        if shadow is not None and shadow.version.version == self._shadow:
            self._stage.clear_shadow(_wish(who, why, numbers))
        self._shadow = None
        self._tell_news(f"{why}.")

    def leave_shadow(self) -> None:
        """What looks on is somebody else's from now on."""
        self._shadow = None

    def activate(self, version: str, who: str, why: str, numbers: Mapping[str, float], expected_active: str) -> None:
        """See Stage."""
        self._stage.activate(version, _wish(who, why, numbers, expected_active))
        self._tell_news(f"{version} is active: {why}.")

    def rollback(self, who: str, why: str, numbers: Mapping[str, float], expected_active: str) -> None:
        """See Stage: to the version that looks on, also where a person changed versions in between."""
        wish, previous = _wish(who, why, numbers, expected_active), self._stage.versions.previous
        if self._shadow is None or (previous is not None and previous.version.version == self._shadow):
            self._stage.rollback(wish)
        else:
            self._stage.activate(self._shadow, wish)
        self._tell_news(f"{self.active()} is active again: {why}.")


def _is_candidate(entry: RegistryEntry) -> bool:
    return entry.manifest is not None and entry.manifest.training.get(SOURCE_KEY) == SERVED_TRAFFIC


def _wish(who: str, why: str, numbers: Mapping[str, float], expected: str | None = None) -> Wish:
    return Wish(who, why, expected, tuple(VersionMetric(name, float(value)) for name, value in numbers.items()))
