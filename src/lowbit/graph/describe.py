"""Writes an anatomy down for people: what `lowbit inspect` prints.

Blocks that are alike are described once, and of a mixture's experts the first stands for all.
"""

from __future__ import annotations

from collections.abc import Iterator

from .anatomy import Anatomy, BlockAnatomy, Edge, Norm, Rows, Site


def describe(anatomy: Anatomy) -> str:
    """A listing of the blocks' taps, edges and refusals, the residual stream, the heads and the proofs."""
    heads = anatomy.heads
    norm = anatomy.final_norm.name if anatomy.final_norm else "none"
    lines = [
        f"{anatomy.family}: {len(anatomy.blocks)} blocks in {anatomy.layers}",
        f"embedding {anatomy.embedding}, final norm {norm}, head {anatomy.head}{' (tied)' if anatomy.tied else ''}",
        f"{heads.query} query heads, {heads.key_value} key-value heads, width {heads.width}",
    ]
    rotations = anatomy.rotations
    lines.append(f"residual stream may be rotated: {rotations.residual or f'no, {rotations.refused}'}")
    lines.append(f"values may be rotated within heads: {'yes' if rotations.heads else 'no'}")
    for numbers, block in _kinds(anatomy.blocks):
        lines += ["", numbers, *(f"  {line}" for line in _block(block))]
    proofs = ", ".join(f"{kind} {change:.0e}" for kind, change in anatomy.proofs.items())
    return "\n".join([*lines, "", f"proved, largest relative change of the logits: {proofs}"])


def _kinds(blocks: tuple[BlockAnatomy, ...]) -> Iterator[tuple[str, BlockAnatomy]]:
    """("blocks 0-2, 5", anatomy) for every kind of block."""
    kinds: list[tuple[BlockAnatomy, list[int]]] = []
    for number, block in enumerate(blocks):
        for known, numbers in kinds:
            if known is block or known == block:
                numbers.append(number)
                break
        else:
            kinds.append((block, [number]))
    for block, numbers in kinds:
        starts = [n for n in numbers if n - 1 not in numbers]
        ends = [n for n in numbers if n + 1 not in numbers]
        spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
        yield f"block{'s' if len(numbers) > 1 else ''} {', '.join(spans)}", block


def _block(block: BlockAnatomy) -> Iterator[str]:
    yield "inputs shared by"
    for tap in block.taps:
        if tap.sites[0].expert in (None, 0):
            yield "  " + ", ".join(f"{_name(site)} {site.shape[0]}x{site.shape[1]}" for site in tap.sites)
    yield "edges"
    for edge in block.edges:
        if not isinstance(edge.source, Rows) or edge.source.site.expert in (None, 0):
            yield f"  {_edge(edge)}"
    experts = {site.name: site for site in block.sites if site.expert is not None}
    refused = {_name(experts[place]) if place in experts else place: reason for place, reason in block.refused[::-1]}
    if refused:
        yield "refused"
        yield from (f"  {place}: {reason}" for place, reason in list(refused.items())[::-1])
    writes = dict.fromkeys(_name(experts[name]) if name in experts else name for name in block.writes)
    yield f"residual stream read by {', '.join(norm.name for norm in block.reads) or 'linears'}"
    yield f"residual stream written by {', '.join(writes)}"


def _name(site: Site) -> str:
    """The site's name, with a star for the number of an expert."""
    return site.name if site.expert is None else site.name.replace(f".{site.expert}.", ".*.", 1)


def _edge(edge: Edge) -> str:
    if isinstance(edge.source, Norm):
        source = edge.source.name + (f" ({edge.source.offset:g} + w)" if edge.source.offset else "")
    else:
        rows = "" if edge.source.index is None else f" ({len(edge.source.index)} rows)"
        source = _name(edge.source.site) + rows
    readers = ", ".join(dict.fromkeys([*map(_name, edge.readers), *edge.others]))
    return f"{source} -> {readers}{', may shift' if edge.shift else ''}"
