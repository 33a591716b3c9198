"""Calls to a predictor service that hangs: they wait among themselves, and nobody else does."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compute_node.http.predictor_routes import PredictorDesk
from compute_node.prompt import TextPrompt
from promoe.errors import Overloaded
from promoe.predictor_admin import PredictorAdmin
from tests.compute_node.hand_engine import HandEngine
from tests.compute_node.tiny_serving import load_tokenizer, serving
from tests.http_node import TIMEOUT_S

_MOST_ASKED = 32


def test_calls_that_hang_keep_no_thread_from_others_and_are_bounded(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path)
    hangs = threading.Event()

    def ask(admin: PredictorAdmin) -> bool:
        return hangs.wait(TIMEOUT_S)

    async def run() -> None:
        # What encodes prompts; a single thread is taken by the first who hangs there.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        async with serving(HandEngine(), tokenizer) as behind:
            desk = PredictorDesk(behind.parts)
            looks = [asyncio.create_task(desk.look(ask)) for _ in range(_MOST_ASKED)]
            await asyncio.sleep(0)  # they run up to their thread
            async with asyncio.timeout(TIMEOUT_S / 2):
                assert await behind.parts.codec.tokenize(TextPrompt("he"))
            with pytest.raises(Overloaded, match="32 calls wait for the predictor at "):
                await desk.look(ask)
            hangs.set()
            assert await asyncio.gather(*looks) == [True] * _MOST_ASKED
            assert await desk.look(ask), "there is room again"

    try:
        asyncio.run(run())
    finally:
        hangs.set()
