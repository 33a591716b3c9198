"""What was written is read, up to the last whole batch of a file that was cut; anything else is refused."""

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.errors import InvalidInput, ModelNotFound
from promoe.trace_columns import SCHEMA
from promoe.trace_events import LayerEvent, StepEvent, TraceEvent
from promoe.trace_file import MAX_BATCH_NBYTES, MAX_BATCH_ROWS, TraceReader, TraceWriter
from tests.promoe.traces import TRACE_EVENTS, MadeUpRun, same_event

RUN = MadeUpRun()


def written(path: Path, events: list[TraceEvent], batches: int = 1) -> Path:
    """A closed trace of as many batches of equal size."""
    with TraceWriter(path, RUN.header()) as writer:
        for number, event in enumerate(events):
            if number % max(1, len(events) // batches) == 0:
                writer.flush()
            writer.append(event)
    return path


def same_events(some: list[TraceEvent], others: list[TraceEvent]) -> bool:
    return len(some) == len(others) and all(map(same_event, some, others))


@given(events=st.lists(TRACE_EVENTS, max_size=12), batches=st.integers(1, 4))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, events: list[TraceEvent], batches: int
) -> None:
    reader = TraceReader(written(tmp_path_factory.mktemp("trace") / "run.trace", events, batches))
    assert reader.header == RUN.header()
    assert (reader.summary.num_events, reader.summary.is_complete, reader.summary.dropped_steps) == (
        len(events),
        True,
        0,
    )
    assert same_events(list(reader), events)
    without = [
        replace(event, layer_input_RD=None, router_input_RD=None, last_output_RD=None)
        if isinstance(event, LayerEvent)
        else event
        for event in events
    ]
    assert same_events(list(reader.events(hidden=False)), without)


def test_hidden_states_are_bfloat16_rounded_to_nearest(tmp_path: Path) -> None:
    hidden_RD = np.array([[1.0, 3.14159, -1e38, 65536.5]], np.float32)
    event = LayerEvent(0, 0, 1, 0, np.zeros((1, 2), np.uint16), (0,), (), (), 0, (0,), hidden_RD)
    (read,) = TraceReader(written(tmp_path / "t", [event]))
    assert isinstance(read, LayerEvent)
    assert read.layer_input_RD is not None
    np.testing.assert_allclose(read.layer_input_RD, hidden_RD, rtol=2**-8)
    assert read.router_input_RD is None


def test_steps_begin_with_their_step_event(tmp_path: Path) -> None:
    events = list(RUN.events())
    reader = TraceReader(written(tmp_path / "t", [*events[1:3], *events]))
    steps = list(reader.steps())
    assert [step[0].step for step in steps if isinstance(step[0], StepEvent)] == list(range(1, 15))
    assert same_events(list(itertools.chain(*steps)), events)
    assert not list(TraceReader(written(tmp_path / "u", events[1:3])).steps())


@pytest.mark.parametrize("hidden", [True, False])
def test_a_file_cut_anywhere_is_read_to_its_last_whole_batch(tmp_path: Path, hidden: bool) -> None:
    events = list(RUN.events(hidden=True))[:40]
    path = written(tmp_path / "t", events, batches=4)
    whole = path.read_bytes()
    cut = tmp_path / "cut"
    seen = set()
    first_batch = next(n for n in range(0, len(whole), 64) if _opens(cut, whole[:n]))
    for length in [*range(first_batch, len(whole), 211), len(whole) - 8]:
        cut.write_bytes(whole[:length])
        reader = TraceReader(cut)
        read = list(reader.events(hidden=hidden))
        assert len(read) == reader.summary.num_events
        assert [event.at_s for event in read] == [event.at_s for event in events[: len(read)]]
        # Without the stream's own end, the last batch still says that it is the last.
        assert reader.summary.is_complete == (length == len(whole) - 8)
        seen.add(len(read))
    assert seen == {0, 10, 20, 30, 40}


