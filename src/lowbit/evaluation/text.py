"""One pass of a model over windows of text: perplexity, and with the original beside it, the divergence.

Nearly all the time goes into forwards, so each window is run once by each model and everything is taken from the same
logits. These are the largest tensors around (a window of 2048 with a vocabulary of 128k is 1 GB in fp32), so the batch
is chosen by their size, and only pieces that fit a cache are ever copied to fp32. B windows, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from .divergence import Divergence, WindowDivergence, divergence_of
from .perplexity import Perplexity, perplexity_of, token_losses

Progress = Callable[[int, int], None]

LOGITS_BYTES = {"cpu": 2**27, "cuda": 2**32}  # of one batch, per model; larger batches were no faster
PIECE_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}  # of fp32 logits compared at a time


@dataclass(frozen=True)
class TextScores:
    """What one pass measures. ``original`` and ``divergence`` are None without a reference model."""

    perplexity: Perplexity
    original: Perplexity | None = None
    divergence: Divergence | None = None


def evaluate_text(
    model: nn.Module,
    windows: Tensor,
    reference: nn.Module | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> TextScores:
    """Score ``windows`` (int64 [N, L]) with a causal model, and compare it with ``reference`` where one is given.

    Args:
        model, reference: called as ``model(input_ids=ids, use_cache=False).logits`` ([B, L, V]), in eval mode, each on
            its own device. Losses and divergences are fp32 whatever the models compute in.
        batch: windows per forward; None chooses by the size of the logits. It does not change the result.
        progress: called with (windows done, windows in all) after each batch.

    Raises:
        ValueError: no window, ids beyond the vocabulary, or logits that are not finite.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows of shape {list(windows.shape)} cannot be scored: give [windows, at least 2 tokens]")
    vocabulary = _vocabulary(model, windows)
    batch = batch or batch_size(_device(model), windows, vocabulary)
    losses: list[float] = []
    original: list[float] = []
    compared: list[WindowDivergence] = []
    with _evaluating(model, reference):
        for ids in windows.split(batch):
            logits = _logits(model, ids)
            others = None if reference is None else _logits(reference, ids).to(logits.device)
            for row in range(ids.shape[0]):
                labels = ids[row, 1:].to(logits.device)
                losses.append(_mean_loss(logits[row], labels, "the model"))
                if others is not None:
                    original.append(_mean_loss(others[row], labels, "the original"))
                    compared.append(_compare(logits[row], others[row]))
            if progress is not None:
                progress(len(losses), windows.shape[0])
    length = windows.shape[1]
    if reference is None:
        return TextScores(perplexity_of(losses, length))
    return TextScores(perplexity_of(losses, length), perplexity_of(original, length), divergence_of(compared))


def perplexity(
    model: nn.Module, windows: Tensor, batch: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of ``model`` on ``windows`` (int64 [N, L]); see :func:`evaluate_text`."""
    return evaluate_text(model, windows, batch=batch, progress=progress).perplexity


def divergence(
    model: nn.Module,
    reference: nn.Module,
    windows: Tensor,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Divergence of ``model`` from ``reference`` on ``windows`` (int64 [N, L]); see :func:`evaluate_text`."""
    found = evaluate_text(model, windows, reference, batch, progress).divergence
    assert found is not None
    return found


def batch_size(device: torch.device, windows: Tensor, vocabulary: int) -> int:
    """How many windows to run at once, so that their logits stay within the budget (and a quarter of free memory)."""
    budget = LOGITS_BYTES.get(device.type, LOGITS_BYTES["cpu"])
    if device.type == "cuda":
        budget = min(budget, torch.cuda.mem_get_info(device)[0] // 4)
    return max(1, min(windows.shape[0], budget // (windows.shape[1] * vocabulary * 4)))


def _vocabulary(model: nn.Module, windows: Tensor) -> int:
    """The width of the model's logits, found by running two tokens; all ids must be below it.

    Ids beyond it would otherwise surface in the embedding, on a GPU as an assertion that ends the process.
    """
    with _evaluating(model):
        vocabulary = _logits(model, torch.zeros(1, 2, dtype=torch.long)).shape[-1]
    if int(windows.max()) >= vocabulary:
        raise ValueError(
            f"the text has token id {int(windows.max())}, the model knows {vocabulary} tokens: "
            "use the tokenizer that belongs to the model"
        )
    return vocabulary


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, L, V] in whatever dtype the model computes."""
    logits: Tensor = model(input_ids=ids.to(_device(model)), use_cache=False).logits
    return logits


def _mean_loss(logits: Tensor, labels: Tensor, whose: str) -> float:
    """Mean loss of one window: logits [L, V] (the last position predicts nothing), labels [L - 1]."""
    pieces = zip(_pieces(logits), labels.split(_piece_rows(logits)), strict=True)
    total = sum(float(token_losses(piece, targets).sum(dtype=torch.float64)) for piece, targets in pieces)
    mean = total / labels.numel()
    if not math.isfinite(mean):
        raise ValueError(f"{whose} gives logits that are NaN or infinite: its weights or its numbers' range are broken")
    return mean


def _compare(logits: Tensor, reference: Tensor) -> WindowDivergence:
    """The divergence sums of one window: logits of both models, [L, V]."""
    if logits.shape != reference.shape:
        raise ValueError(
            f"the models have vocabularies of {logits.shape[-1]} and {reference.shape[-1]} tokens: "
            "compare a model with the original it was made from"
        )
    window = WindowDivergence()
    for piece, other in zip(_pieces(logits), _pieces(reference), strict=True):
        window.add(piece, other)
    return window


def _piece_rows(logits: Tensor) -> int:
    return max(1, PIECE_ELEMENTS.get(logits.device.type, PIECE_ELEMENTS["cpu"]) // logits.shape[-1])


def _pieces(logits: Tensor) -> Iterator[Tensor]:
    """Predicting positions of one window's logits [L, V], a few rows at a time, in fp32."""
    return (piece.float() for piece in logits[:-1].split(_piece_rows(logits)))


def _device(model: nn.Module) -> torch.device:
    """Where the model wants its ids; a model without parameters runs on the CPU."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _evaluating(*models: nn.Module | None) -> Iterator[None]:
    """No gradients and eval mode, which is put back afterwards."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in models:
            if model is not None and model.training:
                stack.callback(model.train)
                model.eval()
        yield
