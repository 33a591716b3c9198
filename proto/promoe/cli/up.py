"""`promoe up`: the whole stack on this machine, in the foreground."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import typer

from promoe.cli.console import state_console
from promoe.cli.http_address import plan_http
from promoe.cli.options import RunDirOption, rate, size
from promoe.cli.pack_cache import DEMO_MODEL, plan_pack
from promoe.cli.run_dir import RunDir
from promoe.cli.settings_check import check_all_settings
from promoe.cli.stack import Stack
from promoe.cli.stack_plan import StackPlan, check_port_free, plan_stack
from promoe.cli.stack_view import StackView, view_for
from promoe.cli.stop_signals import StopSignals
from promoe.config import Settings

_WATCH_INTERVAL_S: Final = 0.2


@dataclass(frozen=True)
class UpOptions:
    """The flags of `promoe up`; what is None is not passed on, so that the configuration file decides."""

    model: Annotated[str, typer.Argument(help="`demo`, a checkpoint folder, a pack, or a hub id (owner/name).")] = (
        DEMO_MODEL
    )
    cache_rate: Annotated[
        float | None, typer.Option(help="Share of all experts that fits the device, above 0, up to 1.")
    ] = None
    expert_slots: Annotated[int | None, typer.Option(help="Experts per layer on the device.")] = None
    memory: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="Device memory to use, for example 8GiB.")
    ] = None
    max_context: Annotated[int | None, typer.Option(help="Longest prompt plus answer, in tokens.")] = None
    device: Annotated[str | None, typer.Option(help="auto, cuda or cpu.")] = None
    dtype: Annotated[str | None, typer.Option(help="Number format to pack in: bfloat16, float16 or float32.")] = None
    listen: Annotated[str | None, typer.Option(help="Address to serve on: host:port or unix:PATH.")] = None
    http: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Address of the OpenAI-compatible HTTP API, or none; 127.0.0.1:8080 or a free port when not given.",
        ),
    ] = None
    link_bytes_per_s: Annotated[
        int | None,
        typer.Option(parser=rate, metavar="RATE", help="Plays a slower link on the CPU, for example 25GB/s."),
    ] = None
    predictor: Annotated[
        str | None, typer.Option(help="Who predicts experts: auto (the best for the model), none, or a plug-in's name.")
    ] = None
    learn: Annotated[
        bool,
        typer.Option("--learn", help="Learn from what is served; see `promoe predictor learn`."),
    ] = False
    config: Annotated[Path | None, typer.Option(help="TOML file with the services' settings.")] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting; may be repeated.")
    ] = None
    run_dir: RunDirOption = None
    demo_wheel: Annotated[Path | None, typer.Option(help="The demo model's base wheel, if it is already here.")] = None

    def assignments(self) -> tuple[str, ...]:
        """The settings that the flags stand for, after those given with --set."""
        flags = {
            "compute.cache_rate": self.cache_rate,
            "compute.expert_slots": self.expert_slots,
            "compute.memory_bytes": self.memory,
            "compute.max_context_tokens": self.max_context,
            "compute.device": self.device,
            "compute.listen": self.listen,
            "compute.link_bytes_per_s": self.link_bytes_per_s,
            "predictor.predictor": self.predictor,
            "learner.enabled": "true" if self.learn else None,
        }
        return (*(self.settings or ()), *(f"{key}={value}" for key, value in flags.items() if value is not None))

    def plan(self, run_dir: RunDir) -> StackPlan:
        """What to run; see plan_pack, plan_http and plan_stack for the errors."""
        pack = plan_pack(self.model, self.dtype, self.demo_wheel)
        assignments = self.assignments()
        http = plan_http(self.http or Settings(self.config, assignments).asked("compute", "http_listen", str))
        plan = plan_stack(pack, run_dir, self.config, (*assignments, f"compute.http_listen={http.listen}"))
        return replace(plan, http_url=http.url, http_sentence=http.sentence())


@contextmanager
def brought_up(plan: StackPlan, run_dir: RunDir, view: StackView, stop: StopSignals) -> Iterator[Stack | None]:
    """Holds the run folder and the running stack; gives None when a signal came before it served."""
    with run_dir.hold():
        check_port_free(plan.endpoint)
        is_checked = check_all_settings(plan.commands, stop)
        stack = Stack(plan, run_dir, view, stop)
        try:
            yield stack if is_checked and stack.bring_up() else None
        finally:
            stack.take_down()
            view.close()


def up(options: UpOptions) -> None:
    """Run the whole stack on this machine until Ctrl-C: pack on first use, fill, load, serve."""
    run_dir = RunDir(options.run_dir)
    view = view_for(state_console())
    with StopSignals() as stop, brought_up(options.plan(run_dir), run_dir, view, stop) as stack:
        if stack is None:
            view.note("Stopped before everything was up; what is packed so far is kept.")
        while stack is not None and not stop.asked:
            stack.watch()
            stop.wait(_WATCH_INTERVAL_S)
