"""The base model as Transformers' own Llama: the teacher, and the student's starting point."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from expert_store.demo_model.dense_weights import DenseWeights


def dense_llama(dense: DenseWeights) -> LlamaForCausalLM:
    """The base model in bfloat16, frozen, in eval mode."""
    embedding, first = dense.embedding(), dense.layer(0)
    config = LlamaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=first.gate_FD.shape[0],
        num_hidden_layers=dense.num_layers,
        num_attention_heads=dense.num_heads,
        num_key_value_heads=dense.num_kv_heads,
        head_dim=first.q_QD.shape[0] // dense.num_heads,
        rms_norm_eps=dense.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": dense.rope_base},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # not model.bfloat16(), which would round the rotary frequencies too
        parameter.data = parameter.data.bfloat16()
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    tensors["model.norm.weight"] = dense.final_norm()
    for i in range(dense.num_layers):
        layer = dense.layer(i)
        parts = {
            "self_attn.q_proj": layer.q_QD,
            "self_attn.k_proj": layer.k_RD,
            "self_attn.v_proj": layer.v_RD,
            "self_attn.o_proj": layer.o_DQ,
            "mlp.gate_proj": layer.gate_FD,
            "mlp.up_proj": layer.up_FD,
            "mlp.down_proj": layer.down_DF,
            "input_layernorm": layer.input_norm_D,
            "post_attention_layernorm": layer.post_attention_norm_D,
        }
        tensors |= {f"model.layers.{i}.{name}.weight": weight for name, weight in parts.items()}
    model.load_state_dict(tensors)
    model.requires_grad_(False)
    model.train(False)
    return model
