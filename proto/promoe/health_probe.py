"""`python -m promoe.health_probe ENDPOINT`: exit status 0 when the service there serves, 1 when it does not.

For health checks of containers: it starts in a fraction of a second and needs nothing but gRPC.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from promoe.errors import PromoeError, Unavailable
from promoe.rpc import CHANNEL_OPTIONS
from promoe.transport import readable_error

_DEADLINE_S: Final = 3.0


def check_serving(endpoint: str, deadline_s: float) -> None:
    """Asks a service's health.

    Raises:
        PromoeError: it does not answer, or does not serve; the text says which.
    """
    with grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS) as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=deadline_s)
        except grpc.RpcError as error:
            raise readable_error(error, endpoint) from error
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        raise Unavailable(f"{endpoint} answers, and is {status}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Says why not on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m promoe.health_probe", description="Asks one of promoe's services whether it serves."
    )
    parser.add_argument("endpoint", help="gRPC endpoint: unix:PATH or host:port")
    parser.add_argument("--deadline-s", type=float, default=_DEADLINE_S, help=f"default: {_DEADLINE_S:g}")
    options = parser.parse_args(arguments)
    try:
        check_serving(options.endpoint, options.deadline_s)
    except PromoeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
