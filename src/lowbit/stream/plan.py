"""The plan: which site gets which format, what it will cost, and every reason to refuse, before a weight is read.

A plan is made from names and shapes alone. What cannot work is refused here in a second, so that no run fails at night.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod

import torch

from ..graph.anatomy import Anatomy, Site
from ..methods.base import LearnedRotation, outcomes
from ..methods.recipe import Recipe
from ..numerics import kquant
from ..numerics.grid import unit_shape
from ..numerics.maps import Map
from ..numerics.sizes import stored_bytes
from ..numerics.spec import BF16, Spec
from . import rotation
from .checkpoint import Checkpoint
from .memory import at_home, gpu_size
from .rounding import stack_limit, stacks_on
from .work import Formats

Refuse = Callable[[Spec | None, Spec | None, Site, bool, Map | bool], str | None]
"""A target format's objection to (weight format, input format, site, whether groups follow another order, the online
map that inputs pass, or whether they pass one that is not known yet), or None. Sites that keep 16-bit weights are only
asked about where their inputs are mapped.
"""

BASE_BYTES = 450 << 20
"""Resident memory of Python with torch and transformers loaded."""


@dataclass(frozen=True)
class Plan:
    """Formats of every site of every block, and what the run will need."""

    anatomy: Anatomy
    recipe: Recipe
    formats: tuple[Formats, ...]
    notices: tuple[str, ...]
    block_bytes: int
    """Checkpoint bytes of the largest block."""
    hidden_bytes: int
    """Hidden states of all calibration text between two blocks."""
    working_bytes: int
    """What one block needs beside its own weights: copies, statistics, factorizations."""
    flops: float
    """Arithmetic of the whole run: forwards, Gram matrices, factorizations, feedback."""
    quantized_weights: int
    stored_bytes: int
    """Bytes that the quantized sites will take in the file."""
    paper_bits: float
    """Bits per quantized weight as papers count them: of codes alone, or as the paper of an Encode says."""
    learning_bytes: int = 0
    """What a rotation that is learned needs, before the first block: the whole model, its gradients, one window."""
    stack_bytes: int = 0
    """What working on a mixture's experts as one stack may take of a GPU, beside all this."""

    @property
    def peak_bytes(self) -> int:
        """Estimated peak of resident memory: this block and the next, working copies, hidden states."""
        return BASE_BYTES + max(2 * self.block_bytes + self.working_bytes + self.hidden_bytes, self.learning_bytes)

    @property
    def bits_per_weight(self) -> float:
        """8 × stored bytes of the quantized sites / their number of weights."""
        return 8 * self.stored_bytes / max(1, self.quantized_weights)


def make_plan(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    recipe: Recipe,
    *,
    tokens: int,
    dtype: torch.dtype,
    refuse: Refuse | None = None,
    window: int = 0,
    device: torch.device | None = None,
) -> Plan:
    """Resolve the recipe on a bound checkpoint for `tokens` tokens of calibration text in windows of at most `window`.

    Raises ValueError, in one sentence, where the recipe cannot be carried out on this model or `refuse` objects.
    """
    _check_patterns(anatomy, recipe)
    rotation.check(anatomy, recipe)
    _check_ranges(recipe)
    _check_maps(anatomy, recipe)
    formats = tuple(
        {site.name: recipe.scheme.formats(anatomy.full_name(index, site.name)) for site in block.sites}
        for index, block in enumerate(anatomy.blocks)
    )
    chosen = [
        (anatomy.full_name(index, site.name), site, *formats[index][site.name])
        for index, block in enumerate(anatomy.blocks)
        for site in block.sites
    ]
    quantized = [(name, site, weights, inputs) for name, site, weights, inputs in chosen if weights is not None]
    if not quantized and recipe.scheme.kv is None:
        raise ValueError("the recipe quantizes nothing: every linear is kept in 16 bits")
    for name, site, weights, inputs in quantized:
        check_format(name, site, weights, inputs, recipe, refuse)
    _check_kv(anatomy, recipe)
    if refuse is not None:
        _check_mapped(anatomy, recipe, formats, refuse)
    prefixes = [f"{anatomy.layers}.{index}." for index in range(len(anatomy.blocks))]
    block_bytes = max(checkpoint.nbytes(checkpoint.names(prefix)) for prefix in prefixes)
    hidden = _hidden_width(anatomy)
    text = recipe.calibrated
    return Plan(
        anatomy,
        recipe,
        formats,
        (*rotation.notices(anatomy, recipe, checkpoint, window, device), *_notices(anatomy, recipe)),
        block_bytes,
        tokens * hidden * dtype.itemsize * (3 if recipe.float_stream else 1) if text else 0,
        _working_bytes(anatomy, recipe, block_bytes),
        sum(_flops(site, recipe, tokens if text else 0) for _, site, _, _ in chosen),
        sum(prod(site.shape) for _, site, _, _ in quantized),
        sum(site_bytes(site.shape, weights, recipe) for _, site, weights, _ in quantized),
        _paper_bits([(site.shape, weights) for _, site, weights, _ in quantized], recipe),
        rotation.learning_bytes(anatomy, recipe, checkpoint, window),
    )


