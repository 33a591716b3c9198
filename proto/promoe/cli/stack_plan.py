"""What one machine's stack consists of: the pack and the command lines of its services. Decides, starts nothing."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from promoe.cli.pack_cache import PackPlan, registry_folder
from promoe.cli.run_dir import DEFAULT_LISTEN, RunDir
from promoe.cli.supervisor import ServiceCommand
from promoe.config import Settings
from promoe.errors import AlreadyRunning, InvalidInput

# A service stops by itself within its own drain deadline; only then do we lose patience.
_STORE_STOP_DEADLINE_S: Final = 15.0
_NODE_STOP_DEADLINE_S: Final = 60.0
_PREDICTOR_STOP_DEADLINE_S: Final = 15.0
_STOP_SLACK_S: Final = 10.0

NO_PREDICTOR: Final = "none"
"""The name of the predictor that makes no hints: then none is started."""


@dataclass(frozen=True)
class StackPlan:
    """What to run.

    Attributes:
        pack: how the model becomes a pack.
        endpoint: where clients on this machine find the compute node.
        store: the expert store's command.
        node: the compute node's command.
        predictor: the predictor service's command; None when the node is to have none, or one that runs elsewhere.
        http_url: where clients on this machine find the HTTP API; empty for none.
        http_sentence: the same for people, with what is to be said about it.
    """

    pack: PackPlan
    endpoint: str
    store: ServiceCommand
    node: ServiceCommand
    predictor: ServiceCommand | None = None
    http_url: str = ""
    http_sentence: str = ""

    @property
    def commands(self) -> tuple[ServiceCommand, ...]:
        """All that are run."""
        return (self.store, self.node, *((self.predictor,) if self.predictor else ()))


def plan_stack(pack: PackPlan, run_dir: RunDir, config: Path | None, assignments: Sequence[str]) -> StackPlan:
    """Puts the command lines together; what the person asked for comes first, what the stack needs overrides it.

    Raises:
        ValueError: the configuration cannot be read.
        InvalidInput: the address to listen on is none.
    """
    settings = Settings(config, assignments)
    listen = with_free_port(settings.asked("compute", "listen", str) or DEFAULT_LISTEN)
    asked = (*(("--config", str(config.absolute())) if config else ()), *_set_flags(assignments))
    needs = {
        **dict.fromkeys(("store.pack", "compute.pack", "predictor.pack"), str(pack.pack_dir)),
        "store.run_dir": str(run_dir.path),
        "store.listen": run_dir.store_endpoint,
        "compute.store_endpoint": run_dir.store_endpoint,
        "compute.listen": listen,
    }
    has_predictor = _wants_predictor(settings)
    if has_predictor:
        needs |= dict.fromkeys(("predictor.listen", "compute.predictor_endpoint"), run_dir.predictor_endpoint)
        if settings.asked("predictor", "registry", str) is None:
            needs["predictor.registry"] = str(registry_folder())
    arguments = (*asked, *_set_flags([f"{key}={value}" for key, value in needs.items()]))

    def command(name: str, module: str, section: str, stop_deadline_s: float) -> ServiceCommand:
        log = run_dir.log("node" if section == "compute" else section)
        stop_deadline_s = _stop_deadline_s(settings, section, stop_deadline_s)
        return ServiceCommand(name, module, arguments, log, stop_deadline_s, f"{module}.settings")

    return StackPlan(
        pack=pack,
        endpoint=reachable(listen),
        store=command("expert store", "expert_store", "store", _STORE_STOP_DEADLINE_S),
        node=command("compute node", "compute_node", "compute", _NODE_STOP_DEADLINE_S),
        predictor=command("predictor", "predictor_service", "predictor", _PREDICTOR_STOP_DEADLINE_S)
        if has_predictor
        else None,
    )


def _wants_predictor(settings: Settings) -> bool:
    """False for the predictor `none`, and for a node that is given the endpoint of another one."""
    is_elsewhere = bool(settings.asked("compute", "predictor_endpoint", str))
    return not is_elsewhere and settings.asked("predictor", "predictor", str) != NO_PREDICTOR


def check_port_free(endpoint: str, flag: str = "--listen") -> None:
    """Finds out before minutes of packing and filling.

    Args:
        endpoint: `host:port`; a unix socket is nothing to find out about.
        flag: what gives another one.

    Raises:
        AlreadyRunning: somebody listens there.
    """
    if endpoint.startswith("unix:"):
        return
    host, port = _split(endpoint)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AlreadyRunning(
                f"{endpoint} cannot be listened on ({error.strerror}); give another {flag}."
            ) from error


def _stop_deadline_s(settings: Settings, section: str, default_s: float) -> float:
    drain_s = settings.asked(section, "drain_deadline_s", float)
    return default_s if drain_s is None else drain_s + _STOP_SLACK_S


def _set_flags(assignments: Sequence[str]) -> list[str]:
    return [text for assignment in assignments for text in ("--set", assignment)]


def _split(listen: str) -> tuple[str, int]:
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(f"{listen!r} is not an address to listen on; write host:port or unix:PATH.")
    return host.strip("[]"), int(port)


def with_free_port(listen: str) -> str:
    """The address, with a free port where port 0 asks for one: so clients can be told before the node is up."""
    if listen.startswith("unix:"):
        return listen
    host, port = _split(listen)
    if port != 0:
        return listen
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        port = probe.getsockname()[1]
    return f"{listen.rpartition(':')[0]}:{port}"


def reachable(listen: str) -> str:
    """Listening on every interface is reached over the loopback one."""
    for everywhere, loopback in (("0.0.0.0:", "127.0.0.1:"), ("[::]:", "[::1]:")):
        if listen.startswith(everywhere):
            return loopback + listen.removeprefix(everywhere)
    return listen
