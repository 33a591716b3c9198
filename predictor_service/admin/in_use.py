"""Which published versions a service of this registry goes on with when it is started again."""

from pathlib import Path
from typing import Final

from predictor_service.registry import VersionName
from predictor_service.version_log import VersionLog
from promoe.errors import InvalidInput

HISTORY_FILE: Final = "history-{}.jsonl"


def history_path(registry: Path, fingerprint: str) -> Path:
    """The history of one model's versions."""
    return registry / HISTORY_FILE.format(fingerprint[:16])


def versions_in_use(registry: Path) -> frozenset[VersionName]:
    """The active version of every service that wrote a history there, and the one before it."""
    in_use: set[VersionName] = set()
    for path in registry.glob(HISTORY_FILE.format("*")):
        newest = {change.service: change for change in VersionLog(path, "").changes()}
        for change in newest.values():
            in_use |= _names(change.after, change.before)
    return frozenset(in_use)


def _names(*versions: str) -> set[VersionName]:
    names: set[VersionName] = set()
    for version in versions:
        try:
            names.add(VersionName.parse(version))
        except InvalidInput:  # before a start there is none
            continue
    return names
