"""The model in front of its blocks: token ids to the first hidden states, and the arguments every block is called with.

Every decoder block is swapped for an echo that records its arguments, and the model's own forward runs once for every
micro-batch: masks, rotary angles and whatever else a family hands to its layers (per layer type, in some) are its own.
Of the embedding only the rows of the tokens in use are read; it may be larger than a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..graph.anatomy import Anatomy
from ..modules.linear import install
from .checkpoint import Checkpoint, free
from .hidden import HiddenStates

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block behind its hidden states."""


class _Recorded(Exception):
    """The last block has been called: the rest of the model's forward is not needed."""


class _Restart(Exception):
    """The model unpacks what a block returns: echoes have to return tuples."""


class _Echo(nn.Module):
    """Stands in for a block: notes its arguments and hands the hidden states on."""

    def __init__(self, original: nn.Module, last: bool, tuples: bool) -> None:
        super().__init__()
        # Models look at plain attributes of their layers (a layer type, say) to choose what to pass them.
        self.__dict__["original"] = original
        self.last, self.tuples = last, tuples
        self.hidden: Tensor | None = None
        self.call: Call = ((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args = (kwargs.pop("hidden_states"), args) if "hidden_states" in kwargs else (args[0], args[1:])
        if hidden.ndim != 3:
            raise _Restart
        self.hidden, self.call = hidden, (args, kwargs)
        if self.last:
            raise _Recorded
        return (hidden,) if self.tuples else hidden


@dataclass
class Calls:
    """For every block and micro-batch the arguments of the call; equal tensors are kept once."""

    by_block: list[list[Call]]

    def run(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The block's output hidden states for one micro-batch."""
        args, kwargs = self.by_block[index][batch]
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def alike(self, index: int, a: int, b: int) -> bool:
        """Whether the block takes the same arguments for two micro-batches, none of which has a row per sequence."""
        return _broadcasts(self.by_block[index][a], self.by_block[index][b])


@torch.no_grad()
def run_prologue(
    model: nn.Module,
    anatomy: Anatomy,
    checkpoint: Checkpoint,
    batches: Sequence[Tensor],
    hidden: HiddenStates,
    dtype: torch.dtype,
    device: torch.device,
    turned: Callable[[str, Tensor], Tensor] = lambda _name, tensor: tensor,
) -> Calls:
    """Fill `hidden` with the first block's inputs for micro-batches of ids [b, T], and return all blocks' arguments.

    `turned` says what stands in the place of a parameter outside the blocks (of some of its rows).
    """
    layers = cast(nn.ModuleList, model.get_submodule(anatomy.layers))
    blocks = list(layers)
    used = torch.cat([batch.flatten() for batch in batches]).unique()
    outside = [
        n for n in checkpoint.names() if not n.startswith(f"{anatomy.layers}.") and not n.startswith(f"{anatomy.head}.")
    ]
    embedding = f"{anatomy.embedding}.weight"
    tensors = checkpoint.read(name for name in outside if name != embedding)
    tensors[embedding] = checkpoint.rows(embedding, used)
    install(model, {}, {name: turned(name, tensor) for name, tensor in tensors.items()}, dtype, device)
    _move_buffers(model, device)
    table = cast(nn.Embedding, model.get_submodule(anatomy.embedding))
    table.padding_idx = None  # it would be checked against the few rows that were read
    compact = table.register_forward_pre_hook(
        lambda _m, args: (torch.searchsorted(used.to(device), args[0]), *args[1:])
    )
    calls = Calls([[] for _ in blocks])
    try:
        for batch in batches:
            echoes = _record(model, layers, blocks, batch.to(device))
            assert echoes[0].hidden is not None
            hidden.append(echoes[0].hidden)
            for index, echo in enumerate(echoes):
                known = calls.by_block[index][-1] if calls.by_block[index] else ((), {})
                calls.by_block[index].append(_shared(echo.call, known))
    finally:
        compact.remove()
        for index, block in enumerate(blocks):
            layers[index] = block
    _share_between_blocks(calls)
    for name in {path.rpartition(".")[0] for path in outside}:
        free(model.get_submodule(name))
    return calls


def _record(model: nn.Module, layers: nn.ModuleList, blocks: Sequence[nn.Module], ids: Tensor) -> list[_Echo]:
    for tuples in (False, True):
        echoes = [_Echo(block, index == len(blocks) - 1, tuples) for index, block in enumerate(blocks)]
        for index, echo in enumerate(echoes):
            layers[index] = echo
        try:
            model(input_ids=ids, use_cache=False)
        except _Recorded:
            return echoes
        except _Restart:
            continue
    raise ValueError(f"{type(model).__name__} did not call its {len(blocks)} blocks one after the other")


def _shared(new: Any, known: Any) -> Any:
    """`new` with every tensor that equals its counterpart in `known` replaced by that one."""
    if isinstance(new, Tensor):
        same = isinstance(known, Tensor) and new.shape == known.shape and new.dtype == known.dtype
        return known if same and torch.equal(new, known) else new
    if isinstance(new, tuple):
        pairs = known if isinstance(known, tuple) and len(known) == len(new) else (None,) * len(new)
        return tuple(_shared(a, b) for a, b in zip(new, pairs, strict=True))
    if isinstance(new, dict):
        return {key: _shared(value, known.get(key) if isinstance(known, dict) else None) for key, value in new.items()}
    return new


def _broadcasts(a: Any, b: Any) -> bool:
    """Whether two trees of arguments are one, and stay right for more sequences than they were made for."""
    if isinstance(a, Tensor):
        return a is b and (a.ndim < 2 or a.shape[0] == 1)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_broadcasts, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_broadcasts(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, bool | int | float | str) and a == b)


def _share_between_blocks(calls: Calls) -> None:
    for before, after in zip(calls.by_block, calls.by_block[1:], strict=False):
        after[:] = [_shared(call, known) for call, known in zip(after, before, strict=True)]


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
