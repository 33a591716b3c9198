"""`python -m expert_store`: reads the configuration, builds the store and its servers, runs until SIGTERM."""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from expert_store.config import StoreConfig
from expert_store.fd_server import FdServer
from expert_store.fill_progress import FillProgress
from expert_store.metrics import metrics_page
from expert_store.run_dir import RunDir
from expert_store.service import SERVICE_NAME, ExpertStoreService
from expert_store.store import ExpertStore
from promoe.arena import ARENA_KINDS
from promoe.config import LogConfig, Settings, SettingUnfit
from promoe.errors import PromoeError, Unavailable, exit_status
from promoe.pack_manifest import PackManifest
from promoe.rpc import RpcServer
from promoe.telemetry import configure_logging

logger = logging.getLogger("expert_store")


async def serve(config: StoreConfig) -> None:
    """Runs one store until SIGTERM or SIGINT; raises the PromoeError or SettingUnfit that keeps it from running."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    manifest = PackManifest.read(config.pack)
    run_dir = RunDir(config)
    try:
        progress = FillProgress(manifest.spec.experts_nbytes)
        store = ExpertStore(config, manifest, run_dir, progress.update)
        try:
            with metrics_page(store, config.metrics_listen):
                await _serve_store(store, config, stop)
        finally:
            progress.close()
            store.close()
    finally:
        run_dir.close()


async def _serve_store(store: ExpertStore, config: StoreConfig, stop: asyncio.Event) -> None:
    service = ExpertStoreService(store, str(config.fd_socket.absolute()))
    server = RpcServer((SERVICE_NAME,))
    service.register(server.server)
    channel = FdServer(config.fd_socket, store, config.peer_uids)
    endpoint = _listen(server, config)
    await server.start()
    logger.info("Serving %s at %s.", config.pack, endpoint)

    full = asyncio.Event()
    tasks = [asyncio.create_task(work) for work in (store.run(full.set), channel.run(), stop.wait())]
    announcement = asyncio.create_task(_announce(server, full))
    end: PromoeError = Unavailable("The expert store is shutting down.")
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    except PromoeError as error:
        end = error
        raise
    finally:
        store.freeze_state()
        service.end_streams(end)
        for task in (*tasks, announcement):
            task.cancel()
        await asyncio.gather(*tasks, announcement, return_exceptions=True)
        await server.stop(config.drain_deadline_s)


def _listen(server: RpcServer, config: StoreConfig) -> str:
    endpoint = server.listen(config.endpoint)
    if config.listen_socket is not None:
        config.listen_socket.chmod(0o660)
    return endpoint


async def _announce(server: RpcServer, full: asyncio.Event) -> None:
    await full.wait()
    await server.set_serving(True)
    logger.info("Every expert is published.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM, 1 when the store cannot run, 2 for a wrong configuration, 3 for a damaged pack."""
    parser = argparse.ArgumentParser(
        prog="python -m expert_store", description="Holds all experts of one pack in shared memory."
    )
    parser.add_argument("--config", type=Path, help="TOML file with a [store] table")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides the file")
    options = parser.parse_args(arguments)
    try:
        settings = Settings(options.config, options.set)
        config = settings.section("store", StoreConfig)
        if config.arena_kind not in ARENA_KINDS:
            raise ValueError(f"store.arena_kind is {config.arena_kind!r}; allowed: {', '.join(ARENA_KINDS)}")
        log = settings.section("log", LogConfig)
        configure_logging("expert_store", log.level, log.format)
    except ValueError as error:
        sys.stderr.write(f"expert_store: {error}\n")
        return 2
    try:
        asyncio.run(serve(config))
    except SettingUnfit as error:  # any other ValueError is a bug, and its traceback is wanted
        sys.stderr.write(f"expert_store: {error}\n")
        return 2
    except PromoeError as error:
        sys.stderr.write(f"expert_store: {error}\n")
        return exit_status(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
