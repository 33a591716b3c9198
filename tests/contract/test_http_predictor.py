"""`/api/predictor`: the versions of a real predictor service, looked at and changed through the node."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import grpc
import httpx2
import pytest
from google.protobuf.message import Message
from transformers import PreTrainedTokenizerBase

from promoe.node_report import PredictorLink, PredictorState
from promoe.v1 import predictor_admin_pb2 as pb
from tests.compute_node.tiny_serving import FixedReport
from tests.http_node import TIMEOUT_S, HttpNode, ScriptEngine, http_node
from tests.packs import write_synthetic_pack
from tests.running_predictor import RunningPredictor


@pytest.fixture(scope="module")
def node(tool_tokenizer: PreTrainedTokenizerBase) -> Iterator[HttpNode]:
    with http_node(ScriptEngine(tool_tokenizer, "hello"), tool_tokenizer) as running:
        yield running


def connect(node: HttpNode, link: PredictorLink) -> None:
    """The node says that this is its predictor."""
    reporter = cast("FixedReport", node.serving.parts.watch.report.reporter)
    reporter.predictor = link


@pytest.fixture(scope="module")
def service(node: HttpNode, module_socket_dir: Path) -> Iterator[RunningPredictor]:
    write_synthetic_pack(module_socket_dir / "pack")
    registry = f"predictor.registry={module_socket_dir / 'registry'}"
    with RunningPredictor(module_socket_dir / "pack", module_socket_dir, registry) as running:
        running.wait_until_serving()
        connect(node, PredictorLink(running.endpoint, PredictorState.CONNECTED, None))
        yield running


def states(node: HttpNode) -> dict[str, str]:
    """What each version does, those that do nothing left out."""
    versions = node.get("/api/predictor").json()["versions"]
    # Once loaded, a plug-in's version says more than its name.
    return {
        info["version"].partition("@")[0]: info["state"]
        for info in versions
        if info["state"] not in ("available", "unusable")
    }


@pytest.mark.usefixtures("service")
def test_versions_are_changed_and_each_change_is_written_down(node: HttpNode) -> None:
    first = node.post("/api/predictor/activate", {"version": "frequency", "why": "to see"}).json()["change"]
    active = first["after"]
    assert (first["action"], active.partition("@")[0], first["why"]) == ("activate", "frequency", "to see")
    assert first["who"].startswith("HTTP from 127.0.0.1")
    assert node.post("/api/predictor/activate", {"version": active}).json() == {"change": None}
    guarded = {"version": "transition", "expected_active": active, "canary_share": 0.25}
    assert node.post("/api/predictor/activate", guarded).json()["change"]["action"] == "canary"
    assert states(node)["transition"] == "canary"
    assert node.post("/api/predictor/rollback", {}).json()["change"]["action"] == "end_canary"
    assert node.post("/api/predictor/shadow", {"version": "transition"}).json()["change"]["action"] == "shadow"
    assert states(node)["transition"] == "shadow"
    assert node.post("/api/predictor/clear_shadow", {}).json()["change"]["action"] == "clear_shadow"
    back = node.post("/api/predictor/rollback", {"expected_active": active}).json()["change"]
    assert back["action"] == "rollback"
    history = node.get("/api/predictor").json()["history"]
    assert [change["action"] for change in history][-6:] == [
        *("activate", "canary", "end_canary", "shadow", "clear_shadow", "rollback")
    ]


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("activate", {"version": "nobody@1"}, 404, "nobody@1"),
        ("activate", {"version": "frequency", "expected_active": "nobody@1"}, 409, "nobody@1"),
        ("activate", {"version": "frequency", "canary_share": 1.0}, 400, "canary_share"),
        ("activate", {}, 400, "version"),
        ("activate", {"version": "frequency", "force": True}, 400, "force"),
        ("shadow", {"version": ""}, 400, "version"),
        ("rollback", {"why": "x" * 501}, 400, "why"),
    ],
)
def test_what_cannot_be_is_refused_in_the_apis_own_shape(
    node: HttpNode, path: str, body: dict[str, object], status: int, word: str
) -> None:
    before = states(node)
    response = node.post(f"/api/predictor/{path}", body)
    assert response.status_code == status, response.text
    assert word in response.json()["error"]["message"]
    assert states(node) == before


@pytest.mark.usefixtures("service")
def test_other_pages_change_no_version(node: HttpNode) -> None:
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert node.post("/api/predictor/activate", {"version": "frequency"}, **headers).status_code == 403


@pytest.mark.usefixtures("service")
def test_scores_come_for_as_long_as_somebody_watches(node: HttpNode) -> None:
    with httpx2.stream("GET", f"{node.url}/api/predictor/quality", timeout=TIMEOUT_S) as response:
        line = next(line for line in response.iter_lines() if line.startswith("data: "))
    report = json.loads(line.removeprefix("data: "))
    assert report["comparisons"] == 0
    assert [quality["state"] for quality in report["qualities"]][:1] in ([], ["active"])


@pytest.mark.usefixtures("service")
def test_the_learner_is_told_with_the_versions(node: HttpNode) -> None:
    learner = node.get("/api/predictor").json()["learner"]
    assert (learner["state"], learner["documents"], learner["progress"]) == ("off", 0, [])


@pytest.mark.usefixtures("service")
def test_a_service_that_is_too_old_to_learn_still_has_versions(node: HttpNode, service: RunningPredictor) -> None:
    def answered(response: Message) -> "grpc.RpcMethodHandler[bytes, Message]":
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: response, response_serializer=lambda message: message.SerializeToString()
        )

    old = {"ListVersions": pb.ListVersionsResponse(), "GetHistory": pb.GetHistoryResponse()}
    server = grpc.server(ThreadPoolExecutor(1))
    methods = {name: answered(response) for name, response in old.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("promoe.v1.PredictorAdmin", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connect(node, PredictorLink(f"127.0.0.1:{port}", PredictorState.CONNECTED, None))
    try:
        looked = node.get("/api/predictor").json()
    finally:
        connect(node, PredictorLink(service.endpoint, PredictorState.CONNECTED, None))
        server.stop(0).wait()
    assert (looked["versions"], looked["learner"]) == ([], None)


def test_a_dead_service_is_away_and_the_api_says_so(node: HttpNode, service: RunningPredictor) -> None:
    with httpx2.stream("GET", f"{node.url}/api/predictor/quality", timeout=TIMEOUT_S) as response:
        lines = response.iter_lines()
        next(line for line in lines if line.startswith("data: "))
        service.kill()
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert "error" in json.loads(last.removeprefix("data: "))
    for response in (node.get("/api/predictor"), node.post("/api/predictor/activate", {"version": "frequency"})):
        assert response.status_code == 503
        assert "There is no connection" in response.json()["error"]["message"]


def test_a_node_without_a_predictor_says_so(node: HttpNode) -> None:
    connect(node, PredictorLink("", PredictorState.NONE, None))
    response = node.get("/api/predictor")
    assert response.status_code == 503
    assert "compute.predictor_endpoint" in response.json()["error"]["message"]