def site_bytes(shape: tuple[int, int], spec: Spec, recipe: Recipe) -> int:
    """Bytes of a site in lowbit's own files once the recipe is done with it."""
    encoded = stored_bytes(shape, spec) if recipe.encode is None else recipe.encode.stored_bytes(shape, spec)
    return encoded + sum(each.stored_bytes(shape) for each in recipe.correct)


def check_format(
    name: str, site: Site, weights: Spec, inputs: Spec | None, recipe: Recipe, refuse: Refuse | None
) -> None:
    """Raise ValueError where the recipe cannot give a site these formats, or the target objects."""
    _check_site(name, site, weights, inputs)
    _check_encoded(name, site, weights, inputs, recipe)
    for made in _outcomes(name, weights, recipe):
        reason = None if refuse is None else refuse(made, inputs, site, recipe.round.reorders(weights), False)
        if reason is not None:
            raise ValueError(f"{name}: {reason}")


def _paper_bits(sites: Sequence[tuple[tuple[int, int], Spec]], recipe: Recipe) -> float:
    total, encode = sum(prod(shape) for shape, _ in sites), recipe.encode
    counted = sum(prod(s) * (spec.bits if encode is None else encode.paper_bits(s, spec)) for s, spec in sites)
    return counted / max(1, total)


def _check_patterns(anatomy: Anatomy, recipe: Recipe) -> None:
    """Every override must match something: one that is silently ignored is a wrong model."""
    names = [anatomy.full_name(i, site.name) for i, block in enumerate(anatomy.blocks) for site in block.sites]
    outside = (anatomy.head, anatomy.embedding)
    for override in recipe.scheme.overrides:
        if any(fnmatchcase(name, override.pattern) for name in names):
            continue
        if any(fnmatchcase(name, override.pattern) for name in outside):
            if override.weights is None:
                continue
            raise ValueError(
                f"{override.pattern} matches the head or embedding, which stay in 16 bits: drop that override"
            )
        leaves = sorted({name.rpartition(".")[2] for name in names})
        near = get_close_matches(override.pattern.rpartition(".")[2].strip("*"), leaves, 1, 0.4)
        hint = f"did you mean *.{near[0]}?" if near else f"linears end in {', '.join(leaves[:6])}"
        raise ValueError(f"the pattern {override.pattern!r} matches no linear of this model: {hint}")


def _check_kv(anatomy: Anatomy, recipe: Recipe) -> None:
    """A quantized cache needs one attention in every block, and groups that divide a head."""
    kv = recipe.scheme.kv
    if kv is None:
        return
    if not all(block.attention for block in anatomy.blocks):
        raise ValueError(
            f"keys and values of {anatomy.family} cannot be quantized: not every block has one attention that caches "
            "them; drop kv from the recipe"
        )
    width = anatomy.heads.width
    if kv.layout in ("group", "channel") and width % min(kv.group, width):
        raise ValueError(f"a key-value group of {kv.group} does not divide the head width {width}: choose a divisor")


def _check_ranges(recipe: Recipe) -> None:
    """Ranges that a method learned before rounding are those that rounding has to use."""
    specs = [recipe.scheme.weights, *(override.weights for override in recipe.scheme.overrides)]
    learned = [method.name for method in recipe.reconstruct if getattr(method, "recodes", True)]
    learned += [step.name for step in (recipe.rotation,) if isinstance(step, LearnedRotation)]
    least = [spec for spec in specs if spec is not None and (spec.minima or spec.scale in ("kquant", "integer"))]
    if learned and least:
        raise ValueError(f"{learned[0]} trains through plain scales, and {least[0]} has none: round with gptq or rtn")
    trained = [method.name for method in recipe.reconstruct if not method.after]
    if trained and any(spec is not None and recipe.round.refits(spec) for spec in specs):
        name = recipe.round.name
        raise ValueError(f"{name} would fit again the ranges that {trained[0]} learns: set {name}.groups=static")


def _outcomes(name: str, weights: Spec, recipe: Recipe) -> tuple[Spec, ...]:
    """The formats that the recipe's clip may give to a site; where it chooses one, nothing else may depend on which."""
    try:
        found = outcomes(recipe.clip, weights)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    others = [part.name for part in (recipe.encode,) if part is not None]
    others += [method.name for method in recipe.reconstruct if getattr(method, "recodes", True)]
    if len(found) > 1 and others:
        raise ValueError(f"{others[0]} needs to know which weights share a scale: drop {recipe.clip.name}")
    if len(found) > 1 and recipe.round.refits(weights):
        name = recipe.round.name
        raise ValueError(f"{name} would fit again the ranges that {recipe.clip.name} chooses: set {name}.groups=static")
    return found


def _check_maps(anatomy: Anatomy, recipe: Recipe) -> None:
    """Maps of an Encode's own stand alone before a linear."""
    if recipe.encode is None or not recipe.encode.maps:
        return
    trained = [method.name for method in recipe.reconstruct if method.online(recipe.scheme)]
    turned = [] if recipe.rotation is None else [recipe.rotation.name]
    online = trained + (turned if any(rotation.online_sites(anatomy, recipe)) else [])
    if online:
        raise ValueError(f"{recipe.encode.name} and {online[0]} both map the inputs of linears: keep one of them")


