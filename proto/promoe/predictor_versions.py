"""Versions of predictors as both ends of `PredictorAdmin` see them."""

from dataclasses import dataclass
from enum import Enum


class VersionOrigin(Enum):
    """Where a version comes from; see predictor_admin.proto."""

    UNSPECIFIED = "unspecified"
    REGISTRY = "registry"
    PACKAGED = "packaged"
    PLUGIN = "plugin"


class VersionState(Enum):
    """What a version is doing; see predictor_admin.proto."""

    UNSPECIFIED = "unspecified"
    AVAILABLE = "available"
    ACTIVE = "active"
    PREVIOUS = "previous"
    UNUSABLE = "unusable"


class VersionAction(Enum):
    """What was done; see predictor_admin.proto."""

    UNSPECIFIED = "unspecified"
    START = "start"
    ACTIVATE = "activate"
    ROLLBACK = "rollback"


@dataclass(frozen=True)
class VersionMetric:
    """A number with its name."""

    name: str
    value: float


@dataclass(frozen=True)
class VersionInfo:
    """A version that could be asked for.

    Attributes:
        version: `name@version`, or a plug-in's name.
        kind: the plug-in that reads it; empty where its file cannot be read.
        origin: where it comes from.
        state: what it is doing.
        size_bytes, published_unix_s: of its file; 0 where there is none.
        parent: the version that training began from; may be empty.
        metrics: measured when it was trained.
        fault: why it cannot be used here; empty when it can, as far as its manifest tells.
    """

    version: str
    kind: str = ""
    origin: VersionOrigin = VersionOrigin.UNSPECIFIED
    state: VersionState = VersionState.AVAILABLE
    size_bytes: int = 0
    published_unix_s: float = 0.0
    parent: str = ""
    metrics: tuple[VersionMetric, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class VersionChange:
    """One line of the history.

    Attributes:
        number: counts up from 1; says the order, whatever the clock does.
        at_unix_s: wall-clock time, for people.
        service: whose active version changed; several services may share a registry.
        action: what was done.
        before, after: the active version; `before` is empty at a start.
        who: did it.
        why: in their words.
        numbers: what it was decided on.
    """

    number: int
    at_unix_s: float
    service: str
    action: VersionAction
    before: str
    after: str
    who: str
    why: str
    numbers: tuple[VersionMetric, ...] = ()
