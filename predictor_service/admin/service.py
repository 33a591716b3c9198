"""The face of version changes: decode, ask the catalogue and the versions, encode."""

from dataclasses import replace
from typing import Final

import grpc

from predictor_service.catalogue import Catalogue
from predictor_service.version_log import Wish
from predictor_service.versions import Versions
from promoe.predictor_versions import VersionInfo, VersionState
from promoe.typed_message import encode_message
from promoe.v1 import predictor_admin_pb2 as pb
from promoe.v1 import predictor_admin_pb2_grpc as pb_grpc

ADMIN_SERVICE_NAME: Final = "promoe.v1.PredictorAdmin"


class PredictorAdminService(pb_grpc.PredictorAdminServicer):
    """Servicer of one predictor service's versions.

    Args:
        versions: the active one, and what changes it.
        catalogue: what there is.
    """

    def __init__(self, versions: Versions, catalogue: Catalogue) -> None:
        self._versions = versions
        self._catalogue = catalogue

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
        change = self._versions.activate(request.version, Wish(request.who, request.why, expected))
        return pb.ActivateResponse(change=None if change is None else encode_message(change, pb.VersionChange))

    def Rollback(self, request: pb.RollbackRequest, context: grpc.ServicerContext) -> pb.RollbackResponse:
        """Switches at once."""
        expected = request.expected_active if request.HasField("expected_active") else None
        change = self._versions.rollback(Wish(request.who, request.why, expected))
        return pb.RollbackResponse(change=encode_message(change, pb.VersionChange))

    def GetHistory(self, request: pb.GetHistoryRequest, context: grpc.ServicerContext) -> pb.GetHistoryResponse:
        """Reads the log."""
        changes = self._versions.log.changes()[-request.limit :]
        return pb.GetHistoryResponse(changes=[encode_message(change, pb.VersionChange) for change in changes])


def _with_states(known: list[VersionInfo], versions: Versions) -> list[VersionInfo]:
    """What runs from elsewhere, or was removed meanwhile, is listed all the same."""
    active, previous = versions.active.version, versions.previous
    states = {active.version: VersionState.ACTIVE}
    if previous is not None:
        states.setdefault(previous.version.version, VersionState.PREVIOUS)
    running = {active.version: active} | ({} if previous is None else {previous.version.version: previous.version})
    # A plug-in's version is known once it is made.
    names = {info.version for info in known}
    plugins = {version.predictor: name for name, version in running.items() if name not in names}
    listed = [replace(info, version=plugins.pop(info.version, info.version)) for info in known]
    listed += [VersionInfo(name, kind) for kind, name in plugins.items()]
    return [replace(info, state=states.get(info.version, info.state)) for info in listed]
