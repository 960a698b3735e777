"""A model's configuration as GGUF's keys, and back.

Most keys are one number under two names, which is one table. What is not: rope's scaling, of which Llama 3's and Phi
3's kinds are tensors; which layers slide; and what llama.cpp computes in one way only, so that a model that wants
another is refused instead of being served wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .gguf_names import FAMILIES, Family, family, model_type

Value = str | int | float | bool | list[Any]

_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
    "expert_used_count": "num_experts_per_tok",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_MIXTURE = {
    "mixtral": {"expert_count": "num_local_experts"},
    "qwen3_moe": {"expert_count": "num_local_experts", "expert_feed_forward_length": "moe_intermediate_size"},
}
_SLIDING = {"gemma2": 2, "gemma3_text": 6}
"""Families whose sliding layers clients know, and which layers do not slide where a file is silent: every n-th."""
_TIED = ("gemma", "gemma2")
"""Families whose head clients take from the embedding, whatever a file holds."""
ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


def _keys(kind: str) -> dict[str, str]:
    return _KEYS | _MIXTURE.get(kind, {})


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def refuse(config: Mapping[str, Any]) -> str | None:
    """Why llama.cpp would not compute this model, with advice, or None."""
    kind = config["model_type"]
    known = FAMILIES[kind]
    act = config.get("hidden_activation") or config.get("hidden_act")
    if act != known.activation and not (kind == "gemma" and act == "gelu"):
        return f"llama.cpp computes {known.activation} in {kind} models, and this one wants {act}: use native"
    if kind in _TIED and not config["tie_word_embeddings"]:
        return f"GGUF's {kind} models share one matrix between embedding and head, and these differ: use native"
    scalar = config.get("query_pre_attn_scalar")
    if scalar not in (None, head_dim(config)) and config["num_hidden_layers"] not in (46, 62):
        width = head_dim(config)
        return f"llama.cpp divides attention scores by the root of {width}, this model by that of {scalar}: use native"
    if kind == "qwen3_moe" and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        return "GGUF has experts in every layer of such models, and this one has not: use native"
    if kind == "qwen3_moe" and not config.get("norm_topk_prob"):
        return "llama.cpp normalises the weights of the chosen experts, and this model does not: use native"
    kinds = [rope.get("rope_type", "default") for rope in _ropes(config).values()]
    odd = sorted(set(kinds) - {"default", "linear", "yarn", "llama3", "longrope"})
    return f"GGUF has no rope scaling of type {odd[0]}: use native" if odd else None


def notices(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What clients compute differently beyond some length."""
    window, kind = config.get("sliding_window"), config["model_type"]
    slides = kind in ("mistral", "mixtral", "phi3") or "sliding_attention" in (config.get("layer_types") or ())
    if window and slides and kind not in _SLIDING and window < config["max_position_embeddings"]:
        return (
            f"llama.cpp attends to everything where {kind} slides a window of {window} tokens: keep contexts shorter",
        )
    return ()


# --- to GGUF ----------------------------------------------------------------------------------------------------------


def metadata(config: Mapping[str, Any]) -> dict[str, Value]:
    """GGUF's keys of a configuration (all fields present, as `to_dict` of a transformers configuration gives them)."""
    kind = config["model_type"]
    known, width = family(kind), head_dim(config)
    values: dict[str, Value] = {}
    for key, name in _keys(kind).items():
        value = width if name == "head_dim" else config.get(name)
        if value is not None:
            values[key] = value
    values["attention.value_length"] = width
    values["rope.dimension_count"] = int(width * _ropes(config)["full_attention"].get("partial_rotary_factor", 1.0))
    if kind in _SLIDING and config.get("sliding_window"):
        values["attention.sliding_window"] = config["sliding_window"]
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
    values |= _rope(config)
    return {f"{known.arch}.{key}": value for key, value in values.items()}


