"""Placement and scheduling change latency, never tokens: through pack, store process, cache, gRPC and client.

The oracle is Transformers' own `generate` on the checkpoint the pack was made from.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from compute_node.config import ComputeConfig, DeviceChoice
from expert_store.pack.packer import pack_checkpoint
from promoe import Client
from promoe.model_spec import Dtype
from promoe.node_report import EngineKind
from tests.families import FAMILIES, SECOND_ENGINE_FAMILIES, VOCABULARY, save_tiny_checkpoint
from tests.running_node import NodeThread
from tests.running_store import RunningStore

NUM_TOKENS = 24


def oracle(checkpoint: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy tokens of each prompt alone, all experts resident, float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0)
    answers: list[list[int]] = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        # Declared for a type that no model class states it is.
        sequence = model.generate(  # type: ignore[misc]
            ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        answers.append([int(token) for token in sequence[0, len(prompt) :]])
    return answers


def ask_together(endpoint: str, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The same prompts as concurrent requests."""
    answers: list[list[int]] = [[] for _ in prompts]

    def ask(index: int) -> None:
        with Client(endpoint) as client:
            answer = client.complete(prompts[index], max_tokens=num_tokens, ignore_eos=True)
            answers[index] = list(answer.token_ids)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def random_prompts(count: int, vocab_size: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def node_config(pack_dir: Path, store: RunningStore, **settings: object) -> ComputeConfig:
    fixed: dict[str, object] = {
        "pack": pack_dir,
        "store_endpoint": store.endpoint,
        "device": DeviceChoice.CPU,
        "num_threads": 1,
        "max_context_tokens": 256,
        "max_batch_tokens": 64,
    }
    return ComputeConfig(**(fixed | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_tokens_of_every_family_equal_generate(family: str, tmp_path: Path, socket_dir: Path) -> None:
    checkpoint = save_tiny_checkpoint(family, tmp_path / "checkpoint", torch.float32)
    prompts = random_prompts(3, len(VOCABULARY), 40)
    expected = oracle(checkpoint, prompts, NUM_TOKENS)
    assert len({token for answer in expected for token in answer}) > 3, "the model says something"
    pack_dir = tmp_path / "pack"
    manifest = pack_checkpoint(checkpoint, pack_dir, dtype=Dtype.FLOAT32)
    with RunningStore(pack_dir, socket_dir) as store:
        for slots, chunk_bytes in ((1, 500), (manifest.spec.num_experts // 2, 1 << 20)):
            config = node_config(pack_dir, store, expert_slots=slots, chunk_bytes=chunk_bytes)
            with NodeThread(config) as node, Client(node.endpoint) as client:
                info = client.info()
                expected_kind = EngineKind.INTERLEAVED if family in SECOND_ENGINE_FAMILIES else EngineKind.CONTINUOUS
                assert info.engine is expected_kind, info.engine_reason
                assert ask_together(node.endpoint, prompts, NUM_TOKENS) == expected
                assert client.cache_stats().decode.misses > 0, "the experts did come through the link"


DEMO_PROMPTS = (
    "What is gravity?",
    "Write a short story about a lighthouse keeper and a storm.",
    "Give me three facts about whales.",
    "Explain how a bicycle works in simple words.",
    "Write a letter to a friend about the sea.",
    "Why is the sky blue?",
    "Describe bread making to a child.",
    "Give me advice on learning chess.",
)


def demo_prompts(checkpoint: Path) -> list[list[int]]:
    """Chats, as the demo model's template renders them."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chats = [[{"role": "user", "content": text}] for text in DEMO_PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_greedy_tokens_of_the_demo_model_equal_generate(
    demo_checkpoint: Path, demo_pack_fp32: Path, socket_dir: Path
) -> None:
    """Cache rates from one slot to all, chunks from small to whole, batches of 1 to 8."""
    prompts = demo_prompts(demo_checkpoint)
    expected = oracle(demo_checkpoint, prompts, 10)
    with RunningStore(demo_pack_fp32, socket_dir) as store:
        for slots, chunk_bytes, batch in ((1, 1 << 20, 8), (4, 5_000, 1), (16, 60_000, 5), (32, 1 << 20, 8)):
            config = node_config(demo_pack_fp32, store, expert_slots=slots, chunk_bytes=chunk_bytes)
            with NodeThread(config) as node:
                assert ask_together(node.endpoint, prompts[:batch], 10) == expected[:batch]


def test_bf16_tokens_do_not_depend_on_where_experts_are(
    demo_checkpoint: Path, demo_pack_bf16: Path, socket_dir: Path
) -> None:
    """In bf16 other batches round differently; the same batch must not, whatever the slots, chunks and overlap."""
    prompt = demo_prompts(demo_checkpoint)[:1]
    answers: list[list[list[int]]] = []
    with RunningStore(demo_pack_bf16, socket_dir) as store:
        for slots, serial in ((1, False), (16, True), (32, False)):
            config = node_config(demo_pack_bf16, store, expert_slots=slots, serial=serial, chunk_bytes=30_000)
            with NodeThread(config) as node:
                answers.append(ask_together(node.endpoint, prompt, 24))
    assert answers[0] == answers[1] == answers[2]
