"""A node whose connection to its store has a bug ends like one whose engine died: it would never be attached again."""

from pathlib import Path

import pytest

from compute_node.attached_arena import AttachedArena
from compute_node.config import ComputeConfig, DeviceChoice
from promoe import Client, Unavailable
from promoe.node_report import StoreState
from tests.running_node import NodeThread
from tests.running_store import RunningStore, wait_until


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_node_whose_store_client_died_stops_serving(
    tiny_pack: Path, socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    with RunningStore(tiny_pack, socket_dir) as store:
        config = ComputeConfig(
            pack=tiny_pack,
            store_endpoint=store.endpoint,
            device=DeviceChoice.CPU,
            expert_slots=2,
            max_context_tokens=256,
            num_threads=1,
        )
        with NodeThread(config) as node, Client(node.endpoint) as client:
            assert client.info().store.state is StoreState.ATTACHED
            monkeypatch.setattr(AttachedArena, "take_table", fail)
            store.kill()
            with RunningStore(tiny_pack, socket_dir):
                wait_until(lambda: node.node.has_died, log=store.log)

                def has_gone() -> bool:
                    try:
                        client.info()
                    except Unavailable:
                        return True
                    return False

                wait_until(has_gone)
