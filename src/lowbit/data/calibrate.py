"""Calibration samples from the packaged text, a text file, a published set by name, or made up (see ``synthetic``).

Samples are a plain list of token rows, because one published recipe is ragged and a list needs no padding and no mask;
``batches`` stacks rows of equal length for the forward pass. All samples are in memory: 128 rows of 2048 ids are 2 MB.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import hub, recipes
from .local import PACKAGED, local_documents
from .synthetic import GENERATED, RANDOM, generated_rows, random_rows
from .text import Tokenizer, require_tokens, tokenize_documents

SHUFFLED = ":shuffled"

# The recipe behind each name, and the text it draws from. OmniQuant's plain `wikitext2` is this one with seed 2.
NAMED: dict[str, tuple[hub.HubText, recipes.CalibrationRecipe]] = {
    "wikitext2": (hub.wikitext2("train"), recipes.joined_windows("\n\n")),
    "wikitext2-space": (hub.wikitext2("train"), recipes.joined_windows(" ")),
    "ptb": (hub.ptb("train"), recipes.joined_windows("\n\n")),
    "ptb-space": (hub.ptb("train"), recipes.joined_windows(" ")),
    "c4": (hub.c4("train", shards=1024), recipes.document_windows),
    "pile": (hub.PILE, recipes.pile_full),
    "pile-awq": (hub.PILE, recipes.pile_blocks),
    "pile-smoothquant": (hub.PILE, recipes.pile_ragged),
    "pile-omniquant": (hub.PILE, recipes.joined_windows("\n\n", first=recipes.PILE_JOINED_DOCUMENTS)),
}


@dataclass(frozen=True)
class Calibration:
    """What calibrates a run: a text (see :func:`load_calibration`) and how much of it, drawn by which seed."""

    source: str = PACKAGED
    samples: int = 128
    length: int = 2048
    seed: int = 0


def load_calibration(
    source: str, tokenizer: Tokenizer, samples: int, length: int, seed: int, model: Callable[[], Any] | None = None
) -> list[Tensor]:
    """Rows of token ids, each int64 [L] (of at most L tokens for ``pile-smoothquant``).

    Args:
        source: ``demo`` (the text in the package), a name of :data:`NAMED`, the path of a text file, ``random`` (ids
            drawn uniformly) or ``generated`` (text sampled from the model); with ``:shuffled`` behind it the tokens of
            every row are permuted, a control for what token order is worth.
        samples: rows wanted. ``pile-awq`` counts documents instead and gives fewer rows.
        seed: of the draw; the Pile recipes take documents in the published order (shuffled with 42) instead.
        model: loads the model that ``generated`` samples from.

    Raises:
        ValueError: an unknown name, a file that is no text, too little text, or no network.
    """
    if samples < 1 or length < 2:
        raise ValueError("calibration needs at least 1 sample of 2 tokens: raise --samples or --length")
    text = source.removesuffix(SHUFFLED)
    if text in NAMED:
        place, recipe = NAMED[text]
        rows = recipe(hub.fetch(place), tokenizer, samples, length, seed)
    elif text == RANDOM:
        rows = random_rows(tokenizer, samples, length, seed)
    elif text == GENERATED and model is not None:
        rows = generated_rows(model(), tokenizer, samples, length, seed)
    else:
        documents = local_documents(text, "calibration", (*NAMED, RANDOM, GENERATED))
        rows = text_windows(documents, tokenizer, samples, length, seed)
    return shuffled(rows, seed) if text != source else rows


def text_windows(documents: Sequence[str], tokenizer: Tokenizer, samples: int, length: int, seed: int) -> list[Tensor]:
    """Windows at random places of a text file's token stream.

    The documents, each behind its BOS, form one stream of n tokens. A sample starts at ``randint(0, n - L)`` of
    ``random.Random(seed)`` and takes L tokens: short documents count as much as their length, and a window that runs
    over the end of a document meets the next one's BOS, as evaluation windows do. Windows may overlap.
    """
    tokens = tokenize_documents(documents, tokenizer)
    require_tokens(tokens.numel(), length, "calibration text", "--length")
    generator = random.Random(seed)
    starts = [generator.randint(0, tokens.numel() - length) for _ in range(samples)]
    return [tokens[start : start + length].clone() for start in starts]


def shuffled(rows: Iterable[Tensor], seed: int) -> list[Tensor]:
    """The same tokens in each row, in an order drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return [row[torch.randperm(row.numel(), generator=generator)] for row in rows]


def batches(rows: Iterable[Tensor], size: int) -> list[Tensor]:
    """Stack rows of equal length into batches [at most ``size``, T], without padding.

    Rows keep their order among those of their length; lengths come in the order of their first row.
    """
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(row.numel(), []).append(row)
    return [torch.stack(group[i : i + size]) for group in by_length.values() for i in range(0, len(group), size)]


def fingerprint(rows: Iterable[Tensor]) -> str:
    """SHA-256 of the ids and the lengths of rows (of a list of rows, or of a tensor [N, L])."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.numel().to_bytes(8, "little"))
        digest.update(row.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
