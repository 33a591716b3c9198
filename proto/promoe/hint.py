"""What a compute node and a predictor say to each other, as their domains see it; numpy arrays, no wire types.

Shapes: R sampled rows (tokens), D hidden, K experts per token, E experts.
"""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.uint16]


class ObservedKind(Enum):
    """Where hidden states are taken from; see predictor.proto."""

    NONE = "none"
    LAYER_INPUT = "layer_input"
    ROUTER_INPUT = "router_input"


@dataclass(frozen=True)
class PredictorVersion:
    """What makes the hints and what it wants to see.

    Attributes:
        version: `name@version`; every hint carries it.
        predictor: the plug-in's name.
        observed: which hidden states it reads.
        lookaheads: in MoE layers; 0 is the observed layer itself.
        calibrated: scores are probabilities, not just an order.
        wants_routing: it reads each layer's routing.
        observe_every: see `is_observed`; routings of layers in between come with the next observation.
        wants_ready: with each layer's routing, which of its experts were READY when it became known.
    """

    version: str
    predictor: str
    observed: ObservedKind
    lookaheads: tuple[int, ...]
    calibrated: bool
    wants_routing: bool
    observe_every: int = 1
    wants_ready: bool = False


def is_observed(layer: int, num_layers: int, observe_every: int) -> bool:
    """Whether a MoE layer is: every so many-th, beginning with the first; and the last, and what leaves it."""
    return layer % observe_every == 0 or layer >= num_layers - 1


@dataclass(frozen=True)
class StepSpan:
    """Consecutive tokens of a step that belong to one request."""

    request_id: str
    num_tokens: int
    is_prefill: bool


@dataclass(frozen=True)
class StepStart:
    """A forward pass begins.

    Attributes:
        step: counts up.
        spans: whose tokens its rows are, in order.
        ended_request_ids: requests that ended since the step before; predictors are told by a `RequestsEnded`.
        version: of the predictor, whose wishes the step's observations follow; empty where there is none.
    """

    step: int
    spans: tuple[StepSpan, ...]
    ended_request_ids: tuple[str, ...] = ()
    version: str = ""

    @property
    def num_tokens(self) -> int:
        """Over all spans."""
        return sum(span.num_tokens for span in self.spans)


@dataclass(frozen=True)
class LayerRouting:
    """Routed experts of the sampled rows of one layer.

    Attributes:
        ready: the layer's experts that were READY when the routing became known; None where nobody says.
    """

    layer: int
    topk_ids_RK: IdArray
    ready: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Observation:
    """What one MoE layer saw in one step, for a bounded sample of its tokens.

    Attributes:
        step: counts up over the session.
        layer: MoE layer; the number of MoE layers stands for the output of the last decoder layer.
        rows: of each sampled row, its index among the step's tokens; the same in every layer of a step.
        num_tokens: of the step.
        hidden_RD: of the rows, float32; None when none are wanted.
        routings: of this layer or of layers before it, as known since the last observation.
    """

    step: int
    layer: int
    rows: tuple[int, ...]
    num_tokens: int
    hidden_RD: Float32Array | None = None
    routings: tuple[LayerRouting, ...] = ()


@dataclass(frozen=True, eq=False)
class Hint:
    """A ranked prediction for one layer of one step: the union over the step's tokens.

    Attributes:
        step: the step it is for.
        layer: the MoE layer it is for.
        observed_step, observed_layer: the observation it was made from.
        experts: best first, each once.
        scores: one per expert; the probability that the layer will need it, if the version is calibrated.
        num_expected: how many experts the layer will probably need; accuracy is measured on so many of the first.
        version: which predictor version made it.
    """

    step: int
    layer: int
    observed_step: int
    observed_layer: int
    experts: IdArray
    scores: Float32Array
    num_expected: int
    version: str

    def lookahead(self, num_layers: int) -> int:
        """MoE layers from the observed one to this one; the next step's layers follow on the last one's output."""
        return (self.step - self.observed_step) * num_layers + self.layer - self.observed_layer


@dataclass(frozen=True)
class RequestsEnded:
    """These requests are over; their state can be forgotten."""

    request_ids: tuple[str, ...] = field(default=())
