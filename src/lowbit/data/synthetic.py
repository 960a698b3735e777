"""Calibration without a text: token ids drawn uniformly, and text that the model itself makes up.

ZeroQuant shows that random ids are worse than text and still much better than nothing, LLM-QAT (Liu et al. 2023) that
what a model samples lies closer to what it was trained on than any one corpus. The second needs the whole model in
memory once, and one step of it per token and batch. The sampling loop is spelled out because the libraries' one draws
from the global random state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .text import Tokenizer

RANDOM, GENERATED = "random", "generated"

BATCH = 8
"""Rows sampled at once: what bounds the model's cache."""


def random_rows(tokenizer: Tokenizer, samples: int, length: int, seed: int) -> list[Tensor]:
    """Rows [L] of ids drawn uniformly from the tokenizer's own vocabulary; added tokens, special ones, are left out."""
    added = tokenizer.get_added_vocab()
    ordinary = torch.tensor(sorted({index for token, index in tokenizer.get_vocab().items() if token not in added}))
    drawn = torch.randint(len(ordinary), (samples, length), generator=torch.Generator().manual_seed(seed))
    return list(ordinary[drawn])


@torch.no_grad()
def generated_rows(model: Any, tokenizer: Tokenizer, samples: int, length: int, seed: int) -> list[Tensor]:
    """Rows [L] sampled from a causal model at temperature 1 behind one random id (and the BOS where there is one).

    Sampling goes on behind an end of text. Draws are from the probabilities in fp32 on the CPU, `BATCH` rows at once.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack(random_rows(tokenizer, samples, 1, seed))
    if tokenizer.bos_token_id is not None:
        first = torch.cat([torch.full_like(first, tokenizer.bos_token_id), first], 1)
    rows: list[Tensor] = []
    for start in first.split(BATCH):
        ids, step = start, start
        cache: dict[str, Any] = {}
        while ids.shape[1] < length:
            output = model(step.to(model.device), **cache, use_cache=True)
            name = "cache" if getattr(output, "cache", None) is not None else "past_key_values"  # before 5.24
            cache = {name: getattr(output, name)}
            step = torch.multinomial(output.logits[:, -1].float().softmax(-1).cpu(), 1, generator=generator)
            ids = torch.cat([ids, step], 1)
        rows.extend(ids)
    return rows
