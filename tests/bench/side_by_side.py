"""One loaded model whose experts come, in turn, out of several expert paths: caches of different policies side by side.

So the paths take turns on the same chats within seconds of each other, and nothing but the path differs between them.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compute_node.cache_stats import CacheMetrics, PhaseCounters, StepRecorder
from compute_node.device.cpu import CpuDevice, NoPinning
from compute_node.device.seam import Device
from compute_node.expert_path import ExpertPath
from compute_node.hint_inbox import HintInbox
from compute_node.hint_quality import HintScores
from compute_node.layer_hooks import install_hooks
from compute_node.layer_observer import LayerObserver
from compute_node.memory_plan import MemoryPlan
from compute_node.miss_watch import MissWatch
from compute_node.model_loader import LoadedModel, load_model
from compute_node.schedule import SchedulePolicy
from compute_node.step_ledger import Phase, StepLedger
from compute_node.store_client import StoreClient
from promoe.ids import ExpertId
from promoe.model_spec import ModelSpec
from promoe.pack_manifest import DENSE_FOLDER, PackManifest
from promoe.trace_events import LoadReason
from tests.bench.demo_model import chat
from tests.bench.greedy_chat import ChatRun, run_chat
from tests.bench.hint_sources import HintSource
from tests.node_doubles import ignore_progress
from tests.running_store import RunningStore

ATTACH_DEADLINE_S: Final = 30.0


@dataclass(frozen=True)
class SharedModel:
    """The dense model, and where its experts lie.

    Attributes:
        layer_modules: names of the experts modules, by MoE layer.
        tokenizer: None for a model that knows no text.
        source_address: of an expert's blob in the mapped arena.
    """

    loaded: LoadedModel
    spec: ModelSpec
    layer_modules: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None
    source_address: Callable[[ExpertId], int]

    def prompt_ids(self, text: str) -> list[int]:
        """One user turn, ready for the answer."""
        assert self.tokenizer is not None, "only a model that knows text is asked in words"
        rendered = self.tokenizer.apply_chat_template(chat(text), tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def all_miss_nbytes(self) -> int:
        """Bytes of the experts that one token is routed to."""
        return self.spec.num_moe_layers * self.spec.experts_per_token * self.spec.layout.blob_nbytes


class _StillBlobs:
    """Nobody withdraws blobs from under a benchmark."""

    def blob_retired(self, expert: ExpertId) -> None:
        raise AssertionError(f"{expert} was withdrawn")

    def blob_published(self, expert: ExpertId) -> None:
        pass


@contextmanager
def shared_model(pack_dir: Path) -> Iterator[SharedModel]:
    """Loads the model and maps the arena of a store of its own."""
    manifest = PackManifest.read(pack_dir)
    with (
        tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder,
        RunningStore(pack_dir, Path(folder)) as running,
    ):
        running.wait_until_full()
        store = StoreClient(running.endpoint, manifest.spec.fingerprint, NoPinning(), _StillBlobs())
        store.attach(ATTACH_DEADLINE_S, ignore_progress)
        try:
            loaded = load_model(pack_dir, manifest, CpuDevice().torch_device)
            tokenizer = AutoTokenizer.from_pretrained(pack_dir / DENSE_FOLDER)
            yield SharedModel(loaded, manifest.spec, manifest.layer_modules, tokenizer, store.source_address)
        finally:
            store.close()


@dataclass(frozen=True)
class PhaseFigures:
    """What one phase of one chat asked of its path."""

    hits: int
    misses: int
    stall_s: float
    late_stall_s: float
    nbytes_by_reason: dict[str, int]


@dataclass(frozen=True)
class ChatFigures:
    """One chat's answer, times and counters."""

    run: ChatRun
    prefill: PhaseFigures
    decode: PhaseFigures


@dataclass(frozen=True)
class _Reading:
    phases: dict[Phase, PhaseCounters]
    nbytes_by_reason: dict[LoadReason, int]


