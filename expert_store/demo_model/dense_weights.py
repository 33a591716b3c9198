"""The base model's weights and tokenizer facts, read from its GGUF file.

Shapes: D hidden 576, F dense FFN neurons 1536, Q query rows 576, R key/value rows 192, V vocabulary.
Every tensor comes back in the layout of Transformers' Llama: [out features, in features].
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize


@dataclass(frozen=True)
class DenseLayer:
    """One Llama decoder layer of the base model, float32 values that bfloat16 holds exactly."""

    q_QD: torch.Tensor
    k_RD: torch.Tensor
    v_RD: torch.Tensor
    o_DQ: torch.Tensor
    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    input_norm_D: torch.Tensor
    post_attention_norm_D: torch.Tensor


@dataclass(frozen=True)
class TokenizerFacts:
    """What a byte-level BPE tokenizer needs; token ids are positions in `tokens`."""

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    special_ids: tuple[int, ...]
    chat_template: str


class DenseWeights:
    """Reads one tensor at a time, so that the whole model never lies dequantised in memory."""

    def __init__(self, gguf_path: Path) -> None:
        self._reader = GGUFReader(gguf_path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.num_layers = self._number("llama.block_count")
        self.num_heads = self._number("llama.attention.head_count")
        self.num_kv_heads = self._number("llama.attention.head_count_kv")
        self.rope_base = self._real("llama.rope.freq_base")
        self.norm_eps = round(self._real("llama.attention.layer_norm_rms_epsilon"), 12)  # stored in float32

    def embedding(self) -> torch.Tensor:
        """Token embedding, tied to the output head: [V, D]."""
        return self._read("token_embd.weight")

    def final_norm(self) -> torch.Tensor:
        """Weight of the last RMS norm: [D]."""
        return self._read("output_norm.weight")

    def layer(self, layer: int) -> DenseLayer:
        """All weights of decoder layer `layer`."""

        def read(name: str) -> torch.Tensor:
            return self._read(f"blk.{layer}.{name}.weight")

        return DenseLayer(
            q_QD=half_rotation_order(read("attn_q"), self.num_heads),
            k_RD=half_rotation_order(read("attn_k"), self.num_kv_heads),
            v_RD=read("attn_v"),
            o_DQ=read("attn_output"),
            gate_FD=read("ffn_gate"),
            up_FD=read("ffn_up"),
            down_DF=read("ffn_down"),
            input_norm_D=read("attn_norm"),
            post_attention_norm_D=read("ffn_norm"),
        )

    def tokenizer_facts(self) -> TokenizerFacts:
        """Vocabulary, merges, special tokens and chat template as the GGUF's metadata states them."""
        tokens = tuple(str(token) for token in self._contents("tokenizer.ggml.tokens"))
        merges = [str(merge).split(" ") for merge in self._contents("tokenizer.ggml.merges")]
        control_type = 3  # llama.cpp's token type of tokens that text never spells
        token_types = self._contents("tokenizer.ggml.token_type")
        return TokenizerFacts(
            tokens=tokens,
            merges=tuple((left, right) for left, right in merges),
            special_ids=tuple(i for i, token_type in enumerate(token_types) if token_type == control_type),
            chat_template=str(self._field("tokenizer.chat_template")),
        )

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        shape = tuple(int(extent) for extent in reversed(tensor.shape))  # GGUF names the fastest axis first
        return torch.from_numpy(values).reshape(shape).bfloat16().float()

    def _number(self, key: str) -> int:
        value = self._field(key)
        assert isinstance(value, int), f"{key} is a whole number in the verified GGUF"
        return value

    def _real(self, key: str) -> float:
        value = self._field(key)
        assert isinstance(value, float), f"{key} is a number in the verified GGUF"
        return value

    def _field(self, key: str) -> object:
        field = self._reader.get_field(key)
        assert field is not None, f"the verified GGUF has the metadata field {key}"
        return field.contents()

    def _contents(self, key: str) -> list[object]:
        contents = self._field(key)
        assert isinstance(contents, list), f"{key} is a list in the verified GGUF"
        return contents


def half_rotation_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of a query or key projection [rows, D].

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Transformers rotates rows i and i + half.
    """
    rows, width = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)
