"""What becomes of a block's weights: rounded or encoded tap by tap, and corrected.

Linears behind one input share a factorization, and those of one format are rounded as one matrix. Taps know nothing of
each other, so the processes of a run take each some of them. On a GPU a mixture's experts of one projection are rounded
as stacks. How many make one follows from their shape, from what the plan leaves to a stack, which is decided when a run
is begun (`stack_limit`), and from the number of lanes, so that there is work for every process. It depends neither on
the memory that is free nor on the number of processes, for a library may choose another order of sums for another
number of matrices.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from ..graph.anatomy import Site, Tap
from ..methods.base import Particular, Stacking, outcomes
from ..methods.views import Stats
from ..numerics.qtensor import QLayer, QTensor, QWeight
from ..numerics.spec import Spec
from .memory import in_parts
from .work import BlockWork, FixedGrid

STARVED = 32
"""An expert that saw fewer tokens than this is rounded to nearest: its statistics would be noise."""

STACKED = ("cuda",)
"""Devices on which experts are worked on as stacks: a CPU is filled by one of them."""
_STEP = 256 << 20


def stacks_on(device: torch.device) -> bool:
    """Whether experts are worked on as stacks there."""
    return device.type in STACKED


def stack_limit(memory: int, taken: int) -> int:
    """Bytes of a GPU's `memory` for working on a stack of experts, beside their weights, Gram matrices and all else.

    A fifth, as long as that is half of what the work on a block leaves, `taken` being what it does not: the other half
    is for states that wait between the passes over a block. Whole steps, since GPUs of one kind differ by a little.
    """
    return max(0, min(memory // 5, (memory - taken) // 2)) // _STEP * _STEP


def rounded(work: BlockWork, taps: Sequence[Tap], stats: Mapping[str, Stats], seed: int) -> dict[str, QLayer]:
    """The quantized sites of `taps` as layers, corrected unless their codes are trained first."""
    recipe, lanes = work.recipe, work.lanes
    made: dict[str, dict[str, QLayer]] = {}
    jobs = list(_jobs(work, taps, stats))
    costs = [sum(_cost(work, tap) for tap in job) for job in jobs]
    for job, owner in zip(jobs, lanes.dealt(costs), strict=True):
        if owner == lanes.rank:
            found = _rounded_stack(work, job, stats) if len(job) > 1 else [_rounded_tap(work, job[0], stats, seed)]
            for tap, layers in zip(job, found, strict=True):
                made[tap.name] = layers if recipe.retrains else corrected(work, layers, stats)
        for tap in job:
            if tap.name in stats and not recipe.revisits_stats:
                stats[tap.name].release()
    made = lanes.joined(made)
    return {name: layer for tap in taps for name, layer in made[tap.name].items()}


def _jobs(work: BlockWork, taps: Sequence[Tap], stats: Mapping[str, Stats]) -> Iterator[list[Tap]]:
    """The taps, those together that are rounded as a stack."""
    alike: dict[tuple[tuple[int, int], Spec, bool], list[Tap]] = defaultdict(list)
    for tap in taps:
        batches = list(_batches(work, tap))
        if len(batches) == 1 and _stacks(work, tap, batches[0][1], stats):
            (sites, spec, scores), inputs = batches[0], tap.sites[0].shape[1]
            alike[(sum(site.shape[0] for site in sites), inputs), spec, scores].append(tap)
        else:
            yield [tap]
    for (shape, _, _), together in alike.items():
        yield from map(list, in_parts(together, entry_bytes(shape), work.stack_bytes, work.lanes.count))


def _stacks(work: BlockWork, tap: Tap, spec: Spec, stats: Mapping[str, Stats]) -> bool:
    """Whether a tap, all of whose sites have this format, may be rounded with others of its shape."""
    recipe = work.recipe
    if not stacks_on(work.device) or tap.sites[0].expert is None or _seen(tap, stats) is None:
        return False
    if any(site.name in work.grids for site in tap.sites) or len(outcomes(recipe.clip, spec)) > 1:
        return False  # grids are one by one what they are
    return recipe.encode is None and isinstance(recipe.round, Stacking) and recipe.round.stacks(spec)


def entry_bytes(shape: tuple[int, int]) -> int:
    """About the bytes that a weight [O, I] of a stack takes while it is worked on, beside it and its Gram matrix.

    Either its factor is being made, or its ranges are searched: see `methods/stacked.py`. A search of AWQ's scales
    takes less, five copies of the weight and one of the Gram matrix.
    """
    weight, square = prod(shape), shape[1] ** 2
    return 4 * max(weight + 3 * square, 7 * weight + square)


def corrected(work: BlockWork, layers: Mapping[str, QLayer], stats: Mapping[str, Stats]) -> dict[str, QLayer]:
    """The layers with every correction of the recipe added to their weights."""
    found = dict(layers)
    for site in (site for site, _ in work.quantized() if site.name in layers):
        weight = layers[site.name].weight
        for correction in work.recipe.correct:
            weight = correction.correct(work.weight(site), weight.to(work.device), stats.get(site.name))
        found[site.name] = replace(layers[site.name], weight=weight.to(_shelf(work)))
    return found


def _rounded_tap(work: BlockWork, tap: Tap, stats: Mapping[str, Stats], seed: int) -> dict[str, QLayer]:
    """The tap's sites, those of one format as one matrix; an Encode takes them singly."""
    layers: dict[str, QLayer] = {}
    for sites, spec, scores in _batches(work, tap):
        seen = _seen(tap, stats)
        if work.recipe.encode is not None:
            layers |= {site.name: _encoded(work, site, spec, seen, scores, seed) for site in sites}
            continue
        trained = work.grids.get(sites[0].name)  # such a site comes alone
        clip = work.recipe.clip if trained is None else FixedGrid(trained)
        codes = work.recipe.round.round(_joined(work, sites), spec, clip, seen, scores=scores)
        layers |= _parted(work, sites, codes, stats)
    return layers