def _opens(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        TraceReader(path)
    except InvalidInput as error:
        assert "is no trace" in str(error)  # noqa: PT017 - both ends are looked for
        return False
    return True


def test_what_a_killed_writer_flushed_is_in_its_part_file(tmp_path: Path) -> None:
    older = written(tmp_path / "t", list(RUN.events())[:1])
    writer = TraceWriter(older, RUN.header())
    for event in itertools.islice(RUN.events(), 5):
        writer.append(event)
    writer.flush()
    writer.append(next(RUN.events()))
    killed = TraceReader(writer.part_path)  # nothing was closed
    assert (killed.summary.num_events, killed.summary.is_complete) == (5, False)
    assert TraceReader(older).summary.num_events == 1
    writer.close()
    assert (TraceReader(older).summary.num_events, writer.part_path.exists()) == (6, False)
    writer.close()
    writer.abandon()


def test_an_exception_leaves_the_part_file_and_the_older_trace(tmp_path: Path) -> None:
    older = written(tmp_path / "t", list(RUN.events())[:1])
    writer = TraceWriter(older, RUN.header())

    def record_two_and_fail() -> None:
        with writer:
            writer.append(next(RUN.events()))
            writer.append(next(RUN.events()))
            raise KeyError

    with pytest.raises(KeyError):
        record_two_and_fail()
    assert TraceReader(older).summary.num_events == 1
    part = TraceReader(writer.part_path)
    assert (part.summary.num_events, part.summary.is_complete) == (2, False)


def test_dropped_steps_are_said(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", RUN.header()) as writer:
        writer.append(next(RUN.events()))
        writer.flush()
        writer.dropped_steps = 3
    assert TraceReader(tmp_path / "t").summary.dropped_steps == 3


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    (step, *_) = RUN.events()
    hidden_RD = np.zeros((MAX_BATCH_NBYTES // 64, 16), np.float32)  # half of the bytes as bfloat16
    rows = tuple(range(hidden_RD.shape[0]))
    large = LayerEvent(0, 0, 1, 0, np.zeros((1, 2), np.uint16), (0,), (), (), 0, rows, hidden_RD)
    sizes = []
    with TraceWriter(tmp_path / "t", RUN.header()) as writer:
        for event in [*[step] * MAX_BATCH_ROWS, step, large, large, step]:
            before = writer.written_nbytes
            writer.append(event)
            if writer.written_nbytes > before:
                sizes.append(writer.num_events)
    assert sizes == [MAX_BATCH_ROWS, MAX_BATCH_ROWS + 3]


def _arrow_stream(path: Path) -> None:
    with path.open("wb") as file, pa.ipc.new_stream(file, pa.schema([("a", pa.uint8())])):
        pass


def _of_another_format(path: Path) -> None:
    metadata = {b"promoe.trace": b"99", b"promoe.header": b"{}"}
    with path.open("wb") as file, pa.ipc.new_stream(file, SCHEMA.with_metadata(metadata)):
        pass


def _with_a_broken_header(path: Path) -> None:
    metadata = {b"promoe.trace": b"1", b"promoe.header": b"{nonsense"}
    with path.open("wb") as file, pa.ipc.new_stream(file, SCHEMA.with_metadata(metadata)):
        pass


def _foreign_batches(path: Path) -> None:
    metadata = {b"promoe.trace": b"1", b"promoe.header": b"{}"}
    with path.open("wb") as file, pa.ipc.new_stream(file, SCHEMA.with_metadata(metadata)) as stream:
        stream.write_batch(pa.record_batch([pa.nulls(1, field.type) for field in SCHEMA], schema=SCHEMA))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "is no trace"),
        (lambda path: path.write_text("Hello, this is a text of some length.\n" * 9), "is no trace"),
        (lambda path: path.write_bytes(bytes(range(256)) * 9), "is no trace"),
        (_arrow_stream, "another program's Arrow stream"),
        (_of_another_format, "is a trace of format 99, and this promoe reads format 1"),
        (_with_a_broken_header, "is damaged"),
        (_foreign_batches, "is damaged"),
    ],
)
def test_what_is_no_trace_is_refused_with_a_sentence(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(InvalidInput, match=re.escape(words)) as refused:
        TraceReader(path)
    assert str(path) in str(refused.value)
    assert str(refused.value).endswith(".")


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ModelNotFound, match="There is no trace at"):
            TraceReader(path)


@given(place=st.floats(0, 1), flip=st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_reads_as_events(
    tmp_path_factory: pytest.TempPathFactory, place: float, flip: int
) -> None:
    """Whatever a disk does to a file: a sentence or events, nothing else."""
    path = written(tmp_path_factory.mktemp("trace") / "t", list(RUN.events())[:30], batches=3)
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= flip
    path.write_bytes(data)
    try:
        assert len(list(TraceReader(path))) <= 40
    except InvalidInput as error:
        assert str(path) in str(error)  # noqa: PT017 - it may also be readable


def test_a_trace_of_many_accesses_is_read_quickly(tmp_path: Path) -> None:
    """10^6 expert accesses in a few seconds; here a fiftieth of them, and many times the machine's noise."""
    run = MadeUpRun(num_layers=10, num_experts=32, experts_per_token=8, num_requests=1, decode_steps=250)
    path = written(tmp_path / "t", list(run.events()))
    started_s = time.perf_counter()
    num_accesses = sum(event.topk_ids_TK.size for event in TraceReader(path) if isinstance(event, LayerEvent))
    elapsed_s = time.perf_counter() - started_s
    assert num_accesses >= 20_000
    assert elapsed_s < 2
