"""The engine thread's side of one or two predictors: whose hints are taken, who is tried out beside it, who has left.

Who that is is decided elsewhere (`takeovers`), by laying new roles down here; the engine thread picks them up when its
next step begins, and waits for nobody:

    roles laid down:   A | B tried out       B                            B
    engine thread:     step: A, B observe ── step: B observes, hints of   step: hints of A
                       hints of B withheld   B are taken, and A's last    are withheld: A can go
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from compute_node.hint_client import HintClient, Patience
from compute_node.hint_inbox import HintInbox, HintTap
from compute_node.hint_session import HintTraffic
from compute_node.layer_sample import LayerSample, LayerSampler, WantedSamples
from compute_node.miss_watch import MissLevel
from promoe.hint import StepStart
from promoe.model_spec import ModelSpec


class Connection:
    """One predictor's client, and the tap on its hints.

    Args:
        endpoint: of the predictor.
        spec: the served model.
        inbox: where hints go that are taken.
        patience: of the client.
        misses: how much there is to save.
        noted: see HintClient.

    Attributes:
        num_shown: steps that the engine thread has shown it before its hints were taken.
    """

    def __init__(
        self,
        endpoint: str,
        spec: ModelSpec,
        inbox: HintInbox,
        patience: Patience,
        misses: Callable[[], MissLevel],
        noted: Callable[[], None],
    ) -> None:
        self.endpoint = endpoint
        self.num_shown = 0
        self.tap = HintTap(inbox)

        def worth() -> MissLevel:
            # Who is tried out has to be shown something.
            level = misses()
            return MissLevel.FEW if level is MissLevel.HARDLY_ANY and not self.tap.is_open else level

        self.client = HintClient(endpoint, spec, self.tap, patience, worth, noted)

    @property
    def num_faults(self) -> int:
        """Hints that could not be used."""
        traffic = self.client.traffic
        return traffic.invalid + traffic.wrong_version


@dataclass(frozen=True)
class Roles:
    """Replaced as a whole.

    Attributes:
        incumbent: whose hints are taken.
        candidate: who is tried out: shown the same steps, its hints withheld.
    """

    incumbent: Connection | None = None
    candidate: Connection | None = None


@dataclass(frozen=True)
class _Books:
    """Who is open, and what those who are not have left."""

    connections: tuple[Connection, ...] = ()
    past: HintTraffic = field(default_factory=HintTraffic)
    num_withheld: int = 0


class _Seat:
    """A sampler for whoever has a role in the running step.

    Args:
        occupant: asked when a step begins.
    """

    def __init__(self, occupant: Callable[[], Connection | None]) -> None:
        self._occupant = occupant
        self._connection: Connection | None = None

    def begin_step(self, start: StepStart) -> WantedSamples | None:
        """See LayerSampler."""
        connection = self._connection = self._occupant()
        if connection is None:
            return None
        wanted = connection.client.begin_step(start)
        if wanted is not None and not connection.tap.is_open:
            connection.num_shown += 1
        return wanted

    def take(self, sample: LayerSample) -> None:
        """See LayerSampler."""
        assert self._connection is not None, "who has no seat wants no samples"
        self._connection.client.take(sample)


class HintLink:
    """Looks for hints on the engine thread, and hands samples to those who have a role.

    Args:
        spec: the served model.
        inbox: where the expert cache looks for hints.
        patience: of each client.
        misses: how much there is to save.

    Attributes:
        roles: laid down by one thread, picked up by the engine thread between two steps.
        samplers: of layers, in this order.
    """

    def __init__(
        self,
        spec: ModelSpec,
        inbox: HintInbox,
        patience: Patience | None = None,
        misses: Callable[[], MissLevel] = lambda: MissLevel.FEW,
    ) -> None:
        self.roles = Roles()
        self.samplers: tuple[LayerSampler, ...] = (_Seat(self._next_incumbent), _Seat(lambda: self._acting.candidate))
        self._spec = spec
        self._inbox = inbox
        self._patience = patience or Patience()
        self._misses = misses
        self._books = _Books()
        self._acting = self.roles
        self._leaving: Connection | None = None
        self._looked_at: tuple[HintClient, ...] = ()
        inbox.look_for_more, inbox.flush = self._look, self._flush

    # ---- the engine's thread

    def _next_incumbent(self) -> Connection | None:
        """A step begins: the seats of the one before it are given to who has the roles now."""
        roles, acting, leaving = self.roles, self._acting, self._leaving
        if leaving is not None:
            leaving.tap.is_open = False
            self._leaving = None
        if roles is not acting:
            if roles.incumbent is not acting.incumbent:
                # What it says of this step it has seen coming in the one before.
                self._leaving = acting.incumbent
                if roles.incumbent is not None:
                    roles.incumbent.tap.is_open = True
            self._acting = roles
        if roles is not acting or leaving is not None:
            present = (roles.incumbent, roles.candidate, self._leaving)
            self._looked_at = tuple(connection.client for connection in present if connection is not None)
        return roles.incumbent

    def _look(self) -> None:
        for client in self._looked_at:
            client.look()

    def _flush(self) -> None:
        for client in self._looked_at:
            client.flush()

    # ---- whoever lays down the roles

    def open(self, endpoint: str, noted: Callable[[], None], is_quiet: bool = False) -> Connection:
        """Looks for a predictor from now on; it has no role yet. `is_quiet`: see ConnectionLog."""
        connection = Connection(endpoint, self._spec, self._inbox, self._patience, self._misses, noted)
        connection.client.log.is_quiet = is_quiet
        self._books = _Books((*self._books.connections, connection), self._books.past, self._books.num_withheld)
        connection.client.start()
        return connection

    def has_left(self, connection: Connection) -> bool:
        """The engine thread takes no more hints of it."""
        return connection not in (self._acting.incumbent, self._acting.candidate, self._leaving)

    def close(self, connection: Connection) -> None:
        """Ends one that has no role (any more); its counters are kept."""
        connection.client.close()
        books = self._books
        self._books = _Books(
            tuple(other for other in books.connections if other is not connection),
            books.past + connection.client.traffic,
            books.num_withheld + connection.tap.num_withheld,
        )

    def close_all(self) -> None:
        """The node ends."""
        self.roles = Roles()
        for connection in self._books.connections:
            self.close(connection)

    # ---- any thread

    @property
    def traffic(self) -> HintTraffic:
        """Counters since the start, of all predictors together."""
        books = self._books
        return sum((connection.client.traffic for connection in books.connections), books.past)

    @property
    def num_withheld(self) -> int:
        """Hints of those who were tried out or have left: checked, counted, not used."""
        books = self._books
        return books.num_withheld + sum(connection.tap.num_withheld for connection in books.connections)
