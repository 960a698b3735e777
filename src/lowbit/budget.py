"""`--bits` and `--size`: a recipe whose name leaves the bits of weights open becomes one with a width for every linear.

This comes between the checks of a request and its plan: the recipe is read at every width, linears are grouped, their
sensitivity is measured, and the least loss within the budget is chosen. The one step of a plan that reads weights; its
result is kept in the run directory, so that a run goes on with the widths that it began with.

The budget counts what every quantized linear takes in lowbit's own files, or, with a target that stores them otherwise,
in that. Linears whose formats are given by overrides count, and are left as they are; linears kept in 16 bits are no
part of bits per weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .graph.anatomy import Anatomy, Site
    from .methods.recipe import Recipe
    from .numerics.spec import Spec
    from .recipes.document import LoadedRecipe
    from .request import Request
    from .stream.allocate import Allocation, Group
    from .stream.checkpoint import Checkpoint
    from .stream.plan import Refuse

PER_SITE, PER_TENSOR = 500, 256
"""At most so many bytes of a file's header a linear takes beside four times its name, and any other tensor."""


@dataclass(frozen=True)
class Opened:
    """A request's recipe at every width, and the model that it is for."""

    request: Request
    by_width: Mapping[int, LoadedRecipe]
    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    anatomy: Anatomy
    refuse: Refuse | None

    @property
    def recipe(self) -> Recipe:
        """The recipe at some width: all but the formats is the same at all."""
        return next(iter(self.by_width.values())).recipe


def budgeted(request: Request) -> bool:
    """Whether the request gives a budget. Raises ValueError for two of them, for what is none, for another measure."""
    for name, value in (("--bits", request.bits), ("--size", request.size)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} {value} is no budget: give a positive number, as in --bits 3.25 or --size 4GB")
    if request.sensitivity not in ("fisher", "kl"):
        raise ValueError(f"unknown sensitivity {request.sensitivity!r}: use fisher or kl")
    if request.bits is not None and request.size is not None:
        raise ValueError("--bits and --size are both budgets: keep one of them")
    return request.bits is not None or request.size is not None


def by_width(request: Request) -> dict[int, LoadedRecipe]:
    """The request's recipe at every width that it may have."""
    import scipy  # noqa: F401  the solver's: if it is not there, that is known before anything is measured

    from . import recipes

    return {
        width: recipes.resolve(
            request.recipe, settings=request.settings, overrides=request.overrides, ignore=request.ignore, width=width
        )
        for width in recipes.widths(str(request.recipe))
    }


def record_of(request: Request) -> dict[str, Any]:
    """What plan.json says of the budget."""
    from .stream.divergence import DIVERGENCE_TOKENS
    from .stream.sensitivity import GRADIENT_TOKENS

    tokens = DIVERGENCE_TOKENS if request.sensitivity == "kl" else GRADIENT_TOKENS
    return {"bits": request.bits, "size": request.size, "sensitivity": request.sensitivity, "tokens": tokens}


