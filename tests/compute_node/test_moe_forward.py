"""The experts function against Transformers' own, over every flag combination of the interface, and bit by bit
against itself over everything that may only change latency."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from compute_node.device.cpu import CpuDevice
from compute_node.device.cuda import CudaDevice
from compute_node.device.seam import Device
from compute_node.expert_weights import ExpertWeights, check_layout
from compute_node.moe_forward import EXPERTS_IMPLEMENTATION, MoeForward, Routing, install, register_experts_function
from compute_node.step_ledger import Phase, TokenSpan
from promoe.errors import ModelUnsupported
from promoe.model_spec import Dtype, ExpertLayout
from tests.compute_node.expert_stack import StackOptions, arena_of, open_stack

NUM_EXPERTS, HIDDEN, EXPERT_HIDDEN, PER_TOKEN = 6, 16, 12, 3


@dataclass(frozen=True)
class Flags:
    """What `use_experts_implementation` can say about a module."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool

    def __str__(self) -> str:
        return "-".join(name for name, value in vars(self).items() if value) or "plain"


# Transformers 5.17 has no family with a norm behind experts.
KNOWS_POST_NORM = "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters

# Without a gate there is nothing to concatenate or interleave.
ALL_FLAGS = [
    Flags(*values)
    for values in itertools.product([True, False], repeat=5)
    if (values[0] or values[3]) and (KNOWS_POST_NORM or not values[4])
]


