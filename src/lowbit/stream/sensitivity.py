"""What rounding one linear to one format costs the loss, for every linear and format, in two passes over the model.

E = Ŵ - W moves a linear's output by E x, and the model's predictions by a divergence of ½ Σ (g·E x)² to second order, g
the gradient at that output of the loss against tokens that the model itself draws: then the second moments of g are the
Fisher information. Inputs and gradients taken as independent, and output rows too, that is ½ Σ_o Γ_o (E H Eᵀ)_oo, H the
mean of x xᵀ and Γ_o that of g_o². So the gradients, which cost most, need not know the formats. Unlike an error of
outputs it is in units of the loss, and linears of all depths compare.

Errors of two bits are not small, and where few tokens bear them, as behind a first block's inputs, they do more than
second order says. So the same is asked of the block's output, computed with each rounded linear in its place, softmax,
gates and all. Both estimates lie below the measured divergence (`divergence`) on average: the larger one counts.

E is that of the recipe's own Round on its clip. Rounding to nearest would be cheaper, but what a Round makes up for is
another part of the error for every linear and width. What transforms, an Encode or training change is not looked at.

The pass forward takes the whole text, as a Round does that would otherwise fit too few tokens; the pass backward a few
thousand tokens of it, whose states every block has left behind. Memory is one block, the head, and hidden states under
their budget.

Shape letters: O output rows, I input columns, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..graph.anatomy import Anatomy, BlockAnatomy, Site
from ..methods.recipe import Recipe
from ..methods.views import Need, Stats
from ..modules.linear import install
from ..numerics.spec import Spec
from .checkpoint import Checkpoint, Prefetch, check_finite, free
from .hidden import HiddenStates, micro_batches
from .memory import release_memory
from .prologue import Calls, run_prologue

MICRO_BATCH = 2048
"""Tokens of one forward and backward."""
GRADIENT_TOKENS = 16384
"""Text that is sent backward: about this many tokens, evenly spread."""
BLOCK_TOKENS = 4096
"""Of these, what is sent through a block with each rounded linear in its place."""

Choices = Mapping[str, Sequence[Spec]]
"""Full name of a linear -> the formats that it may get."""
Losses = Mapping[str, Sequence[float]]
"""Full name of a linear -> the increase of the loss, nats per token, that each of its formats causes alone."""


@dataclass
class Sensitivity:
    """The measurement of a bound checkpoint on windows of token ids; hidden states spill to `scratch`."""

    model: nn.Module
    anatomy: Anatomy
    checkpoint: Checkpoint
    recipe: Recipe
    windows: Sequence[Tensor]
    dtype: torch.dtype
    """What blocks compute in. fp16 is too narrow for gradients: it becomes fp32."""
    device: torch.device
    budget: int
    """Bytes of hidden states in memory."""
    scratch: Path
    seed: int = 0

    def __post_init__(self) -> None:
        self.dtype = torch.float32 if self.dtype == torch.float16 else self.dtype

    @torch.no_grad()
    def losses(self, choices: Choices) -> dict[str, tuple[float, ...]]:
        """The increase of the loss for every format of every linear in `choices`."""
        batches = micro_batches(list(self.windows), MICRO_BATCH)
        drawn = spread(batches, GRADIENT_TOKENS)
        forward = self._forward(batches, drawn, choices)
        self._through_head([batches[batch] for batch in drawn], forward)
        tokens, found = sum(batches[batch].numel() for batch in drawn), {}
        for index, block in self._blocks(reversed(range(len(self.anatomy.blocks)))):
            behind = torch.stack([states.to(self.device).double().square().sum((0, 1)) for states in forward.gradients])
            for site, squares in self._backward(index, block, drawn, forward).items():
                name = self.anatomy.full_name(index, site)
                if name in choices:
                    found[name] = tuple(
                        0.5 * max(float(rows @ squares), float(channels @ behind.sum(0))) / tokens
                        for rows, channels in forward.errors[name]
                    )
        forward.gradients.clear()
        return {name: found.get(name, (0.0,) * len(specs)) for name, specs in choices.items()}

    # --- forward ------------------------------------------------------------------------------------------------------

    def _forward(self, batches: Sequence[Tensor], drawn: Sequence[int], choices: Choices) -> _Forward:
        """Send the text through all blocks, round every linear to each of its formats, and keep the drawn states."""
        count = len(self.anatomy.blocks)
        text = HiddenStates(self.budget // 2, self.scratch / "text")
        kept = [HiddenStates(self.budget // 2 // (count + 1), self.scratch / f"{index}") for index in range(count + 1)]
        calls = run_prologue(self.model, self.anatomy, self.checkpoint, batches, text, self.dtype, self.device)
        errors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        few = [(place, drawn[place]) for place in spread([batches[batch] for batch in drawn], BLOCK_TOKENS)]
        tuples = False
        for index, block in self._blocks(range(count)):
            part = self.anatomy.blocks[index]
            for batch in drawn:
                kept[index].append(text[batch])
            with Inputs(block, part, self.recipe) as inputs:
                tuples = self._advance(calls, index, block, text)
            moves = _Moves(calls, index, block, [(batch, kept[index][place]) for place, batch in few], self.device)
            for site in part.sites:
                name = self.anatomy.full_name(index, site.name)
                errors[name] = [
                    (inputs.error(site, change), moves.of(site, change))
                    for change in inputs.changes(site, choices.get(name, ()))
                ]
        for batch in drawn:
            kept[count].append(text[batch])
        text.clear()
        return _Forward(calls, kept[:-1], kept[-1], errors, tuples)

    def _advance(self, calls: Calls, index: int, block: nn.Module, text: HiddenStates) -> bool:
        """Send the text through a block; returns whether that gives tuples."""
        tuples = False
        for batch, (args, kwargs) in enumerate(calls.by_block[index]):
            output = block(text[batch].to(self.device), *args, **kwargs)
            tuples = isinstance(output, tuple)
            text[batch] = output[0] if tuples else output
        return tuples

    def _blocks(self, order: Iterable[int]) -> Iterator[tuple[int, nn.Module]]:
        """Every block in turn with its weights, which go when the next one is asked for; that is read meanwhile."""
        indices = list(order)
        with Prefetch(self.checkpoint, self.device) as ahead:
            ahead.start(self._names(indices[0]))
            for index, later in zip(indices, [*indices[1:], None], strict=True):
                prefix, read = self.anatomy.full_name(index, ""), ahead.result()
                tensors = {name: tensor.to(self.device, non_blocking=True) for name, tensor in read.items()}
                if later is not None:
                    ahead.start(self._names(later))
                for name, tensor in tensors.items():
                    check_finite(name, tensor)
                block = self.model.get_submodule(prefix)
                held = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
                install(block, {}, held, self.dtype, self.device)
                yield index, block
                free(block)
                release_memory()

    def _names(self, index: int) -> tuple[str, ...]:
        return self.checkpoint.names(self.anatomy.full_name(index, "") + ".")

    # --- backward -----------------------------------------------------------------------------------------------------

    def _through_head(self, batches: Sequence[Tensor], forward: _Forward) -> None:
        """Turn the hidden states behind the last block into the gradients of the loss at them."""
        draws = torch.Generator(self.device).manual_seed(self.seed)
        with head(self.model, self.anatomy, self.checkpoint, self.dtype, self.device, forward.tuples) as logits_of:
            for batch, ids in enumerate(batches):
                states = forward.gradients[batch].to(self.device).detach().requires_grad_()
                with torch.enable_grad():
                    logits = logits_of(ids, states).flatten(0, 1)
                    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draws)[:, 0]
                    loss = F.cross_entropy(logits, drawn, reduction="sum")
                (forward.gradients[batch],) = torch.autograd.grad(loss, states)

    def _backward(self, index: int, block: nn.Module, drawn: Sequence[int], forward: _Forward) -> dict[str, Tensor]:
        """Σ g_o² [O] at every linear's outputs; gradients behind the block become those in front of it."""
        squares: dict[str, Tensor] = {}

        def on_call(name: str) -> Callable[..., None]:
            def add(gradient: Tensor) -> None:
                found = gradient.reshape(-1, gradient.shape[-1]).double().square().sum(0)
                squares[name] = squares[name] + found if name in squares else found

            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
                output.register_hook(add)

            return hook

        inputs = forward.inputs.pop()
        with ExitStack() as hooks:
            for site in self.anatomy.blocks[index].sites:
                hooks.callback(block.get_submodule(site.name).register_forward_hook(on_call(site.name)).remove)
            for place, batch in enumerate(drawn):
                hidden = inputs[place].to(self.device).detach().requires_grad_()
                with torch.enable_grad():
                    output = forward.calls.run(block, index, batch, hidden)
                behind = forward.gradients[place].to(self.device)
                (forward.gradients[place],) = torch.autograd.grad(output, hidden, behind)
        inputs.clear()
        return squares