@dataclass(frozen=True, eq=False)
class SidePath:
    """One expert path beside others; at most one of them is installed.

    Attributes:
        scores: of the hints it took.
    """

    model: SharedModel
    path: ExpertPath
    ledger: StepLedger
    recorder: StepRecorder
    observer: LayerObserver
    scores: HintScores

    def ask(self, prompt: str, num_tokens: int) -> ChatFigures:
        """One chat, with the model's experts out of this path."""
        return self.ask_ids(self.model.prompt_ids(prompt), num_tokens)

    def ask_ids(self, prompt_ids: list[int], num_tokens: int) -> ChatFigures:
        """The same for a prompt in tokens."""
        readings: list[_Reading] = []

        def read() -> None:
            readings.append(self._read())

        with self._installed():
            read()
            run = run_chat(self.model.loaded.model, self.ledger, prompt_ids, num_tokens, read)
            read()
        before, between, after = readings
        return ChatFigures(run, _difference(Phase.PREFILL, before, between), _difference(Phase.DECODE, between, after))

    def good_pred(self) -> float | None:
        """Accuracy times fetch rate of all decode hints so far; None without hints."""
        scores = [score for key, score in self.scores.scores() if key.phase is Phase.DECODE]
        hinted = sum(score.hinted for score in scores)
        if not hinted:
            return None
        return sum(score.correct for score in scores) / hinted * sum(score.ready for score in scores) / hinted

    @contextmanager
    def _installed(self) -> Iterator[None]:
        model, cache = self.model, self.path.expert_cache
        self.path.install(model.loaded, model.spec, self.recorder, self.observer)
        remove = install_hooks(model.loaded.model, model.layer_modules, self.observer, lambda layer: cache.notice())
        try:
            yield
        finally:
            remove()

    def _read(self) -> _Reading:
        phases = {phase: replace(counters) for phase, counters in self.recorder.phases.items()}
        return _Reading(phases, dict(self.path.transfers.stats().nbytes_by_reason))


def _difference(phase: Phase, before: _Reading, after: _Reading) -> PhaseFigures:
    old, new = before.phases[phase], after.phases[phase]
    return PhaseFigures(
        new.hits - old.hits,
        new.misses - old.misses,
        new.stall_s - old.stall_s,
        new.late_prefetch_stall_s - old.late_prefetch_stall_s,
        {r.value: n - before.nbytes_by_reason.get(r, 0) for r, n in after.nbytes_by_reason.items()},
    )


@contextmanager
def side_path(
    model: SharedModel,
    policy: SchedulePolicy,
    slots_per_layer: int,
    link_bytes_per_s: float | None,
    hint_source: HintSource | None,
) -> Iterator[SidePath]:
    """A path on the CPU, over a link of this rate."""
    with path_on(CpuDevice(link_bytes_per_s), model, policy, slots_per_layer, hint_source) as path:
        yield path


@contextmanager
def path_on(
    device: Device, model: SharedModel, policy: SchedulePolicy, slots_per_layer: int, hint_source: HintSource | None
) -> Iterator[SidePath]:
    """Slots, cache, transfer engine and, where hints are wanted, somebody who makes them."""
    spec, inbox = model.spec, HintInbox()
    plan = MemoryPlan(
        slots_per_layer=slots_per_layer, slot_nbytes=spec.layout.blob_stride_nbytes, max_context_tokens=0,
        num_kv_blocks=0, kv_nbytes=0, workspace_nbytes=0, dense_nbytes=0, num_layers=spec.num_moe_layers,
    )  # fmt: skip
    path = ExpertPath.build(spec, policy, plan, device, model.source_address, inbox)
    ledger = StepLedger()
    recorder = StepRecorder(ledger, CacheMetrics.register(CollectorRegistry()), device.take_compute_stall_s)
    scores, misses = HintScores(spec.num_moe_layers), MissWatch(slots_per_layer / spec.num_experts)
    path.expert_cache.sinks += [recorder, scores, misses]
    with path.transfers, ExitStack() as stack:
        path.expert_cache.warm()
        recorder.begin()
        samplers = () if hint_source is None else (stack.enter_context(hint_source(spec, inbox, misses)),)
        observer = LayerObserver(spec.num_moe_layers, device, samplers)
        ledger.listeners = (observer.begin_step, path.expert_cache.begin_step)
        yield SidePath(model, path, ledger, recorder, observer, scores)
        path.expert_cache.check_integrity()
