"""The Inference service through a real server and socket: what it answers."""

import asyncio

import grpc
import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transformers import PreTrainedModel

from promoe import telemetry
from promoe.cache_map import CacheMap
from promoe.node_report import CacheShape, CacheStats, PredictorLink, StoreLink
from promoe.typed_message import decode_message
from promoe.v1 import inference_pb2
from promoe.wire import SCHEMA_VERSION
from tests.compute_node.tiny_serving import FixedReport, Serving, greedy_oracle
from tests.contract.inference_node import CONTEXT, PROMPT, Node, generate, ids_of, refusal, text_of, text_request
from tests.families import END_OF_TURN_ID, VOCABULARY


def test_greedy_text_streams_token_by_token(node: Node, oracle: PreTrainedModel) -> None:
    responses = node.run(lambda server: generate(server, text_request(max_tokens=12)))
    expected = greedy_oracle(oracle, node.ids(PROMPT), 12)
    assert [response.WhichOneof("event") for response in responses[:2]] == ["accepted", "delta"]
    assert responses[0].accepted.prompt_tokens == len(node.ids(PROMPT))
    assert [list(response.delta.token_ids) for response in responses[1:13]] == [[each] for each in expected]
    assert text_of(responses) == node.tokenizer.decode(expected, skip_special_tokens=True)
    finish = responses[-1].finish
    assert finish.reason == inference_pb2.FINISH_REASON_MAX_TOKENS
    assert (finish.usage.prompt_tokens, finish.usage.output_tokens) == (len(node.ids(PROMPT)), 12)
    assert 0 < finish.usage.queue_s < finish.usage.ttft_s
    assert finish.usage.tpot_s > 0


def test_chats_texts_and_tokens_are_three_ways_to_the_same_prompt(node: Node) -> None:
    rendered = "<|im_start|>user\nthe sea<|im_end|>\n<|im_start|>assistant\n"
    sampling = inference_pb2.SamplingParams(max_tokens=6, ignore_eos=True)
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="the sea")])
    requests = [
        inference_pb2.GenerateRequest(chat=chat, sampling=sampling),
        inference_pb2.GenerateRequest(text=rendered, sampling=sampling),
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=node.ids(rendered)), sampling=sampling),
    ]

    async def scenario(server: Serving) -> list[list[int]]:
        return [ids_of(await generate(server, request)) for request in requests]

    answers = node.run(scenario)
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 6


def test_a_seed_that_the_server_drew_repeats_the_answer(node: Node) -> None:
    async def scenario(server: Serving) -> tuple[list[list[int]], list[int]]:
        first = await generate(server, text_request(max_tokens=10, temperature=1.5))
        seed = first[0].accepted.seed
        second = await generate(server, text_request(max_tokens=10, temperature=1.5, seed=seed))
        other = await generate(server, text_request(max_tokens=10, temperature=1.5))
        return [ids_of(first), ids_of(second)], [seed, other[0].accepted.seed]

    answers, seeds = node.run(scenario)
    assert answers[0] == answers[1]
    assert seeds[0] != seeds[1]


def test_concurrent_answers_are_those_they_would_be_alone(node: Node, oracle: PreTrainedModel) -> None:
    texts = [PROMPT, "the", "sand and sea " * 6, "h"]

    async def scenario(server: Serving) -> list[list[int]]:
        answers = await asyncio.gather(*(generate(server, text_request(text, max_tokens=9)) for text in texts))
        return [ids_of(answer) for answer in answers]

    assert node.run(scenario) == [greedy_oracle(oracle, node.ids(text), 9) for text in texts]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_text_ends_before_a_stop_string(node: Node, oracle: PreTrainedModel, length: int) -> None:
    whole = node.tokenizer.decode(greedy_oracle(oracle, node.ids(PROMPT), 30), skip_special_tokens=True)
    assert isinstance(whole, str)
    start = next(index for index in range(8, len(whole)) if "\ufffd" not in whole[index : index + length])
    stop = whole[start : start + length]
    responses = node.run(lambda server: generate(server, text_request(max_tokens=30, stop_strings=["never", stop])))
    assert text_of(responses) == whole[: whole.index(stop)]
    finish = responses[-1].finish
    assert (finish.reason, finish.stop_string) == (inference_pb2.FINISH_REASON_STOP_STRING, stop)
    assert finish.usage.output_tokens == len(ids_of(responses)) < 30


def test_a_stop_token_ends_the_answer_and_is_named(node: Node, oracle: PreTrainedModel) -> None:
    expected = greedy_oracle(oracle, node.ids(PROMPT), 20)
    stop = expected[7]
    responses = node.run(lambda server: generate(server, text_request(max_tokens=20, stop_token_ids=[stop])))
    finish = responses[-1].finish
    assert ids_of(responses) == expected[: expected.index(stop)]
    assert (finish.reason, finish.stop_token_id) == (inference_pb2.FINISH_REASON_STOP_TOKEN, stop)
    assert finish.usage.output_tokens == expected.index(stop) + 1


def test_the_models_own_end_of_sequence_ends_the_answer_unless_ignored(node: Node, oracle: PreTrainedModel) -> None:
    prompts = (list(range(start, start + 57)) for start in range(3, 200))
    prompt, expected = next(
        (prompt, answer) for prompt in prompts if END_OF_TURN_ID in (answer := greedy_oracle(oracle, prompt, 20))
    )

    async def scenario(server: Serving) -> list[list[inference_pb2.GenerateResponse]]:
        token_ids = inference_pb2.TokenIds(ids=prompt)
        settings = [inference_pb2.SamplingParams(max_tokens=20, ignore_eos=ignore) for ignore in (False, True)]
        return [
            await generate(server, inference_pb2.GenerateRequest(token_ids=token_ids, sampling=sampling))
            for sampling in settings
        ]

    ended, ignored = node.run(scenario)
    assert ids_of(ended) == expected[: expected.index(END_OF_TURN_ID)]
    assert ended[-1].finish.reason == inference_pb2.FINISH_REASON_END_OF_SEQUENCE
    assert ended[-1].finish.stop_token_id == END_OF_TURN_ID
    assert ids_of(ignored) == expected


