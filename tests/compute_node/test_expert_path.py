"""Compute reads what was loaded for it, however far compute and copies run behind the host and each other.

On a device whose streams are lazy every missing order shows up as an expert computed with other bytes than its own.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compute_node.copy_ticket import CopyTicket
from compute_node.device.cpu import CpuDevice
from compute_node.device.cuda import CudaDevice
from compute_node.device.seam import Device
from compute_node.expert_weights import ExpertWeights
from compute_node.hint_inbox import ReceivedHint
from compute_node.moe_forward import EXPERTS_IMPLEMENTATION, MoeForward, install, register_experts_function
from compute_node.schedule import POLICIES, SchedulePolicy
from compute_node.step_ledger import Phase, TokenSpan
from promoe.hint import Hint
from promoe.ids import ExpertId
from promoe.model_spec import Dtype, ExpertLayout
from tests.compute_node.expert_stack import ExpertStack, PlainArena, StackOptions, arena_of, open_stack
from tests.compute_node.lazy_device import LazyDevice, LazyLink, LazyStreams, LazyTicket
from tests.compute_node.test_moe_forward import Flags, experts_module, routed_batch

NUM_LAYERS, NUM_EXPERTS, PER_TOKEN = 3, 6, 2
LAYOUT = ExpertLayout.of(Dtype.FLOAT32, {"gate_up_proj": (8, 8), "down_proj": (8, 4)})

LAZY_POLICIES = {
    **POLICIES,
    "overlapped lru": replace(POLICIES["promoe"], eviction="lru", chunks_demand=True, max_chunks_in_flight=2),
    "serial": replace(POLICIES["proactive"], serial=True),
}


@cache
def arena() -> PlainArena:
    """Every expert is full of a byte of its own."""
    made = PlainArena(LAYOUT, NUM_LAYERS, NUM_EXPERTS)
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            fill(made, ExpertId(layer, expert), 1 + layer * NUM_EXPERTS + expert)
    return made


def fill(made: PlainArena, expert: ExpertId, byte: int) -> None:
    ctypes.memset(made.address(expert), byte, LAYOUT.blob_nbytes)


@dataclass(frozen=True)
class LayerPlan:
    """One layer of one step: what it needs, what is hinted before it, and whose blob is exchanged after it."""

    needed: tuple[int, ...]
    hinted: tuple[int, ...]
    hinted_distance: int
    retired: int | None


experts = st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True, min_size=1, max_size=NUM_EXPERTS).map(tuple)
layer_plans = st.builds(
    LayerPlan,
    needed=experts,
    hinted=experts,
    hinted_distance=st.integers(1, NUM_LAYERS),
    retired=st.none() | st.none() | st.integers(0, NUM_EXPERTS - 1),
)
step_plans = st.lists(st.tuples(*[layer_plans] * NUM_LAYERS), min_size=1, max_size=6)


class LazyRun:
    """Steps over a stack; `wrong` names the experts that were computed with other bytes than their own."""

    def __init__(self, stack: ExpertStack, device: LazyDevice) -> None:
        self.wrong: list[ExpertId] = []
        self.num_computed = 0
        self._stack, self._device = stack, device

    def step(self, plans: tuple[LayerPlan, ...]) -> None:
        """Every layer once."""
        num_tokens = max(len(plan.needed) for plan in plans)
        phase = Phase.DECODE if num_tokens == 1 else Phase.PREFILL
        self._stack.ledger.begin_step([TokenSpan("r", 1 if phase is Phase.DECODE else num_tokens, phase)])
        for layer, plan in enumerate(plans):
            self._hint(layer, plan)
            self._stack.expert_cache.notice()
            ids_TK = np.array([plan.needed], dtype=np.uint16)
            with self._stack.expert_cache.acquire(layer, sorted(plan.needed), ids_TK) as acquisition:
                for expert, slot in self._stack.expert_cache.arrivals(acquisition):
                    self._compute(ExpertId(layer, expert), slot)
            if plan.retired is not None:
                self._exchange(ExpertId(layer, plan.retired))
        self._stack.ledger.end_step()

    def _hint(self, layer: int, plan: LayerPlan) -> None:
        step, target = self._stack.ledger.step, layer + plan.hinted_distance - 1
        ids = np.array(plan.hinted, np.uint16)
        scores = np.linspace(0.95, 0.2, len(ids), dtype=np.float32)
        hint = Hint(
            step + target // NUM_LAYERS, target % NUM_LAYERS, step, layer, ids, scores, min(PER_TOKEN, len(ids)), "test"
        )
        self._stack.hints.put(ReceivedHint(hint, None))

    def _compute(self, expert: ExpertId, slot: int) -> None:
        expected = self._stack.arena.bytes_of(expert)
        address = self._stack.slots_SB[slot].data_ptr()

        def read() -> None:
            self.num_computed += 1
            if ctypes.string_at(address, LAYOUT.blob_nbytes) != expected:
                self.wrong.append(expert)

        self._device.compute(read)

    def _exchange(self, expert: ExpertId) -> None:
        """The store withdraws the blob, writes it anew and publishes it."""
        self._stack.expert_cache.blob_retired(expert)
        old = self._stack.arena.bytes_of(expert)[0]
        fill(self._stack.arena, expert, (old + 100) % 256)
        self._stack.expert_cache.blob_published(expert)


def run(plans: list[tuple[LayerPlan, ...]], options: StackOptions, device: LazyDevice) -> LazyRun:
    with open_stack(arena(), NUM_LAYERS, replace(options, device=device)) as stack:
        lazy = LazyRun(stack, device)
        for plan in plans:
            lazy.step(plan)
            stack.expert_cache.check_integrity()
        device.synchronize()
    return lazy


def options_of(policy: SchedulePolicy, slots: int, chunk_nbytes: int, in_flight: int) -> StackOptions:
    policy = replace(policy, chunk_nbytes=chunk_nbytes, max_chunks_in_flight=in_flight)
    return StackOptions(slots, policy=policy, experts_per_token=PER_TOKEN)


@pytest.mark.parametrize("name", LAZY_POLICIES)
@settings(max_examples=30, deadline=None)
@given(
    plans=step_plans,
    slots=st.integers(1, NUM_EXPERTS),
    chunk_nbytes=st.sampled_from([64, 200, LAYOUT.blob_nbytes]),
    in_flight=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_every_expert_is_computed_with_its_own_bytes(
    name: str, plans: list[tuple[LayerPlan, ...]], slots: int, chunk_nbytes: int, in_flight: int, seed: int
) -> None:
    lazy = run(plans, options_of(LAZY_POLICIES[name], slots, chunk_nbytes, in_flight), LazyDevice(seed))
    assert lazy.wrong == []
    assert lazy.num_computed == sum(len(layer.needed) for step in plans for layer in step)


class HastyLink(LazyLink):
    """Overwrites slots without regard to compute."""

    def order_after(self, compute: CopyTicket) -> None:
        """Forgotten."""


class CarelessTicket(LazyTicket):
    """Compute does not wait for it."""

    def wait_on_compute(self) -> None:
        """Forgotten."""


class CarelessLink(LazyLink):
    """Its tickets do not hold up compute."""

    def copy(self, destination_address: int, source_address: int, nbytes: int) -> CopyTicket:
        ticket = super().copy(destination_address, source_address, nbytes)
        assert isinstance(ticket, LazyTicket)
        careless = CarelessTicket(self._streams)
        self._streams.copy.append(lambda: setattr(careless, "is_passed", True))
        return careless


@pytest.mark.parametrize("link", [HastyLink, CarelessLink])
def test_an_order_that_is_not_kept_is_seen(link: Callable[[LazyStreams], LazyLink]) -> None:
    plan = LayerPlan(needed=(0, 1, 2, 3, 4, 5), hinted=(0,), hinted_distance=1, retired=None)
    wrong = 0
    for seed in range(20):
        options = options_of(LAZY_POLICIES["overlapped lru"], 2, LAYOUT.blob_nbytes, 4)
        wrong += len(run([(plan,) * NUM_LAYERS] * 3, options, LazyDevice(seed, link)).wrong)
    assert wrong > 0


def test_the_lazy_device_runs_behind_the_host() -> None:
    device = LazyDevice(0)
    source, target = torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    link = device.open_link()
    mark = device.mark_compute()
    link.order_after(mark)
    ticket = link.copy(target.data_ptr(), source.data_ptr(), 8)
    ticket.wait_on_host()
    assert mark.is_done(), "the copy stream waited for it"
    assert torch.equal(source, target)
    assert link.take_use().nbytes == 8


# ---------------------------------------------------------------------- whole layers, on real devices


def cuda() -> Device:
    return CudaDevice()


DEVICES = [pytest.param(CpuDevice, id="cpu"), pytest.param(cuda, id="cuda", marks=pytest.mark.gpu)]
MODULE_LAYERS = 3
COMPUTE_LAG_CLOCKS = 200_000


@contextmanager
def pinned(device: Device, blobs: PlainArena, is_pinned: bool) -> Iterator[None]:
    """Within the context copies out of the arena go the direct way, if asked for."""
    nbytes = MODULE_LAYERS * blobs.num_experts * blobs.layout.blob_stride_nbytes
    address = blobs.address(ExpertId(0, 0))
    if is_pinned:
        device.pinning.register(address, nbytes)
    try:
        yield
    finally:
        if is_pinned:
            device.pinning.drain()
            device.pinning.unregister(address)


def layers_on(device: Device) -> list[nn.Module]:
    """MoE layers of different weights."""
    modules = [
        experts_module(Flags(True, False, False, True, False), torch.float32, device.torch_device)
        for _ in range(MODULE_LAYERS)
    ]
    for layer, module in enumerate(modules):
        for parameter in module.parameters():
            parameter.mul_(1 + layer / 7)
    return modules


def layer_outputs(
    modules: list[nn.Module], blobs: PlainArena, steps: list[list[int]], options: StackOptions
) -> list[torch.Tensor]:
    """Of every layer of every step, in order.

    Args:
        steps: per layer, the number of tokens of its batch; they are drawn alike for everybody.
    """
    device = options.device
    outputs: list[torch.Tensor] = []
    with open_stack(blobs, MODULE_LAYERS, options) as stack:
        weights = [ExpertWeights(row, blobs.layout) for row in stack.slots_SB]
        for layer, module in enumerate(modules):
            install(module, MoeForward(layer, weights, stack.expert_cache, stack.recorder, stack.observer))
            module.config._experts_implementation = EXPERTS_IMPLEMENTATION  # type: ignore[union-attr]
        for number, step in enumerate(steps):
            phase = Phase.DECODE if max(step) == 1 else Phase.PREFILL
            stack.ledger.begin_step([TokenSpan("r", step[0], phase)])
            for layer, num_tokens in enumerate(step):
                hint_anything(stack, layer, number)
                stack.expert_cache.notice()
                if device.kind == "cuda":
                    torch.cuda._sleep(COMPUTE_LAG_CLOCKS)  # compute runs behind the host, copies do not
                outputs.append(modules[layer](*routed_batch(num_tokens, torch.float32, device.torch_device)))
            stack.ledger.end_step()
        device.synchronize()
    return [output.cpu() for output in outputs]


def hint_anything(stack: ExpertStack, layer: int, number: int) -> None:
    """A hint for the layer after this one, or for the next step's first; often wrong."""
    step, target = stack.ledger.step, layer + 1
    ids = np.roll(np.arange(stack.arena.num_experts, dtype=np.uint16), number + layer)[:4]
    scores = np.array([0.9, 0.8, 0.6, 0.3], np.float32)
    hint = Hint(step + target // MODULE_LAYERS, target % MODULE_LAYERS, step, layer, ids, scores, 3, "test")
    stack.hints.put(ReceivedHint(hint, None))


@pytest.mark.parametrize("open_device", DEVICES)
@pytest.mark.parametrize("is_pinned", [True, False], ids=["direct", "ring"])
@settings(max_examples=6, deadline=None)
@given(
    steps=st.lists(st.lists(st.sampled_from([1, 1, 1, 5]), min_size=MODULE_LAYERS, max_size=MODULE_LAYERS), max_size=5),
    slots=st.integers(1, 5),
    chunk_nbytes=st.sampled_from([500, 1 << 20]),
    in_flight=st.integers(1, 4),
)
def test_hints_and_policies_change_no_bit_on_any_device(
    open_device: Callable[[], Device],
    is_pinned: bool,
    steps: list[list[int]],
    slots: int,
    chunk_nbytes: int,
    in_flight: int,
) -> None:
    device = open_device()
    modules = layers_on(device)
    blobs = arena_of(modules)
    register_experts_function()
    reactive = replace(POLICIES["lru"], serial=True)
    with pinned(device, blobs, is_pinned):
        expected = layer_outputs(modules, blobs, steps, StackOptions(6, policy=reactive, device=device))
        for policy in LAZY_POLICIES.values():
            given_chunks = replace(policy, chunk_nbytes=chunk_nbytes, max_chunks_in_flight=in_flight)
            options = StackOptions(slots, policy=given_chunks, device=device, experts_per_token=3)
            got = layer_outputs(modules, blobs, steps, options)
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)), policy.name
    on_cpu = layers_on(CpuDevice())
    cpu = layer_outputs(on_cpu, arena_of(on_cpu), steps, StackOptions(6, policy=reactive))
    for one, other in zip(expected, cpu, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
