"""Does it fit the device: what each part needs, what is left for it, and which flag mends what is short.

The node's own memory plan decides; what it refuses is taken apart here, so that the part that is short has a name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from compute_node.batch_loop import KV_BLOCK_TOKENS
from compute_node.config import ComputeConfig
from compute_node.memory_plan import (
    BUDGET_SHARE,
    MemoryNeeds,
    MemoryPlan,
    plan_memory,
    planned_context,
    slots_asked_for,
)
from compute_node.planning.planned_device import CONTEXT_NBYTES
from promoe.errors import InsufficientMemory
from promoe.model_spec import Dtype, ModelSpec

SHORTEST_CONTEXT_TOKENS: Final = 256
"""A context below this mends nothing that a person wants."""

_LARGE_MIB: Final = 4096
"""From here on GPUs come in whole gibibytes."""


@dataclass(frozen=True)
class Need:
    """One part. `have_nbytes`: what the parts before it leave."""

    name: str
    need_nbytes: int
    have_nbytes: int
    detail: str

    @property
    def short_nbytes(self) -> int:
        """0 where it fits."""
        return max(0, self.need_nbytes - self.have_nbytes)


@dataclass(frozen=True)
class DeviceNeeds:
    """All parts on one device.

    Args:
        config: what was asked for.
        spec: of the model.
        needs: what it takes beside slots.
        free_nbytes: of the device, with nothing of the model loaded.
        is_asked_gpu: the device is not here.
    """

    config: ComputeConfig
    spec: ModelSpec
    needs: MemoryNeeds
    free_nbytes: int
    is_asked_gpu: bool = False

    @property
    def budget_nbytes(self) -> int:
        """For dense weights, KV, slots and workspace together, as the node reckons it."""
        if self.config.memory_bytes is not None:
            return min(self.config.memory_bytes, self.free_nbytes)
        rest_nbytes = self.free_nbytes - self.needs.dense_nbytes
        return self.needs.dense_nbytes + int(rest_nbytes * BUDGET_SHARE) if rest_nbytes > 0 else self.free_nbytes

    def plan(self) -> MemoryPlan | None:
        """What the node would decide; None where it would refuse. Raises SettingUnfit."""
        try:
            return plan_memory(self.config, self.spec, self.needs, self.free_nbytes - self.needs.dense_nbytes)
        except InsufficientMemory:
            return None

    def parts(self) -> list[Need]:
        """In the order in which they are taken; without a plan what is least needed of each."""
        plan = self.plan()
        context = planned_context(self.config, self.spec)
        slots = plan.slots_per_layer if plan else slots_asked_for(self.config, self.spec) or 1
        kv_nbytes = plan.kv_nbytes if plan else context * self.needs.kv_nbytes_per_token
        kv_tokens = plan.num_kv_blocks * KV_BLOCK_TOKENS if plan else context
        batch_tokens = self.config.max_batch_tokens
        parts = (
            ("dense weights", self.needs.dense_nbytes, self.spec.layout.dtype.value),
            ("workspace", self.needs.workspace_nbytes, f"activations of {batch_tokens} tokens"),
            ("KV blocks", kv_nbytes, f"{kv_tokens} tokens, context {context}"),
            ("expert slots", slots * self.layer_slots_nbytes, f"{slots} of {self.spec.num_experts} a layer"),
        )
        return [*self._overdrawn(), *self._waterfall(parts)]

    @property
    def layer_slots_nbytes(self) -> int:
        """One slot in every MoE layer."""
        return self.spec.layout.blob_stride_nbytes * self.spec.num_moe_layers

    def mends(self) -> list[str]:
        """Flags, each of which alone makes it fit; empty where it fits."""
        if self.plan() is not None:
            return []
        return [flag for flag in (self._fewer_slots(), self._shorter_context(), *self._more_memory()) if flag]

    def most_slots(self) -> int | None:
        """Per layer, as many as fit; None if not even one does."""
        return self._largest(self.spec.num_experts, lambda slots: self._with(expert_slots=slots, cache_rate=None))

    def _overdrawn(self) -> Iterator[Need]:
        """More was asked for than the device has free, which the node refuses whatever is needed of it."""
        asked_nbytes = self.config.memory_bytes
        if asked_nbytes is not None and asked_nbytes > self.free_nbytes:
            yield Need("--memory", asked_nbytes, max(0, self.free_nbytes), "what was asked for; what is free")

    def _waterfall(self, parts: tuple[tuple[str, int, str], ...]) -> Iterator[Need]:
        left_nbytes = max(0, self.budget_nbytes)
        for name, need_nbytes, detail in parts:
            yield Need(name, need_nbytes, left_nbytes, detail)
            left_nbytes = max(0, left_nbytes - need_nbytes)

    def _with(self, **settings: int | None) -> "DeviceNeeds":
        return replace(self, config=replace(self.config, **settings))  # type: ignore[arg-type]

    def _largest(self, most: int, make: Callable[[int], "DeviceNeeds"]) -> int | None:
        """Of 1 to `most`, by bisection; None if 1 is too many."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if make(middle).plan() is not None else (low, middle - 1)
        return low or None

    def _fewer_slots(self) -> str | None:
        asked, most = slots_asked_for(self.config, self.spec), self.most_slots()
        if asked is None or most is None:
            return None
        if self.config.expert_slots is not None:
            return f"--expert-slots {most}"
        return f"--cache-rate {int(1000 * most / self.spec.num_experts) / 1000:g}"

    def _shorter_context(self) -> str | None:
        context = planned_context(self.config, self.spec)
        blocks = self._largest(
            context // KV_BLOCK_TOKENS, lambda blocks: self._with(max_context_tokens=blocks * KV_BLOCK_TOKENS)
        )
        tokens = (blocks or 0) * KV_BLOCK_TOKENS
        return f"--max-context {tokens}" if tokens >= min(SHORTEST_CONTEXT_TOKENS, context // 2) > 0 else None

    def _more_memory(self) -> Iterator[str]:
        least_nbytes = sum(part.need_nbytes for part in self.parts() if part.name != "--memory")
        rest_nbytes = least_nbytes - self.needs.dense_nbytes
        free_mib = self.free_nbytes >> 20
        is_asked = self.config.memory_bytes is not None
        if is_asked and free_mib > 0 and self._with(memory_bytes=free_mib << 20).plan() is not None:
            assert self.config.memory_bytes is not None, "it was asked for"
            is_too_much = self.config.memory_bytes > self.free_nbytes
            yield f"--memory {free_mib}MiB" if is_too_much else f"--memory {_mebibytes(least_nbytes, free_mib)}"
        elif self.is_asked_gpu:
            gpu_nbytes = self.needs.dense_nbytes + rest_nbytes / BUDGET_SHARE + CONTEXT_NBYTES
            yield f"--gpu-memory {_mebibytes(gpu_nbytes)} (a larger GPU)"
        elif is_asked and self._with(memory_bytes=None).plan() is not None:
            yield "no --memory (what is free is enough)"
        if self.spec.layout.dtype is Dtype.FLOAT32:
            yield "--dtype bfloat16 (halves weights and experts)"


def _mebibytes(nbytes: float, most_mib: int | None = None) -> str:
    """Rounded up."""
    mib = -(-int(nbytes) >> 20) + 1
    if most_mib is not None:
        return f"{min(mib, most_mib)}MiB"
    return f"{-(-mib // 1024)}GiB" if mib >= _LARGE_MIB else f"{mib}MiB"
