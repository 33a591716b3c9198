"""Who is in the step that runs now, and what each request's tokens asked of the expert cache.

Owned by the engine thread: engines announce steps, the experts function records layers, nobody locks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from promoe.hint import StepSpan, StepStart


class Phase(Enum):
    """Prefill and decode are measured apart, never mixed."""

    PREFILL = "prefill"
    DECODE = "decode"

    __hash__ = object.__hash__  # Enum's own is a function in Python, called for every count of every layer


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive rows of the step's hidden states that belong to one request."""

    request_id: str
    num_tokens: int
    phase: Phase


@dataclass
class ExpertUse:
    """What one request asked of the expert cache in one phase; see `ExpertUse` in inference.proto."""

    hits: int = 0
    misses: int = 0
    loaded_nbytes: int = 0
    stall_s: float = 0.0


@dataclass
class RequestUse:
    """A request's expert use, by phase."""

    prefill: ExpertUse = field(default_factory=ExpertUse)
    decode: ExpertUse = field(default_factory=ExpertUse)

    def of(self, phase: Phase) -> ExpertUse:
        """The phase's counters."""
        return self.prefill if phase is Phase.PREFILL else self.decode


StepListener: TypeAlias = Callable[[StepStart], None]
"""Told of every step before its forward pass, on the engine thread."""


class StepLedger:
    """The running step's number and spans, and the open requests' use.

    Attributes:
        listeners: told of every step, in this order; set before the first one.
        end_listeners: called after every forward pass, well or not: the host has waited for its logits.
        step: the running step's number, or the last one's; they count up from 1.
    """

    def __init__(self) -> None:
        self.listeners: tuple[StepListener, ...] = ()
        self.end_listeners: tuple[Callable[[], None], ...] = ()
        self.step = 0
        self._spans: tuple[TokenSpan, ...] = ()
        self._uses: dict[str, RequestUse] = {}
        self._ended: list[str] = []

    @property
    def spans(self) -> tuple[TokenSpan, ...]:
        """The running step's spans in row order; empty between steps."""
        return self._spans

    def begin_step(self, spans: Sequence[TokenSpan]) -> None:
        """Announces a forward pass whose rows are these spans, in order."""
        self._spans = tuple(spans)
        for span in self._spans:
            self._uses.setdefault(span.request_id, RequestUse())
        self.step += 1
        ended, self._ended = self._ended, []
        step_spans = tuple(StepSpan(s.request_id, s.num_tokens, s.phase is Phase.PREFILL) for s in self._spans)
        start = StepStart(self.step, step_spans, tuple(ended))
        for listener in self.listeners:
            listener(start)

    def end_step(self) -> None:
        """The forward pass is over."""
        self._spans = ()
        for listener in self.end_listeners:
            listener()

    def use_of(self, request_id: str) -> RequestUse:
        """The open request's counters (created on first use)."""
        return self._uses.setdefault(request_id, RequestUse())

    def take(self, request_id: str) -> RequestUse:
        """The ended request's counters, which are forgotten here; the next step's listeners are told of its end."""
        use = self._uses.pop(request_id, None)
        if use is None:
            return RequestUse()
        self._ended.append(request_id)
        return use
