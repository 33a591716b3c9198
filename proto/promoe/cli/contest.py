"""Compute nodes side by side on one expert store: the same model, cache rate and link under different policies."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

from promoe.cli.pack_cache import PackPlan
from promoe.cli.run_dir import RunDir
from promoe.cli.stack_plan import NO_PREDICTOR, plan_stack
from promoe.cli.stop_signals import StopSignals
from promoe.cli.supervisor import Service, ServiceCommand
from promoe.client import Client
from promoe.errors import DeadlineExceeded, Overloaded, Unavailable
from promoe.retry import RetryPolicy

_POLL_S: Final = 0.2
_STOP_DEADLINE_S: Final = 15.0
_PREDICTOR_GRACE_S: Final = 20.0
"""More than a stack's: without its hints a contestant would be another one."""

_ONCE: Final = RetryPolicy(max_attempts=1)
_NOT_NOW: Final = (Unavailable, Overloaded, DeadlineExceeded)


@dataclass(frozen=True)
class Contestant:
    """One node. `predictor`: whose hints it takes, in a process of its own."""

    title: str
    policy: str
    predictor: str = NO_PREDICTOR


@dataclass(frozen=True)
class Ring:
    """What all contestants share.

    Attributes:
        pack: the model's.
        run_dir: of the stack whose store they use; they have folders in it.
        settings: `section.key=value` texts.
    """

    pack: PackPlan
    run_dir: RunDir
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Corner:
    """A contestant's processes. `predictor`: None where it takes no hints."""

    endpoint: str
    node: ServiceCommand
    predictor: ServiceCommand | None


def plan_corner(ring: Ring, contestant: Contestant) -> Corner:
    """Makes the contestant's folder and puts its command lines together; starts nothing."""
    run_dir = RunDir(ring.run_dir.path / contestant.policy)
    run_dir.path.mkdir(mode=0o700, exist_ok=True)
    listen = f"unix:{run_dir.path / 'node.sock'}"
    own = (f"compute.policy={contestant.policy}", f"predictor.predictor={contestant.predictor}")
    plan = plan_stack(ring.pack, run_dir, None, (*ring.settings, *own, f"compute.listen={listen}"))
    # The last assignment counts: the store is not one of this folder.
    store = ("--set", f"compute.store_endpoint={ring.run_dir.store_endpoint}")
    return Corner(plan.endpoint, replace(plan.node, arguments=(*plan.node.arguments, *store)), plan.predictor)


@contextmanager
def corners_up(corners: Mapping[Contestant, Corner], stop: StopSignals) -> Iterator[Mapping[Contestant, Client]]:
    """Starts them all at once; gives a client of each when they serve, or nothing when a signal came before.

    Raises:
        Unavailable: a process ended; its last words are in the text.
    """
    with ExitStack() as stack:
        services: dict[Contestant, list[Service]] = {}
        stack.callback(lambda: _stop_all([service for group in services.values() for service in group]))
        clients: dict[Contestant, Client] = {}
        for contestant, corner in corners.items():
            commands = [corner.node, *((corner.predictor,) if corner.predictor else ())]
            services[contestant] = [Service(command) for command in commands]
            clients[contestant] = stack.enter_context(Client(corner.endpoint, _ONCE))
            for service in services[contestant]:
                service.start()
        for contestant, client in clients.items():
            if not _wait_until_ready(client, services[contestant], corners[contestant].predictor is not None, stop):
                yield {}
                return
        yield clients


def _wait_until_ready(client: Client, services: list[Service], wants_hints: bool, stop: StopSignals) -> bool:
    """False when a signal came. A predictor that does not come in time is done without."""
    patience_s = time.perf_counter() + _PREDICTOR_GRACE_S
    while not stop.asked:
        for service in services:
            service.check_alive()
        try:
            client.wait_until_ready(_POLL_S)
            if not wants_hints or client.info().predictor.active is not None or time.perf_counter() > patience_s:
                return True
        except _NOT_NOW:
            patience_s = time.perf_counter() + _PREDICTOR_GRACE_S
        stop.wait(_POLL_S)
    return False


def _stop_all(services: Sequence[Service]) -> None:
    for service in services:
        service.terminate()
    end_s = time.perf_counter() + _STOP_DEADLINE_S
    while not all(service.is_gone for service in services) and time.perf_counter() < end_s:
        time.sleep(_POLL_S / 4)
    for service in services:
        service.kill()
