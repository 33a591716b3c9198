"""The demo model's tokenizer, chat template and generation defaults as files of a Hugging Face checkpoint."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from expert_store.demo_model.dense_weights import TokenizerFacts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

END_OF_TEXT_ID, START_OF_TURN_ID, END_OF_TURN_ID = 0, 1, 2

_CONTEXT_LENGTH = 8192


def write_tokenizer_files(facts: TokenizerFacts, out_dir: Path) -> None:
    """Write TOKENIZER_FILES into `out_dir`."""
    byte_level_tokenizer(facts).save(str(out_dir / "tokenizer.json"))
    (out_dir / "chat_template.jinja").write_text(facts.chat_template)
    _write_json(
        out_dir / "tokenizer_config.json",
        {
            "tokenizer_class": "TokenizersBackend",
            "bos_token": facts.tokens[START_OF_TURN_ID],
            "eos_token": facts.tokens[END_OF_TURN_ID],
            "pad_token": facts.tokens[END_OF_TURN_ID],
            "unk_token": facts.tokens[END_OF_TEXT_ID],
            "clean_up_tokenization_spaces": False,
            "model_max_length": _CONTEXT_LENGTH,
        },
    )
    _write_json(
        out_dir / "generation_config.json",
        {"bos_token_id": START_OF_TURN_ID, "eos_token_id": END_OF_TURN_ID, "pad_token_id": END_OF_TURN_ID},
    )


def byte_level_tokenizer(facts: TokenizerFacts) -> Tokenizer:
    """Byte-level BPE that splits digits one by one: llama.cpp's pre-tokenizer `smollm`.

    Transformers' own GGUF conversion leaves the digit split out and so takes the last space of a run before a digit as
    a token of its own ("|  9"); with the split, the base model sees what it was trained on.
    """
    vocabulary = {token: token_id for token_id, token in enumerate(facts.tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=list(facts.merges)))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(
        [AddedToken(facts.tokens[i], special=True, normalized=False) for i in facts.special_ids]
    )
    return tokenizer


def _write_json(path: Path, content: dict[str, str | int | bool]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
