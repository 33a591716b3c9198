"""Everything that watches the engine's steps, wired to one expert cache: hints, their scores, traces, the cache map.

Knows who hears of what, and in which order; decides nothing.
"""

import logging
from collections.abc import Sequence

from compute_node.cache_map import CacheMapRecorder
from compute_node.cache_stats import StepRecorder
from compute_node.device.seam import Device
from compute_node.expert_cache import ExpertCache
from compute_node.hint_inbox import HintInbox
from compute_node.hint_link import HintLink
from compute_node.hint_quality import HintScores
from compute_node.hint_report import HintReport
from compute_node.layer_hooks import install_hooks
from compute_node.layer_observer import LayerObserver
from compute_node.layer_sample import LayerSampler
from compute_node.miss_watch import MissWatch
from compute_node.model_loader import LoadedModel
from compute_node.predictor_trial import TakeoverTimes
from compute_node.schedule import HintUse
from compute_node.takeovers import Takeovers
from compute_node.trace_recorder import TraceRecorder
from promoe.model_spec import ModelSpec

logger = logging.getLogger(__name__)


class StepWatch:
    """The watchers of one node.

    Args:
        spec: the served model.
        expert_cache: tells what it takes notice of.
        device: brings samples to the host.
        inbox: where the expert cache looks for hints.
        predictor_endpoint: who makes them first; empty for nobody.
        trial_s: see TakeoverTimes.

    Attributes:
        observer: sees the layers.
        traces: records what the expert cache is told.
        maps: what every expert is doing.
        scores: how good hints are.
        takeovers: which predictor is listened to; None where the policy has no use for hints.
    """

    def __init__(
        self,
        spec: ModelSpec,
        expert_cache: ExpertCache,
        device: Device,
        inbox: HintInbox,
        predictor_endpoint: str,
        trial_s: float,
    ) -> None:
        self._expert_cache = expert_cache
        self._inbox = inbox
        self.traces = TraceRecorder(spec.num_moe_layers, expert_cache.snapshot)
        self.maps = CacheMapRecorder(spec.num_moe_layers, spec.num_experts, expert_cache.resident_states)
        self.scores = HintScores(spec.num_moe_layers)
        inbox.calibrate = self.scores.calibrated
        self._misses = MissWatch(expert_cache.geometry.cache_rate)
        self.takeovers: Takeovers | None = None
        samplers: tuple[LayerSampler, ...] = (self.traces,)
        if expert_cache.policy.hints is not HintUse.IGNORE:
            link = HintLink(spec, inbox, misses=lambda: self._misses.level)
            self.takeovers = Takeovers(link, predictor_endpoint, TakeoverTimes(trial_s=trial_s))
            samplers = (*link.samplers, self.traces)
        elif predictor_endpoint:
            logger.info("The predictor is not asked: policy %s ignores hints.", expert_cache.policy.name)
        self.observer = LayerObserver(spec.num_moe_layers, device, samplers)

    def attach(self, loaded: LoadedModel, layer_modules: Sequence[str], recorder: StepRecorder) -> None:
        """Hears of steps, layers and loads from now on.

        Raises:
            ModelUnsupported: see `install_hooks`.
        """
        # The observer first: whether a step is traced is known before its first event.
        recorder.ledger.listeners = (self.observer.begin_step, self._expert_cache.begin_step)
        # What leaves the last layer is on the host by now, and nobody looks again before the next step begins: too late
        # for a hint about that step's first layers.
        recorder.ledger.end_listeners = (lambda: self._inbox.flush(),)
        self._expert_cache.sinks += [recorder, self.scores, self._misses, self.maps, self.traces.record]
        install_hooks(loaded.model, layer_modules, self.observer, lambda _: self._expert_cache.notice())

    def begin(self, recorder: StepRecorder) -> None:
        """Counts from here, and looks for the predictor: what start-up did is nobody's use."""
        recorder.begin()
        self._expert_cache.restart_counters()
        self.scores.restart()
        if self.takeovers is not None:
            self.takeovers.start()

    def close(self) -> None:
        """Ends the sessions with predictors."""
        if self.takeovers is not None:
            self.takeovers.close()

    def hint_report(self) -> HintReport:
        """What is told of hints."""
        return HintReport(self.scores, self._inbox, self.takeovers)
