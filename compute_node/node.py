"""One compute node: builds its parts in order, hands out the service, takes everything down again.

The order is what a person waits for: pack and device, dense weights, memory plan, store, slots, first token.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch
from prometheus_client import CollectorRegistry, Gauge
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compute_node.admission import Admission, AdmissionLimits
from compute_node.answer import Answerer
from compute_node.answer_grammar import GrammarCompiler
from compute_node.answer_record import AnswerListener
from compute_node.batch_loop import BatchLimits
from compute_node.cache_report import CacheReport
from compute_node.cache_stats import CacheMetrics, StepRecorder
from compute_node.config import ComputeConfig
from compute_node.device.choice import ChosenDevice, choose_device
from compute_node.engine import Engine
from compute_node.engine_choice import EnginePlan, EngineStarter
from compute_node.expert_path import ExpertPath
from compute_node.hint_inbox import HintInbox
from compute_node.hint_metrics import HintCollector
from compute_node.http.answer_wire import ServedModel
from compute_node.http.node_parts import NodeParts, NodeWatch
from compute_node.memory_plan import MemoryNeeds, MemoryPlan, plan_memory
from compute_node.model_loader import LoadedModel, load_model
from compute_node.node_report import NodeIdentity, NodeReport
from compute_node.prompt import PromptCodec, PromptLimits
from compute_node.request_metrics import RequestMetrics
from compute_node.request_spans import request_spans
from compute_node.schedule import SchedulePolicy
from compute_node.service import InferenceService
from compute_node.step_ledger import Phase, StepLedger
from compute_node.step_watch import StepWatch
from compute_node.store_client import AttachProgress, StoreClient, StoreState
from compute_node.takeovers import Takeovers
from promoe import telemetry
from promoe.errors import PackDamaged
from promoe.ids import ExpertId
from promoe.model_spec import ModelSpec
from promoe.node_report import DeviceInfo
from promoe.pack_manifest import DENSE_FOLDER, PackManifest

logger = logging.getLogger(__name__)

PROGRESS_STEPS: Final = 10
"""How many lines the log gets while the store fills."""


class ComputeNode:
    """Everything behind the Inference service.

    Args:
        config: what was asked for.

    Attributes:
        has_died: the engine or the store client ended without having been stopped.
        experts_modules: by MoE layer, for watching the routing; empty before `start`.
        parts: what the HTTP API stands on; None before `start`.
        takeovers: which predictor is listened to; None before `start`, and where the policy has no use for hints.

    Raises:
        PackDamaged, ModelNotFound: there is no usable pack.
    """

    def __init__(self, config: ComputeConfig) -> None:
        self._config = config
        self._manifest = PackManifest.read(config.pack)
        self._closers = ExitStack()
        self._registry = CollectorRegistry()
        self._admission: Admission | None = None
        self._answer_listener: AnswerListener | None = None
        self.has_died = False
        self.experts_modules: tuple[nn.Module, ...] = ()
        self.parts: NodeParts | None = None
        self.takeovers: Takeovers | None = None

    @property
    def spec(self) -> ModelSpec:
        """The model it serves."""
        return self._manifest.spec

    def start(self, on_death: Callable[[], None], loop: asyncio.AbstractEventLoop) -> InferenceService:
        """Loads and tries everything; blocks until the node can answer.

        Args:
            on_death: called on `loop` when `has_died` becomes true; the node is of no use then.

        Raises:
            PromoeError, SettingUnfit: what keeps it from serving.
        """
        config = self._config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        # What can be wrong is found before what takes long.
        policy = config.schedule()
        self._answer_listener = self._closers.enter_context(request_spans(config.otlp_endpoint, self.spec.name))
        tokenizer = _load_tokenizer(config.pack / DENSE_FOLDER)
        chosen = choose_device(config.device, config.link_bytes_per_s)
        logger.info("Device: %s (%s), %s.", chosen.device.kind, chosen.device.name, chosen.reason)
        loaded = load_model(config.pack, self._manifest, chosen.device.torch_device)
        needs = MemoryNeeds.of(loaded.model.config, self.spec, loaded.dense_nbytes, config)
        plan = plan_memory(config, self.spec, needs, chosen.device.memory().free_nbytes)
        logger.info("Memory plan: %s.", plan)
        ledger = StepLedger()
        recorder = StepRecorder(ledger, CacheMetrics.register(self._registry), chosen.device.take_compute_stall_s)

        def died() -> None:
            self.has_died = True
            loop.call_soon_threadsafe(on_death)

        hints = HintInbox()
        path, store = self._open_experts(chosen, plan, policy, hints, died)
        watch = self._watch_steps(path, chosen, hints)
        path.install(loaded, self.spec, recorder, watch.observer)
        self.experts_modules = loaded.experts_modules
        path.expert_cache.warm()
        watch.attach(loaded, self._manifest.layer_modules, recorder)
        metrics = RequestMetrics(self._registry)

        def observe_step(phase: Phase, elapsed_s: float) -> None:
            if recorder.is_counting:
                metrics.observe_step(phase, elapsed_s)

        limits = BatchLimits(plan.num_kv_blocks, config.max_batch_tokens, config.max_concurrent_requests)
        starter = EngineStarter(loaded.model, ledger, EnginePlan(limits, plan.max_context_tokens), observe_step, died)
        engine, engine_reason = starter.start(config.engine)
        self._closers.callback(engine.stop)
        logger.info("Engine: %s. %s", engine.kind.value, engine_reason)
        self._closers.callback(watch.close)
        watch.begin(recorder)
        report = CacheReport(
            config, plan, path.expert_cache, path.transfers, recorder, store, watch.hint_report(), watch.maps
        )
        self._publish_metrics(report)
        device = _device_report(chosen, path, config.link_bytes_per_s)
        identity = NodeIdentity(store.instance_id, self.spec, engine.kind, engine_reason, device)
        node_report = NodeReport(identity, report)
        parts = self._open_parts(engine, loaded, tokenizer, node_report, metrics, plan.max_context_tokens)
        self.parts, self._admission = parts, parts.admission
        return InferenceService(parts.answerer, parts.codec, parts.admission, identity, report, watch.traces)

    async def drain(self) -> None:
        """Refuses new requests; finishes or, at the deadline, cancels the accepted ones."""
        if self._admission is not None and not self.has_died:
            await self._admission.drain(self._config.drain_deadline_s)

    def close(self) -> None:
        """Ends threads and gives the arena back, in the reverse order of `start`."""
        self._closers.close()

    def _open_experts(
        self,
        chosen: ChosenDevice,
        plan: MemoryPlan,
        policy: SchedulePolicy,
        hints: HintInbox,
        on_death: Callable[[], None],
    ) -> tuple[ExpertPath, StoreClient]:
        """Slots first, then the store, whose blobs they are loaded from."""
        config = self._config

        def source_address(expert: ExpertId) -> int:
            return store.source_address(expert)

        path = ExpertPath.build(self.spec, policy, plan, chosen.device, source_address, hints)
        pinning = chosen.device.pinning
        store = StoreClient(config.store_endpoint, self.spec.fingerprint, pinning, path.expert_cache, on_death)
        store.attach(config.attach_deadline_s, _AttachLog())
        self._closers.callback(store.close)
        path.transfers.start()
        self._closers.callback(path.transfers.close)
        return path, store

    def _open_parts(
        self,
        engine: Engine,
        loaded: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        report: NodeReport,
        metrics: RequestMetrics,
        max_context_tokens: int,
    ) -> NodeParts:
        config, spec = self._config, self.spec
        limits = AdmissionLimits(config.max_concurrent_requests, config.max_queued_requests, config.request_deadline_s)
        admission = Admission(engine, limits, metrics)
        codec = PromptCodec(tokenizer, PromptLimits(spec.vocab_size, max_context_tokens, config.max_prompt_bytes))
        eos_token_ids = _eos_token_ids(loaded, tokenizer)
        grammars = GrammarCompiler(tokenizer, spec.vocab_size, eos_token_ids)
        answerer = Answerer(admission, codec, eos_token_ids, metrics, grammars, self._answer_listener)
        model = ServedModel.of(spec, max_context_tokens)
        return NodeParts(model, answerer, codec, admission, self._registry, NodeWatch(report, metrics.token_times))

    def _watch_steps(self, path: ExpertPath, chosen: ChosenDevice, hints: HintInbox) -> StepWatch:
        endpoint, trial_s = self._config.predictor_endpoint, self._config.predictor_trial_s
        watch = StepWatch(self.spec, path.expert_cache, chosen.device, hints, endpoint, trial_s)
        self.takeovers = watch.takeovers
        return watch

    def _publish_metrics(self, report: CacheReport) -> None:
        """The Prometheus page, where one is asked for."""
        resident = Gauge(telemetry.RESIDENT_EXPERTS, "Experts that are READY in slots.", registry=self._registry)
        resident.set_function(report.num_resident)
        busy = Gauge(telemetry.LINK_BUSY_SECONDS, "Time the link was copying.", registry=self._registry)
        busy.set_function(lambda: report.transfers.stats().link_busy_s)
        attached = Gauge(telemetry.STORE_ATTACHED, "1 while the store is attached.", registry=self._registry)
        attached.set_function(lambda: float(report.store.state is StoreState.ATTACHED))
        self._registry.register(
            HintCollector(
                report.hints.hint_stats,
                report.prefetch_stats,
                report.hints.predictor_link,
                report.hints.takeover_counts,
            )
        )
        self._closers.enter_context(
            telemetry.metrics_page(self._registry, "compute.metrics_listen", self._config.metrics_listen)
        )


class _AttachLog:
    """Says how the store's fill goes on, a few times."""

    def __init__(self) -> None:
        self._said = -1

    def __call__(self, progress: AttachProgress) -> None:
        step = progress.filled_nbytes * PROGRESS_STEPS // max(1, progress.total_nbytes)
        if step > self._said:
            self._said = step
            logger.info(
                "The store has %.0f of %.0f MiB; %.0f MiB are mapped here.",
                progress.filled_nbytes / 2**20,
                progress.total_nbytes / 2**20,
                progress.registered_nbytes / 2**20,
            )


def _device_report(chosen: ChosenDevice, path: ExpertPath, link_bytes_per_s: float | None) -> DeviceInfo:
    return DeviceInfo(
        kind=chosen.device.kind,
        name=chosen.device.name,
        reason=chosen.reason,
        link=path.transfers.link_description,
        emulated_link_bytes_per_s=None if link_bytes_per_s is None else int(link_bytes_per_s),
    )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Never runs code that came with a model.

    Raises:
        PackDamaged: the pack has no tokenizer that Transformers can load.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise PackDamaged(f"{folder} has no tokenizer that can be loaded: {str(error).splitlines()[0]}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase), "AutoTokenizer makes tokenizers"
    return tokenizer


def _eos_token_ids(loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The generation config's end tokens, else the tokenizer's."""
    generation = loaded.model.generation_config
    eos = generation.eos_token_id if generation is not None else None
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset({int(eos)})
