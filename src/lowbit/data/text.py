"""Text in, token windows out: the one rule by which lowbit reads a text file.

Perplexities only compare when the tokens do, so the rule is small and has no options. A file holds documents separated
by a line holding only ``<|endoftext|>``; every document is tokenized by itself with one BOS in front (when the
tokenizer has a BOS) and no other special token; all are concatenated and cut into windows that do not overlap.
Documents go to the tokenizer as one batch, because fast tokenizers spread a batch over the cores: megabytes take
seconds, and a data loader with a cache would be machinery without a need.

Shapes: N windows, L tokens in a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

SEPARATOR = "<|endoftext|>"


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: int | None

    def __call__(self, text: Any, **options: Any) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file, in order: the lines between separators, without the end of the last one.

    Raises:
        ValueError: the file is missing, is not UTF-8 text, or holds no text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no text file at {path}: give the path of a UTF-8 text file")
    return split_documents(path.read_bytes(), str(path))


def split_documents(raw: bytes, name: str) -> list[str]:
    """As :func:`read_documents`, from bytes already read; ``name`` is what errors call them."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}): convert it, or give another file") from error
    if "\0" in text:
        raise ValueError(f"{name} holds binary data, not text: give a UTF-8 text file")
    documents: list[list[str]] = [[]]
    for line in text.replace("\r\n", "\n").removesuffix("\n").split("\n"):
        if line == SEPARATOR:
            documents.append([])
        else:
            documents[-1].append(line)
    found = [document for lines in documents if (document := "\n".join(lines)).strip()]
    if not found:
        raise ValueError(f"{name} holds no text: give a file with at least one document")
    return found


def tokenize_documents(documents: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """Token ids of all documents, concatenated: int64 [tokens].

    Each document has exactly one BOS in front, whether or not the tokenizer adds one itself; none, if it has no BOS.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    ids: list[int] = []
    for document in encoded:
        if document[:1] != bos:
            ids.extend(bos)
        ids.extend(document)
    return torch.tensor(ids, dtype=torch.long)


def windows(tokens: Tensor, length: int, text: str = "text", option: str = "--window") -> Tensor:
    """Cut ``tokens`` [tokens] into windows [N, L] that do not overlap; the tail shorter than L is dropped.

    Args:
        text, option: what the error calls the text, and the flag that sets the length.

    Raises:
        ValueError: not even one window fits.
    """
    require_tokens(tokens.numel(), length, text, option)
    count = tokens.numel() // length
    return tokens[: count * length].view(count, length)


def require_tokens(tokens: int, length: int, text: str, option: str) -> None:
    """Raise the one sentence about a text of ``tokens`` tokens that holds no window of ``length``."""
    if tokens < length:
        shorter = f" or {option} {1 << (tokens.bit_length() - 1)}" if tokens > 1 else ""
        raise ValueError(
            f"{text} has {tokens} tokens, one window of {length} needs {length}: use a longer text{shorter}"
        )


def resolve_window(
    requested: int | None, default: int, context: int | None, option: str = "--window"
) -> tuple[int, str | None]:
    """The window length to use, and a notice when the default had to shrink to the model's context.

    Args:
        requested: the length the user asked for; None leaves it to ``default``.
        context: tokens the model can attend to; None where the model states no limit.

    Raises:
        ValueError: more than the context, or fewer than 2 tokens, were asked for.
    """
    if requested is not None:
        if requested < 2:
            raise ValueError(f"{option} {requested}: a window needs at least 2 tokens")
        if context is not None and requested > context:
            raise ValueError(f"{option} {requested} is more than the model's context: use {context} or less")
        return requested, None
    if context is not None and default > context:
        return context, f"{option} is {context} instead of {default}: the model's context holds no more"
    return default, None


def check_tokenizer(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for (``vocabulary`` rows).

    Added tokens other than the BOS are left out: many models carry added tokens that were never given an embedding,
    and text that does not spell them out never produces them.

    Raises:
        ValueError: an id of the base vocabulary, or the BOS, is beyond the embedding.
    """
    added = tokenizer.get_added_vocab()
    base = [index for token, index in tokenizer.get_vocab().items() if token not in added]
    largest = max([*base, -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id])
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer does not fit the model: it produces ids up to {largest}, the model embeds {vocabulary}; "
            "use the tokenizer that belongs to the model"
        )
