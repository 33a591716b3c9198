"""`promoe plan`: does a model fit, and how fast would it be, before anything of it is loaded or downloaded."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from promoe.cli.console import output_console, print_document, state_console
from promoe.cli.diagnosis import Verdict
from promoe.cli.options import JsonOption, rate, size
from promoe.cli.pack_cache import DEMO_MODEL, plan_pack
from promoe.cli.plan_inquiry import ask_node, ask_store
from promoe.cli.plan_resources import Resource, device_resources, host_resources
from promoe.cli.plan_view import plan_view, suggestion
from promoe.footprint import ModelFootprint
from promoe.model_spec import Dtype


@dataclass(frozen=True)
class PlanFlags:
    """The flags of `promoe plan`; those that `promoe up` has, too, mean the same."""

    model: Annotated[str, typer.Argument(help="`demo`, a checkpoint folder, a pack, or a hub id (owner/name).")] = (
        DEMO_MODEL
    )
    gpu_memory: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="Plan for a GPU of this size, e.g. 24GiB.")
    ] = None
    host_memory: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="Plan for a host with so much memory free.")
    ] = None
    link: Annotated[
        int | None, typer.Option(parser=rate, metavar="RATE", help="Host memory to device, e.g. 25GB/s.")
    ] = None
    memory_bandwidth: Annotated[
        int | None, typer.Option(parser=rate, metavar="RATE", help="The device's memory, e.g. 1000GB/s.")
    ] = None
    resident_tpot: Annotated[
        float | None, typer.Option(metavar="MS", min=0.001, help="TPOT with all experts resident, if you measured it.")
    ] = None
    context: Annotated[
        int | None, typer.Option("--context", "--max-context", min=1, help="Longest prompt plus answer, in tokens.")
    ] = None
    concurrency: Annotated[int | None, typer.Option(min=1, max=256, help="Requests that are decoded together.")] = None
    cache_rate: Annotated[float | None, typer.Option(help="Share of all experts on the device; default: all.")] = None
    expert_slots: Annotated[int | None, typer.Option(help="Experts per layer on the device.")] = None
    memory: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="Device memory to use, for example 8GiB.")
    ] = None
    device: Annotated[str | None, typer.Option(help="auto, cuda or cpu.")] = None
    dtype: Annotated[str | None, typer.Option(help="Number format to pack in: bfloat16, float16 or float32.")] = None
    trace: Annotated[Path | None, typer.Option(help="Forecast with this recorded routing (`promoe trace record`).")] = (
        None
    )
    config: Annotated[Path | None, typer.Option(help="TOML file with the services' settings.")] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting; may be repeated.")
    ] = None
    json_: JsonOption = False

    def node_arguments(self, pack_dir: Path) -> tuple[str, ...]:
        """The command line of the node's planner."""
        return (*self._settings(pack_dir), *self._machine())

    def _settings(self, pack_dir: Path) -> Iterator[str]:
        flags = {
            "compute.cache_rate": self.cache_rate,
            "compute.expert_slots": self.expert_slots,
            "compute.memory_bytes": self.memory,
            "compute.max_context_tokens": self.context,
            "compute.max_concurrent_requests": self.concurrency,
            "compute.device": self.device,
            # Nothing is opened, but a node's configuration has them.
            "compute.pack": pack_dir,
            "compute.store_endpoint": "unix:none",
        }
        if self.config is not None:
            yield from ("--config", str(self.config.absolute()))
        asked = (f"{key}={value}" for key, value in flags.items() if value is not None)
        for assignment in (*(self.settings or ()), *asked):
            yield from ("--set", assignment)

    def _machine(self) -> Iterator[str]:
        flags = {
            "--gpu-memory": self.gpu_memory,
            "--host-memory": self.host_memory,
            "--link": self.link,
            "--memory-bandwidth": self.memory_bandwidth,
            "--resident-tpot": None if self.resident_tpot is None else self.resident_tpot / 1000,
            "--trace": self.trace and self.trace.absolute(),
            "--requests": self.concurrency,
        }
        for name, value in flags.items():
            if value is not None:
                yield from (name, str(value))


def plan(flags: PlanFlags) -> None:
    """Say whether a model fits and how fast it would be, from its headers alone. Exit code 1 if it does not fit."""
    if flags.dtype is not None:
        Dtype.parse(flags.dtype)
    pack = plan_pack(flags.model, flags.dtype)
    with state_console().status("Reading the model's headers …") as status:
        store = ask_store(pack, flags.dtype)
        status.update("Asking the compute node, and simulating …")
        node = ask_node(store.footprint, flags.node_arguments(pack.pack_dir))
    resources = [*device_resources(node), *host_resources(store, flags.host_memory, pack.pack_dir)]
    fits = all(each.verdict is not Verdict.FAIL for each in resources)
    if flags.json_:
        print_document(_document(store.footprint, resources, node, fits=fits))
    else:
        output_console().print(plan_view(store.footprint, resources, node))
    if not fits:
        raise typer.Exit(1)


def _document(
    footprint: ModelFootprint, resources: Sequence[Resource], node: dict[str, object], *, fits: bool
) -> dict[str, object]:
    """For scripts: sizes in bytes, times in seconds."""
    model = {key: value for key, value in footprint.as_document().items() if key != "config"}
    forecast, slots = node["forecast"], node["suggested_slots"]
    sentence = suggestion(forecast, slots) if isinstance(forecast, dict) and isinstance(slots, int) else None
    return {
        "fits": fits,
        "model": model,
        "resources": [asdict(each) for each in resources],
        "short": [each.sentence for each in resources if each.sentence],
        "suggestion": sentence,
        **{key: node[key] for key in ("device", "memory_plan", "mends", "suggested_slots", "most_slots", "forecast")},
    }
