"""The history survives restarts, torn lines, full disks and clocks that jump."""

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.version_log import VersionLog, Wish
from promoe.errors import InvalidInput, ResourceExhausted
from promoe.predictor_versions import VersionAction, VersionMetric

WISH = Wish("ann", "it is better")


def add(log: VersionLog, after: str, before: str = "a@0", action: VersionAction = VersionAction.ACTIVATE) -> int:
    return log.add(action, before, after, WISH).number


def clock(times: Iterator[float]) -> Callable[[], float]:
    return lambda: next(times)


@pytest.fixture(params=["file", "memory"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> VersionLog:
    return VersionLog(tmp_path / "history.jsonl" if request.param == "file" else None, "s1")


def test_changes_are_told_as_they_were_added(log: VersionLog) -> None:
    assert log.changes() == []
    assert log.last_active() is None
    numbers = (VersionMetric("gain", 0.25),)
    first = log.add(VersionAction.ACTIVATE, "a@1", "a@2", replace(WISH, numbers=numbers))
    second = log.add(VersionAction.ROLLBACK, "a@2", "a@1", Wish("bob", "it was not"))
    assert log.changes() == [first, second]
    assert (first.number, first.who, first.why, first.numbers) == (1, "ann", "it is better", numbers)
    assert second.number == 2
    assert log.last_active() == "a@1"


def test_a_start_is_told_and_is_not_what_somebody_made_active(log: VersionLog) -> None:
    add(log, "a@1", "", VersionAction.START)
    assert log.last_active() is None
    add(log, "a@2")
    add(log, "b@1", "", VersionAction.START)
    assert log.last_active() == "a@2"


def test_it_survives_its_process(tmp_path: Path) -> None:
    add(VersionLog(tmp_path / "h", "s1"), "a@2")
    again = VersionLog(tmp_path / "h", "s1")
    assert again.last_active() == "a@2"
    assert add(again, "a@3") == 2


def test_each_service_goes_on_with_its_own(tmp_path: Path) -> None:
    one, other = (VersionLog(tmp_path / "h", name) for name in ("s1", "s2"))
    add(one, "a@1")
    add(other, "b@1")
    assert (one.last_active(), other.last_active()) == ("a@1", "b@1")
    assert [change.number for change in one.changes()] == [1, 2]


@given(cut=st.integers(1, 60))
def test_a_line_that_was_cut_off_never_happened(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("log") / "h"
    log = VersionLog(path, "s1")
    add(log, "a@1")
    whole = path.read_bytes()
    add(log, "a@2")
    path.write_bytes(path.read_bytes()[:-cut])
    assert log.last_active() == "a@1"
    assert add(log, "a@3") == 2
    assert path.read_bytes().startswith(whole)
    assert [change.after for change in log.changes()] == ["a@1", "a@3"]


def test_a_damaged_line_hides_no_other(tmp_path: Path) -> None:
    log = VersionLog(tmp_path / "h", "s1")
    add(log, "a@1")
    with (tmp_path / "h").open("a") as file:
        file.write('{"number": "what"}\nnot json\n[]\n')
    add(log, "a@2")
    assert [change.after for change in log.changes()] == ["a@1", "a@2"]


@pytest.mark.parametrize("line", ['{"number": 7, "action": "unheard_of"}', '{"number": "x"}', "[7]", "7"])
def test_a_line_that_cannot_be_read_here_keeps_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(line + "\n")
    log = VersionLog(path, "s1")
    change = log.add(VersionAction.ACTIVATE, "a@1", "b@1", WISH)
    assert change.number == (8 if "action" in line else 1)
    assert log.changes() == [change]


@pytest.mark.parametrize("call", ["fsync", "pwrite"])
def test_a_full_disk_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    log = VersionLog(tmp_path / "h", "s1")
    add(log, "a@1")
    before = (tmp_path / "h").read_bytes()

    def fail(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ResourceExhausted, match="nothing was changed"):
        add(log, "a@2")
    monkeypatch.undo()
    assert (tmp_path / "h").read_bytes() == before
    assert add(log, "a@2") == 2


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write = VersionLog(tmp_path / "h", "s1"), os.pwrite
    add(log, "a@1")
    before = (tmp_path / "h").read_bytes()
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: write(fd, data[:10], place))
    with pytest.raises(ResourceExhausted):
        add(log, "a@2")
    assert (tmp_path / "h").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceExhausted, match="cannot be written"):
        add(VersionLog(tmp_path / "file" / "h", "s1"), "a@1")


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir()
    with pytest.raises(ResourceExhausted, match="cannot be read"):
        VersionLog(tmp_path / "h", "s1").last_active()


def test_numbers_say_the_order_when_the_clock_jumps(tmp_path: Path) -> None:
    log = VersionLog(tmp_path / "h", "s1", clock(iter([2e9, 1e9, 3e9, 0.0])))
    for number in range(4):
        add(log, f"a@{number}")
    assert [change.number for change in log.changes()] == [1, 2, 3, 4]
    assert log.last_active() == "a@3"


def test_many_that_add_at_once_are_numbered_one_after_the_other(tmp_path: Path) -> None:
    versions = count()

    def add_some(service: int) -> None:
        log = VersionLog(tmp_path / "h", f"s{service}")
        for _ in range(10):
            add(log, f"a@{next(versions)}")

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(add_some, range(6)))
    changes = VersionLog(tmp_path / "h", "s0").changes()
    assert [change.number for change in changes] == list(range(1, 61))
    assert len({change.after for change in changes}) == 60


@pytest.mark.parametrize("who", ["", "  "])
def test_nobody_changes_nothing(who: str) -> None:
    with pytest.raises(InvalidInput, match="Nobody is named"):
        Wish(who, "because")
