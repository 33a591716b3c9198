"""What the HTTP API stands on: the same parts that answer gRPC's calls."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from compute_node.admission import Admission
from compute_node.answer import Answerer
from compute_node.http.answer_wire import ServedModel
from compute_node.node_report import NodeReport
from compute_node.prompt import PromptCodec
from compute_node.request_metrics import TokenTimes


@dataclass(frozen=True)
class NodeWatch:
    """What a live view of the node is made from.

    Attributes:
        report: of what stays, and of the expert cache.
        times: of the tokens that were drawn.
    """

    report: NodeReport
    times: TokenTimes


@dataclass(frozen=True)
class NodeParts:
    """One serving node.

    Attributes:
        model: what it serves.
        answerer: opens answers.
        codec: between text and tokens.
        admission: asked whether anybody is let in.
        registry: the node's figures.
        watch: for live views.
    """

    model: ServedModel
    answerer: Answerer
    codec: PromptCodec
    admission: Admission
    registry: CollectorRegistry
    watch: NodeWatch
