"""Tiny models that fill GGUF's blocks, with tokenizers that llama.cpp knows: what tests of the format start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from families import TINY
from tiny import tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lowbit

TEXT = [f"The {n}th rabbit's 1{n} ears don't fit; it hops über {n * n} hills.\n\n\tSo? {n}!" for n in range(200)]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "moe_intermediate_size": 256, "norm_topk_prob": True},
    "gemma2": {"num_hidden_layers": 2, "head_dim": 64, "query_pre_attn_scalar": 64},
    "gemma3": {"num_hidden_layers": 2, "head_dim": 64, "query_pre_attn_scalar": 64},
    "phi3": {},
}


def save_wide(name: str, directory: Path, *, tokens: str = "words", **changes: Any) -> Path:
    """A random model of the family with rows of whole super-blocks, one block deep unless told otherwise."""
    config = TINY[name]()
    defaults = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    for key, value in {**defaults, **changes}.items():
        setattr(config, key, value)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    if name in ("llama", "mixtral", "mistral", "phi3", "qwen2"):
        config.head_dim = config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            else:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    model.config.dtype = torch.float32
    model.save_pretrained(directory)
    {"words": tokenizer, "bytes": byte_level, "pieces": pieces}[tokens](config.vocab_size).save_pretrained(directory)
    return directory


def byte_level(vocabulary: int) -> PreTrainedTokenizerFast:
    """GPT-2's kind of BPE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    made.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|end|>", eos_token="<|end|>")


def pieces(vocabulary: int) -> PreTrainedTokenizerFast:
    """SentencePiece's kind of BPE, bytes for what has no piece."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special))
    data = json.loads(made.to_str())
    data["added_tokens"] = [each for each in data["added_tokens"] if not each["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(data))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wide(family: str, directory: Path, **changes: Any) -> Path:
    return save_wide(family, directory, **{**FAMILIES.get(family, {}), **changes})


def exported(model: Path, recipe: str, directory: Path, **options: Any) -> tuple[Path, Path]:
    """(run directory, GGUF file) of a model by a recipe."""
    lowbit.quantize(model, recipe, directory / "run", target="gguf", **options)
    lowbit.export(directory / "run", directory / "out", format="gguf")
    return directory / "run", directory / "out" / "model.gguf"


def read_back(path: Path) -> torch.nn.Module:
    """The model of a file, put together from nothing else."""
    return lowbit.load(path, dtype=torch.float32)


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()  # type: ignore[no-any-return]


def windows(vocabulary: int, count: int = 2, length: int = 12) -> Tensor:
    return torch.randint(4, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
