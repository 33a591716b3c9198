"""What the run's own link carried: the model that a replay reckons with unless another link is asked for."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from compute_node.clocked_transfers import LinkModel
from compute_node.replay.recorded_run import RecordedRun
from promoe.config import SettingUnfit
from promoe.trace_events import LoadEvent, LoadReason

SYNCHRONOUS_LINKS: Final = frozenset({"memcpy", "emulated"})
"""There a load's begin and end are those of its copy; elsewhere they are when its chunks were handed over."""


@dataclass(frozen=True)
class _DemandLoad:
    """A load that was asked for when its layer's routing was known: nothing interrupts it, as it may one from before.

    Attributes:
        event: as recorded.
        idle_s: from when on compute had nothing to do but to wait for it, as far as that is known.
    """

    event: LoadEvent
    idle_s: float


def measured_link(run: RecordedRun) -> LinkModel:
    """From the demand loads; from the header's measured rate where copies are asynchronous.

    Means, not medians: on a busy machine the few long waits are most of the time.

    Raises:
        SettingUnfit: the trace does not know the rate.
    """
    loads = list(_demand_loads(run)) if run.header.device.link in SYNCHRONOUS_LINKS else []
    if loads:
        copy_s = sum(load.event.end_s - load.event.begin_s for load in loads)
        wakes_s = [load.event.at_s - load.event.end_s for load in loads if load.idle_s <= load.event.end_s]
        nbytes = sum(load.event.nbytes for load in loads)
        return LinkModel(nbytes / copy_s, wake_s=sum(wakes_s) / max(1, len(wakes_s)))
    if run.header.link_bytes_per_s <= 0:
        raise SettingUnfit("the trace does not know the link's rate; give one: --link BYTES_PER_S")
    return LinkModel(run.header.link_bytes_per_s)


def _demand_loads(run: RecordedRun) -> Iterator[_DemandLoad]:
    for step in run.steps:
        arrived: defaultdict[int, list[LoadEvent]] = defaultdict(list)
        for noticed in step.events:
            if isinstance(noticed, LoadEvent) and not noticed.is_paused:
                arrived[noticed.expert.layer].append(noticed)
        for turn in step.layers:
            event = turn.event
            expert_s = turn.experts_s / max(1, len(turn.needed))
            # READY experts are computed first, and each of the others when it has come.
            idle_s = event.at_s + len(event.hits) * expert_s
            for load in arrived[event.layer]:
                if event.at_s <= load.at_s <= event.end_s:
                    if load.reason is LoadReason.DEMAND and load.end_s > load.begin_s >= event.at_s:
                        yield _DemandLoad(load, idle_s)
                    idle_s = max(idle_s, load.at_s + expert_s)
