"""The fill publishes every blob once, verified, and stops at the first that is damaged."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expert_store.blob_table import BlobsAdded, BlobState, Lease, StoreEvent
from expert_store.filling import Filling
from promoe.errors import PackDamaged
from promoe.ids import ExpertId
from tests.expert_store.arenas import PackAndArena, pack_and_arena
from tests.packs import flip_bit


def fill(made: PackAndArena, num_threads: int) -> tuple[Filling, list[int]]:
    progress: list[int] = []
    filling = Filling(made.layout, made.table, made.reader, progress.append)
    with ThreadPoolExecutor(num_threads) as threads:
        asyncio.run(filling.run(threads, num_threads))
    return filling, progress


@pytest.mark.parametrize("num_threads", [1, 3, 16])
def test_fills_what_is_empty_and_publishes_on_the_way(num_threads: int, tmp_path: Path) -> None:
    events: list[StoreEvent] = []
    with pack_and_arena(tmp_path) as made:
        made.table.attach(Lease("node", 1, 1, events.append), knows_arena=False)
        made.reader.load([2])
        made.table.publish([2])
        filling, progress = fill(made, num_threads)
        assert all(made.holds(index) for index in range(8))
        assert made.table.count(BlobState.PUBLISHED) == 8
        assert filling.verified_blobs == 7
        assert filling.read_nbytes == 7 * made.layout.blob_nbytes
        assert filling.filled_nbytes == progress[-1] == made.manifest.spec.experts_nbytes
        assert progress == sorted(progress)
        added = [event for event in events if isinstance(event, BlobsAdded)]
        assert sorted(blob.expert for event in added for blob in event.blobs) == [
            ExpertId(layer, expert) for layer in range(2) for expert in range(4)
        ]
        assert [event.complete for event in added] == [False] * (len(added) - 1) + [True]


def test_a_full_arena_is_not_read_again(tmp_path: Path) -> None:
    with pack_and_arena(tmp_path) as made:
        fill(made, 2)
        for layer in range(2):
            for expert in range(4):
                flip_bit(made.pack_dir, ExpertId(layer, expert), made.manifest)
        filling, progress = fill(made, 2)
        assert (filling.read_nbytes, progress) == (0, [])
        assert filling.elapsed_s == filling.elapsed_s


def test_a_damaged_blob_ends_the_fill_and_is_not_published(tmp_path: Path) -> None:
    with pack_and_arena(tmp_path) as made:
        flip_bit(made.pack_dir, ExpertId(1, 1), made.manifest)
        with pytest.raises(PackDamaged, match="L1E1"):
            fill(made, 2)
        assert not made.table.is_complete
        assert made.layout.index_of(ExpertId(1, 1)) in made.table.indices(BlobState.EMPTY)
