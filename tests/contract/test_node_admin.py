"""Another predictor is asked for over gRPC: what is answered, refused, and by whom."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from compute_node.admin.service import ADMIN_SERVICE_NAME, MOST_TEXT, NodeAdminService
from compute_node.takeovers import Takeovers
from promoe.errors import DeadlineExceeded, InvalidInput, ModelMismatch, ModelNotFound, PromoeError, Unavailable
from promoe.node_admin import NodeAdmin
from promoe.rpc import RpcServer
from tests.contract.takeover_engine import Engine, Services, engine_at, silent
from tests.promoe.scripted_inference import HELLO, ScriptedInference, serve_in_thread
from tests.running_store import wait_until

NOWHERE = "unix:/nowhere/p"


@contextmanager
def served(takeovers: Takeovers | None, endpoint: str) -> Iterator[NodeAdmin]:
    """The service on an event loop of its own, and a client of it."""
    ready: Future[None] = Future()
    loop = asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        rpc = RpcServer((ADMIN_SERVICE_NAME,))
        NodeAdminService(takeovers).register(rpc.server)
        rpc.listen(endpoint)
        await rpc.start()
        ready.set_result(None)
        await end.wait()
        await rpc.stop(0)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        ready.result(20)
        yield NodeAdmin(endpoint)
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(20)
        loop.close()


@pytest.fixture
def services(socket_dir: Path) -> Iterator[Services]:
    opened = Services(socket_dir, with_packets=True)
    yield opened
    opened.close()


@pytest.fixture
def engine(services: Services) -> Iterator[Engine]:
    services.serve("old")
    with engine_at(services.endpoint("old")) as running:
        running.run()
        yield running


@pytest.fixture
def admin(engine: Engine, services: Services) -> Iterator[NodeAdmin]:
    with served(engine.takeovers, services.endpoint("node")) as client:
        yield client


def test_the_switch_is_answered_and_once_again_nothing(admin: NodeAdmin, engine: Engine, services: Services) -> None:
    services.serve("new")
    switch = admin.connect_predictor(services.endpoint("new"), " ann ", "to see")
    assert switch == engine.takeovers.last_switch
    assert switch is not None
    assert (switch.before, switch.after, switch.who) == (services.endpoint("old"), services.endpoint("new"), "ann")
    assert admin.connect_predictor(services.endpoint("new"), "bob", "") is None


@pytest.mark.parametrize(
    ("asked", "error", "reason"),
    [
        (("", "ann", ""), InvalidInput, "expected unix:PATH or host:port"),
        (("somewhere", "ann", ""), InvalidInput, "expected unix:PATH or host:port"),
        ((NOWHERE, "ann", ""), ModelNotFound, f"The predictor at {NOWHERE} cannot take over, and the node stays"),
        ((NOWHERE, "", ""), InvalidInput, "Nobody is named"),
        ((NOWHERE, "ann\nWARNING", ""), InvalidInput, "who is"),
        ((NOWHERE, "ann", "a" * (MOST_TEXT + 1)), InvalidInput, "why is"),
    ],
)
def test_what_cannot_be_is_a_sentence(
    admin: NodeAdmin, engine: Engine, asked: tuple[str, str, str], error: type[PromoeError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        admin.connect_predictor(*asked)
    assert engine.takeovers.last_switch is None


def test_who_does_not_wait_any_longer_leaves_the_node_as_it_is(
    admin: NodeAdmin, engine: Engine, services: Services
) -> None:
    services.serve("mute", silent)
    with pytest.raises(DeadlineExceeded):
        NodeAdmin(admin.endpoint, deadline_s=0.2).connect_predictor(services.endpoint("mute"), "ann", "")
    wait_until(lambda: engine.takeovers.candidate != "", 20)
    assert engine.takeovers.endpoint == services.endpoint("old")


def test_a_node_whose_policy_ignores_hints_says_so(services: Services) -> None:
    with served(None, services.endpoint("node")) as client, pytest.raises(ModelMismatch, match="ignores hints"):
        client.connect_predictor(services.endpoint("new"), "ann", "")


def test_a_node_that_is_not_there_and_an_older_one_are_told_apart(services: Services) -> None:
    with pytest.raises(Unavailable, match="There is no connection to"):
        NodeAdmin(services.endpoint("node")).connect_predictor(services.endpoint("new"), "ann", "")
    older = serve_in_thread(ScriptedInference(HELLO), services.endpoint("older"))
    with older as endpoint, pytest.raises(ModelMismatch, match="does not serve this call"):
        NodeAdmin(endpoint).connect_predictor(services.endpoint("new"), "ann", "")
