"""A node's trace is repeated exactly: store, predictor and node are processes, the link is slow, the client records."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from compute_node.replay.phase_totals import recorded_totals
from compute_node.replay.recorded_order import verify
from compute_node.replay.recorded_policy import recorded_policy
from compute_node.replay.recorded_run import RecordedRun
from compute_node.step_ledger import Phase
from promoe import Client
from promoe.cli.trace_recording import TraceRecording
from promoe.node_report import PredictorState
from promoe.trace_file import TraceReader
from tests.running_node import RunningNode
from tests.running_predictor import RunningPredictor
from tests.running_store import RunningStore, wait_until
from tests.system.tiny_stack import pack_tiny_model

PROMPTS = ("the cat and the hat ", "a hat is on the mat, and so is ", "the ")
NUM_TOKENS = 24


@dataclass(frozen=True)
class Servants:
    """What every node here uses."""

    pack_dir: Path
    folder: Path
    store: RunningStore
    predictor: RunningPredictor


@pytest.fixture(scope="module")
def servants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servants]:
    folder = tmp_path_factory.mktemp("replay")
    pack_dir = pack_tiny_model(folder, "qwen2_moe")
    settings = "predictor.predictor=frequency"
    with RunningStore(pack_dir, folder) as store, RunningPredictor(pack_dir, folder, settings) as predictor:
        yield Servants(pack_dir, folder, store, predictor)


def record(client: Client, path: Path, prompts: tuple[str, ...]) -> None:
    """The node has served before: the trace begins in the middle of its life."""
    client.complete(prompts[0], max_tokens=8, ignore_eos=True)
    recording = TraceRecording(client.trace(), path)
    recording.start()
    for prompt in prompts:
        client.complete(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
    wait_until(lambda: recording.state.steps >= len(prompts) * NUM_TOKENS, 30.0)
    recording.close()
    assert recording.finish().dropped_steps == 0


@pytest.mark.parametrize("policy", ["lru", "promoe", "proactive"])
def test_a_recorded_run_is_repeated_with_exactly_its_hits(servants: Servants, policy: str) -> None:
    path = servants.folder / f"{policy}.trace"
    settings = (
        f"compute.policy={policy}",
        "compute.expert_slots=2",
        "compute.link_bytes_per_s=4000000",
        "compute.max_context_tokens=256",
        f"compute.predictor_endpoint={servants.predictor.endpoint}",
    )
    with (
        RunningNode(servants.pack_dir, servants.store.endpoint, servants.folder, *settings, name=policy) as node,
        node.client() as client,
    ):
        if policy != "lru":  # which asks nobody
            wait_until(lambda: client.info().predictor.state is PredictorState.CONNECTED, 30.0)
        record(client, path, PROMPTS)
    run = RecordedRun.read(TraceReader(path))
    assert recorded_policy(run.header).name == policy
    verification = verify(run, recorded_policy(run.header))
    assert verification.parted is None
    assert verification.num_accesses == run.num_accesses > 0
    decode = recorded_totals(run)[Phase.DECODE]
    assert decode.misses > 0, "there was something to schedule"
    assert decode.num_tokens == len(PROMPTS) * (NUM_TOKENS - 1)
