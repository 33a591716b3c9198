"""Which device a plan is made for, and what will be free on it once the dense weights are loaded."""

from dataclasses import dataclass
from typing import Final

from compute_node.config import ComputeConfig, DeviceChoice
from compute_node.device.choice import choose_device
from compute_node.device.seam import Device
from promoe.config import SettingUnfit
from promoe.footprint import ModelFootprint

CONTEXT_NBYTES: Final = 512 << 20
"""What CUDA's context and libraries take of a GPU that cannot be asked (an assumption; a GPU that is here is asked)."""


@dataclass(frozen=True)
class AskedDevice:
    """A machine that is not this one.

    Attributes:
        gpu_nbytes: memory of its GPU; None: this machine's device.
        host_nbytes: memory of a host that computes itself; None: this machine's.
    """

    gpu_nbytes: int | None = None
    host_nbytes: int | None = None


@dataclass(frozen=True)
class PlannedDevice:
    """What memory is reckoned with.

    Attributes:
        kind: `cuda` or `cpu`.
        description: for people.
        free_nbytes: before anything of the model is loaded; on a CPU the arena is there already.
        device: the device itself; None for one that is not here.
    """

    kind: str
    description: str
    free_nbytes: int
    device: Device | None

    @classmethod
    def of(cls, config: ComputeConfig, footprint: ModelFootprint, asked: AskedDevice) -> "PlannedDevice":
        """The device that a node with this configuration would choose, or the one that was asked for.

        Raises:
            Unavailable: CUDA was asked for and cannot be used here; `--gpu-memory` plans for a GPU elsewhere.
            SettingUnfit: a GPU's memory was given for the CPU.
        """
        if asked.gpu_nbytes is not None:
            if config.device is DeviceChoice.CPU or config.link_bytes_per_s is not None:
                raise SettingUnfit(
                    "--gpu-memory plans for a GPU; compute.device=cpu and a played link are for the CPU."
                )
            return cls("cuda", "a GPU of the size given", asked.gpu_nbytes - CONTEXT_NBYTES, None)
        device = choose_device(config.device, config.link_bytes_per_s).device
        free_nbytes = device.memory().free_nbytes
        if device.kind == "cuda":
            return cls("cuda", device.name, free_nbytes, device)
        # The experts in the arena and those in slots are in the same memory.
        free_nbytes = asked.host_nbytes if asked.host_nbytes is not None else free_nbytes
        return cls("cpu", f"the CPU ({device.name})", free_nbytes - footprint.arena_nbytes, device)
