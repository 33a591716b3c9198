"""What people and their programs change on a running compute node; a call each, with a deadline."""

from typing import Final

import grpc

from promoe.node_report import PredictorSwitch
from promoe.rpc import CHANNEL_OPTIONS
from promoe.transport import readable_error
from promoe.typed_message import decode_message
from promoe.v1 import node_admin_pb2, node_admin_pb2_grpc

CONNECT_DEADLINE_S: Final = 90.0
"""A predictor is shaken hands with and warmed up before the call returns, and somebody else's may be before."""


class NodeAdmin:
    """One node's administration (required: a node that does not answer is an error).

    Args:
        endpoint: of the compute node.
        deadline_s: of each call.
    """

    def __init__(self, endpoint: str, deadline_s: float = CONNECT_DEADLINE_S) -> None:
        self.endpoint = endpoint
        self._deadline_s = deadline_s

    def connect_predictor(self, endpoint: str, who: str, why: str) -> PredictorSwitch | None:
        """See `ConnectPredictor` in node_admin.proto; None when the endpoint was in use already.

        Raises:
            PromoeError: why nothing has changed.
        """
        request = node_admin_pb2.ConnectPredictorRequest(endpoint=endpoint, who=who, why=why)
        with grpc.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS) as channel:
            try:
                stub = node_admin_pb2_grpc.NodeAdminStub(channel)
                response = stub.ConnectPredictor(request, timeout=self._deadline_s)
            except grpc.RpcError as error:
                raise readable_error(error, self.endpoint) from error
        return decode_message(response.switch, PredictorSwitch) if response.HasField("switch") else None