def allocated(
    opened: Opened, windows: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[LoadedRecipe, Allocation]:
    """The recipe with a width for every linear: those that its run directory has, or the best within the budget."""
    from .stream.allocate import allocate, groups

    known = stored(opened.request)
    found = groups(
        opened.anatomy,
        {width: each.recipe.scheme for width, each in opened.by_width.items()},
        lambda name, site, weights, inputs: _price(opened, name, site, weights, inputs),
        joined=_joined(opened.request),
    )
    _check_choices(opened, found)
    _tell_of_more(opened)
    room = _room(opened, found)
    limit = _limit(opened, found, room)
    if known is None:
        losses = _losses(opened, found, windows, dtype, device)
        known = allocate(found, losses, limit, room.fixed + room.beside)
    elif set(known.widths) != {pattern for group in found for pattern in group.patterns}:
        raise ValueError(
            f"{opened.request.output} was begun with another model or recipe: repeat the first command to resume, or "
            "start over with --restart"
        )
    loaded = opened.by_width[known.common]
    scheme = loaded.recipe.scheme
    scheme = replace(scheme, overrides=(*known.overrides(found), *scheme.overrides))
    return replace(loaded, recipe=replace(loaded.recipe, scheme=scheme)), known


def stored(request: Request) -> Allocation | None:
    """The allocation that the request's run directory was begun with.

    Raises ValueError where it was begun without one, or for another budget: before anything is measured.
    """
    from .stream.allocate import Allocation
    from .stream.run import ALLOCATION, PLAN, first_difference

    if request.output is None or request.restart or not (Path(request.output) / PLAN).exists():
        return None
    plan = json.loads((Path(request.output) / PLAN).read_text(encoding="utf8"))
    change = first_difference(plan.get("allocation"), record_of(request), "allocation")
    if change is not None:
        raise ValueError(
            f"{request.output} was begun with another plan, {change}: repeat the first command to resume, or start "
            "over with --restart"
        )
    file = Path(request.output) / ALLOCATION
    return Allocation.from_json(json.loads(file.read_text(encoding="utf8"))) if file.exists() else None


def _tell_of_more(opened: Opened) -> None:
    """Say what will be stored that shapes do not tell."""
    recipe, notice = opened.recipe, opened.request.notice
    for method in (each.name for each in recipe.reconstruct if each.online(recipe.scheme)):
        notice(f"{method} leaves maps in front of linears, which take their bytes on top of the budget")
    if recipe.encode is not None:
        notice(f"what {recipe.encode.name} keeps out of the codes, if its number is found on the way, is not budgeted")


def _joined(request: Request) -> bool:
    """Whether linears behind one input must share a format: vLLM makes one of them."""
    from .formats.base import find

    return request.target is not None and "vllm" in find(request.target).CLIENTS


def _price(opened: Opened, name: str, site: Site, weights: Spec, inputs: Spec | None) -> int | None:
    """Bytes of a linear in these formats, or None where it cannot have them."""
    from .stream.plan import check_format

    try:
        check_format(name, site, weights, inputs, opened.recipe, opened.refuse)
    except ValueError:
        return None
    return _bytes(opened, site, weights)


def _bytes(opened: Opened, site: Site, weights: Spec) -> int:
    """Bytes of a linear in the files of the target, where it has a layout of its own, or in lowbit's."""
    from .formats.base import find
    from .stream.plan import site_bytes

    target = opened.request.target
    own = None if target is None else getattr(find(target), "stored_bytes", None)
    return int(own(weights, site.shape)) if own is not None else site_bytes(site.shape, weights, opened.recipe)


def _check_choices(opened: Opened, found: Sequence[Group]) -> None:
    """Raise ValueError where nothing is to be chosen, or some linear can have no format."""
    from .stream.plan import check_format

    name, target = opened.recipe.name, opened.request.target
    if not found:
        raise ValueError(
            f"every linear's format is given by overrides, so nothing is left to choose: name one in {name}"
        )
    sites = {
        opened.anatomy.full_name(i, site.name): site for i, b in enumerate(opened.anatomy.blocks) for site in b.sites
    }
    for group in found:
        if not group.formats:
            first = group.names[0]
            for each in opened.by_width.values():
                weights, inputs = each.recipe.scheme.formats(first)
                assert weights is not None
                check_format(first, sites[first], weights, inputs, opened.recipe, opened.refuse)
    widths = {width for group in found for width in group.formats}
    if len(widths) == 1:
        where = f"{target} carries" if target else "this model takes"
        raise ValueError(
            f"{where} {name} in {widths.pop()} bits only, so no mixture is possible: name the width instead"
        )


# --- the budget -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Room:
    """What there is beside the linears whose width is open."""

    fixed: int
    """Bytes of quantized linears whose format is given."""
    beside: int
    """Bytes of the files that no quantized linear takes."""
    weights: int
    """Weights of all quantized linears."""


def _room(opened: Opened, found: Sequence[Group]) -> _Room:
    left_open = {name for group in found for name in group.names}
    named = [
        (opened.anatomy.full_name(i, site.name), site) for i, b in enumerate(opened.anatomy.blocks) for site in b.sites
    ]
    quantized = [(name, site, opened.recipe.scheme.formats(name)[0]) for name, site in named]
    kept = [(name, site, weights) for name, site, weights in quantized if weights is not None]
    return _Room(
        sum(_bytes(opened, site, weights) for name, site, weights in kept if name not in left_open),
        _beside(opened, [name for name, *_ in kept]),
        sum(prod(site.shape) for _, site, _ in kept),
    )


def _limit(opened: Opened, found: Sequence[Group], room: _Room) -> int:
    """Bytes that the groups may take together. Raises ValueError where nothing is within the budget, or everything."""
    request, name = opened.request, opened.recipe.name
    least, most = (room.fixed + sum(end(group.nbytes.values()) for group in found) for end in (min, max))
    if request.size is not None:
        budget = request.size - room.beside
        said, low, high = (f"{n / 1e6:,.2f} MB" for n in (request.size, least + room.beside, most + room.beside))
    else:
        assert request.bits is not None
        budget = int(request.bits * room.weights / 8)
        low, high = (f"{8 * n / room.weights:.3f}" for n in (least, most))
        said = f"{request.bits:g} bits per weight"
    if budget < least:
        raise ValueError(f"{said} is too little for {name}, which takes {low} to {high} on this model: ask for more")
    if budget > most:
        raise ValueError(
            f"{said} is more than {name} can use, which takes {low} to {high} on this model: ask for less, or name a "
            f"width of {max(opened.by_width)}"
        )
    return budget - room.fixed


def _beside(opened: Opened, quantized: Sequence[str]) -> int:
    """Bytes of the files beside the quantized linears' own: other tensors, and headers at most."""
    from .stream.rotation import unties

    checkpoint, anatomy = opened.checkpoint, opened.anatomy
    held = {f"{name}.weight" for name in quantized}
    rest = [name for name in checkpoint.names() if name not in held and name not in checkpoint.tied]
    if unties(anatomy, opened.recipe):
        rest.append(f"{anatomy.embedding}.weight")  # once more, as the head
    headers = sum(4 * len(name) + PER_SITE for name in quantized) + PER_TENSOR * len(rest)
    formats = len(opened.by_width) * PER_TENSOR * (len(anatomy.blocks) + 1)
    return checkpoint.nbytes(rest) + headers + formats


# --- the measurement --------------------------------------------------------------------------------------------------


def _losses(
    opened: Opened,
    found: Sequence[Group],
    windows: Sequence[torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, tuple[float, ...]]:
    """What every format costs every linear, in the order of its group's formats."""
    from .stream.divergence import Divergence
    from .stream.memory import free_memory
    from .stream.sensitivity import Sensitivity

    choices = {name: [weights for weights, _ in group.formats.values()] for group in found for name in group.names}
    opened.request.notice(
        "measuring what every format costs the loss: every linear is rounded to each, and the model is read twice"
    )
    memory = free_memory() if opened.request.memory is None else opened.request.memory
    if opened.request.sensitivity == "kl":
        _check_whole(opened, dtype, device, memory)
    with TemporaryDirectory(prefix="lowbit-") as scratch:
        measurement = (Divergence if opened.request.sensitivity == "kl" else Sensitivity)(
            opened.skeleton,
            opened.anatomy,
            opened.checkpoint,
            opened.recipe,
            windows,
            dtype,
            device,
            memory // 2,
            Path(scratch),
            opened.request.seed or 0,
        )
        return measurement.losses(choices)


def _check_whole(opened: Opened, dtype: torch.dtype, device: torch.device, memory: int) -> None:
    """Raise ValueError where the whole model has no room."""
    from .stream.memory import gpu_room

    weights = sum(prod(site.shape) for block in opened.anatomy.blocks for site in block.sites)
    room = gpu_room(device, opened.request.gpu_memory) if device.type == "cuda" else memory
    if dtype.itemsize * weights > room:
        raise ValueError(
            f"--sensitivity kl has the whole model in memory, {dtype.itemsize * weights / 2**30:.1f} GiB, and "
            f"{room / 2**30:.1f} GiB are free: use fisher, which goes block by block"
        )
