"""The Inference service through a real server and socket: clients that leave, limits, deadlines, draining."""

import asyncio

import grpc
import grpc.aio
import pytest

from compute_node.admission import AdmissionLimits
from promoe.errors import RETRY_AFTER_METADATA_KEY
from tests.compute_node.tiny_serving import Serving
from tests.contract.inference_node import Node, generate, ids_of, refusal, text_request, until


def test_a_client_that_goes_away_frees_its_place(node: Node) -> None:
    async def scenario(server: Serving) -> None:
        call = server.stub.Generate(text_request(max_tokens=250), timeout=60)
        stream = aiter(call)
        while (await anext(stream)).WhichOneof("event") != "delta":
            pass
        assert server.admission.num_running == 1
        call.cancel()
        await until(lambda: server.admission.num_running == 0)
        cancelled = ("promoe_requests_total", {"outcome": "cancelled"})
        await until(lambda: server.registry.get_sample_value(*cancelled) == 1)
        # Its place is the only one, and free.
        assert len(ids_of(await generate(server, text_request(max_tokens=2)))) == 2

    node.run(scenario, AdmissionLimits(1, 0, 60.0))


def test_who_cannot_even_wait_is_told_when_to_come_again(node: Node) -> None:
    async def scenario(server: Serving) -> grpc.aio.AioRpcError:
        calls = [server.stub.Generate(text_request(max_tokens=250), timeout=60) for _ in range(2)]
        streams = [aiter(call) for call in calls]
        await anext(streams[0])
        await until(lambda: (server.admission.num_running, server.admission.num_queued) == (1, 1))
        error = await refusal(server, text_request(max_tokens=1))
        for call in calls:
            call.cancel()
        return error

    error = node.run(scenario, AdmissionLimits(1, 1, 60.0))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(error.trailing_metadata()[RETRY_AFTER_METADATA_KEY]) >= 100


def test_a_request_is_ended_by_the_nodes_deadline(node: Node) -> None:
    error = node.run(lambda server: refusal(server, text_request(max_tokens=250)), AdmissionLimits(1, 1, 0.05))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "not finished within 0.05 s" in str(error.details())


def test_a_callers_deadline_frees_its_place(node: Node) -> None:
    async def scenario(server: Serving) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in server.stub.Generate(text_request(max_tokens=250), timeout=0.1):
                pass
        await until(lambda: server.admission.num_running == 0)
        return ended.value

    assert node.run(scenario).code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(node: Node) -> None:
    async def scenario(server: Serving) -> tuple[list[int], grpc.aio.AioRpcError]:
        stream = aiter(server.stub.Generate(text_request(max_tokens=60), timeout=60))
        accepted = await anext(stream)
        assert accepted.WhichOneof("event") == "accepted"
        draining = asyncio.create_task(server.admission.drain(60.0))
        await asyncio.sleep(0)
        error = await refusal(server, text_request(max_tokens=1))
        rest = [response async for response in stream]
        await draining
        return ids_of(rest), error

    ids, error = node.run(scenario)
    assert len(ids) == 60
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_what_is_open_at_the_drain_deadline_is_told(node: Node) -> None:
    async def scenario(server: Serving) -> grpc.aio.AioRpcError:
        stream = aiter(server.stub.Generate(text_request(max_tokens=250), timeout=60))
        await anext(stream)
        await server.admission.drain(0.0)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in stream:
                pass
        await until(lambda: server.admission.num_running == 0)
        return ended.value

    error = node.run(scenario)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in str(error.details())
