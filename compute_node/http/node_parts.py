"""What the HTTP API stands on: the same parts that answer gRPC's calls."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from compute_node.admission import Admission
from compute_node.answer import Answerer
from compute_node.http.answer_wire import ServedModel
from compute_node.prompt import PromptCodec


@dataclass(frozen=True)
class NodeParts:
    """One serving node.

    Attributes:
        model: what it serves.
        answerer: opens answers.
        codec: between text and tokens.
        admission: asked whether anybody is let in.
        registry: the node's figures.
    """

    model: ServedModel
    answerer: Answerer
    codec: PromptCodec
    admission: Admission
    registry: CollectorRegistry
