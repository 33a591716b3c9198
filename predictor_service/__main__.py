"""`python -m predictor_service`: reads the configuration, builds the predictor and its server, runs until SIGTERM."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

# Before numpy is imported: a product of a few rows is done sooner by one thread than by waking others, which would
# take the compute node's cores. Who sets the variable decides.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

from predictor_service.admin.in_use import history_path
from predictor_service.admin.service import ADMIN_SERVICE_NAME, MOST_WATCHERS, PredictorAdminService
from predictor_service.catalogue import Catalogue
from predictor_service.choice import choose_predictor
from predictor_service.config import AUTO, PredictorConfig
from predictor_service.feed import Feed
from predictor_service.learner.config import LearnerConfig
from predictor_service.learning import Learning, LearningSettings
from predictor_service.metrics import metrics_page
from predictor_service.packet_server import PacketServer
from predictor_service.predictor import PredictorSource
from predictor_service.registry import Registry
from predictor_service.service import SERVICE_NAME, PredictorService
from predictor_service.session_book import SessionLimits
from predictor_service.shadow.process import ShadowSource
from predictor_service.stage import Stage
from predictor_service.version_log import VersionLog
from predictor_service.versions import Versions
from promoe.config import LogConfig, Settings, SettingUnfit
from promoe.errors import PromoeError, ResourceExhausted, Unavailable, exit_status
from promoe.pack_manifest import PackManifest
from promoe.packet_channel import packet_path
from promoe.telemetry import configure_logging
from promoe.threaded_rpc import ThreadedRpcServer

logger = logging.getLogger("predictor_service")


_SPARE_CONNECTIONS: Final = 4
"""For nodes that are told that there are as many sessions as there may be."""

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def serve(config: PredictorConfig, learner: LearnerConfig, settings: tuple[str, ...]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        config: of the service.
        learner: of what learns beside it.
        settings: as they were given, for the learner's process.

    Raises:
        PromoeError, SettingUnfit: what keeps it from running.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # here and in every thread to come: sigwait takes them
    spec = PackManifest.read(config.pack).spec
    source = PredictorSource(spec, config.pack, config.artifact, config.lookahead)
    catalogue = Catalogue(spec, config.pack, Registry(config.registry) if config.registry else None)
    versions = _begin_versions(config, source, catalogue)
    limits = SessionLimits(config.max_rows, config.max_sessions, config.max_queued_events)
    feed = Feed()
    service = PredictorService(spec, lambda: versions.lineup, limits, feed)
    stage = Stage(versions, feed, ShadowSource(config.pack, config.registry), service.costs)
    learning = _plan_learning(config, LearningSettings(learner, settings), stage, catalogue, feed)
    with metrics_page(service.stats, config.metrics_listen):
        server = ThreadedRpcServer((SERVICE_NAME, ADMIN_SERVICE_NAME), config.max_sessions + MOST_WATCHERS)
        service.register(server.server)
        PredictorAdminService(stage, catalogue, learning).register(server.server)
        endpoint = _listen(server, config.listen)
        packets = _open_packets(service, endpoint, config.max_sessions)
        server.start()
        versions.started()
        if learning is not None:
            learning.start()
        server.set_serving(True)
        logger.info("Predicting %s with %s at %s.", spec.name, versions.active.version.version, endpoint)
        signal.sigwait(_STOP_SIGNALS)
        service.end_streams(Unavailable("The predictor service is shutting down."))
        if learning is not None:
            learning.close()
        stage.close()
        if packets is not None:
            packets.close()
        server.stop(config.drain_deadline_s)


def _plan_learning(
    config: PredictorConfig, asked: LearningSettings, stage: Stage, catalogue: Catalogue, feed: Feed
) -> Learning | None:
    if not asked.config.enabled:
        return None
    if config.registry is None:
        raise SettingUnfit("learner.enabled is true and predictor.registry is missing: it takes the candidates")
    return Learning(asked, Registry(config.registry), stage, catalogue, feed)


def _begin_versions(config: PredictorConfig, source: PredictorSource, catalogue: Catalogue) -> Versions:
    """With what the configuration names; where it leaves the choice, with what this service's history left active."""
    path = history_path(config.registry, source.spec.fingerprint) if config.registry else None
    log = VersionLog(path, config.listen)
    last = log.last_active() if config.predictor == AUTO and config.artifact is None else None
    if last is not None:
        try:
            return Versions(source.spec, catalogue.load(last), catalogue.load, log)
        except (PromoeError, SettingUnfit) as error:
            logger.warning("%s was active and cannot be any more: %s", last, error)
    return Versions(source.spec, choose_predictor(config.predictor, source), catalogue.load, log)


def _open_packets(service: PredictorService, endpoint: str, max_sessions: int) -> PacketServer | None:
    """Beside a unix socket of gRPC; nodes of this host talk to it without gRPC. Without it they have the stream."""
    path = packet_path(endpoint)
    if path is None:
        return None
    try:
        packets = PacketServer(path, service.converse, max_sessions + _SPARE_CONNECTIONS)
    except ResourceExhausted as error:
        logger.warning("Nodes are talked to over gRPC only: %s", error)
        return None
    service.has_packets = True
    packets.start()
    return packets


def _listen(server: ThreadedRpcServer, asked: str) -> str:
    """Binds the address; a unix socket's folder is made, and the socket is for owner and group."""
    socket = Path(asked.removeprefix("unix:")) if asked.startswith("unix:") else None
    try:
        if socket is not None:
            socket.parent.mkdir(mode=0o770, parents=True, exist_ok=True)
        endpoint = server.listen(asked)
    except OSError as error:
        raise SettingUnfit(f"predictor.listen is {asked!r}; its folder cannot be made ({error.strerror})") from error
    except ValueError as error:
        raise SettingUnfit(f"predictor.listen is {asked!r}: {error}") from error
    if socket is not None:
        socket.chmod(0o660)
    return endpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM, 1 when it cannot run, 2 for a wrong configuration, 3 for a damaged pack."""
    parser = argparse.ArgumentParser(
        prog="python -m predictor_service", description="Predicts which experts of one pack will be needed."
    )
    parser.add_argument("--config", type=Path, help="TOML file with a [predictor] table")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides the file")
    options = parser.parse_args(arguments)
    try:
        settings = Settings(options.config, options.set)
        config = settings.section("predictor", PredictorConfig)
        learner = settings.section("learner", LearnerConfig)
        log = settings.section("log", LogConfig)
        configure_logging("predictor_service", log.level, log.format)
    except ValueError as error:
        sys.stderr.write(f"predictor_service: {error}\n")
        return 2
    try:
        serve(config, learner, _as_given(options.config, options.set))
    except SettingUnfit as error:  # any other ValueError is a bug, and its traceback is wanted
        sys.stderr.write(f"predictor_service: {error}\n")
        return 2
    except PromoeError as error:
        sys.stderr.write(f"predictor_service: {error}\n")
        return exit_status(error)
    return 0


def _as_given(config: Path | None, assignments: Sequence[str]) -> tuple[str, ...]:
    given = ("--config", str(config)) if config is not None else ()
    return (*given, *(text for assignment in assignments for text in ("--set", assignment)))


if __name__ == "__main__":
    sys.exit(main())
