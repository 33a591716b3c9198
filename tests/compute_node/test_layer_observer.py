"""What a sampler gets of a step is what it asked for: the rows it is told of, as the layers saw them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compute_node.device.cpu import CpuDevice
from compute_node.device.cuda import CudaDevice
from compute_node.device.seam import Device, HostCopy
from compute_node.layer_observer import LayerObserver
from compute_node.layer_sample import LayerSample, WantedSamples, sampled_rows
from promoe.hint import ObservedKind, StepSpan, StepStart

NUM_LAYERS, HIDDEN, EXPERTS_PER_TOKEN = 3, 4, 2


@dataclass
class Sampler:
    """Wants the same of every step, and keeps it."""

    wanted: WantedSamples | None
    starts: list[StepStart] = field(default_factory=list)
    samples: list[LayerSample] = field(default_factory=list)

    def begin_step(self, start: StepStart) -> WantedSamples | None:
        self.starts.append(start)
        return self.wanted

    def take(self, sample: LayerSample) -> None:
        self.samples.append(sample)


class CountingDevice(CpuDevice):
    """A device that counts its copies."""

    num_copies = 0
    num_indexed = 0

    def index_rows(self, rows: Sequence[int]) -> torch.Tensor:
        self.num_indexed += 1
        return super().index_rows(rows)

    def copy_to_host(self, hidden_TD: torch.Tensor, index_R: torch.Tensor | None) -> HostCopy:
        self.num_copies += 1
        return super().copy_to_host(hidden_TD, index_R)


def layer_input(step: int, layer: int, num_tokens: int) -> torch.Tensor:
    rows = torch.arange(num_tokens)[:, None] + torch.zeros(1, HIDDEN)
    return rows + 100 * layer + 1000 * step


def routing(layer: int, num_tokens: int) -> np.ndarray:
    return np.arange(num_tokens * EXPERTS_PER_TOKEN).reshape(num_tokens, -1) + layer


def run_step(
    observer: LayerObserver, step: int, spans: tuple[StepSpan, ...], padding: int = 0, device: Device | None = None
) -> None:
    """As the engine's thread does it; what was shown is overwritten afterwards, as compute may do."""
    observer.begin_step(StepStart(step, spans))
    num_rows = sum(span.num_tokens for span in spans) + padding
    torch_device = torch.device("cpu") if device is None else device.torch_device
    for layer in range(NUM_LAYERS):
        hidden_TD = layer_input(step, layer, num_rows).to(torch_device)
        observer.layer_input(layer, hidden_TD)
        hidden_TD.mul_(-1)
        observer.routed(layer, routing(layer, num_rows), hidden_TD, (layer, 7))
        hidden_TD.zero_()
    output_TD = layer_input(step, NUM_LAYERS, num_rows).to(torch_device)
    observer.last_output(output_TD)
    output_TD.zero_()


def observer_of(*samplers: Sampler, device: Device | None = None) -> LayerObserver:
    return LayerObserver(NUM_LAYERS, device or CpuDevice(), samplers)


def cuda() -> Device:
    return CudaDevice()


