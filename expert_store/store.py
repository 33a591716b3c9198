"""One expert store: gets an arena (made, or handed back by a compute node), fills it, keeps it intact.

Everything here runs in the event loop, which owns the table; threads only read and verify. Knows no wire format.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

from expert_store.arena import Arena, ArenaLayout
from expert_store.blob_reader import BlobReader, check_sizes, checksums_of
from expert_store.blob_table import BlobState, BlobTable, Lease
from expert_store.config import StoreConfig
from expert_store.filling import Filling
from expert_store.memory_budget import check_room_for
from expert_store.run_dir import AttachedNode, RunDir, StoreState
from expert_store.scrub import Scrub
from promoe.errors import PromoeError
from promoe.pack_manifest import PackManifest

logger = logging.getLogger(__name__)


class Phase(Enum):
    """ADOPTING (only after a crash) → FILLING → FULL."""

    ADOPTING = "adopting"
    FILLING = "filling"
    FULL = "full"


@dataclass(frozen=True)
class StoreStats:
    """Figures for people and for metrics; bytes are of blobs without alignment, unless they are the arena's."""

    published_blobs: int
    retired_blobs: int
    arena_nbytes: int
    filled_nbytes: int
    total_nbytes: int
    fill_s: float
    fill_bytes_per_s: float
    verified_blobs: int
    damaged_blobs: int
    adopted: bool
    leases: tuple[Lease, ...]


