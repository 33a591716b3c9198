"""What a trace is made of: everything that the expert cache was told, in the order it was told, with times.

The order is the point: with the same events in the same order the same policy decides the same, so a replay of a run
with its own policy reproduces its hits. Times are seconds on one clock since the trace began.
Shapes: T tokens, K experts per token, R sampled rows, D hidden.
"""

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from promoe.hint import Float32Array, Hint, IdArray, StepSpan
from promoe.ids import ExpertId


@dataclass(frozen=True)
class StepEvent:
    """A forward pass begins.

    Attributes:
        at_s: when.
        step: counts up.
        spans: whose tokens its rows are.
        ended_request_ids: requests that ended since the step before.
        link_bytes_per_s: what the cache reckons with during the step; 0 before anything was moved.
    """

    at_s: float
    step: int
    spans: tuple[StepSpan, ...]
    ended_request_ids: tuple[str, ...] = ()
    link_bytes_per_s: float = 0.0


class HintFate(Enum):
    """What became of a hint when the cache took notice of it."""

    TAKEN = "taken"
    # For a layer whose routing is known already, or for a step that is over.
    LATE = "late"
    # Not a hint for this model: layer or expert out of range, an expert twice, a score that is no number.
    INVALID = "invalid"
    # Made by a version that the service did not announce.
    WRONG_VERSION = "wrong_version"
    # Pushed out of a full queue by newer ones.
    OVERFLOW = "overflow"

    __hash__ = object.__hash__  # Enum's own is a function in Python, called for every count of every layer


@dataclass(frozen=True, eq=False)
class HintEvent:
    """The cache took notice of a hint.

    Attributes:
        at_s: when it did.
        hint: as it came.
        fate: what became of it.
        latency_s: since its observation was sent, where that is known.
        look: in which of the step's looks around, counted from 0; a replay notices it in the same one.
    """

    at_s: float
    hint: Hint
    fate: HintFate
    latency_s: float | None = None
    look: int = 0


class LoadReason(Enum):
    """Why an expert is loaded. STREAM: a prefill's next layer, in order, without a predictor."""

    DEMAND = "demand"
    PREFETCH = "prefetch"
    STREAM = "stream"

    __hash__ = object.__hash__  # as above


@dataclass(frozen=True)
class LoadEvent:
    """The cache took notice of a load that had arrived, or took one off the link's queue with a part of it copied.

    Attributes:
        at_s: when it took notice.
        begin_s, end_s: of the copy, on the link.
        expert: which one.
        reason: what it was queued as at last (a prefetch that became urgent is a demand load).
        nbytes: that have come: all of the expert's, unless it was paused.
        look: as in HintEvent.
        is_paused: it was taken off the queue; it may go on later, and then arrive whole.
    """

    at_s: float
    begin_s: float
    end_s: float
    expert: ExpertId
    reason: LoadReason
    nbytes: int
    look: int = 0
    is_paused: bool = False


@dataclass(frozen=True, eq=False)
class LayerEvent:
    """One MoE layer's routing became known and its experts were computed.

    Attributes:
        at_s: when the routing was known.
        end_s: when the layer's experts were released.
        step, layer: which.
        topk_ids_TK: routed experts of all tokens.
        hits: needed experts that were READY at `at_s`.
        misses: the others.
        late: those of `misses` whose load was under way.
        stall_s: how long compute waited for loads between `at_s` and `end_s`.
        rows: indices of the sampled tokens; empty when no hidden states were asked for.
        layer_input_RD, router_input_RD: their hidden states, where recorded.
        last_output_RD: what left the last decoder layer; with the last MoE layer only, where layer inputs are recorded.
        ready: all experts of the layer that were READY at `at_s`, needed or not; not part of a recorded trace.
    """

    at_s: float
    end_s: float
    step: int
    layer: int
    topk_ids_TK: IdArray
    hits: tuple[int, ...]
    misses: tuple[int, ...]
    late: tuple[int, ...]
    stall_s: float
    rows: tuple[int, ...] = ()
    layer_input_RD: Float32Array | None = None
    router_input_RD: Float32Array | None = None
    last_output_RD: Float32Array | None = None
    ready: tuple[int, ...] = ()


TraceEvent: TypeAlias = StepEvent | HintEvent | LoadEvent | LayerEvent


@dataclass(frozen=True)
class TraceBatch:
    """Events in their order, as they travel; `dropped_steps` were left out so far because the reader was too slow."""

    events: tuple[TraceEvent, ...]
    dropped_steps: int
