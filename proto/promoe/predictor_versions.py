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
    SHADOW = "shadow"
    CANARY = "canary"


class VersionAction(Enum):
    """What was done; see predictor_admin.proto."""

    UNSPECIFIED = "unspecified"
    START = "start"
    ACTIVATE = "activate"
    ROLLBACK = "rollback"
    SHADOW = "shadow"
    CLEAR_SHADOW = "clear_shadow"
    CANARY = "canary"
    END_CANARY = "end_canary"


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
        before, after: the active version; `before` is empty at a start, and both are the same where another version
            was changed.
        who: did it.
        why: in their words.
        numbers: what it was decided on.
        version: what was asked for, where that is not `after`: a shadow, a canary.
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
    version: str = ""


@dataclass(frozen=True)
class VersionQuality:
    """How well one version predicts what the nodes decode, over the layers of steps that were scored.

    Attributes:
        version: which.
        state: what it is doing now.
        steps, layers: that were scored; a layer counts where it was routed and any version had a hint for it.
        hinted: experts in the heads of its hints (`num_expected` of each).
        correct: those of `hinted` that were routed: accuracy = correct / hinted.
        ready: those of `hinted` that were READY when the routing became known: fetch rate = ready / hinted. For a
            version without effect an estimate from below: what the others had fetched.
        routed: experts that were routed.
        found: those of `routed` among the first so many of its list: recall = found / routed.
        observations: it was shown.
        predict_s: processor time it took.
        fault: why it makes no hints (any more); empty when it does.
    """

    version: str
    state: VersionState = VersionState.AVAILABLE
    steps: int = 0
    layers: int = 0
    hinted: int = 0
    correct: int = 0
    ready: int = 0
    routed: int = 0
    found: int = 0
    observations: int = 0
    predict_s: float = 0.0
    fault: str = ""


class LearnerState(Enum):
    """What the learner is doing; see predictor_admin.proto."""

    UNSPECIFIED = "unspecified"
    OFF = "off"
    GATHERING = "gathering"
    TRAINING = "training"
    SHADOWING = "shadowing"
    WATCHING = "watching"
    FAILED = "failed"


@dataclass(frozen=True)
class LearnerReport:
    """How far the learner is.

    Attributes:
        state: see LearnerState.
        paused: it gathers and trains nothing.
        documents, tokens, size_bytes: what is gathered now.
        oldest_s: age of the oldest of it.
        progress: of the judgement that is open.
        news: what happened last, or why it is off.
    """

    state: LearnerState
    paused: bool = False
    documents: int = 0
    tokens: int = 0
    size_bytes: int = 0
    oldest_s: float = 0.0
    progress: tuple[VersionMetric, ...] = ()
    news: str = ""


@dataclass(frozen=True)
class QualityReport:
    """Since scoring began.

    Attributes:
        scored_s: for how long there was scoring.
        qualities: by version, the active one first.
        comparisons: steps in which the shadow and what made the hints were scored on the same layers.
        gain: the shadow's mean recall in them less the other's.
    """

    scored_s: float
    qualities: tuple[VersionQuality, ...]
    comparisons: int = 0
    gain: float = 0.0
