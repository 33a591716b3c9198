"""The trace file: an Arrow IPC stream with zstd, one row per event, the header in the schema's metadata.

A stream has no footer: what is there up to the last whole batch can be read, whatever became of its writer. Every
batch says how many steps were left out so far, the last one that it is the last.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pyarrow as pa
from google.protobuf import json_format

from promoe.errors import InvalidInput, ModelNotFound
from promoe.trace_columns import HIDDEN_COLUMNS, SCHEMA, BatchRows, Row, batch_of, row_nbytes, row_of
from promoe.trace_events import StepEvent, TraceEvent
from promoe.trace_header import TraceHeader
from promoe.typed_message import decode_message, encode_message
from promoe.v1 import inference_pb2

FORMAT_VERSION: Final = 1
"""Readers refuse others."""

MAX_BATCH_ROWS: Final = 4096
MAX_BATCH_NBYTES: Final = 4 << 20
"""A batch is written when it has so many events, or so many bytes: what a kill can cost."""

_VERSION_KEY: Final = b"promoe.trace"
_HEADER_KEY: Final = b"promoe.header"
_DROPPED_KEY: Final = b"dropped_steps"
_LAST_KEY: Final = b"last"


class TraceWriter:
    """Appends events to `PATH.part`, which becomes `path` when it is closed.

    So a run that fails leaves an older trace at `path` alone, and what it had recorded in the part file, which a
    TraceReader reads as it is. As a context manager it closes, unless an exception passes through: then the part file
    stays.

    Args:
        path: of the finished file; replaced when it exists.
        header: written first.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.path = path
        self.part_path = path.with_name(f"{path.name}.part")
        self.num_events = 0
        self.dropped_steps = 0
        self._rows: list[Row] = []
        self._rows_nbytes = 0
        message = encode_message(header, inference_pb2.TraceHeader)
        metadata = {_VERSION_KEY: str(FORMAT_VERSION).encode(), _HEADER_KEY: json_format.MessageToJson(message)}
        self._file = self.part_path.open("wb")
        options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
        self._stream = pa.ipc.new_stream(self._file, SCHEMA.with_metadata(metadata), options=options)

    @property
    def written_nbytes(self) -> int:
        """Bytes in the file so far."""
        return self._file.tell()

    def append(self, event: TraceEvent) -> None:
        """Adds one event; writes a batch when there is enough for one."""
        row = row_of(event)
        self._rows.append(row)
        self._rows_nbytes += row_nbytes(row)
        self.num_events += 1
        if len(self._rows) >= MAX_BATCH_ROWS or self._rows_nbytes >= MAX_BATCH_NBYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what was appended as a batch of its own."""
        if self._rows:
            self._write_batch({})

    def close(self) -> None:
        """Writes the rest and the mark of a complete trace, and gives the file its name."""
        if self._file.closed:
            return
        self._write_batch({_LAST_KEY: b"yes"})
        self._stream.close()
        self._file.close()
        self.part_path.replace(self.path)

    def abandon(self) -> None:
        """Leaves the part file with what was appended, without the mark."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def _write_batch(self, marks: dict[bytes, bytes]) -> None:
        metadata = {_DROPPED_KEY: str(self.dropped_steps).encode()} | marks
        self._stream.write_batch(batch_of(self._rows), custom_metadata=metadata)
        # Into the system's hands: the process may be killed at any time.
        self._file.flush()
        self._rows.clear()
        self._rows_nbytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


@dataclass(frozen=True)
class TraceSummary:
    """What the batches' marks say; known without reading events.

    Attributes:
        num_events: rows of all whole batches.
        dropped_steps: steps that were left out while recording: a replay of a trace with gaps means nothing.
        is_complete: False when the writer was killed, or the file cut: it ends with its last whole batch.
    """

    num_events: int
    dropped_steps: int
    is_complete: bool


class TraceReader:
    """A trace file's header, summary and events; iterating again starts again.

    Args:
        path: of the file, or of the part file of a writer that was killed.

    Attributes:
        path: the file.
        header: what a replay must know.
        summary: see TraceSummary.

    Raises:
        ModelNotFound: there is no such file.
        InvalidInput: it is no trace, one of another format, or damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelNotFound(f"There is no trace at {path}.")
        self.path = path
        self.header = self._read_header()
        self.summary = self._summarize()

    def __iter__(self) -> Iterator[TraceEvent]:
        return self.events()

    def events(self, *, hidden: bool = True) -> Iterator[TraceEvent]:
        """The events in their order, a batch in memory at a time.

        Args:
            hidden: with hidden states; without them a trace that has some is read many times faster.

        Raises:
            InvalidInput: while iterating: the file is damaged.
        """
        columns = [name for name in SCHEMA.names if hidden or name not in HIDDEN_COLUMNS]
        for batch, _ in self._batches(columns):
            try:
                batch.validate(full=True)
                events = list(BatchRows(batch))
            except (pa.ArrowException, ValueError, TypeError) as error:
                raise self._damaged(error) from error
            yield from events

    def steps(self, *, hidden: bool = True) -> Iterator[list[TraceEvent]]:
        """The events step by step: each list begins with its StepEvent; what came before the first one is left out."""
        step: list[TraceEvent] = []
        for event in self.events(hidden=hidden):
            if isinstance(event, StepEvent):
                if step:
                    yield step
                step = [event]
            elif step:
                step.append(event)
        if step:
            yield step

    def _read_header(self) -> TraceHeader:
        try:
            with pa.memory_map(str(self.path)) as source:
                schema = pa.ipc.open_stream(source).schema
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InvalidInput(f"{self.path} is no trace: {_first_line(error)}.") from error
        metadata = schema.metadata or {}
        version = metadata.get(_VERSION_KEY)
        if version is None:
            raise InvalidInput(f"{self.path} is no trace: it is another program's Arrow stream.")
        if version != str(FORMAT_VERSION).encode() or not schema.equals(SCHEMA):
            raise InvalidInput(
                f"{self.path} is a trace of format {version.decode(errors='replace')}, and this promoe reads format "
                f"{FORMAT_VERSION}. Record it again, or read it with the promoe that wrote it."
            )
        message = inference_pb2.TraceHeader()
        try:
            json_format.Parse(metadata.get(_HEADER_KEY, b""), message, ignore_unknown_fields=True)
        except (json_format.ParseError, ValueError) as error:
            raise self._damaged(error) from error
        return decode_message(message, TraceHeader)

    def _summarize(self) -> TraceSummary:
        num_events, dropped_steps, is_complete = 0, 0, False
        for batch, marks in self._batches(["kind"]):
            num_events += batch.num_rows
            dropped = marks.get(_DROPPED_KEY, b"")
            if is_complete or not dropped.isdigit():
                raise self._damaged(ValueError("its batches are not those that were written"))
            dropped_steps = int(dropped)
            is_complete = _LAST_KEY in marks
        return TraceSummary(num_events, dropped_steps, is_complete)

    def _batches(self, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, dict[bytes, bytes]]]:
        """Whole batches with their marks, these columns of them; one that is cut off ends them."""
        options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name) for name in columns])
        with pa.memory_map(str(self.path)) as source:
            stream = pa.ipc.open_stream(source, options=options)
            while True:
                try:
                    batch, marks = stream.read_next_batch_with_custom_metadata()
                except StopIteration:
                    return
                except (pa.ArrowException, OSError) as error:
                    if source.tell() >= source.size():
                        return
                    raise self._damaged(error) from error
                yield batch, dict(marks or {})

    def _damaged(self, error: Exception) -> InvalidInput:
        return InvalidInput(f"The trace {self.path} is damaged: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
