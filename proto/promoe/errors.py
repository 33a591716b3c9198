"""Operational failures, and the one table that maps them to gRPC status codes and back."""

from types import MappingProxyType
from typing import Final

import grpc


class PromoeError(Exception):
    """A failure that a person or a caller can act on; its text is a whole sentence."""


class InvalidInput(PromoeError):
    """What was asked cannot be done as asked."""


class ModelNotFound(PromoeError):
    """The model, pack or file does not exist or cannot be reached."""


class ModelUnsupported(PromoeError):
    """The model exists, but its family or its format is not supported."""


class PackDamaged(PromoeError):
    """A pack is incomplete or its bytes are not those that were written."""


class ModelMismatch(PromoeError):
    """Two sides were made for different models or schemas; the text shows both."""


class InsufficientMemory(PromoeError):
    """A budget is too small; the text names the number that is short and the flag that mends it."""


class Overloaded(PromoeError):
    """A bounded queue is full.

    Args:
        message: the sentence.
        retry_after_ms: when the caller should try again.
    """

    def __init__(self, message: str, retry_after_ms: int = 1000) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class Unavailable(PromoeError):
    """The peer is not there, not ready yet, or is shutting down; trying again may help."""


class DeadlineExceeded(PromoeError):
    """The caller's deadline passed."""


class AlreadyRunning(PromoeError):
    """Another process holds what this one wants to own (socket, port, folder)."""


class ResourceExhausted(PromoeError):
    """The host ran out of something: disk, file descriptors, shared memory."""


class InternalError(PromoeError):
    """The peer failed in a way that is a bug; its log has the details."""


RETRY_AFTER_METADATA_KEY: Final = "retry-after-ms"

STATUS_OF_ERROR: Final[tuple[tuple[type[PromoeError], grpc.StatusCode], ...]] = (
    (InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (ModelNotFound, grpc.StatusCode.NOT_FOUND),
    (ModelUnsupported, grpc.StatusCode.UNIMPLEMENTED),
    (PackDamaged, grpc.StatusCode.DATA_LOSS),
    (ModelMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (InsufficientMemory, grpc.StatusCode.OUT_OF_RANGE),
    (ResourceExhausted, grpc.StatusCode.ABORTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (AlreadyRunning, grpc.StatusCode.ALREADY_EXISTS),
    (InternalError, grpc.StatusCode.INTERNAL),
)
"""Domain error <-> gRPC status, one to one, so that a client raises what the server raised."""


def status_of(error: BaseException) -> grpc.StatusCode | None:
    """The status for a domain error (ValueError is bad input), or None for a bug."""
    if isinstance(error, ValueError):
        return grpc.StatusCode.INVALID_ARGUMENT
    for error_type, status in STATUS_OF_ERROR:
        if isinstance(error, error_type):
            return status
    return None


_MAX_TEXT_NBYTES: Final = 2000
"""gRPC replaces a status whose text does not fit its metadata (8 KiB, percent-encoded: up to 3 bytes for one)."""


EXIT_WRONG_SETTING: Final = 2
EXIT_PACK_DAMAGED: Final = 3
"""Exit status of a service that found its pack damaged: who started it may know how the pack is made."""


def exit_status(error: PromoeError) -> int:
    """What a service that this error keeps from running ends with."""
    return EXIT_PACK_DAMAGED if isinstance(error, PackDamaged) else 1


def wire_text(error: BaseException) -> str:
    """The error's sentence as it travels: never empty, valid UTF-8, and short enough for gRPC's metadata."""
    encoded = (str(error) or type(error).__name__).encode(errors="replace")
    if len(encoded) <= _MAX_TEXT_NBYTES:
        return encoded.decode()
    return encoded[:_MAX_TEXT_NBYTES].decode(errors="ignore") + "…"


def error_of(status: grpc.StatusCode, message: str, retry_after_ms: int | None = None) -> PromoeError:
    """The domain error that a status stands for; statuses outside the table are an InternalError.

    gRPC itself uses two statuses of the table with another meaning, which only its text tells.
    """
    if status is grpc.StatusCode.UNIMPLEMENTED and message.startswith("Method not found"):
        return ModelMismatch("The peer does not serve this call; it is another service or another version of promoe.")
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in message:
        return InvalidInput(f"The message is too large: {message}")
    for error_type, known_status in STATUS_OF_ERROR:
        if status is known_status:
            if error_type is Overloaded and retry_after_ms is not None:
                return Overloaded(message, retry_after_ms)
            return error_type(message)
    if status is grpc.StatusCode.CANCELLED:
        return Unavailable(message or "the call was cancelled")
    return InternalError(f"{status.name}: {message}")


_STATUS_OF_CODE: Final = MappingProxyType({status.value[0]: status for status in grpc.StatusCode})


def code_of(status: grpc.StatusCode) -> int:
    """The status as a number, for messages that carry one."""
    code: int = status.value[0]
    return code


def error_of_code(code: int, message: str) -> PromoeError:
    """`error_of` for a status that came as a number; one that gRPC does not have is UNKNOWN."""
    return error_of(_STATUS_OF_CODE.get(code, grpc.StatusCode.UNKNOWN), message)
