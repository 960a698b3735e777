"""What GGUF calls the families' tensors, and how they change under that name: three facts per family, as data.

    permuted   q and k rows of a head alternate between the halves that rope turns into each other, instead of lying one
               half behind the other
    plus_one   gains of norms are stored as what they multiply with, w + 1
    experts    a mixture's experts are one tensor with three axes

Rows of a quantized tensor are independent, so all three act on rows of bytes or on small fp32 tensors, and no code is
looked at. Both directions are read off one table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_NORM = {"post_attention_layernorm": "ffn_norm"}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_FUSED = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
ROUTER = "ffn_gate_inp"


@dataclass(frozen=True)
class Family:
    """An architecture of GGUF and what its tensors are called."""

    arch: str
    blocks: Mapping[str, str]
    permuted: bool = False
    plus_one: bool = False
    activation: str = "silu"
    """The only activation function that clients compute for it."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """Of a mixture: module under `…experts.N` -> GGUF's name."""
    mixture: str = ""
    """Of a mixture: path of the module that holds router and experts."""

    @property
    def gguf_blocks(self) -> Mapping[str, str]:
        """GGUF's names of a block's modules -> the checkpoint's, `{}` standing for the number of an expert."""
        named = {ours: theirs for theirs, ours in self.blocks.items()}
        return named | {ours: f"{self.mixture}.experts.{{}}.{theirs}" for theirs, ours in self.experts.items()}


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", {**_ATTENTION, **_NORM, **_MLP}, permuted=True),
    "mistral": Family("llama", {**_ATTENTION, **_NORM, **_MLP}, permuted=True),
    "mixtral": Family(
        "llama",
        {**_ATTENTION, **_NORM, "block_sparse_moe.gate": ROUTER},
        permuted=True,
        experts={"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"},
        mixture="block_sparse_moe",
    ),
    "qwen2": Family("qwen2", {**_ATTENTION, **_NORM, **_MLP}),
    "qwen3": Family("qwen3", {**_ATTENTION, **_NORM, **_MLP, **_HEAD_NORMS}),
    "qwen3_moe": Family(
        "qwen3moe",
        {**_ATTENTION, **_NORM, **_HEAD_NORMS, "mlp.gate": ROUTER},
        experts={"gate_proj": "ffn_gate_exps", "down_proj": "ffn_down_exps", "up_proj": "ffn_up_exps"},
        mixture="mlp",
    ),
    "gemma": Family("gemma", {**_ATTENTION, **_NORM, **_MLP}, plus_one=True, activation="gelu_pytorch_tanh"),
    "gemma2": Family("gemma2", {**_ATTENTION, **_SANDWICH, **_MLP}, plus_one=True, activation="gelu_pytorch_tanh"),
    "gemma3_text": Family(
        "gemma3",
        {**_ATTENTION, **_SANDWICH, **_MLP, **_HEAD_NORMS},
        plus_one=True,
        activation="gelu_pytorch_tanh",
    ),
    "phi3": Family("phi3", {**_FUSED, **_NORM}),
}


def family(model_type: str) -> Family:
    """The family of a configuration's model type. Raises ValueError for one that GGUF is not written for."""
    if model_type not in FAMILIES:
        raise ValueError(refusal(model_type))
    return FAMILIES[model_type]


def refusal(model_type: str) -> str:
    """What to say of a family that is not written."""
    return (
        f"GGUF export knows {', '.join(FAMILIES)}, not {model_type}, whose tensors llama.cpp names and orders in its "
        "own way: use native or compressed-tensors"
    )


def model_type(arch: str, experts: bool) -> str:
    """The configuration's model type of a file. Raises ValueError for an architecture that is not read."""
    for name, known in FAMILIES.items():
        if known.arch == arch and bool(known.experts) == experts:
            return name
    known_archs = ", ".join(sorted({known.arch for known in FAMILIES.values()}))
    raise ValueError(f"lowbit reads GGUF files of {known_archs}, not {arch}: give the Hugging Face model instead")


def to_gguf(name: str, family: Family) -> tuple[str, int | None]:
    """(GGUF's name, number of the expert or None) of a checkpoint's tensor. Raises ValueError where there is none."""
    path, _, leaf = name.rpartition(".")
    if path in _OUTSIDE:
        return f"{_OUTSIDE[path]}.{leaf}", None
    match = _BLOCK.fullmatch(name)
    if match is not None:
        block, path, leaf = match.groups()
        if path in family.blocks:
            return f"blk.{block}.{family.blocks[path]}.{leaf}", None
        expert = _EXPERT.fullmatch(path)
        if expert is not None and expert[3] in family.experts:
            return f"blk.{block}.{family.experts[expert[3]]}.{leaf}", int(expert[2])
    raise ValueError(f"GGUF has no name for {name} in {family.arch} models: use native or compressed-tensors")


def from_gguf(name: str, family: Family) -> str | None:
    """The checkpoint's name of a tensor, `{}` standing for the number of an expert; None where it has none."""
    path, _, leaf = name.rpartition(".")
    for theirs, ours in _OUTSIDE.items():
        if path == ours:
            return f"{theirs}.{leaf}"
    match = _GGUF_BLOCK.fullmatch(name)
    if match is None or match[2] not in family.gguf_blocks:
        return None
    return f"model.layers.{match[1]}.{family.gguf_blocks[match[2]]}.{match[3]}"


def heads_of(name: str, family: Family, heads: tuple[int, int]) -> int | None:
    """How many heads the rows of a GGUF tensor are permuted in, of (query, key) heads; None where they are not."""
    module = name.split(".")[-2]
    if not family.permuted or module not in ("attn_q", "attn_k"):
        return None
    return heads[module == "attn_k"]


def permuted(x: Tensor, heads: int) -> Tensor:
    """Rows [O, …], one half of a head behind the other, so that they alternate."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def unpermuted(x: Tensor, heads: int) -> Tensor:
    """The inverse of `permuted`."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def is_shifted(name: str, family: Family) -> bool:
    """Whether a checkpoint's tensor is stored with 1 added."""
    return family.plus_one and name.endswith("norm.weight")


def stacked(experts: Mapping[int, Tensor], name: str) -> Tensor:
    """The experts' tensors as one. Raises ValueError where one is missing."""
    missing = sorted(set(range(max(experts) + 1)) - set(experts))
    if missing:
        raise ValueError(
            f"{name}: expert {missing[0]} is not in the same format as the others, and GGUF keeps them in one"
        )
    return torch.stack([experts[index] for index in range(len(experts))])
