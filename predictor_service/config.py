"""What a predictor service can be asked for; defaults live here and nowhere else."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

AUTO: Final = "auto"
"""The best predictor that there is for the model; see `predictor_service.choice`."""

_MAX_LOOKAHEAD: Final = 16
_MAX_ROWS: Final = 4096
_MAX_SESSIONS: Final = 256
_MAX_PORT: Final = 65535


def default_listen() -> str:
    """In the user's runtime folder where there is one (it differs per host and user), else under /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "promoe" if runtime else Path(f"/tmp/promoe-{os.getuid()}")
    return f"unix:{folder / 'predictor.sock'}"


@dataclass(frozen=True)
class PredictorConfig:
    """The `[predictor]` table.

    Attributes:
        pack: folder of the expert pack whose experts are predicted.
        listen: gRPC endpoint, `unix:PATH` or `host:port`.
        metrics_listen: `host:port` of the Prometheus page; empty for none.
        predictor: a plug-in's name, or `auto`.
        artifact: what the plug-in was trained to, or for the oracle a recorded trace; None: the one that comes with
            promoe, where there is one for the model.
        registry: folder of published versions, and of the history of what was active; None: versions come with promoe,
            and the history is forgotten with the process.
        lookahead: how many MoE layers ahead is predicted; None: the predictor's own distance.
        max_rows: tokens of a step that are observed at most.
        max_sessions: compute nodes served at once.
        max_queued_events: of one session; beyond it the oldest observation is dropped.
        drain_deadline_s: how long SIGTERM waits for running calls.
    """

    pack: Path
    listen: str = field(default_factory=default_listen)
    metrics_listen: str = ""
    predictor: str = AUTO
    artifact: Path | None = None
    registry: Path | None = None
    lookahead: int | None = None
    max_rows: int = 8
    max_sessions: int = 16
    max_queued_events: int = 64
    drain_deadline_s: float = 2.0

    def __post_init__(self) -> None:
        for name, value, most in (
            ("lookahead", self.lookahead, _MAX_LOOKAHEAD),
            ("max_rows", self.max_rows, _MAX_ROWS),
            ("max_sessions", self.max_sessions, _MAX_SESSIONS),
            ("max_queued_events", self.max_queued_events, 1 << 20),
        ):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"predictor.{name} is {value}; allowed: 1 to {most}")
        if not 0 <= self.drain_deadline_s < math.inf:
            raise ValueError(f"predictor.drain_deadline_s is {self.drain_deadline_s}; allowed: 0 or more")
        if self.metrics_listen:
            host, _, port = self.metrics_listen.rpartition(":")
            if not host or not port.isdecimal() or int(port) > _MAX_PORT:
                raise ValueError(f"predictor.metrics_listen is {self.metrics_listen!r}; expected host:port")
