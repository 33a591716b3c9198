"""The command line of a plan, which `promoe plan` writes; sizes are bytes."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compute_node.planning.planned_device import AskedDevice


@dataclass(frozen=True)
class PlanOptions:
    """What was asked for; None: as it is here.

    Attributes:
        config, assignments: the configuration, as the node reads it.
        device: a machine that is not this one.
        link, memory_bandwidth: bytes per second.
        resident_tpot_s: of decoding with all experts resident, measured by whoever asks.
        trace: a recorded routing.
        num_requests: decoded together when the forecast is made.
    """

    config: Path | None
    assignments: tuple[str, ...]
    device: AskedDevice
    link: float | None
    memory_bandwidth: float | None
    resident_tpot_s: float | None
    trace: Path | None
    num_requests: int


def parse_options(arguments: Sequence[str]) -> PlanOptions:
    """Ends the process with a message where the command line is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m compute_node.planning",
        description="Says what a compute node would decide for the model whose footprint (JSON) is on standard input.",
    )
    parser.add_argument("--config", type=Path, help="TOML file with a [compute] table")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides the file")
    parser.add_argument("--gpu-memory", type=_positive_int, metavar="BYTES", help="plan for a GPU of this size")
    parser.add_argument("--host-memory", type=_positive_int, metavar="BYTES", help="plan for a host with so much free")
    parser.add_argument("--link", type=_positive, metavar="BYTES_PER_S", help="host memory to device")
    parser.add_argument("--memory-bandwidth", type=_positive, metavar="BYTES_PER_S", help="of the device's memory")
    parser.add_argument("--resident-tpot", type=_positive, metavar="S", help="measured with all experts resident")
    parser.add_argument("--trace", type=Path, help="recorded routing; default: a made-up one")
    parser.add_argument("--requests", type=_positive_int, default=1, metavar="N", help="decoded together")
    given = parser.parse_args(arguments)
    return PlanOptions(
        config=given.config,
        assignments=tuple(given.set),
        device=AskedDevice(given.gpu_memory, given.host_memory),
        link=given.link,
        memory_bandwidth=given.memory_bandwidth,
        resident_tpot_s=given.resident_tpot,
        trace=given.trace,
        num_requests=given.requests,
    )


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: allowed: above 0")
    return number


def _positive_int(text: str) -> int:
    return int(_positive(text))