@pytest.mark.parametrize("open_device", [CpuDevice, pytest.param(cuda, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("max_rows", [1, 4, 4000])
def test_samples_are_what_was_shown_however_late_they_are_read(
    open_device: Callable[[], Device], max_rows: int
) -> None:
    device = open_device()
    sampler = Sampler(WantedSamples(max_rows, layer_input=True, router_input=True, routing=False))
    observer = observer_of(sampler, device=device)
    spans = (StepSpan("writer", 1, is_prefill=False), StepSpan("reader", 3000, is_prefill=True))
    for step in range(1, 5):
        run_step(observer, step, spans if step % 2 else spans[:1], device=device)
    assert len(sampler.samples) == 4 * (2 * NUM_LAYERS + 1)
    for sample in sampler.samples:
        assert sample.hidden is not None
        sign = 1 if sample.kind is ObservedKind.LAYER_INPUT else -1
        shown_TD = sign * layer_input(sample.step, sample.layer, sample.num_tokens)
        assert torch.equal(sample.hidden.wait(), shown_TD[list(sample.rows)])


@pytest.mark.parametrize("layer_input_wanted", [False, True])
@pytest.mark.parametrize("router_input_wanted", [False, True])
@pytest.mark.parametrize("routing_wanted", [False, True])
@given(
    spans=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    max_rows=st.integers(1, 6),
    padding_and_every=st.tuples(st.integers(0, 2), st.integers(1, NUM_LAYERS + 1)),
)
def test_samples_are_the_rows_of_what_was_shown(
    layer_input_wanted: bool,
    router_input_wanted: bool,
    routing_wanted: bool,
    spans: list[int],
    max_rows: int,
    padding_and_every: tuple[int, int],
) -> None:
    padding, every = padding_and_every
    sampler = Sampler(WantedSamples(max_rows, layer_input_wanted, router_input_wanted, routing_wanted, every))
    step_spans = tuple(StepSpan(f"r{i}", n, n > 1) for i, n in enumerate(spans))
    observer = observer_of(sampler)
    run_step(observer, 1, step_spans, padding)
    run_step(observer, 2, step_spans)
    rows = sampled_rows(step_spans, max_rows)
    routings: list[tuple[int, int]] = []
    for sample in sampler.samples:
        assert (sample.rows, sample.num_tokens) == (rows, sum(spans))
        sign = 1 if sample.kind is ObservedKind.LAYER_INPUT else -1
        if sample.hidden is None:
            assert sample.kind is ObservedKind.NONE
        else:
            shown_TD = sign * layer_input(sample.step, sample.layer, sum(spans))
            assert torch.equal(sample.hidden.wait(), shown_TD[list(rows)])
        for known in sample.routings:
            assert known.layer <= sample.layer
            assert known.topk_ids_RK.dtype == np.uint16
            np.testing.assert_array_equal(known.topk_ids_RK, routing(known.layer, sum(spans))[list(rows)])
            routings.append((sample.step, known.layer))
    kinds = [(sample.step, sample.layer, sample.kind) for sample in sampler.samples]
    expected: list[tuple[int, int, ObservedKind]] = []
    for step in (1, 2):
        for layer in sorted({*range(0, NUM_LAYERS, every), NUM_LAYERS - 1}):
            if layer_input_wanted:
                expected.append((step, layer, ObservedKind.LAYER_INPUT))
            if router_input_wanted:
                expected.append((step, layer, ObservedKind.ROUTER_INPUT))
            elif routing_wanted and not layer_input_wanted:
                expected.append((step, layer, ObservedKind.NONE))
        if layer_input_wanted:
            expected.append((step, NUM_LAYERS, ObservedKind.LAYER_INPUT))
    assert kinds == expected
    # Every layer's routing exactly once, and none is left over for the next step.
    all_layers = [(step, layer) for step in (1, 2) for layer in range(NUM_LAYERS)]
    assert routings == (all_layers if routing_wanted else [])


def test_nothing_is_copied_for_nobody() -> None:
    device, sampler = CountingDevice(), Sampler(None)
    run_step(observer_of(sampler, device=device), 1, (StepSpan("r", 3, True),))
    assert (device.num_copies, sampler.samples, len(sampler.starts)) == (0, [], 1)


def test_two_who_want_the_same_share_a_copy() -> None:
    device = CountingDevice()
    same = [Sampler(WantedSamples(2, True, False, False)) for _ in range(2)]
    other = Sampler(WantedSamples(1, True, False, False))
    run_step(observer_of(*same, other, device=device), 1, (StepSpan("r", 3, True),))
    assert device.num_copies == 2 * (NUM_LAYERS + 1)
    assert same[0].samples[0].hidden is same[1].samples[0].hidden
    assert other.samples[0].rows == (2,)


def test_rows_are_indexed_where_layers_are_computed_and_once_a_step() -> None:
    """Between two steps continuous batching is on another stream than in them, and nothing orders the one's work before
    the other's: a layer would be gathered by numbers that are not there yet."""
    device, sampler = CountingDevice(), Sampler(WantedSamples(2, True, True, False))
    observer = observer_of(sampler, device=device)
    spans = (StepSpan("r", 3, True),)
    observer.begin_step(StepStart(1, spans))
    assert device.num_indexed == 0
    run_step(observer, 2, spans)
    assert device.num_indexed == 1
    run_step(observer, 3, (StepSpan("r", 2, True),))
    assert device.num_indexed == 1, "all of them need no numbers"


@pytest.mark.gpu
def test_layers_that_another_stream_computes_than_the_one_between_steps_are_sampled_right() -> None:
    device = CudaDevice()
    sampler = Sampler(WantedSamples(1, layer_input=True, router_input=False, routing=False))
    observer = observer_of(sampler, device=device)
    computing = torch.cuda.Stream()
    busy = torch.ones(8192, 8192, device=device.torch_device)
    for step in range(1, 4):
        for _ in range(5):  # behind which whatever is begun between the steps would wait
            torch.mm(busy, busy)
        observer.begin_step(StepStart(step, (StepSpan("r", 700, is_prefill=True),)))
        with torch.cuda.stream(computing):
            for layer in range(NUM_LAYERS):
                observer.layer_input(layer, layer_input(step, layer, 700).to(device.torch_device))
    for sample in sampler.samples:
        assert sample.hidden is not None
        assert torch.equal(sample.hidden.wait(), layer_input(sample.step, sample.layer, 700)[list(sample.rows)])


def test_a_step_without_tokens_is_nobodys() -> None:
    sampler = Sampler(WantedSamples(2, True, True, True))
    observer = observer_of(sampler)
    observer.begin_step(StepStart(1, ()))
    observer.layer_input(0, torch.zeros(0, HIDDEN))
    observer.routed(0, np.zeros((0, EXPERTS_PER_TOKEN), np.int64), torch.zeros(0, HIDDEN), None)
    assert sampler.samples == []


def test_what_was_ready_is_told_to_whoever_wants_it() -> None:
    wants, other = (
        Sampler(WantedSamples(2, False, False, True, ready=True)),
        Sampler(WantedSamples(2, False, False, True)),
    )
    run_step(observer_of(wants, other), 1, (StepSpan("r", 1, False),))
    told = [routing.ready for sample in wants.samples for routing in sample.routings]
    assert told == [(layer, 7) for layer in range(NUM_LAYERS)]
    assert {routing.ready for sample in other.samples for routing in sample.routings} == {None}
