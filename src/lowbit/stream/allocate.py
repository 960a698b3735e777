"""Bits where they matter: one width for every linear, so that the predicted loss is least within a budget of bytes.

Losses of single linears add up to second order, so the choice is a knapsack: of every group of linears that share a
format one width is taken, its price the bytes and its harm the loss (`sensitivity`). It is solved exactly, as a linear
program in integers, by HiGHS through scipy. What comes out are ordinary overrides of a recipe: nothing behind this step
knows that they were not typed.

A layer's experts share a format for every projection, since what runs them takes one. Where the target's clients join
the linears behind one input (q, k, v; gate, up), those do too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Any

from ..graph.anatomy import Anatomy, Site
from ..methods.scheme import Override, Scheme
from ..numerics.spec import Spec
from .sensitivity import Losses

Price = Callable[[str, Site, Spec, Spec | None], int | None]
"""(full name, site, weight format, input format) -> its bytes, or None where it is no choice."""


@dataclass(frozen=True)
class Group:
    """Linears that get one width, by full name, and what overrides call them; the formats and bytes of each width."""

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    formats: Mapping[int, tuple[Spec, Spec | None]]
    nbytes: Mapping[int, int]

    def losses(self, found: Losses) -> dict[int, float]:
        """The predicted loss of all its linears at each width."""
        sums = (sum(each) for each in zip(*(found[name] for name in self.names), strict=True))
        return dict(zip(self.formats, sums, strict=True))


def groups(anatomy: Anatomy, schemes: Mapping[int, Scheme], price: Price, *, joined: bool) -> list[Group]:
    """The linears whose format depends on the width, with the widths that `price` allows all of a group.

    `schemes` are the recipe's at each width. `joined`: linears behind one input are one group.
    """
    parts: dict[tuple[int, str], list[Site]] = {}
    for index, block in enumerate(anatomy.blocks):
        for tap in block.taps:
            for site in tap.sites:
                name = anatomy.full_name(index, site.name)
                if len({scheme.formats(name) for scheme in schemes.values()}) > 1:
                    shared = tap.sites[0] if joined else site
                    parts.setdefault((index, _pattern(shared)), []).append(site)
    return [_group(anatomy, index, sites, schemes, price) for (index, _), sites in parts.items()]


def _group(anatomy: Anatomy, index: int, sites: Sequence[Site], schemes: Mapping[int, Scheme], price: Price) -> Group:
    names = tuple(anatomy.full_name(index, site.name) for site in sites)
    patterns = tuple(dict.fromkeys(anatomy.full_name(index, _pattern(site)) for site in sites))
    formats, nbytes = {}, {}
    for width, scheme in schemes.items():
        weights, inputs = scheme.formats(names[0])
        assert weights is not None, "a width is open where weights are quantized"
        prices = [price(name, site, weights, inputs) for name, site in zip(names, sites, strict=True)]
        if None not in prices:
            formats[width] = (weights, inputs)
            nbytes[width] = sum(each for each in prices if each is not None)
    return Group(names, patterns, formats, nbytes)


def _pattern(site: Site) -> str:
    """The site's name, or what it has in common with the same projection of the layer's other experts."""
    return site.name if site.expert is None else site.name.replace(f".{site.expert}.", ".*.", 1)


@dataclass(frozen=True)
class Allocation:
    """The width of every group and the increase of the loss, nats per token, that is predicted of it."""

    widths: Mapping[str, int]
    """By pattern."""
    loss: float
    candidates: Mapping[str, Mapping[int, tuple[int, float]]]
    """Pattern of a group's first linear -> width -> (bytes, loss): what was chosen from."""
    size_bytes: int
    """Bytes of the whole model's files, at most."""

    def to_json(self) -> dict[str, Any]:
        """What a run directory keeps."""
        return {"widths": self.widths, "loss": self.loss, "candidates": self.candidates, "size_bytes": self.size_bytes}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Allocation:
        """The inverse of `to_json`."""
        candidates = {
            pattern: {int(width): (nbytes, loss) for width, (nbytes, loss) in each.items()}
            for pattern, each in data["candidates"].items()
        }
        return Allocation(data["widths"], data["loss"], candidates, data["size_bytes"])

    @property
    def common(self) -> int:
        """The width that most linears have; the smallest of those."""
        counts = Counter(self.widths.values())
        return min(counts, key=lambda width: (-counts[width], width))

    def overrides(self, found: Sequence[Group]) -> tuple[Override, ...]:
        """An override for every linear whose width is not the common one."""
        return tuple(
            Override(pattern, *group.formats[self.widths[pattern]])
            for group in found
            for pattern in group.patterns
            if self.widths[pattern] != self.common
        )

    def table(self) -> list[str]:
        """How many linears of every kind have which width: a row for each kind."""
        widths = sorted(set(self.widths.values()))
        kinds: dict[str, Counter[int]] = {}
        for pattern, width in self.widths.items():
            kinds.setdefault(_kind(pattern), Counter())[width] += 1
        size = max(len(kind) for kind in kinds)
        lines = [f"{'':{size}}  " + "".join(f"{width:>4}" for width in widths) + "  mean"]
        for kind, counts in kinds.items():
            mean = sum(width * count for width, count in counts.items()) / counts.total()
            cells = "".join(f"{counts[width] or '·':>4}" for width in widths)
            lines.append(f"{kind:{size}}  {cells}  {mean:4.2f}")
        return lines


