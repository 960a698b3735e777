"""What a user asks for, as the command line and `lowbit.quantize` fill it in and everything behind them reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from .methods.recipe import Recipe

Notice = Callable[[str], None]
"""Receives one sentence that the user should see."""
OnBlock = Callable[[int, int, "Mapping[str, Any] | None"], None]
"""(block, number of blocks, its report when done; None when it starts)."""


@dataclass(frozen=True)
class Request:
    """Everything that `quantize` can be asked for; names and defaults are those of the command line."""

    model: str
    recipe: str | Recipe
    output: str | None = None
    settings: Sequence[str] = ()
    overrides: Sequence[str] = ()
    ignore: Sequence[str] = ()
    calibration: str | Sequence[torch.Tensor] | None = None
    """A named set, a text file, or windows of token ids [T] as they are, for who draws them elsewhere."""
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    target: str | None = None
    bits: float | None = None
    """Bits per weight to spend where they matter, for a recipe whose name leaves the width open."""
    size: int | None = None
    """The same as bytes of the model's files."""
    sensitivity: Literal["fisher", "kl"] = "fisher"
    """What tells where bits matter: the loss's curvature, or trying each linear with the whole model in memory."""
    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    gpu_memory: int | None = None
    gpus: int | None = None
    """Processes with a GPU each that share the text and the work."""
    lanes: int | None = None
    """Parts of the text whose statistics are summed by themselves, by default one a GPU: results depend on this alone,
    not on the number of GPUs."""
    restart: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    notice: Notice = field(default=lambda _text: None)
    on_block: OnBlock = field(default=lambda *_: None)
