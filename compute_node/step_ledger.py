"""Who is in the step that runs now, and what each request's tokens asked of the expert cache.

Owned by the engine thread: engines announce steps, the experts function records layers, nobody locks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """Prefill and decode are measured apart, never mixed."""

    PREFILL = "prefill"
    DECODE = "decode"


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


class StepLedger:
    """The running step's spans and the open requests' use."""

    def __init__(self) -> None:
        self._spans: tuple[TokenSpan, ...] = ()
        self._uses: dict[str, RequestUse] = {}

    @property
    def spans(self) -> tuple[TokenSpan, ...]:
        """The running step's spans in row order; empty between steps."""
        return self._spans

    def begin_step(self, spans: Sequence[TokenSpan]) -> None:
        """Announces a forward pass whose rows are these spans, in order."""
        self._spans = tuple(spans)
        for span in self._spans:
            self._uses.setdefault(span.request_id, RequestUse())

    def end_step(self) -> None:
        """The forward pass is over."""
        self._spans = ()

    def use_of(self, request_id: str) -> RequestUse:
        """The open request's counters (created on first use)."""
        return self._uses.setdefault(request_id, RequestUse())

    def take(self, request_id: str) -> RequestUse:
        """The request's counters, which are forgotten here."""
        return self._uses.pop(request_id, RequestUse())