def test_an_answer_ends_where_the_context_does(node: Node) -> None:
    responses = node.run(lambda server: generate(server, text_request("the " * 200, max_tokens=1000)))
    finish = responses[-1].finish
    assert finish.reason == inference_pb2.FINISH_REASON_CONTEXT_FULL
    assert finish.usage.prompt_tokens + finish.usage.output_tokens == CONTEXT


def test_logprobs_are_those_of_a_plain_forward_pass(node: Node, oracle: PreTrainedModel) -> None:
    params = {"max_tokens": 5, "temperature": 0.8, "seed": 5, "top_logprobs": 2}
    responses = node.run(lambda server: generate(server, text_request(**params)))
    prompt_ids, ids = node.ids(PROMPT), ids_of(responses)
    with torch.no_grad():
        logits_TV = oracle(input_ids=torch.tensor([prompt_ids + ids])).logits[0]
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
    reported = [logprob for response in responses for logprob in response.delta.logprobs]
    assert [each.token.token_id for each in reported] == ids
    for position, each in enumerate(reported, start=len(prompt_ids) - 1):
        assert each.token.logprob == pytest.approx(float(logprobs_TV[position, each.token.token_id]), abs=1e-4)
        best = torch.topk(logprobs_TV[position], 2)
        assert [other.token_id for other in each.alternatives] == best.indices.tolist()
        assert [other.logprob for other in each.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert each.token.text == node.tokenizer.decode([each.token.token_id])


def test_no_logprobs_unless_asked_for(node: Node) -> None:
    responses = node.run(lambda server: generate(server, text_request(max_tokens=2)))
    assert not any(response.delta.logprobs for response in responses)


def test_text_goes_to_tokens_and_back(node: Node) -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])

    async def scenario(server: Serving) -> tuple[list[int], list[int], str]:
        stub = server.stub
        tokens = await stub.Tokenize(inference_pb2.TokenizeRequest(text=PROMPT))
        rendered = await stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
        text = await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=tokens.token_ids))
        return list(tokens.token_ids), list(rendered.token_ids), text.text

    tokens, rendered, text = node.run(scenario)
    assert tokens == node.ids(PROMPT)
    assert rendered == node.ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert text == PROMPT


def test_the_node_says_what_it_is(node: Node) -> None:
    async def scenario(server: Serving) -> inference_pb2.InferenceGetInfoResponse:
        return await server.stub.GetInfo(inference_pb2.InferenceGetInfoRequest())

    info = node.run(scenario)
    assert inference_pb2.EngineKind.Name(info.engine) == f"ENGINE_KIND_{node.engine.kind.name}"
    assert info.service.instance_id == "instance-1"
    assert info.service.schema_version == SCHEMA_VERSION
    assert info.model.vocab_size == len(VOCABULARY)
    assert not info.device.HasField("emulated_link_bytes_per_s")
    assert (info.limits.max_context_tokens, info.limits.max_new_tokens) == (CONTEXT, CONTEXT - 1)
    assert info.limits.max_prompt_bytes == 4096
    assert decode_message(info.expert_cache, CacheShape) == FixedReport.shape
    assert decode_message(info.store, StoreLink) == FixedReport.store
    assert decode_message(info.predictor, PredictorLink) == FixedReport.predictor


def test_the_expert_caches_counters_are_passed_on(node: Node) -> None:
    async def scenario(server: Serving) -> inference_pb2.CacheStatsResponse:
        return await server.stub.CacheStats(inference_pb2.CacheStatsRequest())

    assert decode_message(node.run(scenario), CacheStats) == FixedReport.stats


def test_the_cache_map_is_passed_on(node: Node) -> None:
    async def scenario(server: Serving) -> inference_pb2.CacheMapResponse:
        return await server.stub.CacheMap(inference_pb2.CacheMapRequest())

    assert decode_message(node.run(scenario), CacheMap) == FixedReport.map


def test_metrics_count_what_was_served(node: Node) -> None:
    async def scenario(server: Serving) -> dict[str, float | None]:
        await generate(server, text_request(max_tokens=5))
        await refusal(server, text_request(top_k=0))
        value = server.registry.get_sample_value
        return {
            "finished": value(f"{telemetry.REQUESTS}_total", {"outcome": "finished"}),
            "prompt": value(f"{telemetry.TOKENS}_total", {"kind": "prompt"}),
            "output": value(f"{telemetry.TOKENS}_total", {"kind": "output"}),
            "ttft": value(f"{telemetry.TTFT_SECONDS}_count"),
            "itl": value(f"{telemetry.ITL_SECONDS}_count"),
            "tpot": value(f"{telemetry.TPOT_SECONDS}_count"),
            "queue": value(f"{telemetry.QUEUE_SECONDS}_count"),
        }

    assert node.run(scenario) == {
        "finished": 1, "prompt": len(node.ids(PROMPT)), "output": 5, "ttft": 1, "itl": 4, "tpot": 1, "queue": 1,
    }  # fmt: skip


def test_the_server_answers_health_checks(node: Node) -> None:
    async def scenario(server: Serving) -> list[int]:
        async with grpc.aio.insecure_channel(server.endpoint) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return [
                (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status
                for service in ("", "promoe.v1.Inference")
            ]

    assert node.run(scenario) == [health_pb2.HealthCheckResponse.SERVING] * 2
