"""Repeats a run: the expert cache decides again, while loads arrive and hints are noticed exactly where they were.

Everything that the cache decides by is in the trace, in its order; so with the run's own policy it finds the same hits
at every layer. Where it does not, cache or trace is not what it was, and the event tells where they part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compute_node.copy_ticket import CopyTicket
from compute_node.device.cpu import DONE
from compute_node.expert_cache import CacheSurroundings, ExpertCache
from compute_node.hint_inbox import HintInbox, ReceivedHint
from compute_node.loads import Load, LoadState
from compute_node.replay.recorded_run import RecordedLayer, RecordedRun, RecordedStep
from compute_node.replay.simulation import starting_snapshot
from compute_node.replay.virtual_clock import VirtualClock, VirtualMarks
from compute_node.schedule import SchedulePolicy
from promoe.errors import PromoeError
from promoe.ids import ExpertId
from promoe.trace_events import HintEvent, HintFate, LayerEvent, LoadEvent, TraceEvent


class Parted(PromoeError):
    """Replay and run do not decide alike."""


@dataclass(frozen=True)
class Verification:
    """What came of repeating a run.

    Attributes:
        num_layers: turns of MoE layers that were repeated with the same hits and misses.
        num_accesses: experts asked for in them.
        parted: None, or where replay and run part and how.
    """

    num_layers: int
    num_accesses: int
    parted: str | None


class NotYet:
    """A copy that the run had not seen arrive."""

    def is_done(self) -> bool:
        """Not before the run noticed it."""
        return False

    def wait_on_host(self) -> None:
        """Nothing moves here."""

    def wait_on_compute(self) -> None:
        """Nothing moves here."""


class StepOrder:
    """A step's events, and how far the replay has come in them.

    Attributes:
        layer: whose turn it is; None between turns.
    """

    def __init__(self) -> None:
        self.layer: RecordedLayer | None = None
        self._events: Sequence[TraceEvent] = ()
        self._place = 0

    def begin(self, events: Sequence[TraceEvent]) -> None:
        """The next step; all of the one before must have been repeated."""
        left = [event for event in self._events[self._place :] if not isinstance(event, HintEvent)]
        if left:
            raise Parted(f"the run went on with {_named(left[0])}, which the replay did not ask for")
        self._events, self._place = events, 0

    def peek(self) -> TraceEvent | None:
        """What happened next."""
        return self._events[self._place] if self._place < len(self._events) else None

    def take(self) -> None:
        """It has happened again."""
        self._place += 1

    def next_arrival(self, expert: ExpertId) -> LoadEvent | None:
        """When the run will see this expert arrive, within the step."""
        for event in self._events[self._place :]:
            if isinstance(event, LoadEvent) and event.expert == expert:
                return None if event.is_paused else event
        return None


class RecordedTransfers:
    """`Transfers` that move nothing: loads arrive where the run saw them arrive.

    Attributes:
        bytes_per_s: what the run reckoned with in this step.
        stall_s: what the layer's waits took together; the first of them takes it all.
    """

    def __init__(self, order: StepOrder, clock: VirtualClock) -> None:
        self._order = order
        self._clock = clock
        self._live: dict[ExpertId, Load] = {}
        self.bytes_per_s = 0.0
        self.stall_s = 0.0

    def catch_up(self) -> None:
        """The recorded events say what has come."""

    def submit(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""
        for load in loads:
            self._live[load.expert] = load
            if load.state is LoadState.PAUSED:
                load.state = LoadState.QUEUED

    def promote(self, load: Load) -> None:
        """See `Transfers`; in what order loads arrive is known already."""

    def pause(self, loads: Sequence[Load]) -> None:
        """See `Transfers`: with the bytes that the run kept."""
        told: set[ExpertId] = set()
        asked = {load.expert: load for load in loads}
        queued = [load for load in loads if load.state is LoadState.QUEUED]
        for load in queued:
            load.state = LoadState.PAUSED
        while isinstance(event := self._order.peek(), LoadEvent) and event.expert in asked.keys() - told:
            self._order.take()
            told.add(event.expert)
            if event.is_paused:
                asked[event.expert].copied_nbytes = event.nbytes
            else:
                self.arrive(event)
        turn = self._order.layer
        for load in queued:
            arrival = None if load.expert in told else self._order.next_arrival(load.expert)
            if arrival is not None and turn is not None and arrival.begin_s <= turn.event.at_s:
                # It was wholly on the link by then, so that nothing was left to be taken off.
                self._issue(load, arrival, NotYet())

    def settle(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""

    def settle_expert(self, expert: ExpertId) -> None:
        """See `Transfers`."""

    def next_issued(self, loads: Sequence[Load]) -> Load:
        """See `Transfers`; raises Parted when the run saw something else arrive."""
        event = self._order.peek()
        names = ", ".join(str(load.expert) for load in loads)
        if not isinstance(event, LoadEvent) or event.is_paused or self._live.get(event.expert) not in loads:
            raise Parted(f"the replay waits for {names}, and the run went on with {_named(event)}")
        self._order.take()
        self._clock.advance(self.stall_s)
        self.stall_s = 0.0
        load = self._live[event.expert]
        self.arrive(event)
        return load

    def queued_nbytes(self) -> int:
        """See `Transfers`; decisions do not depend on it."""
        return 0

    def link_bytes_per_s(self) -> float | None:
        """See `Transfers`."""
        return self.bytes_per_s

    def arrive(self, event: LoadEvent) -> None:
        """The run noticed this arrival."""
        load = self._live.pop(event.expert, None)
        if load is None:
            raise Parted(f"the run loaded {event.expert}, and the replay did not")
        self._issue(load, event, DONE)

    def _issue(self, load: Load, event: LoadEvent, ticket: CopyTicket) -> None:
        load.begin_s, load.end_s, load.copied_nbytes = event.begin_s, event.end_s, load.nbytes
        load.ticket = ticket
        load.state = LoadState.ISSUED


class RecordedInbox(HintInbox):
    """Gives out hints, and lets loads arrive, in the look around in which the run noticed them."""

    def __init__(self, order: StepOrder, transfers: RecordedTransfers) -> None:
        super().__init__()
        self._order = order
        self._transfers = transfers
        self._look = 0

    def begin_step(self) -> None:
        """Looks are counted by step."""
        self._look = 0

    def drain(self, looks_for_more: bool = True) -> list[ReceivedHint]:
        """One look around."""
        look, self._look = self._look, self._look + 1
        noticed: list[ReceivedHint] = []
        while (event := self._order.peek()) is not None:
            if isinstance(event, HintEvent):
                if event.look > look:
                    break
                if event.fate in (HintFate.TAKEN, HintFate.LATE):
                    noticed.append(ReceivedHint(event.hint, event.latency_s))
            elif isinstance(event, LoadEvent) and not event.is_paused and event.look <= look:
                self._transfers.arrive(event)
            else:
                break
            self._order.take()
        return noticed


class Repetition:
    """The run once more. Args as of `verify`."""

    def __init__(self, run: RecordedRun, policy: SchedulePolicy) -> None:
        self._run = run
        self._clock = VirtualClock()
        self._order = StepOrder()
        self._transfers = RecordedTransfers(self._order, self._clock)
        self._inbox = RecordedInbox(self._order, self._transfers)
        self._expert_cache = ExpertCache(
            range(run.geometry.num_slots),
            run.geometry,
            policy,
            CacheSurroundings(
                marks=VirtualMarks(self._clock),
                transfers=self._transfers,
                source_address=lambda expert: 0,
                hints=self._inbox,
                clock=self._clock,
            ),
        )
        snapshot = starting_snapshot(run, run.geometry, policy.slot_split)
        self._expert_cache.restore(replace(snapshot, resident=list(run.header.resident)))

    def verify(self) -> Verification:
        """Repeats it up to the end, or to where it parts."""
        num_layers = num_accesses = 0
        for step in self._run.steps:
            where = f"step {step.start.step}"
            try:
                self._begin(step)
                for turn in step.layers:
                    where = f"step {step.start.step}, layer {turn.event.layer}"
                    self._repeat_layer(turn)
                    num_layers += 1
                    num_accesses += len(turn.needed)
            except Parted as parted:
                return Verification(num_layers, num_accesses, f"{where}: {parted}.")
        return Verification(num_layers, num_accesses, None)

    def _begin(self, step: RecordedStep) -> None:
        self._order.begin(step.events)
        self._inbox.begin_step()
        self._transfers.bytes_per_s = step.link_bytes_per_s
        self._clock.advance_to(step.began_s)
        self._expert_cache.begin_step(step.start)

    def _repeat_layer(self, turn: RecordedLayer) -> None:
        recorded = turn.event
        self._expert_cache.notice()
        self._clock.advance_to(recorded.at_s)
        self._order.layer = turn
        self._transfers.stall_s = recorded.stall_s
        with self._expert_cache.acquire(recorded.layer, turn.needed, recorded.topk_ids_TK) as acquisition:
            found, expected = set(acquisition.hits), set(recorded.hits)
            if found != expected:
                raise Parted(
                    f"the run found {_listed(expected - found)} that the replay misses, and the replay found "
                    f"{_listed(found - expected)} that the run missed"
                )
            for _ in self._expert_cache.arrivals(acquisition):
                pass
            self._order.layer = None
            if self._order.peek() is not recorded:
                raise Parted(f"the run went on with {_named(self._order.peek())}")
            self._order.take()
            self._clock.advance_to(recorded.end_s)


def verify(run: RecordedRun, policy: SchedulePolicy) -> Verification:
    """Repeats the run with its own policy.

    Args:
        run: recorded from the first step of a cache, or from a quiet moment: loads that were under way when it began
            are not in its header.
        policy: the one that it was recorded with.
    """
    return Repetition(run, policy).verify()


def _named(event: TraceEvent | None) -> str:
    if isinstance(event, LoadEvent):
        return f"{event.expert} {'being paused' if event.is_paused else 'arriving'}"
    if isinstance(event, LayerEvent):
        return f"the end of layer {event.layer}"
    return "the end of the step" if event is None else "a hint"


def _listed(experts: set[int]) -> str:
    return ", ".join(f"expert {expert}" for expert in sorted(experts)) or "nothing"