def _check_site(name: str, site: Site, weights: Spec, inputs: Spec | None) -> None:
    try:
        unit_shape(torch.Size(site.shape), weights.block)
        if weights.scale == "kquant":
            kquant.check_columns(site.shape[1])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if inputs is not None and not inputs.dynamic and inputs.block != (-1, -1) and inputs.scale != "e4m3":
        raise ValueError(f"{name}: static activation formats are per tensor; make {inputs} dynamic or per tensor")
    if inputs is not None:
        try:
            unit_shape(torch.Size((1, site.shape[1])), inputs.block)
        except ValueError as error:
            raise ValueError(f"{name}, activations: {error}") from None


def _check_encoded(name: str, site: Site, weights: Spec, inputs: Spec | None, recipe: Recipe) -> None:
    """What an Encode cannot take, or 16-bit weights of which nobody leaves any out."""
    encode = recipe.encode
    if encode is None:
        if weights.number == BF16:
            raise ValueError(f"{name}: bf16 is the format of pruned weights, and nothing prunes: give it codes, or w16")
        return
    try:
        encode.check(site.shape, weights, inputs)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if encode.maps and inputs is not None and not inputs.dynamic:
        raise ValueError(f"{name}: {encode.name} maps the inputs, whose static range is not known then: drop -static")


def _hidden_width(anatomy: Anatomy) -> int:
    """Width of the residual stream: that of the linears behind the first tap."""
    return anatomy.blocks[0].taps[0].sites[0].shape[1]


def _check_mapped(anatomy: Anatomy, recipe: Recipe, formats: Sequence[Formats], refuse: Refuse) -> None:
    trained = any(method.online(recipe.scheme) for method in recipe.reconstruct)
    for index, maps in enumerate(rotation.online_sites(anatomy, recipe)):
        for site in anatomy.blocks[index].sites:
            mapped: Map | bool = True if trained else maps.get(site.name, False)
            reason = refuse(*formats[index][site.name], site, False, mapped) if mapped else None
            if reason is not None:
                raise ValueError(f"{anatomy.full_name(index, site.name)}: {reason}")


def _notices(anatomy: Anatomy, recipe: Recipe) -> tuple[str, ...]:
    """What the recipe's transforms will skip, and why; once per kind of block."""
    if not recipe.folds:
        return ()
    seen = dict.fromkeys(f"{place}: {reason}" for block in anatomy.blocks for place, reason in block.refused)
    names = "+".join(transform.name for transform in recipe.folds)
    return tuple(f"{names} skips {line}" for line in seen)


def stack_bytes(plan: Plan, device: torch.device, gpu_memory: int | None) -> int:
    """What a stack of experts may take of a GPU of which the run may take `gpu_memory`; 0 where nothing is stacked."""
    experts = any(site.expert is not None for block in plan.anatomy.blocks for site in block.sites)
    if not experts or not stacks_on(device) or "gram" not in plan.recipe.needs:
        return 0
    memory = gpu_size(device, gpu_memory)
    states = plan.hidden_bytes if at_home(plan.hidden_bytes, memory) else 0
    return stack_limit(memory, 2 * plan.block_bytes + plan.working_bytes + states)


def _working_bytes(anatomy: Anatomy, recipe: Recipe, block_bytes: int) -> int:
    blocks = [[tap.sites[0].shape[1] for tap in block.taps] for block in anatomy.blocks]
    widths = max(blocks, key=lambda widths: sum(w * w for w in widths))
    largest = max(prod(site.shape) for block in anatomy.blocks for site in block.sites)
    total = block_bytes // 2 + 3 * 4 * largest
    if "gram" in recipe.needs:
        total += 4 * sum(w * w for w in widths) + 3 * 4 * max(widths) ** 2 + block_bytes
    if recipe.transforms:
        total += 2 * block_bytes
    if recipe.rotation is not None:
        total += 2 * 8 * _hidden_width(anatomy) ** 2
    return total


def _flops(site: Site, recipe: Recipe, tokens: int) -> float:
    """Two forwards, the Gram matrix and, once per site, a factorization and the error feedback."""
    outputs, inputs = site.shape
    forwards = 4.0 * tokens * outputs * inputs
    if "gram" not in recipe.needs:
        return forwards
    return forwards + tokens * inputs**2 + inputs**3 + 2.0 * outputs * inputs**2


def plan_summary(plan: Plan) -> Mapping[str, Sequence[str]]:
    """Format -> names of the linears that get it (within a block, over all blocks), for `lowbit inspect`."""
    kinds: dict[str, dict[str, None]] = {}
    for formats in plan.formats:
        for name, (weights, inputs) in formats.items():
            label = "16 bits" if weights is None else f"{weights}" + (f", inputs {inputs}" if inputs else "")
            kinds.setdefault(label, {})[name] = None
    return {label: list(names) for label, names in kinds.items()}


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a middling matrix product here and now, for estimates only."""
    a = torch.ones(1024, 1024, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best
