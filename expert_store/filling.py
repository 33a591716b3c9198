"""The first fill: every empty blob read, verified and published, by a few threads side by side.

Owned by the event loop; only reading and verifying happen in threads.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

from expert_store.arena import ArenaLayout
from expert_store.blob_reader import BlobReader, reading_groups
from expert_store.blob_table import BlobState, BlobTable


class Filling:
    """One fill of one arena; blobs that an adopted arena holds already are not read.

    Args:
        on_progress: called in the event loop with the bytes filled so far.
    """

    def __init__(
        self, layout: ArenaLayout, table: BlobTable, reader: BlobReader, on_progress: Callable[[int], None]
    ) -> None:
        self._layout = layout
        self._table = table
        self._reader = reader
        self._on_progress = on_progress
        self._started = time.perf_counter()
        self._finished: float | None = None
        self.read_nbytes = 0
        self.verified_blobs = 0

    @property
    def filled_nbytes(self) -> int:
        """Bytes of the blobs that were published once, without alignment."""
        return self._table.num_published_once * self._layout.blob_nbytes

    @property
    def elapsed_s(self) -> float:
        """Until now, or until the fill ended."""
        return (self._finished or time.perf_counter()) - self._started

    async def run(self, threads: Executor, num_threads: int) -> None:
        """Fills what is empty.

        Raises:
            PackDamaged: names the file and the expert.
            ResourceExhausted: there is no memory for the pages.
        """
        groups = reading_groups(self._layout, self._table.indices(BlobState.EMPTY))
        workers = [asyncio.create_task(self._work(groups, threads)) for _ in range(num_threads)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        self._finished = time.perf_counter()

    async def _work(self, groups: Iterator[list[int]], threads: Executor) -> None:
        loop = asyncio.get_running_loop()
        for group in groups:
            await loop.run_in_executor(threads, self._reader.load, group)
            self._table.publish(group)
            self.verified_blobs += len(group)
            self.read_nbytes += len(group) * self._layout.blob_nbytes
            self._on_progress(self.filled_nbytes)
