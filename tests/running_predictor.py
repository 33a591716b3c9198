"""A real predictor service process for tests, and a node's end of its stream without a node."""

import queue
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import numpy as np

from promoe.errors import Unavailable, error_of_code
from promoe.hint import Float32Array, IdArray, LayerRouting, Observation, StepSpan, StepStart
from promoe.hint_wire import encode_observation, encode_step_start
from promoe.model_spec import Dtype
from promoe.rpc import CHANNEL_OPTIONS, domain_error
from promoe.v1 import model_pb2
from promoe.v1 import predictor_pb2 as pb
from promoe.v1 import predictor_pb2_grpc as pb_grpc
from promoe.wire import SCHEMA_VERSION
from tests.running_store import wait_until

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 20.0


class RunningPredictor:
    """`python -m predictor_service`, started at construction; killed at the end of the `with` block.

    Args:
        folder: the socket is `folder/predictor.sock`, the log `folder/predictor.log` (appended).
        settings: further `predictor.key=value` texts.
        environment: of the process, if not ours.
        packets: `node` talks over the packet socket.
    """

    def __init__(
        self,
        pack_dir: Path,
        folder: Path,
        *settings: str,
        environment: Mapping[str, str] | None = None,
        packets: bool = False,
    ) -> None:
        self.packets = packets
        self.log = folder / "predictor.log"
        self.endpoint = f"unix:{folder / 'predictor.sock'}"
        command = [sys.executable, "-m", "predictor_service"]
        for argument in (f"predictor.pack={pack_dir}", f"predictor.listen={self.endpoint}", *settings):
            command += ["--set", argument]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=log, env=environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """kill -9; returns when the process is gone."""
        self.process.kill()
        self.process.wait(timeout=DEADLINE_S)

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=DEADLINE_S)

    def get_info(self) -> pb.PredictorGetInfoResponse:
        """Raises Unavailable while the service does not listen yet."""
        with grpc.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS) as channel:
            try:
                return pb_grpc.PredictorStub(channel).GetInfo(pb.PredictorGetInfoRequest(), timeout=5)
            except grpc.RpcError as error:
                raise domain_error(error) from error

    def stats(self) -> pb.PredictorStatsResponse:
        """The service's own figures."""
        with grpc.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS) as channel:
            return pb_grpc.PredictorStub(channel).Stats(pb.PredictorStatsRequest(), timeout=5)

    def wait_until_serving(self, timeout_s: float = DEADLINE_S) -> pb.PredictorGetInfoResponse:
        """Returns when GetInfo answers."""
        wait_until(self._answers, timeout_s, self.log)
        return self.get_info()

    @contextmanager
    def node(self, name: str = "node", max_rows: int = 8) -> Iterator["PredictStream"]:
        """A connected node's stream; cancelled at the end of the block."""
        with self.open_stream() as stream:
            spec = self.get_info().model
            service = model_pb2.ServiceInfo(version="0", schema_version=SCHEMA_VERSION, instance_id=name)
            stream.send(pb.PredictRequest(hello=pb.PredictHello(service=service, model=spec, max_rows=max_rows)))
            stream.welcome = stream.receive().welcome
            yield stream

    @contextmanager
    def open_stream(self) -> Iterator["PredictStream"]:
        """Without a hello; cancelled at the end of the block."""
        stream: PredictStream = (
            PacketStream(f"{self.endpoint.removeprefix('unix:')}.packets")
            if self.packets
            else GrpcStream(self.endpoint)
        )
        try:
            yield stream
        finally:
            stream.cancel()

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"the predictor service ended:\n{self.log.read_text()}"
        try:
            self.get_info()
        except Unavailable:
            return False
        return True


class PredictStream(ABC):
    """A session, raw: whatever is sent goes out, whatever comes is handed on."""

    welcome = pb.PredictWelcome()

    @abstractmethod
    def send(self, request: pb.PredictRequest) -> None:
        """Sends one message."""

    @abstractmethod
    def receive(self) -> pb.PredictResponse:
        """The next message.

        Raises:
            PromoeError: the session failed.
            StopIteration: the service ended it.
        """

    @abstractmethod
    def finish(self) -> None:
        """Sends no more; the service ends the stream when it has handled what came."""

    @abstractmethod
    def cancel(self) -> None:
        """Vanishes."""

    def begin_step(self, step: int, *spans: StepSpan, version: str = "") -> None:
        """One request's decoded token, unless other spans are given; sampled for a version, if one is named."""
        start = StepStart(step, spans or (StepSpan("r1", 1, is_prefill=False),), version=version)
        self.send(pb.PredictRequest(step_start=encode_step_start(start)))

    def observe(self, observation: Observation) -> None:
        """Sends an observation, hidden states in float32."""
        self.send(pb.PredictRequest(observation=encode_observation(observation, Dtype.FLOAT32)))


class GrpcStream(PredictStream):
    """A Predict call."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        self._requests: queue.SimpleQueue[pb.PredictRequest | None] = queue.SimpleQueue()
        self._call = pb_grpc.PredictorStub(self._channel).Predict(iter(self._requests.get, None))

    def send(self, request: pb.PredictRequest) -> None:
        self._requests.put(request)

    def receive(self) -> pb.PredictResponse:
        try:
            return next(self._call)
        except grpc.RpcError as error:
            raise domain_error(error) from error

    def finish(self) -> None:
        self._requests.put(None)

    def cancel(self) -> None:
        self._requests.put(None)
        self._call.cancel()
        self._channel.close()


class PacketStream(PredictStream):
    """A connection to the packet socket."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(path)
        self._has_finished = False

    def send(self, request: pb.PredictRequest) -> None:
        self._socket.send(request.SerializeToString())

    def receive(self) -> pb.PredictResponse:
        try:
            data = self._socket.recv(1 << 20)
        except ConnectionResetError:  # told once; what was said before comes after
            data = self._socket.recv(1 << 20)
        if not data and self._has_finished:
            raise StopIteration
        if not data:
            raise Unavailable("the service is gone")
        response = pb.PredictResponse.FromString(data)
        if response.HasField("end"):
            raise error_of_code(response.end.status_code, response.end.reason)
        return response

    def finish(self) -> None:
        self._has_finished = True
        self._socket.shutdown(socket.SHUT_WR)

    def cancel(self) -> None:
        self._socket.close()


def one_token(step: int, layer: int, topk_ids: list[int], hidden_D: Float32Array | None = None) -> Observation:
    """What a layer saw of a step of one token."""
    ids_RK: IdArray = np.array([topk_ids], np.uint16)
    hidden_RD = None if hidden_D is None else hidden_D[None]
    return Observation(step, layer, (0,), 1, hidden_RD, (LayerRouting(layer, ids_RK),))
