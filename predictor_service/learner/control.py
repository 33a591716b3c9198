"""What the service and the learner's process say to each other, as JSON lines over a socket.

    service ──► learner    {"train": {"base": PATH or null, "name": "learned@2"}}   {"pause": true}   {"status": true}
                           {"versions": {"learned@1": "router_input"}}
    learner ──► service    {"status": {...}}   {"trained": {"path": PATH, "metrics": {...}}}   {"failed": "sentence"}

`versions` says what sessions observe for a version, as their welcomes do: for those that were opened before the
learner was started, and where a welcome got lost.
"""

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from promoe.errors import InvalidInput, Unavailable
from promoe.hint import ObservedKind

_MOST_LINE_NBYTES: Final = 1 << 20
_RECEIVE_NBYTES: Final = 1 << 16


@dataclass(frozen=True)
class Train:
    """Train a candidate, from an artifact or from nothing."""

    base: Path | None
    name: str


@dataclass(frozen=True)
class Pause:
    """Stop, or go on."""

    is_paused: bool


@dataclass(frozen=True)
class AskStatus:
    """Say what is held."""


@dataclass(frozen=True)
class KnowVersions:
    """What is observed for which version."""

    observed: dict[str, ObservedKind] = field(default_factory=dict)


Command: TypeAlias = Train | Pause | AskStatus | KnowVersions


@dataclass(frozen=True)
class LearnerStatus:
    """What the learner's process holds and does.

    Attributes:
        documents_seen: since it was started, those that were read from the disk included.
        documents, tokens, nbytes: that are held; bytes with those of requests that still run.
        oldest_age_s: of a document.
        lost_steps: that lacked something, because packets were missing.
        bad_packets: that could not be read.
        is_paused: nothing is gathered or trained.
        is_training: a candidate is being trained.
        trained_tokens, epochs: of it, so far.
    """

    documents_seen: int
    documents: int
    tokens: int
    nbytes: int
    oldest_age_s: float
    lost_steps: int
    bad_packets: int
    is_paused: bool
    is_training: bool
    trained_tokens: int
    epochs: int


@dataclass(frozen=True)
class CandidateTrained:
    """Its artifact is at `path`."""

    path: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrainingFailed:
    """Why there is no candidate."""

    sentence: str


Answer: TypeAlias = LearnerStatus | CandidateTrained | TrainingFailed


def encode_answer(answer: Answer) -> bytes:
    """A line."""
    document: dict[str, object]
    match answer:
        case LearnerStatus():
            document = {"status": asdict(answer)}
        case CandidateTrained():
            document = {"trained": asdict(answer)}
        case TrainingFailed():
            document = {"failed": answer.sentence}
    return json.dumps(document).encode() + b"\n"


def decode_answer(line: bytes) -> Answer:
    """Raises InvalidInput for what is no answer."""
    key, value = _entry(line)
    try:
        match key, value:
            case "status", dict():
                return LearnerStatus(**value)
            case "trained", {"path": str(path), "metrics": dict(metrics)}:
                return CandidateTrained(path, {str(name): float(number) for name, number in metrics.items()})
            case "failed", str():
                return TrainingFailed(value)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"The learner's answer {key} cannot be read: {error}.") from error
    raise InvalidInput(f"The learner's answer {key!r} is not known; known: status, trained, failed.")


def encode_command(command: Command) -> bytes:
    """A line."""
    document: dict[str, object]
    match command:
        case Train():
            document = {"train": {"base": None if command.base is None else str(command.base), "name": command.name}}
        case Pause():
            document = {"pause": command.is_paused}
        case AskStatus():
            document = {"status": True}
        case KnowVersions():
            document = {"versions": {version: observed.value for version, observed in command.observed.items()}}
    return json.dumps(document).encode() + b"\n"


def decode_command(line: bytes) -> Command:
    """Raises InvalidInput for what is no command."""
    key, value = _entry(line)
    match key, value:
        case "train", {"base": str(base), "name": str(name)}:
            return Train(Path(base), name)
        case "train", {"base": None, "name": str(name)}:
            return Train(None, name)
        case "pause", bool():
            return Pause(value)
        case "status", True:
            return AskStatus()
        case "versions", dict():
            try:
                return KnowVersions({str(version): ObservedKind(observed) for version, observed in value.items()})
            except ValueError as error:
                raise InvalidInput(f"versions: {error}.") from error
    raise InvalidInput(f"The command {key!r} is not known, or not so; known: train, pause, status, versions.")


def _entry(line: bytes) -> tuple[str, object]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise InvalidInput("A line is no JSON document.") from error
    if not isinstance(document, dict) or len(document) != 1:
        raise InvalidInput("A line is not a document with one key.")
    ((key, value),) = document.items()
    return key, value


class ControlLines:
    """Lines over a connected stream socket; one thread reads, any may send.

    Args:
        connection: closed with this.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._waiting = b""

    def fileno(self) -> int:
        """For polling."""
        return self._connection.fileno()

    def send(self, line: bytes) -> None:
        """Raises Unavailable when the other side is gone."""
        try:
            with self._sending:
                self._connection.sendall(line)
        except OSError as error:
            raise Unavailable(f"The other side is gone ({error.strerror or error}).") from error

    def receive(self) -> Iterator[bytes]:
        """Waits for something and yields the lines that are whole.

        Raises:
            Unavailable: the other side is gone.
            InvalidInput: a line is longer than any command.
        """
        try:
            data = self._connection.recv(_RECEIVE_NBYTES)
        except OSError as error:
            raise Unavailable(f"The other side is gone ({error.strerror or error}).") from error
        if not data:
            raise Unavailable("The other side is gone.")
        *lines, self._waiting = (self._waiting + data).split(b"\n")
        if len(self._waiting) > _MOST_LINE_NBYTES:
            raise InvalidInput(f"A line is longer than {_MOST_LINE_NBYTES} bytes.")
        yield from lines

    def shut_down(self) -> None:
        """Tells the other side, and wakes whoever receives here; allowed from any thread, and twice."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was quicker
            return

    def close(self) -> None:
        """Nothing is sent or received any more."""
        self._connection.close()