def experts_module(flags: Flags, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A module as Transformers' families write them, with random weights."""

    class Experts(nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            up_name, width = ("gate_up_proj", 2 * EXPERT_HIDDEN) if flags.has_gate else ("up_proj", EXPERT_HIDDEN)
            self.num_experts = NUM_EXPERTS
            for name, rows, columns in ((up_name, width, HIDDEN), ("down_proj", HIDDEN, EXPERT_HIDDEN)):
                shape = (columns, rows) if flags.is_transposed else (rows, columns)
                setattr(self, name, nn.Parameter(torch.randn(NUM_EXPERTS, *shape) / 4))
                if flags.has_bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(NUM_EXPERTS, rows)))
            self.act_fn = nn.SiLU()
            if flags.has_post_expert_norm:
                self.post_expert_norm = nn.RMSNorm(HIDDEN)

        def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the eager form is not what is compared with")

    if flags.has_gate and not flags.is_concatenated:

        def interleaved_gate(self: Experts, gate_up: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(gate_up[..., ::2]) * (gate_up[..., 1::2] + 1)

        Experts._apply_gate = interleaved_gate  # type: ignore[attr-defined]
    post_norm: dict[str, bool] = {"has_post_expert_norm": flags.has_post_expert_norm} if KNOWS_POST_NORM else {}
    decorated = use_experts_implementation(
        Experts,
        is_concatenated=flags.is_concatenated,
        is_transposed=flags.is_transposed,
        has_bias=flags.has_bias,
        has_gate=flags.has_gate,
        **post_norm,  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    module: nn.Module = decorated(SimpleNamespace(_experts_implementation="batched_mm"))
    return module.to(device, dtype).requires_grad_(False)


def routed_batch(num_tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Hidden states (T, D), top-k ids (T, K), weights (T, K)."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, HIDDEN, generator=generator)
    weights_TK, ids_TK = torch.randn(num_tokens, NUM_EXPERTS, generator=generator).softmax(-1).topk(PER_TOKEN)
    return hidden_TD.to(device, dtype), ids_TK.to(device), weights_TK.to(device, dtype)


@contextmanager
def through_slots(module: nn.Module, options: StackOptions) -> Iterator[Callable[..., torch.Tensor]]:
    """The module, computing out of an expert cache."""
    register_experts_function()
    arena = arena_of([module])
    with open_stack(arena, 1, options) as stack:
        weights = [ExpertWeights(row, arena.layout) for row in stack.slots_SB]
        install(module, MoeForward(0, weights, stack.expert_cache, stack.recorder, stack.observer))
        config = cast(SimpleNamespace, module.config)
        before, config._experts_implementation = config._experts_implementation, EXPERTS_IMPLEMENTATION
        try:
            yield module
        finally:
            config._experts_implementation = before


def cuda() -> Device:
    return CudaDevice()


DEVICES = [pytest.param(CpuDevice, id="cpu"), pytest.param(cuda, id="cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("open_device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", ALL_FLAGS, ids=str)
def test_equals_transformers_for_every_kind_of_experts(
    flags: Flags, dtype: torch.dtype, open_device: Callable[[], Device]
) -> None:
    device = open_device()
    module = experts_module(flags, dtype, device.torch_device)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for num_tokens in (1, 7):
        batch = routed_batch(num_tokens, dtype, device.torch_device)
        expected_TD = module(*batch)
        with through_slots(module, StackOptions(slots_per_layer=2, device=device)) as served:
            torch.testing.assert_close(served(*batch), expected_TD, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_that_changes_latency_changes_a_bit(dtype: torch.dtype) -> None:
    flags = Flags(True, True, False, True, False)
    module = experts_module(flags, dtype, torch.device("cpu"))
    for num_tokens in (1, 2, 9):
        batch = routed_batch(num_tokens, dtype, torch.device("cpu"))
        outputs: list[torch.Tensor] = []
        for slots, chunk_nbytes, serial, eviction in itertools.product(
            (1, 2, 3, NUM_EXPERTS), (33, 1 << 20), (False, True), ("lru", "lfu")
        ):
            options = StackOptions(slots, chunk_nbytes=chunk_nbytes, serial=serial, eviction=eviction)
            with through_slots(module, options) as served:
                outputs += [served(*batch), served(*batch)]  # cold and warm
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_token_that_names_an_expert_twice_gets_it_twice() -> None:
    flags = Flags(True, False, False, True, False)
    module = experts_module(flags, torch.float32, torch.device("cpu"))
    hidden_1D, _, weights_1K = routed_batch(1, torch.float32, torch.device("cpu"))
    batch = (hidden_1D, torch.tensor([[4, 4, 1]]), weights_1K)
    expected_1D = module(*batch)
    with through_slots(module, StackOptions(slots_per_layer=2)) as served:
        torch.testing.assert_close(served(*batch), expected_1D, rtol=1e-5, atol=1e-5)


def test_grouping_rows_and_back_is_the_identity() -> None:
    for num_tokens in (1, 2, 13):
        hidden_TD, ids_TK, _ = routed_batch(num_tokens, torch.float32, torch.device("cpu"))
        routing = Routing.of(ids_TK)
        expected_TKD = hidden_TD.unsqueeze(1).expand(-1, PER_TOKEN, -1)
        assert torch.equal(routing.ungroup(routing.group(hidden_TD)), expected_TKD)
        grouped_ids = routing.ungroup(
            torch.repeat_interleave(
                torch.tensor(routing.experts), torch.tensor(routing.bounds).diff(), output_size=num_tokens * PER_TOKEN
            ).unsqueeze(-1)
        ).squeeze(-1)
        assert torch.equal(grouped_ids, ids_TK)


def test_hits_are_attributed_to_phases_and_requests() -> None:
    module = experts_module(Flags(True, False, False, True, False), torch.float32, torch.device("cpu"))
    register_experts_function()
    arena = arena_of([module])
    with open_stack(arena, 1, StackOptions(slots_per_layer=NUM_EXPERTS)) as stack:
        weights = [ExpertWeights(row, arena.layout) for row in stack.slots_SB]
        forward = MoeForward(0, weights, stack.expert_cache, stack.recorder, stack.observer)
        hidden_TD = torch.randn(3, HIDDEN)
        ids_TK = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 4, 5]])
        stack.ledger.begin_step([TokenSpan("writer", 1, Phase.DECODE), TokenSpan("reader", 2, Phase.PREFILL)])
        forward(module, hidden_TD, ids_TK, torch.ones(3, 3))  # type: ignore[arg-type]
        forward(module, hidden_TD, ids_TK, torch.ones(3, 3))  # type: ignore[arg-type]
        stack.ledger.end_step()
        decode, prefill = stack.recorder.phases[Phase.DECODE], stack.recorder.phases[Phase.PREFILL]
        assert (decode.misses, decode.hits) == (3, 3)
        assert (prefill.misses, prefill.hits) == (5, 5), "experts 0, 1, 3, 4, 5 once each per step"
        assert (decode.tokens, prefill.tokens) == (2, 4)
        writer, reader = stack.ledger.take("writer"), stack.ledger.take("reader")
        assert (writer.decode.misses, writer.decode.hits, writer.prefill.hits) == (3, 3, 0)
        assert (reader.prefill.misses, reader.prefill.hits) == (5, 5)
        blobs = 6 * arena.layout.blob_nbytes
        assert abs(decode.demand_nbytes + prefill.demand_nbytes - blobs) <= 2, "shares of what was loaded"


def test_experts_with_parameters_it_would_ignore_are_refused() -> None:
    layout = ExpertLayout.of(Dtype.FLOAT32, {"gate_up_proj": (4, 2), "down_proj": (2, 2), "scales": (2,)})
    with pytest.raises(ModelUnsupported, match="scales"):
        check_layout(layout)
    with pytest.raises(ModelUnsupported, match="parameters down_proj;"):
        check_layout(ExpertLayout.of(Dtype.FLOAT32, {"down_proj": (2, 2)}))
