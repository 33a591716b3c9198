"""Texts, tokens and models over HTTP, against a tiny model that computes."""

import pytest

from promoe import Client
from tests.http_node import MODEL, HttpNode

GO_ON = {"ignore_eos": True}
PROMPT = "then the sand"


def test_a_prompt_may_be_text_or_tokens_and_there_may_be_several(live: HttpNode) -> None:
    with Client(live.serving.endpoint) as grpc_client:
        ids = grpc_client.tokenize(PROMPT)
        expected = grpc_client.complete(PROMPT, max_tokens=6, ignore_eos=True).text
    with live.client() as client:
        for prompt in (PROMPT, ids, [PROMPT], [ids]):
            one = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0, extra_body=GO_ON)
            assert [choice.text for choice in one.choices] == [expected]
        two = client.completions.create(
            model=MODEL, prompt=[PROMPT, "and on"], n=2, max_tokens=6, temperature=0, extra_body=GO_ON
        )
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text == expected
    assert two.choices[2].text == two.choices[3].text != expected
    assert two.usage is not None
    assert two.usage.completion_tokens == 24
    assert two.usage.prompt_tokens == len(ids) + len(live.post("/tokenize", {"prompt": "and on"}).json()["tokens"])


def test_sixteen_tokens_are_the_default_and_an_echo_comes_first(live: HttpNode) -> None:
    with live.client() as client:
        plain = client.completions.create(model=MODEL, prompt=PROMPT, seed=1, extra_body=GO_ON)
        echoed = client.completions.create(model=MODEL, prompt=PROMPT, seed=1, echo=True, extra_body=GO_ON)
        pieces = list(
            client.completions.create(model=MODEL, prompt=PROMPT, seed=1, echo=True, stream=True, extra_body=GO_ON)
        )
    assert plain.usage is not None
    assert plain.usage.completion_tokens == 16
    assert plain.choices[0].finish_reason == "length"
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == echoed.choices[0].text


def test_log_probabilities_say_where_their_tokens_are(live: HttpNode) -> None:
    with live.client() as client:
        whole = client.completions.create(
            model=MODEL, prompt=PROMPT, seed=2, max_tokens=10, logprobs=2, extra_body=GO_ON
        )
        pieces = list(
            client.completions.create(
                model=MODEL, prompt=PROMPT, seed=2, max_tokens=10, logprobs=2, stream=True, extra_body=GO_ON
            )
        )
    shown = whole.choices[0].logprobs
    assert shown is not None
    assert shown.tokens is not None
    assert shown.text_offset is not None
    assert len(shown.tokens) == len(shown.token_logprobs or ()) == len(shown.top_logprobs or ()) == 10
    for token, offset in zip(shown.tokens, shown.text_offset, strict=True):
        is_whole = "\N{REPLACEMENT CHARACTER}" not in token
        assert not is_whole or token in whole.choices[0].text[offset:]
    streamed = [
        token
        for piece in pieces
        for choice in piece.choices
        if choice.logprobs
        for token in choice.logprobs.tokens or ()
    ]
    assert streamed == shown.tokens


def test_models_are_listed_and_found(live: HttpNode) -> None:
    with live.client() as client:
        (model,) = client.models.list().data
        assert client.models.retrieve(model.id) == model
    assert (model.id, model.owned_by, model.object) == (MODEL, "promoe", "model")
    other = live.get("/v1/models/meta/llama")
    assert other.status_code == 404
    assert other.json()["error"] == {
        "message": 'The model "meta/llama" does not exist here; served: tiny.',
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize("text", ["then the sand", "\u00e9\u20ac\U0001f600", "x"])
def test_tokens_and_back(live: HttpNode, text: str) -> None:
    tokenized = live.post("/tokenize", {"model": MODEL, "prompt": text}).json()
    assert tokenized["count"] == len(tokenized["tokens"])
    assert live.post("/detokenize", {"tokens": tokenized["tokens"]}).json() == {"prompt": text}


def test_a_chat_is_tokenized_as_the_model_sees_it(live: HttpNode) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert live.post("/tokenize", chat).json() == live.post("/tokenize", {"prompt": rendered}).json()


def test_the_process_and_its_figures_can_be_watched(live: HttpNode) -> None:
    assert live.get("/health").json() == {"status": "ok"}
    ready = live.get("/ready")
    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"
    page = live.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    for name in ("promoe_tokens_total", "promoe_ttft_seconds_bucket", "promoe_running_requests"):
        assert name in page.text
