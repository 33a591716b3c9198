"""An expert store that says what a test tells it to: the peer's second implementation, over real sockets."""

import queue
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from promoe.fd_channel import FdOp, FdPacket, receive_packet, send_packet
from promoe.model_spec import ModelSpec
from promoe.v1 import expert_store_pb2 as pb
from promoe.v1 import expert_store_pb2_grpc as pb_grpc
from promoe.v1 import model_pb2
from promoe.wire import SCHEMA_VERSION, encode_spec


class ScriptedStore(pb_grpc.ExpertStoreServicer):
    """Serves gRPC and the descriptor side-channel in threads of the test's process.

    Attributes:
        info: what GetInfo answers.
        fd_answers: what the side-channel answers to each hello, in order; the last one stays.
        script: what Attach streams; None ends the stream, a status with its text aborts it.
        requests: what nodes sent over Attach.
        hellos: what nodes sent over the side-channel.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.endpoint = f"unix:{folder / 'scripted.sock'}"
        self.info = pb.ExpertStoreGetInfoResponse(
            service=model_pb2.ServiceInfo(version="0", schema_version=SCHEMA_VERSION, instance_id="scripted"),
            model=encode_spec(spec),
            fd_socket=str(folder / "fd.sock"),
        )
        self.fd_answers: list[tuple[FdPacket, int | None]] = []
        self.script: queue.SimpleQueue[pb.AttachResponse | tuple[grpc.StatusCode, str] | None] = queue.SimpleQueue()
        self.requests: queue.SimpleQueue[pb.AttachRequest] = queue.SimpleQueue()
        self.hellos: list[FdPacket] = []
        self._server = grpc.server(ThreadPoolExecutor(8))
        pb_grpc.add_ExpertStoreServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.endpoint)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.info.fd_socket)
        self._listener.listen()
        self._fd_thread = threading.Thread(target=self._serve_fds, daemon=True)

    def __enter__(self) -> Self:
        self._server.start()
        self._fd_thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.script.put(None)
        self._server.stop(0).wait(10)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._fd_thread.join(10)
        self._listener.close()

    def GetInfo(
        self, request: pb.ExpertStoreGetInfoRequest, context: grpc.ServicerContext
    ) -> pb.ExpertStoreGetInfoResponse:
        """As the test says."""
        return self.info

    def Attach(
        self, request_iterator: Iterator[pb.AttachRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AttachResponse]:
        """As the script says."""
        reader = threading.Thread(target=self._read_requests, args=(request_iterator,), daemon=True)
        reader.start()
        while (event := self.script.get()) is not None:
            if isinstance(event, tuple):
                context.abort(*event)
            else:
                yield event

    def Stats(self, request: pb.ExpertStoreStatsRequest, context: grpc.ServicerContext) -> pb.ExpertStoreStatsResponse:
        """Nothing to tell."""
        return pb.ExpertStoreStatsResponse()

    def _read_requests(self, requests: Iterator[pb.AttachRequest]) -> None:
        try:
            for request in requests:
                self.requests.put(request)
        except grpc.RpcError:
            return

    def _serve_fds(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            with channel:
                channel.settimeout(10)
                hello, _ = receive_packet(channel)
                self.hellos.append(hello)
                answer, fd = self.fd_answers.pop(0) if len(self.fd_answers) > 1 else self.fd_answers[0]
                send_packet(channel, answer, fd)
                if answer.op is FdOp.OFFER:
                    self.hellos.append(receive_packet(channel)[0])
                    send_packet(channel, FdPacket(FdOp.REFUSED, reason="Its header is damaged."))
