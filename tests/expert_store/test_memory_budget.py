"""An arena that does not fit is refused before it is made, with the number that is short."""

import pytest

from expert_store import memory_budget
from expert_store.memory_budget import check_room_for
from promoe.errors import InsufficientMemory
from promoe.host_memory import CGROUP_LIMIT, HostMemory


def test_a_small_arena_fits() -> None:
    check_room_for(1 << 20)


def test_an_arena_beyond_the_machine_is_refused_with_numbers() -> None:
    with pytest.raises(InsufficientMemory, match=r"needs 1048576\.12 GiB, but .* leaves .* GiB are short"):
        check_room_for(1 << 50)


def test_what_is_short_is_named_by_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = HostMemory(3 << 30, 4 << 30, CGROUP_LIMIT, has_cgroup_limit=True)
    monkeypatch.setattr(memory_budget, "host_memory", lambda: bound)
    with pytest.raises(InsufficientMemory, match=r"the cgroup's memory limit leaves 3\.00 GiB: 0\.12 GiB are short"):
        check_room_for(3 << 30)