def _rounded_stack(work: BlockWork, taps: Sequence[Tap], stats: Mapping[str, Stats]) -> list[dict[str, QLayer]]:
    """`_rounded_tap` for taps that are rounded as one batch."""
    recipe, batches = work.recipe, [next(_batches(work, tap)) for tap in taps]
    (_, spec, scores), seen = batches[0], [stats[tap.name] for tap in taps]
    assert isinstance(recipe.round, Stacking), "only what stacks is stacked"
    weights = [_joined(work, sites) for sites, _, _ in batches]
    codes = recipe.round.round_stack(weights, spec, recipe.clip, seen, scores=scores)
    return [_parted(work, sites, each, stats) for (sites, _, _), each in zip(batches, codes, strict=True)]


def _seen(tap: Tap, stats: Mapping[str, Stats]) -> Stats | None:
    """The statistics that a tap is rounded by; None where there are none, or too few."""
    seen = stats.get(tap.name)
    starved = seen is not None and tap.sites[0].expert is not None and seen.tokens < STARVED
    return None if starved else seen


def _joined(work: BlockWork, sites: Sequence[Site]) -> Tensor:
    return torch.cat([work.weight(site) for site in sites])


def _parted(work: BlockWork, sites: Sequence[Site], codes: QTensor, stats: Mapping[str, Stats]) -> dict[str, QLayer]:
    """The layers of sites whose weights were rounded as one matrix."""
    layers: dict[str, QLayer] = {}
    start = 0
    for site in sites:
        part = codes.rows(start, start + site.shape[0])
        layers[site.name] = work.layer(site, _shelved(work, part), work.input_grid(site, stats))
        start += site.shape[0]
    return layers


def _encoded(work: BlockWork, site: Site, spec: Spec, stats: Stats | None, scores: bool, seed: int) -> QLayer:
    """What the recipe's Encode makes of one linear; every linear of a model has random numbers of its own."""
    recipe, trained = work.recipe, work.grids.get(site.name)
    assert recipe.encode is not None
    clip = recipe.clip if trained is None else FixedGrid(trained)
    own = (seed * 1_000_003 + zlib.crc32(site.name.encode())) % (1 << 63)
    encoded = recipe.encode.encode(work.weight(site), spec, recipe.round, clip, stats, scores=scores, seed=own)
    encoded = encoded.to(_shelf(work))
    layer = work.layer(site, encoded.weight, work.input_grid(site, {} if stats is None else {site.name: stats}))
    before = encoded.input_map or layer.input_map
    return replace(layer, input_map=before, output_map=encoded.output_map, outliers=encoded.outliers)


def _batches(work: BlockWork, tap: Tap) -> Iterator[tuple[list[Site], Spec, bool]]:
    """The tap's quantized sites in batches that share format and treatment; units must not span two linears.

    Servers join q, k and v and know one NVFP4 tensor scale of them, so that v is treated as q and k are there.
    """
    batches: dict[tuple[Spec, bool, str], list[Site]] = {}
    scoring = any(site.name in work.anatomy.scores for site in tap.sites)
    single = isinstance(work.recipe.clip, Particular) and work.recipe.clip.alone
    for site in tap.sites:
        spec = work.formats[site.name][0]
        if spec is not None:
            alone = "" if spec.by_row and not single and site.name not in work.grids else site.name
            scores = scoring if spec.scale == "e4m3" else site.name in work.anatomy.scores
            batches.setdefault((spec, scores, alone), []).append(site)
    for (spec, scores, _), sites in batches.items():
        yield sites, spec, scores


def _cost(work: BlockWork, tap: Tap) -> float:
    """About the work that rounding the tap's sites is: with a Gram matrix its factor, and a sweep over the columns."""
    inputs = tap.sites[0].shape[1]
    outputs = sum(site.shape[0] for site in tap.sites if work.formats[site.name][0] is not None)
    if "gram" not in (work.recipe.encode or work.recipe.round).needs or not outputs:
        return float(inputs * outputs)
    return float(inputs**2 * (inputs + 2 * outputs))


def _shelved(work: BlockWork, part: QTensor) -> QWeight:
    """A finished weight where it is put, its codes in pinned memory if that is the CPU's: they come back at once."""
    if part.codes.is_cuda and _shelf(work).type == "cpu":
        part = replace(part, codes=torch.empty_like(part.codes, device="cpu", pin_memory=True).copy_(part.codes))
    return QWeight((part,)).to(_shelf(work))


def _shelf(work: BlockWork) -> torch.device:
    """Where finished layers are put: in memory of the CPU, or where they can be handed to other processes."""
    return torch.device("cpu") if work.lanes.alone else work.device
