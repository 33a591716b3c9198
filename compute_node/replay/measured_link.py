"""What the run's own link carried: the model that a replay reckons with unless another link is asked for."""

import statistics
from typing import Final

from compute_node.replay.recorded_run import RecordedRun
from compute_node.replay.virtual_transfers import LinkModel
from promoe.config import SettingUnfit
from promoe.trace_events import LoadEvent, LoadReason

SYNCHRONOUS_LINKS: Final = frozenset({"memcpy", "emulated"})
"""There a load's begin and end are those of its copy; elsewhere they are when its chunks were handed over."""


def measured_link(run: RecordedRun) -> LinkModel:
    """From the demand loads, which nothing interrupts; from the header's measured rate where copies are asynchronous.

    Raises:
        SettingUnfit: the trace does not know the rate.
    """
    if run.header.device.link in SYNCHRONOUS_LINKS and (loads := _demand_loads(run)):
        copy_s = sum(load.end_s - load.begin_s for load in loads)
        wake_s = statistics.median(load.at_s - load.end_s for load in loads)
        return LinkModel(sum(load.nbytes for load in loads) / copy_s, wake_s=max(0.0, wake_s))
    if run.header.link_bytes_per_s <= 0:
        raise SettingUnfit("the trace does not know the link's rate; give one: --link BYTES_PER_S")
    return LinkModel(run.header.link_bytes_per_s)


def _demand_loads(run: RecordedRun) -> list[LoadEvent]:
    """Those that were asked for when their layer's routing was known: the others may have given way half way."""
    loads: list[LoadEvent] = []
    for step in run.steps:
        routed_s = {turn.event.layer: turn.event.at_s for turn in step.layers}
        loads += [
            event
            for event in step.events
            if isinstance(event, LoadEvent)
            and event.reason is LoadReason.DEMAND
            and event.end_s > event.begin_s >= routed_s[event.expert.layer]
        ]
    return loads
