"""Tiny random models of many families, saved as transformers saves them, for tests of the reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbit.graph.skeleton import build_skeleton
from lowbit.stream.checkpoint import Checkpoint

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
MOE = LLAMA | {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA | {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", LLAMA),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", MOE | {"num_experts": 4}),
    "deepseek-v3": ("DeepseekV3", MOE | DEEPSEEK),
    "gpt-oss": ("GptOss", LLAMA | {"num_local_experts": 4, "intermediate_size": 32, "sliding_window": 8}),
    "gpt2": ("GPT2", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPT", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", SMALL | {"num_kv_heads": 4, "new_decoder_architecture": False}),
    "gemma3": ("Gemma3", LLAMA | {"sliding_window": 8}),
    "phi3": ("Phi3", LLAMA | {"pad_token_id": 0}),
    "gpt-neox": ("GPTNeoX", SMALL | {"intermediate_size": 48}),
}
BASES = {"gpt2": "GPT2Model", "opt": "OPTModel", "bloom": "BloomModel", "falcon": "FalconModel", "llama": "LlamaModel"}


def make(family: str) -> transformers.PreTrainedModel:
    prefix, options = FAMILIES[family]
    suffix = "TextConfig" if family == "gemma3" else "Config"
    head = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    config = getattr(transformers, prefix + suffix)(**options, dtype=torch.bfloat16)
    model = getattr(transformers, prefix + head)(config).to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # in fp32 whatever the model's dtype, as DeepSeek ships it
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    for tensor in model.state_dict().values():
        tensor.normal_()
    return model


class Models:
    """Directories of tiny random models, whole or in shards; each is made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, transformers.PreTrainedModel] = {}

    def __call__(self, family: str, sharded: bool = False) -> Path:
        path = self._root / f"{family}-{sharded}"
        if not path.exists():
            if family not in self._made:
                torch.manual_seed(0)
                self._made[family] = make(family)
            self._made[family].save_pretrained(path, max_shard_size="20KB" if sharded else "1GB")
        return path


def bound(path: Path) -> tuple[Checkpoint, nn.Module]:
    checkpoint = Checkpoint.open(path)
    skeleton = build_skeleton(checkpoint.config)
    checkpoint.bind(skeleton)
    return checkpoint, skeleton


def truth(path: Path) -> dict[str, Tensor]:
    return dict(transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict())


def rewrite(path: Path, target: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    """A copy of a model with other tensors or another config."""
    shutil.copytree(path, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    old = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(old | config))
    return target
