"""The face of version changes: decode, ask the catalogue and the stage, encode."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import grpc

from predictor_service.catalogue import Catalogue
from predictor_service.learning import Learning
from predictor_service.stage import Stage
from predictor_service.version_log import Wish
from predictor_service.versions import Versions
from promoe.errors import InvalidInput, ModelMismatch, Overloaded
from promoe.predictor_versions import LearnerReport, LearnerState, VersionInfo, VersionState
from promoe.typed_message import encode_message
from promoe.v1 import predictor_admin_pb2 as pb
from promoe.v1 import predictor_admin_pb2_grpc as pb_grpc

ADMIN_SERVICE_NAME: Final = "promoe.v1.PredictorAdmin"

MOST_WATCHERS: Final = 8
"""At once: each keeps a thread."""

_NOT_LEARNING: Final = (
    "This service does not learn: it was started without learner.enabled (`promoe up --learn`), or has no registry."
)

_LEAST_INTERVAL_S: Final = 0.1
_MOST_INTERVAL_S: Final = 60.0


class PredictorAdminService(pb_grpc.PredictorAdminServicer):
    """Servicer of one predictor service's versions.

    Args:
        stage: which versions do what, and what changes it.
        catalogue: what there is.
        learning: what learns while it serves; None where that is off.
    """

    def __init__(self, stage: Stage, catalogue: Catalogue, learning: Learning | None = None) -> None:
        self._learning = learning
        self._stage = stage
        self._versions = stage.versions
        self._catalogue = catalogue
        self._watchers = threading.BoundedSemaphore(MOST_WATCHERS)

    def register(self, server: grpc.Server) -> None:
        """Makes the server answer for this service."""
        pb_grpc.add_PredictorAdminServicer_to_server(self, server)

    def ListVersions(self, request: pb.ListVersionsRequest, context: grpc.ServicerContext) -> pb.ListVersionsResponse:
        """Reads the registry's manifests."""
        listed = _with_states(self._catalogue.versions(), self._versions)
        return pb.ListVersionsResponse(versions=[encode_message(info, pb.VersionInfo) for info in listed])

    def Activate(self, request: pb.ActivateRequest, context: grpc.ServicerContext) -> pb.ActivateResponse:
        """Loads, tries out, writes down, switches."""
        expected = request.expected_active if request.HasField("expected_active") else None
        share = request.canary_share if request.HasField("canary_share") else None
        change = self._stage.activate(request.version, Wish(request.who, request.why, expected), share)
        return pb.ActivateResponse(change=None if change is None else encode_message(change, pb.VersionChange))

    def Rollback(self, request: pb.RollbackRequest, context: grpc.ServicerContext) -> pb.RollbackResponse:
        """Switches at once."""
        expected = request.expected_active if request.HasField("expected_active") else None
        change = self._stage.rollback(Wish(request.who, request.why, expected))
        return pb.RollbackResponse(change=encode_message(change, pb.VersionChange))

    def SetShadow(self, request: pb.SetShadowRequest, context: grpc.ServicerContext) -> pb.SetShadowResponse:
        """Loads, tries out, starts its process, writes down."""
        wish = Wish(request.who, request.why)
        change = self._stage.set_shadow(request.version, wish)
        self._step_aside(wish)
        return pb.SetShadowResponse(change=None if change is None else encode_message(change, pb.VersionChange))

    def ClearShadow(self, request: pb.ClearShadowRequest, context: grpc.ServicerContext) -> pb.ClearShadowResponse:
        """Writes down, ends its process."""
        wish = Wish(request.who, request.why)
        change = self._stage.clear_shadow(wish)
        self._step_aside(wish)
        return pb.ClearShadowResponse(change=None if change is None else encode_message(change, pb.VersionChange))

    def WatchQuality(
        self, request: pb.WatchQualityRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchQualityResponse]:
        """At once, and then as often as was asked, until the caller leaves."""
        interval_s = request.interval_s or 1.0
        if not _LEAST_INTERVAL_S <= interval_s <= _MOST_INTERVAL_S:
            raise InvalidInput(
                f"interval_s is {interval_s:g}; allowed: {_LEAST_INTERVAL_S:g} to {_MOST_INTERVAL_S:g}, or 0."
            )
        if not self._watchers.acquire(blocking=False):
            raise Overloaded(f"{MOST_WATCHERS} watch already, and no more at once.")
        left = threading.Event()
        if not context.add_callback(left.set):
            left.set()
        try:
            with self._stage.watching() as report:
                while not left.is_set():
                    yield pb.WatchQualityResponse(report=encode_message(report(), pb.QualityReport))
                    left.wait(interval_s)
        finally:
            self._watchers.release()

    def Train(self, request: pb.TrainRequest, context: grpc.ServicerContext) -> pb.TrainResponse:
        """Tells the learner."""
        return pb.TrainResponse(accepted=self._learner().train(request.who, request.why))

    def PauseLearner(self, request: pb.PauseLearnerRequest, context: grpc.ServicerContext) -> pb.PauseLearnerResponse:
        """Tells the learner."""
        self._learner().pause(request.paused, request.who)
        return pb.PauseLearnerResponse()

    def GetLearner(self, request: pb.GetLearnerRequest, context: grpc.ServicerContext) -> pb.GetLearnerResponse:
        """Answers from memory."""
        off = LearnerReport(LearnerState.OFF, news=_NOT_LEARNING)
        report = off if self._learning is None else self._learning.report()
        return pb.GetLearnerResponse(report=encode_message(report, pb.LearnerReport))

    def _learner(self) -> Learning:
        if self._learning is None:
            raise ModelMismatch(_NOT_LEARNING)
        return self._learning

    def _step_aside(self, wish: Wish) -> None:
        """Once it is done: a wish that cannot be had must not cost the learner what it compares."""
        if self._learning is not None:
            self._learning.step_aside(wish.who, wish.why)

    def GetHistory(self, request: pb.GetHistoryRequest, context: grpc.ServicerContext) -> pb.GetHistoryResponse:
        """Reads the log."""
        changes = self._versions.log.changes()[-request.limit :]
        return pb.GetHistoryResponse(changes=[encode_message(change, pb.VersionChange) for change in changes])


def _with_states(known: list[VersionInfo], versions: Versions) -> list[VersionInfo]:
    """What runs from elsewhere, or was removed meanwhile, is listed all the same."""
    canary = versions.canary
    roles = (
        (versions.active, VersionState.ACTIVE),
        (None if canary is None else canary.predictor, VersionState.CANARY),
        (versions.shadow, VersionState.SHADOW),
        (versions.previous, VersionState.PREVIOUS),
    )
    states: dict[str, VersionState] = {}
    running: dict[str, str] = {}
    for predictor, state in roles:
        if predictor is not None:
            states.setdefault(predictor.version.version, state)
            running[predictor.version.version] = predictor.version.predictor
    # A plug-in's version is known once it is made.
    names = {info.version for info in known}
    plugins = {kind: name for name, kind in running.items() if name not in names}
    listed = [replace(info, version=plugins.pop(info.version, info.version)) for info in known]
    listed += [VersionInfo(name, kind) for kind, name in plugins.items()]
    return [replace(info, state=states.get(info.version, info.state)) for info in listed]
