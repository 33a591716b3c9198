"""A whole stack on this machine: packs, starts, watches and stops its services, and says how it goes."""

import os
import time
from typing import Final

from promoe.cli.figures import node_figures
from promoe.cli.quantity import format_bytes_per_s, format_nbytes, format_s
from promoe.cli.run_dir import RunDir, StackState
from promoe.cli.stack_plan import StackPlan
from promoe.cli.stack_view import PhaseLine, PhaseState, StackStatus, StackView
from promoe.cli.stop_signals import StopSignals
from promoe.cli.store_calls import FillState, StoreInfo, store_info
from promoe.cli.supervisor import RestartPolicy, Service, ServiceState
from promoe.cli.tool_run import make_pack
from promoe.client import Client
from promoe.errors import EXIT_PACK_DAMAGED, DeadlineExceeded, Overloaded, PackDamaged, PromoeError, Unavailable
from promoe.node_report import NodeInfo
from promoe.retry import RetryPolicy

_POLL_S: Final = 0.1
_PROBE_DEADLINE_S: Final = 1.0
_FIGURES_INTERVAL_S: Final = 1.0
PREDICTOR_GRACE_S: Final = 3.0
"""A serving node's first tokens wait so long at most for the predictor to be connected."""
_BEST_EFFORT: Final = RestartPolicy(max_restarts=None, max_delay_s=60.0)
"""Without the predictor everything works, only slower: it never takes the stack down, however often it ends."""
_ONCE: Final = RetryPolicy(max_attempts=1)
# A probe of a service that is starting, restarting or busy.
_NOT_NOW: Final = (Unavailable, Overloaded, DeadlineExceeded)


