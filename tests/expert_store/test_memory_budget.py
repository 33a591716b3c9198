"""An arena that does not fit is refused before it is made, with the number that is short."""

from pathlib import Path

import pytest

from expert_store.memory_budget import check_room_for, room_in
from promoe.errors import InsufficientMemory


def test_a_small_arena_fits() -> None:
    check_room_for(1 << 20)


def test_an_arena_beyond_the_machine_is_refused_with_numbers() -> None:
    with pytest.raises(InsufficientMemory, match=r"needs 1048576\.12 GiB, but .* leaves .* GiB are short"):
        check_room_for(1 << 50)


def write_group(folder: Path, limit: str, current: int = 0, cached: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached // 2}\nactive_file {cached // 2}\n")
    return folder


def test_a_group_leaves_its_limit_less_what_is_used_but_for_the_page_cache(tmp_path: Path) -> None:
    assert room_in(write_group(tmp_path / "a", "1000", current=700, cached=400)) == 700
    assert room_in(write_group(tmp_path / "b", "max")) is None
    assert room_in(tmp_path / "no such group") is None