def _kind(pattern: str) -> str:
    """What linears of the same place in their blocks have in common: the name behind the block's number."""
    words = pattern.split(".")
    number = next((place for place, word in enumerate(words) if word.isdigit()), -1)
    return ".".join(words[number + 1 :])


def allocate(found: Sequence[Group], losses: Losses, budget: int, beside: int) -> Allocation:
    """The widths of least predicted loss whose bytes are at most `budget`, which the smallest must not exceed.

    `beside` are the bytes of everything else in the model's files.
    """
    options = [[(width, group.nbytes[width], loss) for width, loss in group.losses(losses).items()] for group in found]
    places = solve([[(nbytes, loss) for _, nbytes, loss in group] for group in options], budget)
    chosen = [group[place] for group, place in zip(options, places, strict=True)]
    widths = {pattern: width for group, (width, *_) in zip(found, chosen, strict=True) for pattern in group.patterns}
    candidates = {
        group.patterns[0]: {width: (nbytes, loss) for width, nbytes, loss in each}
        for group, each in zip(found, options, strict=True)
    }
    size = beside + sum(nbytes for _, nbytes, _ in chosen)
    return Allocation(widths, sum(loss for *_, loss in chosen), candidates, size)


def solve(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """The place of the option (price, harm) to take in each group, harm least among all choices within the budget.

    The solver works in floating point, and takes differences of 1e-6 for none: harms are scaled until all of them
    together are thousands. A choice that exceeds the budget by a rounding error is asked for again with one unit less.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    prices = [price for group in options for price, _ in group]
    unit = reduce(gcd, prices)
    units = np.array([[price // unit for price in prices]], dtype=float)
    owners = np.repeat(np.arange(len(options)), [len(group) for group in options])
    once = LinearConstraint(csr_array((np.ones(len(prices)), (owners, np.arange(len(prices))))), 1, 1)

    def least(harms: Any, room: int, whole: bool) -> Any:
        within = LinearConstraint(units, -np.inf, room)
        found = milp(
            harms,
            integrality=np.full(len(prices), int(whole)),
            bounds=Bounds(0, 1),
            constraints=[once, within],
            options={"mip_rel_gap": 0.0},
        )
        assert found.x is not None, f"the smallest choice is within the budget, and HiGHS says: {found.message}"
        return found

    harms = np.array([harm for group in options for _, harm in group])
    harms = harms / (harms.max() or 1.0)
    harms = harms * 1e4 / (least(harms, budget // unit, False).fun or 1.0)
    for room in range(budget // unit, -1, -1):
        taken = np.flatnonzero(least(harms, room, True).x > 0.5).tolist()
        if sum(prices[place] for place in taken) <= budget:
            break
    first = np.cumsum([0, *(len(group) for group in options)]).tolist()
    return [place - start for place, start in zip(taken, first, strict=False)]
