"""A damaged blob is withdrawn, read again when nobody reads it any more, and published again."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expert_store import scrub as scrub_module
from expert_store.blob_table import BlobsAdded, BlobState, BlobWithdrawn, Lease, StoreEvent
from expert_store.scrub import Scrub
from promoe.errors import ResourceExhausted
from promoe.ids import ExpertId
from tests.expert_store.arenas import PackAndArena, pack_and_arena
from tests.packs import flip_bit

DAMAGED = ExpertId(0, 2)


def run_scrub(made: PackAndArena, scenario: Callable[[Scrub], Awaitable[None]]) -> None:
    """Runs a scenario on a full arena whose `DAMAGED` blob has a flipped bit."""
    made.reader.load([0, 1, 2, 3])
    made.reader.load([4, 5, 6, 7])
    made.table.publish(range(8))
    made.damage_in_memory(DAMAGED)

    async def run() -> None:
        with ThreadPoolExecutor(1) as threads:
            scrub = Scrub(made.layout, made.table, made.reader, threads)
            try:
                await scenario(scrub)
            finally:
                await scrub.stop()

    asyncio.run(asyncio.wait_for(run(), 20))


async def published_again(made: PackAndArena) -> None:
    while made.table.count(BlobState.PUBLISHED) < 8:
        await asyncio.sleep(0)


def test_damage_is_mended_behind_the_nodes_backs_only_after_they_agreed(tmp_path: Path) -> None:
    with pack_and_arena(tmp_path) as made:
        events: list[StoreEvent] = []
        lease = Lease("node", 1, 1, events.append)

        async def scenario(scrub: Scrub) -> None:
            made.table.attach(lease, knows_arena=False)
            await scrub.run_once()
            assert (scrub.verified_blobs, scrub.damaged_blobs) == (8, 1)
            while not isinstance(events[-1], BlobWithdrawn):
                await asyncio.sleep(0)
            assert events[-1].expert == DAMAGED
            assert not made.holds(made.layout.index_of(DAMAGED)), "written while the node may read it"
            made.table.acknowledge(lease, DAMAGED, events[-1].generation)
            await published_again(made)

        run_scrub(made, scenario)
        assert all(made.holds(index) for index in range(8))
        last = events[-1]
        assert isinstance(last, BlobsAdded)
        assert [(blob.expert, blob.generation) for blob in last.blobs] == [(DAMAGED, 2)]


def test_damage_of_memory_and_pack_stays_withdrawn_until_the_pack_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scrub_module, "MEND_RETRY_S", 0.01)
    with pack_and_arena(tmp_path) as made:

        async def scenario(scrub: Scrub) -> None:
            flip_bit(made.pack_dir, DAMAGED, made.manifest)
            await scrub.run_once()
            while "stays withdrawn" not in caplog.text:
                await asyncio.sleep(0)
            assert made.table.count(BlobState.PUBLISHED) == 7
            flip_bit(made.pack_dir, DAMAGED, made.manifest)
            await published_again(made)

        run_scrub(made, scenario)
        assert made.holds(made.layout.index_of(DAMAGED))


def test_a_blob_is_mended_when_there_is_memory_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def have_no_memory(offset: int, nbytes: int) -> None:
        raise ResourceExhausted(f"No memory for {nbytes} bytes of the arena.")

    monkeypatch.setattr(scrub_module, "MEND_RETRY_S", 0.01)
    with pack_and_arena(tmp_path) as made:

        async def scenario(scrub: Scrub) -> None:
            with monkeypatch.context() as short:
                short.setattr(made.arena.mapping, "populate", have_no_memory)
                await scrub.run_once()
                while "stays withdrawn: No memory" not in caplog.text:
                    await asyncio.sleep(0)
            await published_again(made)

        run_scrub(made, scenario)
        assert made.holds(made.layout.index_of(DAMAGED))


def test_a_silent_node_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scrub_module, "MEND_RETRY_S", 0.01)
    with pack_and_arena(tmp_path) as made:
        lease = Lease("node", 4711, 1, lambda event: None)

        async def scenario(scrub: Scrub) -> None:
            made.table.attach(lease, knows_arena=False)
            await scrub.run_once()
            while "waits for the compute nodes with pids [4711]" not in caplog.text:
                await asyncio.sleep(0)
            made.table.drop(lease)
            await published_again(made)

        run_scrub(made, scenario)
