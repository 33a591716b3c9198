"""The device seam: what both implementations promise, and how one of them is chosen."""

import ctypes
import time
from collections.abc import Callable

import pytest
import torch

from compute_node.config import DeviceChoice
from compute_node.device.choice import choose_device
from compute_node.device.cpu import CpuDevice, CpuLink
from compute_node.device.cuda import CudaDevice
from compute_node.device.seam import Device, LinkUse
from promoe.config import SettingUnfit
from promoe.errors import InsufficientMemory, Unavailable


def cuda() -> Device:
    return CudaDevice()


DEVICES = [pytest.param(CpuDevice, id="cpu"), pytest.param(cuda, id="cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("open_device", DEVICES)
def test_slots_are_rows_that_any_kernel_may_read(open_device: Callable[[], Device]) -> None:
    slots_SB = open_device().allocate_slots(3, 8192)
    assert (slots_SB.shape, slots_SB.dtype, slots_SB.is_contiguous()) == ((3, 8192), torch.uint8, True)
    assert all(row.data_ptr() % 256 == 0 for row in slots_SB)


@pytest.mark.parametrize("open_device", DEVICES)
def test_a_copy_brings_the_bytes(open_device: Callable[[], Device]) -> None:
    device = open_device()
    slots_SB = device.allocate_slots(2, 4096)
    slots_SB.zero_()
    device.synchronize()
    source = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    link = device.open_link()
    link.order_after(device.mark_compute())
    device.wait_begins()
    ticket = link.copy(slots_SB[1].data_ptr(), source.data_ptr(), 4096)
    ticket.wait_on_compute()
    computed = slots_SB.clone()
    ticket.wait_on_host()
    assert ticket.is_done()
    use = link.take_use()
    assert use.nbytes == 4096
    assert use.busy_s > 0
    assert link.take_use() == LinkUse(0, 0.0), "each use is told once"
    assert torch.equal(computed[1].cpu(), source)
    assert not computed[0].any()
    assert device.take_compute_stall_s(0.25) == 0.25 or device.kind == "cuda"
    assert device.take_compute_stall_s(0.0) == 0.0, "each wait is told once"


@pytest.mark.parametrize("open_device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 3, 700])
def test_hidden_states_reach_the_host_as_they_were(open_device: Callable[[], Device], num_tokens: int) -> None:
    device = open_device()
    rows = tuple(range(0, num_tokens, 2))
    hidden_TD = torch.randn(num_tokens, 96).to(device.torch_device, torch.bfloat16)
    expected_TD = hidden_TD.cpu().clone()
    copies = [(device.copy_to_host(hidden_TD, None), expected_TD)]
    copies.append((device.copy_to_host(hidden_TD, device.index_rows(rows)), expected_TD[list(rows)]))
    hidden_TD.zero_()
    del hidden_TD
    overwriting = [torch.full((num_tokens, 96), 7.0, device=device.torch_device) for _ in range(4)]
    for copy, expected in copies:
        assert torch.equal(copy.wait(), expected)
        assert copy.ticket.is_done()
        assert copy.tensor.device.type == "cpu"
    assert len(overwriting) == 4


@pytest.mark.parametrize("open_device", DEVICES)
def test_memory_is_what_the_device_reports(open_device: Callable[[], Device]) -> None:
    memory = open_device().memory()
    assert 0 < memory.free_nbytes <= memory.total_nbytes


@pytest.mark.parametrize("open_device", DEVICES)
def test_slots_beyond_the_memory_are_refused_with_the_flag(open_device: Callable[[], Device]) -> None:
    device = open_device()
    with pytest.raises(InsufficientMemory, match=r"Lower --cache-rate or --expert-slots"):
        device.allocate_slots(1 << 20, device.memory().total_nbytes)


def test_an_emulated_link_delivers_no_byte_early() -> None:
    link = CpuLink(bytes_per_s=1e6)
    source = ctypes.create_string_buffer(b"x" * 10_000)
    target = ctypes.create_string_buffer(10_000)
    started_s = time.perf_counter()
    for _ in range(2):
        link.copy(ctypes.addressof(target), ctypes.addressof(source), 10_000)
    assert time.perf_counter() - started_s >= 0.02 - 1e-4
    assert target.raw == b"x" * 10_000


def test_auto_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = choose_device(DeviceChoice.AUTO, None)
    assert (chosen.device.kind, chosen.reason) == ("cpu", "auto: no CUDA device can be used")
    assert choose_device(DeviceChoice.CPU, 1e9).device.open_link().description == "emulated"


def test_a_device_that_was_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match=r"No CUDA device can be used.*--device cpu"):
        choose_device(DeviceChoice.CUDA, None)


@pytest.mark.gpu
def test_a_gpu_has_a_real_link() -> None:
    with pytest.raises(SettingUnfit, match="a GPU has a real one"):
        choose_device(DeviceChoice.CUDA, 1e9)


@pytest.mark.parametrize("open_device", DEVICES)
def test_rows_come_to_the_host_as_they_were_when_they_were_asked_for(open_device: Callable[[], Device]) -> None:
    device = open_device()
    hidden_TD = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3).to(device.torch_device)
    every, some = device.copy_to_host(hidden_TD, None), device.copy_to_host(hidden_TD, device.index_rows((1, 3)))
    hidden_TD.zero_()
    expected_TD = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)
    assert torch.equal(every.wait(), expected_TD)
    assert torch.equal(some.wait(), expected_TD[[1, 3]])
    assert every.tensor.device.type == some.tensor.device.type == "cpu"
