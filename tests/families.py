"""Tiny random models of every decoder family that lowbit is tested on.

`TINY[name]()` is a configuration, `build(name)` the model in fp32. Weights are random, gains and biases are disturbed
around their initial values, so that no test passes because a norm happens to be the identity or a bias to be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _config(model_type: str, *leave_out: str, **changes: Any) -> Callable[[], PreTrainedConfig]:
    settings = {key: value for key, value in (COMMON | changes).items() if key not in leave_out}

    def make() -> PreTrainedConfig:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type](**settings)
        return config

    return make


_OPT: dict[str, Any] = {"ffn_dim": 96, "word_embed_proj_dim": 64}

TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("llama"),
    "llama-tied": _config("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "opt": _config("opt", "num_key_value_heads", **_OPT),
    "opt-350m": _config("opt", "num_key_value_heads", ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False),
    "mixtral": _config("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _config("qwen2", tie_word_embeddings=True),
    "bloom": _config("bloom", "num_key_value_heads", "intermediate_size"),
    "mistral": _config("mistral", sliding_window=6),
    "qwen3": _config("qwen3", head_dim=16),
    "gemma2": _config("gemma2", head_dim=16, query_pre_attn_scalar=16, sliding_window=6),
    "gemma3": _config(
        "gemma3_text",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": _config("phi3"),
    "gpt2": _config("gpt2", "num_key_value_heads", n_inner=96),
    "gpt_neox": _config("gpt_neox", "num_key_value_heads"),
    "falcon-7b": _config("falcon", "num_key_value_heads", ffn_hidden_size=96, multi_query=True, alibi=False),
    "falcon-40b": _config(
        "falcon", "num_key_value_heads", ffn_hidden_size=96, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon-rw": _config(
        "falcon",
        "num_key_value_heads",
        ffn_hidden_size=96,
        multi_query=False,
        alibi=True,
        bias=True,
        parallel_attn=False,
    ),
    "cohere": _config("cohere", use_qk_norm=True),
    "olmo2": _config("olmo2"),
    "stablelm": _config("stablelm", use_qkv_bias=True),
    "stablelm-parallel": _config("stablelm", use_parallel_residual=True, qk_layernorm=True),
    "granite": _config(
        "granite", embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0, attention_multiplier=0.1
    ),
    "qwen3_moe": _config("qwen3_moe", head_dim=16, num_experts=4, **MIXTURE),
    "qwen2_moe": _config("qwen2_moe", num_experts=4, shared_expert_intermediate_size=48, **MIXTURE),
    "gpt_oss": _config("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "deepseek_v3": _config(
        "deepseek_v3",
        num_hidden_layers=3,
        num_key_value_heads=4,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        **MIXTURE,
    ),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The model of `TINY[name]` in fp32 and evaluation mode, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(TINY[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length] that every tiny model knows, without the special ones."""
    return torch.randint(3, COMMON["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
