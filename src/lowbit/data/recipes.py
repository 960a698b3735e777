"""The published ways of turning documents into samples, token for token.

A perplexity or a calibration only compares with a paper's when the ids are the same, and the papers differ in small
things: what joins the lines, whether windows cross documents, in which order random numbers are drawn. Each recipe is
therefore a pure function of documents and a seed, apart from the download (``hub.py``), so that tests can hold it to
the published loop offline. Here the tokenizer adds its default special tokens, once per call, as in the published code.
Random draws are Python's ``random``, whose ``Random(seed)`` gives the sequence of ``random.seed(seed)`` without
touching the global state.

N samples, L tokens in a sample.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from .text import Tokenizer, require_tokens, windows

C4_EVALUATION_WINDOWS = 256
C4_EVALUATION_SEED = 0
C4_NEW_DOCUMENTS = 1100
PILE_JOINED_DOCUMENTS = 1000


class CalibrationRecipe(Protocol):
    """Draws at most ``samples`` rows of ids (int64 [L], shorter only where the recipe is ragged)."""

    def __call__(
        self, documents: Sequence[str], tokenizer: Tokenizer, samples: int, length: int, seed: int
    ) -> list[Tensor]: ...


class EvaluationRecipe(Protocol):
    """Makes the windows of a test set: int64 [N, L]."""

    def __call__(self, documents: Sequence[str], tokenizer: Tokenizer, length: int) -> Tensor: ...


def encode(text: str, tokenizer: Tokenizer) -> Tensor:
    """Ids of one text with the tokenizer's own special tokens: int64 [tokens]."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


# --- calibration


def joined_windows(join: str, first: int | None = None) -> CalibrationRecipe:
    """Windows at random places of the (``first``) documents joined by ``join`` (GPTQ, OmniQuant: two line ends;
    SparseGPT, Wanda: a space). The last possible place is never drawn, as in the published loop.
    """

    def recipe(documents: Sequence[str], tokenizer: Tokenizer, samples: int, length: int, seed: int) -> list[Tensor]:
        tokens = encode(join.join(documents[:first]), tokenizer)
        require_tokens(tokens.numel(), length + 1, "calibration text", "--length")
        generator = random.Random(seed)
        starts = [generator.randint(0, tokens.numel() - length - 1) for _ in range(samples)]
        return [tokens[start : start + length] for start in starts]

    return recipe


def document_windows(
    documents: Sequence[str], tokenizer: Tokenizer, samples: int, length: int, seed: int
) -> list[Tensor]:
    """C4 (GPTQ): draw documents until one is longer than L tokens, then a random window inside it.

    A rejected draw consumes random state, so documents must come in their published order. Raises ValueError when
    no document is long enough.
    """
    generator = random.Random(seed)
    rejected: set[int] = set()
    rows: list[Tensor] = []
    while len(rows) < samples:
        index = generator.randint(0, len(documents) - 1)
        if index in rejected:
            continue
        tokens = encode(documents[index], tokenizer)
        if tokens.numel() > length:
            start = generator.randint(0, tokens.numel() - length - 1)
            rows.append(tokens[start : start + length])
        else:
            rejected.add(index)
            if len(rejected) == len(documents):
                raise ValueError(f"no document is longer than {length} tokens: use a shorter --length")
    return rows


def pile_full(documents: Sequence[str], tokenizer: Tokenizer, samples: int, length: int, seed: int) -> list[Tensor]:
    """Pile, general: the first N documents of at least L tokens, each cut to L. Raises ValueError when fewer exist."""
    rows = (row for document in documents if (row := _truncated(document, tokenizer, length)).numel() == length)
    found = list(islice(rows, samples))
    if len(found) < samples:
        raise ValueError(f"only {len(found)} documents have {length} tokens: use fewer --samples or a shorter --length")
    return found


def pile_ragged(documents: Sequence[str], tokenizer: Tokenizer, samples: int, length: int, seed: int) -> list[Tensor]:
    """Pile, SmoothQuant: the first N documents, each cut to at most L tokens, none padded."""
    rows = (_truncated(document, tokenizer, length) for document in documents[:samples])
    return [row for row in rows if row.numel()]


def pile_blocks(documents: Sequence[str], tokenizer: Tokenizer, samples: int, length: int, seed: int) -> list[Tensor]:
    """Pile, AWQ: the first N documents of at most L tokens, concatenated and cut into blocks of L.

    Blocks cross documents, and there are fewer of them than N.
    """
    encoded = (encode(document.strip(), tokenizer) for document in documents)
    accepted = list(islice((tokens for tokens in encoded if 0 < tokens.numel() <= length), samples))
    tokens = torch.cat(accepted) if accepted else torch.empty(0, dtype=torch.long)
    return list(windows(tokens, length, "calibration text", "--length"))


def _truncated(document: str, tokenizer: Tokenizer, length: int) -> Tensor:
    ids = tokenizer(document, truncation=True, max_length=length, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


# --- evaluation


def joined_test(join: str) -> EvaluationRecipe:
    """The whole set joined by ``join``, tokenized once, cut into windows that do not overlap."""

    def recipe(documents: Sequence[str], tokenizer: Tokenizer, length: int) -> Tensor:
        return windows(encode(join.join(documents), tokenizer), length)

    return recipe


def c4_new(documents: Sequence[str], tokenizer: Tokenizer, length: int) -> Tensor:
    """C4 as SparseGPT and its descendants score it: 1100 documents joined by a space, the first 256 windows."""
    return joined_test(" ")(documents[:C4_NEW_DOCUMENTS], tokenizer, length)[:C4_EVALUATION_WINDOWS]


def c4_old(documents: Sequence[str], tokenizer: Tokenizer, length: int) -> Tensor:
    """C4 as GPTQ scores it: 256 random windows inside long documents, always drawn with seed 0."""
    rows = document_windows(documents, tokenizer, C4_EVALUATION_WINDOWS, length, C4_EVALUATION_SEED)
    return torch.stack(rows)
