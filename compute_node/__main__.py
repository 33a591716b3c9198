"""`python -m compute_node`: reads the configuration, loads the model, wires the parts, serves until SIGTERM."""

import argparse
import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from compute_node.admin.service import ADMIN_SERVICE_NAME, NodeAdminService
from compute_node.call_naming import name_call
from compute_node.compilation import execution
from compute_node.config import ComputeConfig
from compute_node.config_reload import AskedConfig, ConfigReload
from compute_node.node import ComputeNode
from compute_node.service import SERVICE_NAME
from promoe.config import LogConfig, Settings, SettingUnfit
from promoe.errors import PromoeError, exit_status
from promoe.rpc import RpcServer
from promoe.telemetry import configure_logging

if TYPE_CHECKING:
    from compute_node.http.gate import HttpGate

logger = logging.getLogger("compute_node")


async def serve(asked: AskedConfig, read: Callable[[], AskedConfig] | None) -> None:
    """Loads (nothing else is served meanwhile), then answers until SIGTERM or SIGINT.

    Args:
        asked: the configuration.
        read: reads it anew, at SIGHUP; None where there is no file, and SIGHUP means what it means to any process.

    Raises:
        PromoeError: what keeps the node from serving.
        SettingUnfit: a setting that does not fit the model.
    """
    logger.info("The placement's code runs %s.", execution().value)
    # Until the event loop is free to listen, a signal ends the process at once: nothing was accepted yet.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    if read is not None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    server = RpcServer((SERVICE_NAME, ADMIN_SERVICE_NAME), name_call)
    endpoint = server.listen(asked.compute.listen)
    stop = asyncio.Event()
    node = ComputeNode(asked.compute)
    gate = open_gate(asked.compute)
    loop = asyncio.get_running_loop()
    try:
        service = node.start(on_death=stop.set, loop=loop)
        # What was loaded stays: looking through it for garbage would hold a step up for a fifth of a second.
        gc.collect()
        gc.freeze()
        service.register(server.server)
        NodeAdminService(node.takeovers).register(server.server)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if read is not None:
            loop.add_signal_handler(signal.SIGHUP, ConfigReload(asked, read, node.takeovers).reload)
        await server.start()
        await server.set_serving(True)
        async with AsyncExitStack() as http:
            if gate is not None:
                assert node.parts is not None, "it was started"
                await http.enter_async_context(gate.serving(node.parts))
            logger.info("Serving %s at %s.", node.spec.name, endpoint)
            await stop.wait()
            logger.info("Draining: new requests are refused.")
            await server.set_serving(False)
            await node.drain()
        await server.stop(grace_s=1.0)
    finally:
        if gate is not None:
            gate.close()
        node.close()
    if node.has_died:
        raise PromoeError("The engine or the store client died; the log above has the reason.")


def open_gate(config: ComputeConfig) -> "HttpGate | None":
    """The HTTP API's address, where one is asked for; see HttpGate for the errors."""
    if not config.http_listen:
        return None
    # Here, because a node without an HTTP API starts sooner without it.
    from compute_node.http.gate import HttpGate

    return HttpGate(config)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM, 1 when the node cannot run, 2 for a wrong configuration, 3 for a damaged pack."""
    parser = argparse.ArgumentParser(
        prog="python -m compute_node", description="Runs a packed model with an expert cache."
    )
    parser.add_argument("--config", type=Path, help="TOML file with a [compute] table; read again at SIGHUP")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides the file")
    options = parser.parse_args(arguments)

    def read() -> AskedConfig:
        settings = Settings(options.config, options.set)
        return AskedConfig(settings.section("compute", ComputeConfig), settings.section("log", LogConfig))

    try:
        asked = read()
        configure_logging("compute_node", asked.log.level, asked.log.format)
        # Transformers' batching tells of its own comings and goings, in its own format, at the root's level.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
    except ValueError as error:
        sys.stderr.write(f"compute_node: {error}\n")
        return 2
    try:
        asyncio.run(serve(asked, None if options.config is None else read))
    except SettingUnfit as error:  # any other ValueError is a bug, and its traceback is wanted
        sys.stderr.write(f"compute_node: {error}\n")
        return 2
    except PromoeError as error:
        sys.stderr.write(f"compute_node: {error}\n")
        return exit_status(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
