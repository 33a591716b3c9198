"""The face of what people change on a running node: decode, ask, encode."""

import asyncio
from typing import TYPE_CHECKING, Final, TypeAlias

from google.protobuf.message import Message

from compute_node.config import check_predictor_endpoint
from compute_node.takeovers import Takeovers
from promoe.errors import DeadlineExceeded, ModelMismatch
from promoe.node_admin import CONNECT_DEADLINE_S
from promoe.typed_message import encode_message
from promoe.v1 import inference_pb2, node_admin_pb2, node_admin_pb2_grpc

if TYPE_CHECKING:
    import grpc.aio

    # gRPC's classes are generic for the type checker only.
    _Context: TypeAlias = grpc.aio.ServicerContext[Message, Message]

ADMIN_SERVICE_NAME: Final = "promoe.v1.NodeAdmin"

MOST_TEXT: Final = 1000
"""Characters of who asks, and why."""


class NodeAdminService(node_admin_pb2_grpc.NodeAdminServicer):
    """Servicer of one node's administration.

    Args:
        takeovers: of its predictors; None where the policy has no use for hints.
    """

    def __init__(self, takeovers: Takeovers | None) -> None:
        self._takeovers = takeovers

    def register(self, server: "grpc.aio.Server") -> None:
        """Makes the server answer for this service."""
        node_admin_pb2_grpc.add_NodeAdminServicer_to_server(self, server)

    async def ConnectPredictor(
        self, request: node_admin_pb2.ConnectPredictorRequest, context: "_Context"
    ) -> node_admin_pb2.ConnectPredictorResponse:
        """Waits for the switch, or for why there is none."""
        if self._takeovers is None:
            raise ModelMismatch("This node's policy ignores hints; no predictor is asked, whichever it is.")
        check_predictor_endpoint("endpoint", request.endpoint)
        for name, text in (("who", request.who), ("why", request.why)):
            if len(text) > MOST_TEXT or not text.isprintable():
                raise ValueError(f"{name} is {text[:40]!r}; allowed: one line of at most {MOST_TEXT} characters")
        outcome = self._takeovers.connect(request.endpoint, request.who, request.why)
        try:
            switch = await asyncio.wait_for(asyncio.wrap_future(outcome), CONNECT_DEADLINE_S)
        except TimeoutError:
            raise DeadlineExceeded(
                f"Nothing was decided about the predictor at {request.endpoint} within {CONNECT_DEADLINE_S:g} s: "
                "it may still take over."
            ) from None
        encoded = None if switch is None else encode_message(switch, inference_pb2.PredictorSwitch)
        return node_admin_pb2.ConnectPredictorResponse(switch=encoded)
