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
    """Of every service that wrote a history there: the active version, the one before it, and what was tried last."""
    in_use: set[VersionName] = set()
    for path in registry.glob(HISTORY_FILE.format("*")):
        changes = VersionLog(path, "").changes()
        newest = {change.service: change for change in changes}
        switched = {change.service: change for change in changes if not change.version}
        for change in (*newest.values(), *switched.values()):
            in_use |= _names(change.after, change.before, change.version)
    return frozenset(in_use)


def _names(*versions: str) -> set[VersionName]:
    names: set[VersionName] = set()
    for version in versions:
        try:
            names.add(VersionName.parse(version))
        except InvalidInput:  # before a start there is none
            continue
    return names
