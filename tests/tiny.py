"""Tiny models as directories, with a tokenizer and a text that fit them: what end-to-end tests start from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from families import TINY, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lowbit
from lowbit.data.calibrate import load_calibration

WORDS = 120


def save_model(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A tiny random model of a family, saved as transformers saves it, with its tokenizer."""
    model = build(name).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory, **options)
    tokenizer(TINY[name]().vocab_size).save_pretrained(directory)
    return directory


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, … as tokens, BOS in front."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocab |= {f"w{i}": i + 4 for i in range(min(WORDS, vocabulary - 4))}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_text(path: Path, words: int = 2000, seed: int = 0) -> Path:
    """Random words in two documents."""
    draw = random.Random(seed)
    half = [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(words // 2)) for _ in range(2)]
    path.write_text(f"{half[0]}\n<|endoftext|>\n{half[1]}\n", encoding="utf8")
    return path


@torch.no_grad()
def first_block_error(model: Path, saved: Path, text: Path, samples: int, length: int) -> float:
    """What a report calls the first block's error, from two loaded models: relative squared error of its output."""
    original, loaded = (lowbit.load(path, dtype=torch.float32) for path in (model, saved))
    ids = torch.stack(load_calibration(str(text), tokenizer(original.config.vocab_size), samples, length, 0))
    target, output = (each(ids, output_hidden_states=True).hidden_states[1] for each in (original, loaded))
    return float((output - target).square().sum() / target.square().sum())