class Stack:
    """The services of one run folder, which the caller holds: store and node, and the predictor as a best effort."""

    def __init__(self, plan: StackPlan, run_dir: RunDir, view: StackView, stop: StopSignals) -> None:
        self.plan = plan
        self._run_dir = run_dir
        self._view = view
        self._stop = stop
        self._store = Service(plan.store)
        self._node = Service(plan.node)
        self._predictor = Service(plan.predictor, _BEST_EFFORT) if plan.predictor else None
        self._phases = {name: PhaseLine(name) for name in ("pack", "fill", "load", "ready")}
        self._footer = ""
        self._begin_s = time.perf_counter()
        self._started_unix_s = time.time()
        self._next_figures_s = 0.0

    def bring_up(self) -> bool:
        """Packs if need be, fills, loads; returns True when the stack serves, False when a signal came before.

        Raises:
            PackDamaged: a service found the cached pack damaged; the command that mends it is in the text.
            PromoeError: something else failed; its last words are in the text.
        """
        try:
            return self._bring_pack() and self._bring_services()
        except PromoeError as error:
            for line in self._phases.values():
                if line.state is PhaseState.RUNNING:
                    self._show(line.name, PhaseState.FAILED, "failed")
            mend_command = self.plan.pack.mend_command
            if mend_command and self._found_damage():
                raise PackDamaged(f"{error}\nThis makes anew only what is damaged:\n{mend_command}") from error
            raise

    def watch(self) -> None:
        """One look at the running stack: restarts what crashed, refreshes the figures. Call it often.

        Raises:
            Unavailable: a service crashed too often.
        """
        for service in (self._store, self._node):
            crashes_before = service.num_crashes
            service.watch()
            if service.num_crashes > crashes_before:
                self._view.note(f"{service.ending()} It is being restarted.")
                self._show("ready", PhaseState.RUNNING, f"restarting the {service.command.name}")
        self._watch_predictor()
        if time.perf_counter() >= self._next_figures_s:
            self._next_figures_s = time.perf_counter() + _FIGURES_INTERVAL_S
            self._refresh_figures()

    def take_down(self) -> None:
        """Stops the node (it drains), the predictor, and then the store; a second signal kills them."""
        self._footer = ""
        for service in (self._node, *((self._predictor,) if self._predictor else ()), self._store):
            if not service.is_gone:
                waits = ", when it has finished its answers" if service is self._node else ""
                hurry = f"{waits}; Ctrl-C again does not wait" if self._stop.asked else ""
                self._show("stop", PhaseState.RUNNING, f"stopping the {service.command.name}{hurry}")
                self._stop_service(service)
            service.kill()
        if "stop" in self._phases:
            self._show("stop", PhaseState.DONE, "stopped")

    def _watch_predictor(self) -> None:
        """Restarts it as often as need be; of a row of crashes only the first is told."""
        predictor = self._predictor
        if predictor is None:
            return
        crashes_before = predictor.num_crashes
        predictor.watch()
        if predictor.num_crashes > crashes_before and predictor.crashes_in_row == 1:
            self._view.note(f"{predictor.obituary()}\nIt is being restarted; meanwhile no experts are predicted.")

    def _stop_service(self, service: Service) -> None:
        """Waits until it has stopped, its deadline has passed, or a second signal came."""
        end_s = time.perf_counter() + service.command.stop_deadline_s
        service.terminate()
        while not service.is_gone and not self._stop.asked_twice:
            if time.perf_counter() >= end_s:
                self._view.note(f"The {service.command.name} did not stop by itself and is killed.")
                return
            self._stop.wait(_POLL_S)

    def _found_damage(self) -> bool:
        services = [service for service in (self._store, self._node) if service.state is ServiceState.FAILED]
        return any(service.exit_code() == EXIT_PACK_DAMAGED for service in services)

    def _bring_pack(self) -> bool:
        pack = self.plan.pack
        if pack.steps:
            self._show("pack", PhaseState.RUNNING, f"{pack.model}, on first use, to {pack.pack_dir}")
            self._view.pause()
            if not make_pack(pack, self._stop):
                return False
        self._show(
            "pack", PhaseState.DONE, f"{pack.model} is packed in {pack.pack_dir}" if pack.steps else str(pack.pack_dir)
        )
        return True

    def _bring_services(self) -> bool:
        self._begin_s = time.perf_counter()
        self._store.start()
        if self._predictor is not None:
            self._predictor.start()
        full = serving = False
        while not (full and serving):
            if self._stop.asked:
                return False
            self._store.check_alive()
            full = full or self._look_at_fill()
            if self._node.state is ServiceState.RUNNING:
                self._node.check_alive()
                serving = serving or self._look_at_load()
            self._watch_predictor()
            self._stop.wait(_POLL_S)
        self._wait_for_predictor()
        self._show_ready()
        if self.plan.http_sentence:
            self._view.note(self.plan.http_sentence)
        return True

    def _wait_for_predictor(self) -> None:
        """So that the first answer has hints, unless the predictor is in trouble."""
        end_s = time.perf_counter() + PREDICTOR_GRACE_S
        predictor = self._predictor
        while predictor is not None and predictor.num_crashes == 0 and time.perf_counter() < end_s:
            try:
                with Client(self.plan.endpoint, _ONCE) as client:
                    if self._stop.asked or client.info().predictor.active is not None:
                        return
            except _NOT_NOW:
                return
            self._watch_predictor()
            self._stop.wait(_POLL_S)

    def _look_at_fill(self) -> bool:
        """True when every expert is in the arena. The node is started as soon as the store answers."""
        try:
            info = store_info(self._run_dir.store_endpoint, _PROBE_DEADLINE_S)
        except _NOT_NOW:
            self._show("fill", PhaseState.RUNNING, "starting the expert store")
            return False
        if self._node.state is ServiceState.STOPPED:
            self._node.start()
        if info.fill_state is FillState.FULL:
            self._show("fill", PhaseState.DONE, f"{format_nbytes(info.total_bytes)} of experts in shared memory")
            return True
        self._show("fill", PhaseState.RUNNING, _fill_phrase(info), info.filled_bytes / max(info.total_bytes, 1))
        return False

    def _look_at_load(self) -> bool:
        elapsed_s = time.perf_counter() - self._begin_s
        with Client(self.plan.endpoint, _ONCE) as client:
            try:
                client.wait_until_ready(_POLL_S)
            except _NOT_NOW:
                self._show("load", PhaseState.RUNNING, f"loading the model into the compute node ({elapsed_s:.0f} s)")
                return False
        self._show("load", PhaseState.DONE, f"model loaded, {format_s(elapsed_s)} after the start")
        return True

    def _show_ready(self) -> None:
        with Client(self.plan.endpoint, _ONCE) as client:
            self._show("ready", PhaseState.DONE, ready_phrase(self.plan.endpoint, client.info()))

    def _refresh_figures(self) -> None:
        services_run = self._store.state is self._node.state is ServiceState.RUNNING
        try:
            with Client(self.plan.endpoint, _ONCE) as client:
                figures = node_figures(client.cache_stats(deadline_s=_PROBE_DEADLINE_S))
                if self._phases["ready"].state is PhaseState.DONE:
                    self._show_ready()  # the predictor may have come or gone
            if services_run and self._phases["ready"].state is PhaseState.RUNNING:
                store_info(self._run_dir.store_endpoint, _PROBE_DEADLINE_S)
                self._show_ready()
        except _NOT_NOW:
            return
        self._footer = f"{figures}\ntalk to it with promoe chat · logs in {self._run_dir.path} · Ctrl-C stops"
        self._view.show(self._status())

    def _show(self, name: str, state: PhaseState, detail: str, fraction: float | None = None) -> None:
        line = PhaseLine(name, state, detail, fraction)
        former = self._phases.get(name, PhaseLine(name))
        self._phases[name] = line
        if line != former:
            if line.state is not former.state:
                self._write_state(line)
            self._view.show(self._status())

    def _write_state(self, line: PhaseLine) -> None:
        try:
            self._run_dir.write_state(self._state(line))
        except OSError as error:
            # A full disk must not stop a stack that serves; the other commands then need --endpoint.
            self._view.note(f"The state in {self._run_dir.path} cannot be written ({error.strerror}).")

    def _status(self) -> StackStatus:
        return StackStatus(tuple(self._phases.values()), self._footer)

    def _state(self, line: PhaseLine) -> StackState:
        pack = self.plan.pack
        is_restart = line.name == "ready" and line.state is PhaseState.RUNNING
        return StackState(
            pid=os.getpid(),
            phase="restart" if is_restart else line.name,
            endpoint=self.plan.endpoint,
            store_endpoint=self._run_dir.store_endpoint,
            model=pack.model,
            pack=str(pack.pack_dir),
            started_unix_s=self._started_unix_s,
            http_url=self.plan.http_url,
        )


def ready_phrase(endpoint: str, info: NodeInfo) -> str:
    """What is served, where, and with how much of it on the device."""
    model, shape = info.model, info.expert_cache
    link = ""
    if info.device.emulated_link_bytes_per_s:
        link = f", emulated link of {format_bytes_per_s(info.device.emulated_link_bytes_per_s)}"
    return (
        f"{model.name} on {endpoint} ({info.device.kind}{link}): {shape.slots_per_layer} of {model.num_experts} "
        f"experts per layer on the device (cache rate {shape.cache_rate:.3g}, {shape.eviction}), "
        f"{predictor_phrase(info)}"
    )


def predictor_phrase(info: NodeInfo) -> str:
    """Who predicts, or that nobody does."""
    link = info.predictor
    if link.active is not None:
        return f"predictor {link.active.version}"
    return f"predictor {link.state.value}" if link.endpoint else "no predictor"


def _fill_phrase(info: StoreInfo) -> str:
    if info.fill_state is FillState.ADOPTING:
        return "waiting for a compute node to hand the arena back"
    share = 100 * info.filled_bytes / max(info.total_bytes, 1)
    return f"{share:.0f} % of {format_nbytes(info.total_bytes)} of experts"
