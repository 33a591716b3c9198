"""The schedule that a trace was recorded with, from its header, and the same with single settings replaced."""

from collections.abc import Mapping
from dataclasses import replace

from compute_node.eviction import eviction_named
from compute_node.schedule import HintUse, SchedulePolicy, SlotSplit, policy_named
from promoe.trace_header import TraceHeader


def recorded_policy(header: TraceHeader) -> SchedulePolicy:
    """Raises SettingUnfit when the header names a policy or an eviction that this promoe does not know."""
    shape = header.shape
    policy = replace(
        policy_named(shape.policy),
        eviction=shape.eviction,
        slot_split=SlotSplit(shape.slot_split),
        hints=HintUse(shape.hints),
        chunk_nbytes=shape.chunk_nbytes,
        chunks_demand=shape.chunks_demand,
        max_chunks_in_flight=shape.max_chunks_in_flight,
        early_preemption=shape.early_preemption,
        reorder=shape.reorder,
        stream_prefill=shape.stream_prefill,
        serial=shape.serial,
    )
    eviction_named(policy.eviction)
    return policy


def policy_with(policy: SchedulePolicy, asked: Mapping[str, object]) -> SchedulePolicy:
    """The policy with the settings that were asked for, None being none.

    Raises:
        SettingUnfit: an eviction that is not in the table.
    """
    settings = {name: value for name, value in asked.items() if value is not None}
    changed = replace(policy, **settings)  # type: ignore[arg-type]  # the command line's types are the fields'
    eviction_named(changed.eviction)
    return changed
