"""The link of a replay is the run's own, as its demand loads saw it."""

from dataclasses import replace

import numpy as np
import pytest

from compute_node.clocked_transfers import LinkModel
from compute_node.replay.measured_link import measured_link
from compute_node.replay.recorded_run import RecordedRun
from promoe.config import SettingUnfit
from promoe.hint import StepSpan
from promoe.ids import ExpertId
from promoe.trace_events import LayerEvent, LoadEvent, LoadReason, StepEvent
from promoe.trace_header import TraceHeader
from tests.promoe.traces import MadeUpRun

HEADER = MadeUpRun(num_layers=1).header()


def load(begin_s: float, end_s: float, reason: LoadReason = LoadReason.DEMAND, noticed_s: float = 0.25) -> LoadEvent:
    return LoadEvent(end_s + noticed_s, begin_s, end_s, ExpertId(0, 1), reason, 1000)


def run_of(header: TraceHeader, *loads: LoadEvent) -> RecordedRun:
    layer = LayerEvent(10.0, 20.0, 1, 0, np.array([[1, 2]], np.uint16), (), (1, 2), (), 5.0)
    return RecordedRun.of(header, [[StepEvent(0.0, 1, (StepSpan("r", 1, False),)), *loads, layer]])


def test_it_is_measured_on_what_nothing_interrupts() -> None:
    asynchronous_noise = (
        load(5.0, 15.0),  # promoted while it was under way: it may have given way before
        load(11.0, 19.0, LoadReason.PREFETCH),
    )
    run = run_of(HEADER, load(10.0, 12.0), load(12.0, 16.0, noticed_s=0.75), *asynchronous_noise)
    assert measured_link(run) == LinkModel(2000 / 6.0, wake_s=0.5)


def test_nobody_wakes_up_who_was_computing() -> None:
    """An expert takes 2.5 s to compute: after the first load until 14.75 s, after the second until 17.5 s."""
    run = run_of(HEADER, load(10.0, 12.0), load(12.0, 14.0, noticed_s=1.0), load(14.0, 18.0, noticed_s=0.5))
    assert measured_link(run).wake_s == pytest.approx((0.25 + 0.5) / 2)


@pytest.mark.parametrize("kind", ["emulated", "registered"])
def test_the_header_knows_the_rate_where_the_loads_do_not(kind: str) -> None:
    header = replace(HEADER, device=replace(HEADER.device, link=kind))
    loads = (load(10.0, 12.0),) if kind == "registered" else ()
    assert measured_link(run_of(header, *loads)) == LinkModel(1e6)


def test_a_run_without_loads_and_without_a_rate_needs_to_be_told() -> None:
    with pytest.raises(SettingUnfit, match="--link"):
        measured_link(run_of(replace(HEADER, link_bytes_per_s=0.0)))
