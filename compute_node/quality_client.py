"""Follows a predictor service's scores of its versions (best effort: a service that is away is an error of the caller's
request, and of nothing else)."""

from collections.abc import AsyncGenerator

import grpc.aio

from promoe.predictor_versions import QualityReport
from promoe.rpc import CHANNEL_OPTIONS
from promoe.transport import readable_error
from promoe.typed_message import decode_message
from promoe.v1 import predictor_admin_pb2 as pb
from promoe.v1 import predictor_admin_pb2_grpc as pb_grpc


async def watch_quality(endpoint: str, interval_s: float) -> AsyncGenerator[QualityReport]:
    """Scores as they come, until the service ends or the generator is closed.

    Raises:
        PromoeError: the service cannot be reached, or ended.
    """
    async with grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS) as channel:
        stub: pb_grpc.PredictorAdminAsyncStub = pb_grpc.PredictorAdminStub(channel)
        call = stub.WatchQuality(pb.WatchQualityRequest(interval_s=interval_s))
        try:
            async for response in call:
                yield decode_message(response.report, QualityReport)
        except grpc.RpcError as error:
            raise readable_error(error, endpoint) from error
        finally:
            call.cancel()
