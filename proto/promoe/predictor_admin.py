"""What people and their programs ask of a predictor service's versions; a call each, with a deadline."""

from collections.abc import Callable, Generator
from typing import Final, TypeVar

import grpc

from promoe.predictor_versions import LearnerReport, QualityReport, VersionChange, VersionInfo
from promoe.rpc import CHANNEL_OPTIONS
from promoe.transport import readable_error
from promoe.typed_message import decode_message
from promoe.v1 import predictor_admin_pb2 as pb
from promoe.v1 import predictor_admin_pb2_grpc as pb_grpc

_Response = TypeVar("_Response")

DEADLINE_S: Final = 60.0
"""A version is loaded and tried out before the call returns."""


class PredictorAdmin:
    """One service's versions (required: a service that does not answer is an error).

    Args:
        endpoint: of the predictor service.
        deadline_s: of each call.
    """

    def __init__(self, endpoint: str, deadline_s: float = DEADLINE_S) -> None:
        self.endpoint = endpoint
        self._deadline_s = deadline_s

    def versions(self) -> list[VersionInfo]:
        """All that could be asked for, and what each is doing; raises PromoeError as every call."""
        response = self._ask(lambda stub, timeout: stub.ListVersions(pb.ListVersionsRequest(), timeout=timeout))
        return [decode_message(info, VersionInfo) for info in response.versions]

    def activate(
        self,
        version: str,
        who: str,
        why: str,
        expected_active: str | None = None,
        canary_share: float | None = None,
    ) -> VersionChange | None:
        """See `Activate` in predictor_admin.proto; None when it is as asked already."""
        request = pb.ActivateRequest(
            version=version, who=who, why=why, expected_active=expected_active, canary_share=canary_share
        )
        response = self._ask(lambda stub, timeout: stub.Activate(request, timeout=timeout))
        return decode_message(response.change, VersionChange) if response.HasField("change") else None

    def set_shadow(self, version: str, who: str, why: str) -> VersionChange | None:
        """See `SetShadow` in predictor_admin.proto; None when the version was the shadow already."""
        request = pb.SetShadowRequest(version=version, who=who, why=why)
        response = self._ask(lambda stub, timeout: stub.SetShadow(request, timeout=timeout))
        return decode_message(response.change, VersionChange) if response.HasField("change") else None

    def clear_shadow(self, who: str, why: str) -> VersionChange | None:
        """See `ClearShadow` in predictor_admin.proto; None when there was none."""
        request = pb.ClearShadowRequest(who=who, why=why)
        response = self._ask(lambda stub, timeout: stub.ClearShadow(request, timeout=timeout))
        return decode_message(response.change, VersionChange) if response.HasField("change") else None

    def train(self, who: str, why: str) -> bool:
        """See `Train` in predictor_admin.proto; False while a candidate is trained or tried already."""
        request = pb.TrainRequest(who=who, why=why)
        return self._ask(lambda stub, timeout: stub.Train(request, timeout=timeout)).accepted

    def pause_learner(self, paused: bool, who: str) -> None:
        """See `PauseLearner` in predictor_admin.proto."""
        request = pb.PauseLearnerRequest(paused=paused, who=who)
        self._ask(lambda stub, timeout: stub.PauseLearner(request, timeout=timeout))

    def learner(self) -> LearnerReport:
        """How far learning is."""
        response = self._ask(lambda stub, timeout: stub.GetLearner(pb.GetLearnerRequest(), timeout=timeout))
        return decode_message(response.report, LearnerReport)

    def watch(self, interval_s: float = 1.0) -> Generator[QualityReport, None, None]:
        """Scores as they come, until the service ends (raises Unavailable) or the iterator is closed."""
        request = pb.WatchQualityRequest(interval_s=interval_s)
        with grpc.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS) as channel:
            call = pb_grpc.PredictorAdminStub(channel).WatchQuality(request)
            try:
                for response in call:
                    yield decode_message(response.report, QualityReport)
            except grpc.RpcError as error:
                raise readable_error(error, self.endpoint) from error
            finally:
                call.cancel()

    def rollback(self, who: str, why: str, expected_active: str | None = None) -> VersionChange:
        """See `Rollback` in predictor_admin.proto."""
        request = pb.RollbackRequest(who=who, why=why, expected_active=expected_active)
        return decode_message(
            self._ask(lambda stub, timeout: stub.Rollback(request, timeout=timeout)).change, VersionChange
        )

    def history(self, limit: int = 0) -> list[VersionChange]:
        """The newest changes, oldest first; 0: all."""
        request = pb.GetHistoryRequest(limit=limit)
        response = self._ask(lambda stub, timeout: stub.GetHistory(request, timeout=timeout))
        return [decode_message(change, VersionChange) for change in response.changes]

    def _ask(self, call: "Callable[[pb_grpc.PredictorAdminStub, float], _Response]") -> _Response:
        with grpc.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS) as channel:
            try:
                return call(pb_grpc.PredictorAdminStub(channel), self._deadline_s)
            except grpc.RpcError as error:
                raise readable_error(error, self.endpoint) from error
