"""Packs and arenas for tests of the store's parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from expert_store.arena import Arena, ArenaLayout
from expert_store.blob_reader import BlobReader, checksums_of
from expert_store.blob_table import BlobTable
from promoe.ids import ExpertId
from promoe.pack_manifest import PackManifest
from tests.packs import synthetic_blob, write_synthetic_pack


@dataclass(frozen=True)
class PackAndArena:
    """A pack of 2 × 4 experts and an empty arena for it."""

    pack_dir: Path
    manifest: PackManifest
    arena: Arena
    table: BlobTable
    reader: BlobReader

    @property
    def layout(self) -> ArenaLayout:
        """The arena's."""
        return self.arena.layout

    def holds(self, index: int) -> bool:
        """True when the arena has the very bytes that the pack was written from."""
        expert = self.layout.expert_at(index)
        with self.arena.blob_view(index) as blob:
            return bytes(blob) == synthetic_blob(0, expert, self.layout.blob_nbytes)

    def damage_in_memory(self, expert: ExpertId) -> None:
        """Flips a bit of the expert's blob in the arena."""
        with self.arena.blob_view(self.layout.index_of(expert)) as blob:
            blob[len(blob) // 3] ^= 1


@contextmanager
def pack_and_arena(folder: Path) -> Iterator[PackAndArena]:
    """Everything closed afterwards, and the table's integrity checked."""
    pack_dir = folder / "pack"
    manifest = write_synthetic_pack(pack_dir)
    layout = ArenaLayout.of(manifest.spec)
    checksums = checksums_of(manifest, layout)
    arena = Arena.create(layout, "memfd")
    table = BlobTable(layout, arena.directory, checksums)
    try:
        yield PackAndArena(pack_dir, manifest, arena, table, BlobReader(pack_dir, arena, checksums))
        table.check_integrity()
    finally:
        arena.close()
