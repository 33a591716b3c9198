"""A request's name over gRPC: the caller's or the node's, in the metadata, in the answer's name and in the log."""

import asyncio
from collections.abc import Callable

import grpc
import pytest

from compute_node.answer_record import AnswerRecord
from compute_node.request_metrics import Outcome
from promoe.client import AsyncClient, Client
from promoe.request_id import REQUEST_ID_HEADER, TRACEPARENT_HEADER, answered_request_id
from tests.compute_node.tiny_serving import Serving
from tests.contract.inference_node import Node, text_request
from tests.log_lines import LogLine, json_log


async def named(server: Serving, *metadata: tuple[str, str]) -> tuple[str, str]:
    """What the node's initial metadata call the request, and the answer's name."""
    call = server.stub.Generate(text_request(max_tokens=1), timeout=60, metadata=metadata)
    responses = [response async for response in call]
    return str((await call.initial_metadata())[REQUEST_ID_HEADER]), responses[0].accepted.request_id


def test_the_callers_name_comes_back_and_is_in_the_answers_name_and_line(node: Node) -> None:
    async def scenario(server: Serving) -> tuple[str, str, LogLine]:
        with json_log("compute_node") as lines:
            return *(await named(server, (REQUEST_ID_HEADER, "job-17:a.b"))), lines.next()

    request_id, answer_id, line = node.run(scenario)
    assert request_id == answered_request_id(answer_id) == "job-17:a.b"
    assert (line["request_id"], line["answer_id"]) == (request_id, answer_id)


@pytest.mark.parametrize("metadata", [(), ((REQUEST_ID_HEADER, "no name"),), ((REQUEST_ID_HEADER, "x" * 65),)])
def test_the_node_names_what_has_no_name_fit_for_a_log(node: Node, metadata: tuple[tuple[str, str], ...]) -> None:
    async def scenario(server: Serving) -> list[tuple[str, str]]:
        return [await named(server, *metadata) for _ in range(2)]

    (first, first_answer), (second, second_answer) = node.run(scenario)
    assert len({first, second, *(value for _, value in metadata)}) == 2 + len(metadata)
    assert [answered_request_id(first_answer), answered_request_id(second_answer)] == [first, second]


def test_answers_to_requests_of_one_name_have_names_of_their_own(node: Node) -> None:
    async def scenario(server: Serving) -> list[tuple[str, str]]:
        return list(await asyncio.gather(*(named(server, (REQUEST_ID_HEADER, "again")) for _ in range(3))))

    names = node.run(scenario)
    assert {request_id for request_id, _ in names} == {"again"}
    assert len({answer_id for _, answer_id in names}) == 3


@pytest.mark.parametrize(
    "refused",
    [
        lambda stub, **call: stub.Generate(text_request(max_tokens=0), **call),
        lambda stub, **call: stub.Tokenize(text_request(), **call),
    ],
)
def test_a_refusal_has_a_line_with_its_name(node: Node, refused: Callable[..., "grpc.aio.Call"]) -> None:
    async def scenario(server: Serving) -> tuple[grpc.StatusCode, str, LogLine]:
        with json_log("promoe") as lines:
            call = refused(server.stub, timeout=60, metadata=((REQUEST_ID_HEADER, "wrong"),))
            status = await call.code()
            return status, str((await call.initial_metadata())[REQUEST_ID_HEADER]), lines.next()

    status, request_id, line = node.run(scenario)
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert request_id == line["request_id"] == "wrong"
    assert str(line["message"]).endswith(": INVALID_ARGUMENT")
    assert "exception" not in line


def test_the_callers_span_is_told_with_the_answer(node: Node) -> None:
    async def scenario(server: Serving) -> list[AnswerRecord]:
        await named(server, (TRACEPARENT_HEADER, "00-0a-0b-01"))
        await named(server)
        return server.answers

    first, second = node.run(scenario)
    assert (first.traceparent, second.traceparent) == ("00-0a-0b-01", "")
    assert (first.outcome, first.num_output_tokens, first.use is not None) == (Outcome.FINISHED, 1, True)
    times = [first.times.arrived_s, first.times.started_s, first.times.first_s, first.times.ended_s]
    in_order = [mark for mark in times if mark is not None]
    assert in_order == sorted(set(in_order))
    assert len(in_order) == len(times)
    assert first.times.first_s == first.times.last_s


def test_the_clients_give_their_requests_names(node: Node) -> None:
    async def scenario(server: Serving) -> list[str]:
        def blocking() -> str:
            with Client(server.endpoint) as client:
                return client.complete("then", max_tokens=1, request_id="blocking").request_id

        async with AsyncClient(server.endpoint) as client:
            awaited = (await client.complete("then", max_tokens=1, request_id="awaited")).request_id
            unnamed = (await client.complete("then", max_tokens=1)).request_id
            with pytest.raises(ValueError, match=r"request_id is 'no name'; allowed: 1 to 64 of A-Z a-z 0-9"):
                client.generate("then", request_id="no name")
        return [awaited, unnamed, await asyncio.to_thread(blocking)]

    awaited, unnamed, blocking = map(answered_request_id, node.run(scenario))
    assert (awaited, blocking) == ("awaited", "blocking")
    assert len(unnamed) == 24