class ExpertStore:
    """The store of one pack.

    Args:
        on_progress: called with the bytes filled so far.

    Raises:
        PackDamaged: a file of the pack has not the size that the manifest implies.
    """

    def __init__(
        self,
        config: StoreConfig,
        manifest: PackManifest,
        run_dir: RunDir,
        on_progress: Callable[[int], None],
    ) -> None:
        self.spec = manifest.spec
        self.layout = ArenaLayout.of(manifest.spec)
        check_sizes(config.pack, self.layout)
        self.phase = Phase.FILLING
        self._config = config
        self._checksums = checksums_of(manifest, self.layout)
        self._run_dir = run_dir
        self._on_progress = on_progress
        self._arena: Arena | None = None
        self._table: BlobTable | None = None
        self._filling: Filling | None = None
        self._scrub: Scrub | None = None
        self._adopted = False
        self._state_is_frozen = False
        self._error: PromoeError | None = None
        self._changed = asyncio.Event()
        self._handed_back = asyncio.Event()
        self._holders: list[AttachedNode] = []
        self._peer_pids: dict[str, int] = {}

    @property
    def arena(self) -> Arena | None:
        """The arena, once there is one."""
        return self._arena

    async def run(self, on_full: Callable[[], None]) -> None:
        """Adopts or makes the arena, fills it, then scrubs for as long as it is not cancelled.

        Args:
            on_full: called once, when every blob is published.

        Raises:
            PromoeError: the store cannot do its work; nodes that wait for the arena are told the same.
        """
        with ThreadPoolExecutor(self._config.fill_threads, thread_name_prefix="pack-reader") as threads:
            try:
                await self._obtain_arena()
                await self._fill(threads)
                on_full()
                await self._keep_intact(threads)
            except PromoeError as error:
                self._error = error
                self._changed.set()
                raise

    async def wait_for_table(self) -> tuple[Arena, BlobTable]:
        """The arena and its table, as soon as they exist; raises what kept them from existing."""
        while self._table is None:
            if self._error is not None:
                raise self._error
            await self._changed.wait()
        assert self._arena is not None, "a table belongs to an arena"
        return self._arena, self._table

    def adopt(self, fd: int) -> None:
        """Takes back the arena that a compute node kept; the first good one wins. Owns `fd` from here.

        Raises:
            InvalidInput, ModelMismatch, ResourceExhausted: this is not an arena to go on with.
        """
        assert self.phase is Phase.ADOPTING, "only a restarted store asks for its arena"
        table = self._install(Arena.adopt(fd, self.layout, self._config.arena_kind))
        for node in self._holders:
            table.expect(node.instance_id, node.pid)
        self._adopted = True
        self.phase = Phase.FILLING
        self._handed_back.set()

    def note_peer(self, node_instance_id: str, pid: int) -> None:
        """Remembers the process behind a node, as the kernel tells it (0: in another pid namespace)."""
        self._peer_pids[node_instance_id] = pid

    def kernel_pid_of(self, node_instance_id: str) -> int:
        """The process behind a node that attaches now; 0 if the side-channel did not show one."""
        return self._peer_pids.pop(node_instance_id, 0)

    def attach(self, table: BlobTable, lease: Lease, knows_arena: bool) -> None:
        """Starts a node's lease."""
        table.attach(lease, knows_arena)
        logger.info("Compute node %s (pid %d) attached.", lease.node_instance_id, lease.pid, extra=_about(lease))
        self._write_state()

    def detach(self, table: BlobTable, lease: Lease) -> None:
        """Ends a node's lease."""
        table.drop(lease)
        logger.info(
            "Compute node %s (pid %d) is gone; its lease ended.", lease.node_instance_id, lease.pid, extra=_about(lease)
        )
        self._write_state()

    def stats(self) -> StoreStats:
        """The figures of this moment."""
        table, filling, scrub = self._table, self._filling, self._scrub
        read_nbytes = filling.read_nbytes if filling else 0
        fill_s = filling.elapsed_s if filling else 0.0
        return StoreStats(
            published_blobs=table.count(BlobState.PUBLISHED) if table else 0,
            retired_blobs=table.count(BlobState.RETIRED) + table.count(BlobState.REUSABLE) if table else 0,
            arena_nbytes=self.layout.nbytes if self._arena else 0,
            filled_nbytes=filling.filled_nbytes if filling else 0,
            total_nbytes=self.spec.experts_nbytes,
            fill_s=fill_s,
            fill_bytes_per_s=read_nbytes / fill_s if fill_s else 0.0,
            verified_blobs=(filling.verified_blobs if filling else 0) + (scrub.verified_blobs if scrub else 0),
            damaged_blobs=scrub.damaged_blobs if scrub else 0,
            adopted=self._adopted,
            leases=tuple(lease for lease in table.leases if lease.send is not None) if table else (),
        )

    def freeze_state(self) -> None:
        """From now on the state on disk stays as it is: nodes whose calls end because the store stops are not gone."""
        self._state_is_frozen = True

    def close(self) -> None:
        """Lets go of the arena; it lives on in the nodes that map it."""
        if self._arena is not None:
            self._arena.close()

    async def _obtain_arena(self) -> None:
        previous = self._run_dir.read_state()
        if previous is not None and previous.fingerprint == self.layout.fingerprint:
            self._holders = [node for node in previous.nodes if node.may_live()]
        if self._holders:
            await self._wait_for_adoption()
        if self._table is None:
            self.phase = Phase.FILLING
            check_room_for(self.layout.nbytes)
            self._install(Arena.create(self.layout, self._config.arena_kind))
        self._write_state()

    async def _wait_for_adoption(self) -> None:
        self.phase = Phase.ADOPTING
        logger.info(
            "%d compute node(s) may hold a former store's arena; waiting up to %g s for one to hand it back.",
            len(self._holders),
            self._config.adopt_wait_s,
        )
        try:
            async with asyncio.timeout(self._config.adopt_wait_s):
                await self._handed_back.wait()
        except TimeoutError:
            logger.warning("No compute node handed the arena back; filling a new one.")

    def _install(self, arena: Arena) -> BlobTable:
        self._arena = arena
        self._table = BlobTable(self.layout, arena.directory, self._checksums)
        self._changed.set()
        return self._table

    async def _fill(self, threads: ThreadPoolExecutor) -> None:
        arena, table = await self.wait_for_table()
        reader = BlobReader(self._config.pack, arena, self._checksums)
        self._filling = Filling(self.layout, table, reader, self._on_progress)
        self._scrub = Scrub(self.layout, table, reader, threads)
        if self._adopted:
            logger.info("Adopted arena %s with %d whole blobs.", arena.uuid, table.count(BlobState.PUBLISHED))
        await self._filling.run(threads, self._config.fill_threads)
        self.phase = Phase.FULL
        if self._filling.read_nbytes:
            logger.info(
                "Filled %d bytes in %.2f s (%.2f GB/s, %s).",
                self._filling.read_nbytes,
                self._filling.elapsed_s,
                self._filling.read_nbytes / self._filling.elapsed_s / 1e9,
                "direct" if reader.uses_direct_io else "page cache",
            )

    async def _keep_intact(self, threads: ThreadPoolExecutor) -> None:
        _, table = await self.wait_for_table()
        assert self._scrub is not None, "the fill made it"
        absent = asyncio.create_task(self._forget_absent(table))
        try:
            if self._adopted:
                self._scrub.mend_withdrawn()
                await self._scrub.run_once()
                logger.info(
                    "Verified the adopted arena: %d of %d blobs damaged.",
                    self._scrub.damaged_blobs,
                    self._scrub.verified_blobs,
                )
            while self._config.scrub_interval_s:
                await asyncio.sleep(self._config.scrub_interval_s)
                await self._scrub.run_once()
            await asyncio.Event().wait()
        finally:
            absent.cancel()
            await self._scrub.stop()

    async def _forget_absent(self, table: BlobTable) -> None:
        await asyncio.sleep(self._config.adopt_wait_s)
        for lease in table.drop_absent():
            logger.warning(
                "Compute node %s (pid %d) did not come back.", lease.node_instance_id, lease.pid, extra=_about(lease)
            )
        self._write_state()

    def _write_state(self) -> None:
        if self._arena is None or self._table is None or self._state_is_frozen:
            return
        nodes = [AttachedNode.of(lease.node_instance_id, lease.kernel_pid) for lease in self._table.leases]
        living = tuple(node for node in nodes if node is not None)
        self._run_dir.write_state(StoreState(self._arena.uuid, self.layout.fingerprint, living))


def _about(lease: Lease) -> dict[str, object]:
    return {"fields": {"node": lease.node_instance_id, "pid": lease.pid, "lease_s": lease.held_s}}
