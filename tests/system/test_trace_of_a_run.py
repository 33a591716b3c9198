"""A trace of a real node tells what really happened: its counters', the model's own hidden states and routing."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compute_node.config import ComputeConfig, DeviceChoice
from expert_store.pack.packer import pack_checkpoint
from promoe import Answer, Client
from promoe.cli.trace_recording import TraceRecording
from promoe.node_report import CacheStats
from promoe.trace_events import LayerEvent, LoadEvent, StepEvent, TraceEvent
from promoe.trace_file import TraceReader
from tests.families import save_tiny_checkpoint
from tests.running_node import NodeThread
from tests.running_store import RunningStore, wait_until

PROMPT = [5, 6, 7, 8, 9, 10, 11]
OUTPUT_TOKENS = 12
ROWS = 4


@dataclass(frozen=True)
class Recorded:
    """Two answers, one after the other, and the trace of both."""

    reader: TraceReader
    answers: list[Answer]
    stats: CacheStats
    model: PreTrainedModel

    @property
    def steps(self) -> list[list[TraceEvent]]:
        """The trace step by step."""
        return list(self.reader.steps())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("trace")
    save_tiny_checkpoint("qwen2_moe", folder / "checkpoint", torch.float32)
    pack_checkpoint(folder / "checkpoint", folder / "pack", dtype=None)
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32)
    with RunningStore(folder / "pack", folder) as store:
        config = ComputeConfig(
            pack=folder / "pack",
            store_endpoint=store.endpoint,
            device=DeviceChoice.CPU,
            expert_slots=3,
            max_context_tokens=256,
            num_threads=1,
        )
        with NodeThread(config) as node, Client(node.endpoint) as client:
            client.complete([3, 4], max_tokens=3, ignore_eos=True)  # before the trace
            before = client.cache_stats()
            stream = client.trace(max_rows=ROWS, layer_input=True, router_input=True)
            recording = TraceRecording(stream, folder / "run.trace")
            recording.start()
            answers = [client.complete(PROMPT, max_tokens=OUTPUT_TOKENS, ignore_eos=True) for _ in range(2)]
            wait_until(lambda: recording.state.steps == 2 * OUTPUT_TOKENS)
            recording.close()
            recording.finish()
            stats = _since(before, client.cache_stats())
            yield Recorded(TraceReader(folder / "run.trace"), answers, stats, model)


def _since(before: CacheStats, after: CacheStats) -> CacheStats:
    for name in ("prefill", "decode"):
        phase, earlier = getattr(after, name), getattr(before, name)
        for field in ("hits", "misses", "tokens", "steps", "stall_s"):
            object.__setattr__(phase, field, getattr(phase, field) - getattr(earlier, field))
    return after


def layers_of(step: list[TraceEvent]) -> list[LayerEvent]:
    return [event for event in step if isinstance(event, LayerEvent)]


def test_it_begins_in_the_middle_of_a_run_and_is_whole(recorded: Recorded) -> None:
    model = recorded.reader.header.model
    assert recorded.reader.summary.is_complete
    assert len(recorded.steps) == 2 * OUTPUT_TOKENS
    for step in recorded.steps:
        assert [event.layer for event in layers_of(step)] == list(range(model.num_moe_layers))
    held = [place for place in recorded.reader.header.resident if place >= 0]
    assert len(held) == len(set(held)) > 0
    assert max(held) < model.num_moe_layers * model.num_experts
    assert recorded.reader.header.history_json.startswith("{")


def test_steps_say_whose_tokens_they_computed(recorded: Recorded) -> None:
    spans = [(event.spans, event.ended_request_ids) for (event, *_) in recorded.steps if isinstance(event, StepEvent)]
    first, second = (answer.request_id for answer in recorded.answers)
    told = [(span.request_id, span.num_tokens, span.is_prefill) for spans_of, _ in spans for span in spans_of]
    decode = [(1, False)] * (OUTPUT_TOKENS - 1)
    assert [each[1:] for each in told if each[0] == first] == [(len(PROMPT), True), *decode]
    # Its prompt's first block may be shared with the first request's.
    prefill, *others = [each[1:] for each in told if each[0] == second]
    assert (prefill[1], others) == (True, decode)
    assert first in spans[OUTPUT_TOKENS][1]


def test_hits_misses_and_stalls_are_those_of_the_counters(recorded: Recorded) -> None:
    for phase, is_prefill in ((recorded.stats.prefill, True), (recorded.stats.decode, False)):
        steps = [s for s in recorded.steps if isinstance(s[0], StepEvent) and s[0].spans[0].is_prefill == is_prefill]
        layers = [layer for step in steps for layer in layers_of(step)]
        assert sum(len(layer.hits) for layer in layers) == phase.hits
        assert sum(len(layer.misses) for layer in layers) == phase.misses
        assert sum(layer.stall_s for layer in layers) == pytest.approx(phase.stall_s)
        assert len(steps) == phase.steps
    for step in recorded.steps:
        for layer in layers_of(step):
            assert set(layer.hits) | set(layer.misses) == set(np.unique(layer.topk_ids_TK).tolist())
            assert set(layer.late) <= set(layer.misses)


def test_times_follow_each_other(recorded: Recorded) -> None:
    events = list(recorded.reader)
    assert isinstance(events[0], StepEvent)
    assert events[0].at_s == 0
    layers = [event for event in events if isinstance(event, LayerEvent)]
    assert all(one.end_s <= next_.at_s for one, next_ in itertools.pairwise(layers))
    assert all(layer.stall_s <= layer.end_s - layer.at_s for layer in layers)
    loads = [event for event in events if isinstance(event, LoadEvent)]
    assert loads
    assert all(load.begin_s <= load.end_s <= load.at_s for load in loads)


@torch.no_grad()
def test_hidden_states_and_routing_are_the_models_own(recorded: Recorded) -> None:
    """The answer's tokens through plain Transformers: the same inputs of every layer, the same routing."""
    tokens = PROMPT + list(recorded.answers[0].token_ids)
    output = recorded.model(torch.tensor([tokens[:-1]]), output_hidden_states=True, output_router_logits=True)
    position = 0
    compared = 0
    for step in recorded.steps[:OUTPUT_TOKENS]:
        for layer in layers_of(step):
            positions = [position + row for row in layer.rows]
            expected_RD = output.hidden_states[layer.layer][0, positions].numpy()
            assert layer.layer_input_RD is not None
            np.testing.assert_allclose(layer.layer_input_RD, expected_RD, rtol=2**-6, atol=2e-2)
            compared += len(positions)
            routed = output.router_logits[layer.layer][position : position + len(layer.topk_ids_TK)]
            best = routed.topk(layer.topk_ids_TK.shape[1]).indices.numpy()
            assert (np.sort(best, axis=1) == np.sort(layer.topk_ids_TK, axis=1)).all()
            _check_router_input(recorded.model, layer)
        position += len(layers_of(step)[0].topk_ids_TK)
        last = layers_of(step)[-1].last_output_RD
        assert last is not None
        normed = recorded.model.model.norm(torch.from_numpy(last)).numpy()
        expected_RD = output.hidden_states[-1][0, positions].numpy()
        np.testing.assert_allclose(normed, expected_RD, rtol=2**-6, atol=2e-2)
    assert position == len(tokens) - 1
    assert compared >= 3 * (ROWS + OUTPUT_TOKENS - 1)


def _check_router_input(model: PreTrainedModel, layer: LayerEvent) -> None:
    """What the router read leads to the routing, but for ties that bfloat16 makes."""
    assert layer.router_input_RD is not None
    gate = model.model.layers[layer.layer].mlp.gate
    logits = torch.from_numpy(layer.router_input_RD) @ gate.weight.T
    best = logits.topk(layer.topk_ids_TK.shape[1]).indices.numpy()
    same = [
        len(set(b.tolist()) & set(layer.topk_ids_TK[row].tolist())) for b, row in zip(best, layer.rows, strict=True)
    ]
    assert sum(same) >= 0.75 * best.size