def spread(batches: Sequence[Tensor], tokens: int) -> list[int]:
    """Evenly spread micro-batches [b, T] that hold about so many tokens."""
    count = min(len(batches), max(1, tokens // batches[0].numel()))
    return [index * len(batches) // count for index in range(count)]


@contextmanager
def head(
    model: nn.Module,
    anatomy: Anatomy,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    tuples: bool,
) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """What gives logits [b, T, V] in fp32 for ids [b, T] and the hidden states [b, T, D] behind the last block.

    The model's own forward runs around the blocks, so what it does in front of its head is its own affair. It starts
    from an embedding of zeros, since what comes out of the blocks is given. `tuples`: blocks return tuples.
    """
    layers = cast(nn.ModuleList, model.get_submodule(anatomy.layers))
    table, blocks = cast(nn.Embedding, model.get_submodule(anatomy.embedding)), list(layers)
    outside = [name for name in checkpoint.names() if not name.startswith(f"{anatomy.layers}.")]
    embedding = f"{anatomy.embedding}.weight"
    tensors = checkpoint.read(name for name in outside if name != embedding)
    tensors[embedding] = torch.zeros(1, table.embedding_dim)
    install(model, {}, tensors, dtype, device)
    table.padding_idx = None  # it would be checked against the one row that there is
    zeros = table.register_forward_pre_hook(lambda _m, args: (torch.zeros_like(args[0]), *args[1:]))
    stand_ins = [_Given(block, tuples) for block in blocks]

    def logits_of(ids: Tensor, states: Tensor) -> Tensor:
        stand_ins[-1].states = states
        return cast(Tensor, model(input_ids=ids.to(device), use_cache=False).logits).float()

    try:
        for index, stand_in in enumerate(stand_ins):
            layers[index] = stand_in
        yield logits_of
    finally:
        zeros.remove()
        for index, block in enumerate(blocks):
            layers[index] = block
        for path in {name.rpartition(".")[0] for name in outside}:
            free(model.get_submodule(path))


@dataclass
class _Forward:
    """What the pass forward leaves."""

    calls: Calls
    inputs: list[HiddenStates]
    """The drawn micro-batches in front of every block."""
    gradients: HiddenStates
    """Behind the last block: states at first, gradients from there on."""
    errors: dict[str, list[tuple[Tensor, Tensor]]]
    """Full name of a linear -> for each of its formats means of (E x)_o² [O] and of the block's change squared [D]."""
    tuples: bool
    """Whether blocks return tuples."""


class _Given(nn.Module):
    """Stands in for a block: hands its inputs on, or the states that it was given."""

    def __init__(self, original: nn.Module, tuples: bool) -> None:
        super().__init__()
        # Models look at plain attributes of their layers (a layer type, say) to choose what to pass them.
        self.__dict__["original"] = original
        self.tuples = tuples
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = self.states
        if states is None:
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return (states,) if self.tuples else states


class Inputs:
    """Statistics of what a block's linears see while the text runs, and the errors of rounding them."""

    def __init__(self, block: nn.Module, part: BlockAnatomy, recipe: Recipe) -> None:
        self._block, self._part, self._recipe = block, part, recipe
        gram: frozenset[Need] = frozenset({"gram"})
        needs = (recipe.clip.needs | recipe.round.needs | gram) - {"cross"}  # there is one stream
        self._stats = {tap.name: Stats.observing(needs) for tap in part.taps}
        self._behind = {site.name: self._stats[tap.name] for tap in part.taps for site in tap.sites}
        self._hooks = ExitStack()

    def __enter__(self) -> Inputs:
        for name, stats in self._stats.items():

            def on_input(_module: nn.Module, args: tuple[Any, ...], stats: Stats = stats) -> None:
                stats.update(args[0].reshape(-1, args[0].shape[-1]))

            self._hooks.callback(self._block.get_submodule(name).register_forward_pre_hook(on_input).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def changes(self, site: Site, specs: Sequence[Spec]) -> Iterator[Tensor]:
        """E [O, I] of a linear for each format; nothing where it saw no token."""
        stats, weight = self._behind[site.name], site.weight(self._block).float()
        round, clip, scores = self._recipe.round, self._recipe.clip, site.name in self._part.scores
        for spec in specs if stats.tokens else ():
            yield round.round(weight, spec, clip, stats, scores=scores).dequantize() - weight

    def error(self, site: Site, change: Tensor) -> Tensor:
        """The mean of (E x)_o² [O] over the tokens that a linear saw."""
        stats = self._behind[site.name]
        return ((change @ stats.hessian()) * change).sum(1).double() / stats.tokens


class _Moves:
    """What becomes of a block's output when one of its linears is changed, on a few micro-batches."""

    def __init__(
        self, calls: Calls, index: int, block: nn.Module, text: Sequence[tuple[int, Tensor]], device: torch.device
    ) -> None:
        self._block = block
        self._runs = [partial(calls.run, block, index, batch, states.to(device)) for batch, states in text]
        self._before = [run() for run in self._runs]

    def of(self, site: Site, change: Tensor) -> Tensor:
        """The mean over tokens of the output's squared change [D]."""
        with changed(site.weight(self._block), change):
            moved = [(run() - before).flatten(0, 1) for run, before in zip(self._runs, self._before, strict=True)]
        return torch.cat(moved).double().square().mean(0)


@contextmanager
def changed(weight: Tensor, change: Tensor) -> Iterator[None]:
    """Let a weight [O, I] in place be W + E meanwhile."""
    original = weight.clone()
    weight.copy_(original.float() + change)
    yield
    weight.copy_(original)
