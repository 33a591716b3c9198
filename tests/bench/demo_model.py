"""The demo model for benchmarks: built and packed once, and chats to ask it."""

from pathlib import Path
from typing import Final

from expert_store.demo_model.build import build_demo_model
from expert_store.pack.packer import pack_checkpoint
from tests.bench.report import ROOT

CACHE: Final = ROOT / ".cache" / "demo"

PROMPTS: Final = (
    "Explain how the water cycle works in simple words.",
    "Write a short story about a lighthouse keeper and a storm.",
    "Give me three facts about whales.",
    "What is democracy and why does it matter?",
    "Write a letter to a friend about the sea.",
    "Describe bread making to a child.",
    "Write a short essay about volcanoes.",
    "Give me advice on learning to play chess.",
)


def demo_checkpoint() -> Path:
    """The Hugging Face checkpoint."""
    return build_demo_model(CACHE / "checkpoint")


def demo_pack() -> Path:
    """The expert pack, in the model's own bf16."""
    pack_dir = CACHE / "pack_bfloat16"
    pack_checkpoint(demo_checkpoint(), pack_dir, dtype=None)
    return pack_dir


def chat(prompt: str) -> list[dict[str, str]]:
    """One user turn."""
    return [{"role": "user", "content": prompt}]
