"""Checks published blobs in the background and mends damaged ones: withdraw, read again, publish again."""

import asyncio
import logging
from concurrent.futures import Executor
from typing import Final

from expert_store.arena import ArenaLayout
from expert_store.blob_reader import BlobReader
from expert_store.blob_table import BlobState, BlobTable
from promoe.errors import PackDamaged, ResourceExhausted

logger = logging.getLogger(__name__)

MEND_RETRY_S: Final = 30.0
"""Between two tries to read a blob (its pack file may be damaged too), and between two reminders of a silent node."""


class Scrub:
    """One arena's background check. A damaged blob is never handed to a node that asks after it was found."""

    def __init__(self, layout: ArenaLayout, table: BlobTable, reader: BlobReader, threads: Executor) -> None:
        self._layout = layout
        self._table = table
        self._reader = reader
        self._threads = threads
        self._mends: set[asyncio.Task[None]] = set()
        self.verified_blobs = 0
        self.damaged_blobs = 0

    async def run_once(self) -> None:
        """Checks every published blob; returns when each is known to be intact or is being mended."""
        loop = asyncio.get_running_loop()
        for index in self._table.indices(BlobState.PUBLISHED):
            intact = await loop.run_in_executor(self._threads, self._reader.is_intact, index)
            self.verified_blobs += 1
            if not intact:
                self.damaged_blobs += 1
                reason = f"{self._layout.expert_at(index)} is damaged in memory; it is read from the pack again."
                logger.error("%s", reason)
                self._table.retire(index, reason)
                self._start_mend(index)

    def mend_withdrawn(self) -> None:
        """Starts to mend what an adopted arena's store had withdrawn, or left half written."""
        for index in self._table.indices(BlobState.RETIRED):
            self._start_mend(index)

    async def stop(self) -> None:
        """Gives up the mends that are under way."""
        for mend in self._mends:
            mend.cancel()
        await asyncio.gather(*self._mends, return_exceptions=True)

    def _start_mend(self, index: int) -> None:
        self._mends = {mend for mend in self._mends if not mend.done()}
        self._mends.add(asyncio.create_task(self._mend(index)))

    async def _mend(self, index: int) -> None:
        expert = self._layout.expert_at(index)
        loop = asyncio.get_running_loop()
        reusable: asyncio.Future[None] = loop.create_future()
        self._table.when_reusable(index, lambda: reusable.set_result(None))
        while not (await asyncio.wait({reusable}, timeout=MEND_RETRY_S))[0]:
            silent = [lease.pid for lease in self._table.leases if index in lease.unacknowledged]
            logger.warning("%s waits for the compute nodes with pids %s to stop reading it.", expert, silent)
        while True:
            try:
                await loop.run_in_executor(self._threads, self._reader.load, [index])
                break
            except (PackDamaged, ResourceExhausted) as error:
                logger.error("%s stays withdrawn: %s", expert, error)
                await asyncio.sleep(MEND_RETRY_S)
        self._table.publish([index])
        logger.info("%s is intact again.", expert)