def _ropes(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Rope's parameters of the kinds of layers; one kind is full attention."""
    given = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    return dict(given) if "full_attention" in given else {"full_attention": given}


def _rope(config: Mapping[str, Any]) -> dict[str, Value]:
    ropes = _ropes(config)
    rope, width = ropes["full_attention"], head_dim(config)
    values: dict[str, Value] = {"rope.freq_base": float(rope["rope_theta"])}
    if "sliding_attention" in ropes:
        values["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    scaling = rope.get("rope_type", "default")
    if scaling in ("linear", "yarn"):
        values |= {"rope.scaling.type": scaling, "rope.scaling.factor": float(rope["factor"])}
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if scaling in ("yarn", "longrope") and original:
        values["rope.scaling.original_context_length"] = original
    if scaling == "longrope" and original:
        grown = config["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(grown) / math.log(original)) if grown > 1 else 1.0
        values["rope.scaling.attn_factor"] = float(rope.get("attention_factor") or factor)
    assert width > 0
    return values


def rope_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What divides rope's frequencies, fp32 [width/2], for scalings that are no single number."""
    rope = _ropes(config)["full_attention"]
    if rope.get("rope_type") == "llama3":
        return {ROPE_FREQS: llama3_factors(rope, head_dim(config))}
    if rope.get("rope_type") == "longrope":
        return {ROPE_LONG: torch.tensor(rope["long_factor"]), ROPE_SHORT: torch.tensor(rope["short_factor"])}
    return {}


def llama3_factors(rope: Mapping[str, Any], width: int) -> Tensor:
    """Llama 3.1's factors: 1 for short wavelengths, `factor` for long ones, smooth between."""
    frequency = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


# --- from GGUF --------------------------------------------------------------------------------------------------------


def configuration(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], tied: bool) -> dict[str, Any]:
    """What `AutoConfig` makes the model of, from a file's keys and rope's tensors. Raises ValueError."""
    arch = str(fields["general.architecture"])
    own = {key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")}
    kind = model_type(arch, bool(own.get("expert_count")))
    config: dict[str, Any] = {"model_type": kind, "tie_word_embeddings": tied, "attention_bias": False}
    config |= {name: own[key] for key, name in _keys(kind).items() if key in own}
    config.setdefault("vocab_size", len(fields.get("tokenizer.ggml.tokens", ())))
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    for token in ("bos", "eos", "padding"):
        config[f"{token.replace('padding', 'pad')}_token_id"] = fields.get(f"tokenizer.ggml.{token}_token_id")
    if kind in _SLIDING:
        config |= _sliding(own, kind, config["num_hidden_layers"])
        config["query_pre_attn_scalar"] = head_dim(config)
    if FAMILIES[kind].activation != "silu":
        config["hidden_activation"] = FAMILIES[kind].activation
    if kind == "qwen3_moe":
        config["norm_topk_prob"] = True
    if kind == "phi3" and ROPE_LONG in tensors:
        config["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    config["rope_parameters"] = _rope_parameters(own, kind, head_dim(config), tensors)
    return config


def _sliding(own: Mapping[str, Any], kind: str, layers: int) -> dict[str, Any]:
    pattern = own.get("attention.sliding_window_pattern", _SLIDING[kind])
    window = own.get("attention.sliding_window", 4096 if kind == "gemma2" else 0)
    every = pattern if isinstance(pattern, list) else [i % pattern < pattern - 1 for i in range(layers)]
    named = ["sliding_attention" if slides and window else "full_attention" for slides in every[:layers]]
    return {"layer_types": named, "sliding_window": window or None}


def _rope_parameters(own: Mapping[str, Any], kind: str, width: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    turned = own.get("rope.dimension_count", width)
    if turned != width:
        rope["partial_rotary_factor"] = turned / width
    scaling = own.get("rope.scaling.type", "none")
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": own["rope.scaling.factor"]}
    if scaling == "yarn" and "rope.scaling.original_context_length" in own:
        rope["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    if ROPE_FREQS in tensors:
        rope |= _llama3_parameters(rope, width, tensors[ROPE_FREQS])
    if ROPE_LONG in tensors:
        long, short = tensors[ROPE_LONG].tolist(), tensors[ROPE_SHORT].tolist()
        rope |= {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    if kind != "gemma3_text":
        return rope
    local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}
    return {"full_attention": rope, "sliding_attention": local}


def _llama3_parameters(rope: Mapping[str, Any], width: int, factors: Tensor) -> dict[str, Any]:
    """The scaling that a file's factors come from; every Llama 3 shares all but one number."""
    known = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for original in (8192, *(1 << bits for bits in range(9, 18))):
        guess = {**rope, **known, "factor": float(factors.max()), "original_max_position_embeddings": original}
        if torch.allclose(llama3_factors(guess, width), factors.float(), rtol=1e-4):
            return guess
    raise ValueError("the file's rope factors are none of Llama 3's scaling: give the Hugging Face model instead")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a configuration."""
    return family(config["model_type"])
