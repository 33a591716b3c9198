"""What a compute node would decide for a model that it has not loaded, and what decoding would come to."""

from dataclasses import asdict, dataclass

from transformers import AutoConfig

from compute_node.config import ComputeConfig
from compute_node.memory_plan import MemoryNeeds, MemoryPlan, planned_context
from compute_node.planning.compute_cost import LAYER_OVERHEAD_S, ComputeCost
from compute_node.planning.device_needs import DeviceNeeds
from compute_node.planning.forecast import CostBand, Forecaster, ladder
from compute_node.planning.made_up_run import PROMPT_TOKENS, Conversation, distinct_experts, of_this_model
from compute_node.planning.options import PlanOptions
from compute_node.planning.planned_device import PlannedDevice
from compute_node.planning.rates import Rate, link_rate, memory_rate
from compute_node.replay.recorded_run import RecordedRun
from compute_node.step_ledger import Phase
from promoe.config import SettingUnfit
from promoe.footprint import ModelFootprint
from promoe.trace_file import TraceReader


@dataclass(frozen=True)
class NodePlanner:
    """Plans for one model with one configuration on one device.

    Args:
        config: as a node would be started.
        footprint: of the model.
        options: what else was asked for.
        device: that it is planned for.
    """

    config: ComputeConfig
    footprint: ModelFootprint
    options: PlanOptions
    device: PlannedDevice

    @property
    def needs(self) -> DeviceNeeds:
        """Of the model on the device."""
        settings = dict(self.footprint.config)
        model_config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
        spec = self.footprint.spec
        needs = MemoryNeeds.of(model_config, spec, self.footprint.dense_nbytes, self.config)
        return DeviceNeeds(self.config, spec, needs, self.device.free_nbytes, self.device.device is None)

    def as_document(self) -> dict[str, object]:
        """For JSON; times in seconds, sizes in bytes.

        Raises:
            SettingUnfit: a setting that does not fit the model.
            InvalidInput: a trace that cannot be used.
        """
        needs = self.needs
        plan = needs.plan()
        most = needs.most_slots()
        suggested = plan.slots_per_layer if plan else most
        return {
            "device": {
                "kind": self.device.kind,
                "description": self.device.description,
                "budget_nbytes": needs.budget_nbytes,
                "is_here": self.device.device is not None,
            },
            "fits": plan is not None,
            "parts": [{**asdict(part), "short_nbytes": part.short_nbytes} for part in needs.parts()],
            "mends": needs.mends(),
            "memory_plan": plan and asdict(plan),
            "suggested_slots": suggested,
            "most_slots": most,
            "forecast": None if suggested is None else self._forecast(needs, plan, suggested),
        }

    def _forecast(self, needs: DeviceNeeds, plan: MemoryPlan | None, suggested: int) -> dict[str, object]:
        spec = self.footprint.spec
        link = link_rate(self.device, self.options.link, self.config.link_bytes_per_s)
        memory = memory_rate(self.device, self.options.memory_bandwidth)
        run, routing = self._run()
        costs = self._costs(needs, memory, run)
        forecaster = Forecaster(run, self.config.schedule(), link.bytes_per_s, costs)
        rows = [forecaster.at(slots) for slots in ladder(spec.num_experts, (suggested,))]
        kv_nbytes = plan.kv_nbytes if plan else planned_context(self.config, spec) * needs.needs.kv_nbytes_per_token
        fixed_nbytes = needs.needs.dense_nbytes + needs.needs.workspace_nbytes + kv_nbytes
        distinct = distinct_experts(run)
        return {
            "link": asdict(link),
            "memory_bandwidth": asdict(memory),
            "routing": routing,
            "num_requests": self._num_requests(run),
            "policy": self.config.policy,
            "all_resident_s": [costs.low.step_s(distinct), costs.high.step_s(distinct)],
            "is_resident_given": self.options.resident_tpot_s is not None,
            "layer_overhead_s": costs.high.layer_s,
            "rows": [
                {
                    **asdict(row),
                    "cache_rate": row.slots_per_layer / spec.num_experts,
                    "device_nbytes": fixed_nbytes + row.slots_per_layer * needs.layer_slots_nbytes,
                }
                for row in rows
            ],
        }

    def _run(self) -> tuple[RecordedRun, str]:
        spec = self.footprint.spec
        if self.options.trace is None:
            run = Conversation.of(spec, self.options.num_requests).run(spec)
            return run, "made up, as skewed and as persistent as the demo model's on English text"
        run = of_this_model(RecordedRun.read(TraceReader(self.options.trace)), spec)
        if not distinct_experts(run):
            raise SettingUnfit(f"--trace {self.options.trace} has no decode step to forecast from")
        return run, f"recorded in {self.options.trace}"

    def _num_requests(self, run: RecordedRun) -> int:
        """Decoded together, at most."""
        return max(len(step.start.spans) for step in run.steps if step.phase is Phase.DECODE)

    def _costs(self, needs: DeviceNeeds, memory: Rate, run: RecordedRun) -> CostBand:
        spec, num_requests = self.footprint.spec, self._num_requests(run)
        read_nbytes = self.footprint.dense_nbytes - self.footprint.lookup_nbytes

        def cost(context_tokens: int, layer_s: float) -> ComputeCost:
            kv_nbytes = num_requests * context_tokens * needs.needs.kv_nbytes_per_token
            return ComputeCost(
                spec.num_moe_layers, read_nbytes, spec.layout.blob_nbytes, kv_nbytes, memory.bytes_per_s, layer_s
            )

        context = planned_context(self.config, spec)
        band = CostBand(cost(min(PROMPT_TOKENS, context), 0.0), cost(context, LAYER_OVERHEAD_S[self.device.kind]))
        given_s = self.options.resident_tpot_s
        if given_s is None:
            return band
        distinct = distinct_experts(run)
        return CostBand(band.low.scaled_to(given_s, distinct), band.high.scaled_to(given_s, distinct))
