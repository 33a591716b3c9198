"""Which device serves, decided once at start-up and explained."""

from dataclasses import dataclass

import torch

from compute_node.config import DeviceChoice
from compute_node.device.cpu import CpuDevice
from compute_node.device.cuda import CudaDevice
from compute_node.device.seam import Device
from promoe.config import SettingUnfit


@dataclass(frozen=True)
class ChosenDevice:
    """The device and why it was taken, one sentence."""

    device: Device
    reason: str


def choose_device(choice: DeviceChoice, link_bytes_per_s: float | None) -> ChosenDevice:
    """Only `auto` may fall back.

    Raises:
        Unavailable: CUDA was asked for and cannot be used.
        SettingUnfit: an emulated link was asked for on a device with a real one.
    """
    if choice is DeviceChoice.CUDA or (choice is DeviceChoice.AUTO and torch.cuda.is_available()):
        device = CudaDevice()
        if link_bytes_per_s is not None:
            raise SettingUnfit(
                "compute.link_bytes_per_s plays a link on the CPU; a GPU has a real one. Use --device cpu."
            )
        return ChosenDevice(device, "asked for" if choice is DeviceChoice.CUDA else "a CUDA device can be used")
    reason = "asked for" if choice is DeviceChoice.CPU else "auto: no CUDA device can be used"
    return ChosenDevice(CpuDevice(link_bytes_per_s), reason)
