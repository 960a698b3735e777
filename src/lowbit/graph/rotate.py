"""Merges rotations into a model's weights, in place: norm folding, the residual stream (R1), V within heads (R2).

Rows are the unit of everything: whatever reads the residual stream becomes W Q, whatever writes into it Qᵀ W, which is
the rows of Wᵀ times Q, and so are embeddings, biases and the head. A block is rotated from its anatomy alone; what lies
outside the blocks is a pure function of rows, so that a table larger than a block can be streamed through in pieces.
Computed in fp64, stored in the parameter's own dtype: whoever needs exactness rotates fp32 copies, since 16-bit storage
rounds. `rotations.py` finds out which models allow it.

LayerNorms keep their class (see `numerics.maps.mean_preserving`), and a bias β under a gain g that the readers cannot
absorb stays in the norm: LN(x) g + β = (LN(x) + β/g) g, so the gain alone is folded and β/g is rotated with the stream.

Shape letters: O output features, I input features, D model width, K key-value heads, h head width, N rows.
QuaRot: Ashkboos et al. 2024. SpinQuant: Liu et al. 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ..numerics.maps import Kronecker, Map, mean_preserving, random_hadamard
from .anatomy import Anatomy, BlockAnatomy, Edge, Norm, Rows, Site
from .fold import source_rows

CHUNK = 4096
"""Rows that are multiplied in fp64 at once, to bound the memory of it."""


def rotation_refusal(anatomy: Anatomy) -> str | None:
    """Why the residual stream cannot be rotated, in one sentence; None where it can."""
    if anatomy.rotations.residual:
        return None
    return f"{anatomy.family} cannot be rotated: {anatomy.rotations.refused}."


def random_rotation(anatomy: Anatomy, width: int, seed: int) -> Tensor:
    """A random Q [D, D] in fp64 of the kind that the model's residual stream allows. Raises ValueError if none is."""
    if (refusal := rotation_refusal(anatomy)) is not None:
        raise ValueError(refusal)
    draw = random_hadamard if anatomy.rotations.residual == "orthogonal" else mean_preserving
    return draw(width, seed)


# --- rows -------------------------------------------------------------------------------------------------------------


def rotate_rows(rows: Tensor, q: Tensor) -> Tensor:
    """rows [N, D] times Q: an embedding's rows, a folded head's rows, a writer's bias."""
    return (rows.double() @ q.to(rows.device, torch.float64)).to(rows.dtype)


def fold_rows(rows: Tensor, gain: Tensor) -> Tensor:
    """rows [N, D] of a reader, for instance the head, with the gain [D] of the norm before it."""
    return (rows.double() * gain.to(rows.device, torch.float64)).to(rows.dtype)


def effective_gain(norm: Norm, weight: Tensor) -> Tensor:
    """What a norm with this weight multiplies every channel by, [D] in fp64."""
    return weight.double() + norm.offset


def free_norm(norm: Norm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a norm whose gain has gone into its readers: effective gain 1, bias β/g.

    Raises ValueError where the gain of a channel is zero and its bias is not: then nothing carries the bias.
    """
    free = torch.full_like(weight, 1 - norm.offset)
    if bias is None:
        return free, None
    gain = effective_gain(norm, weight)
    if bool(((gain == 0) & (bias != 0)).any()):
        raise ValueError(
            f"{norm.name} has a gain of 0 under a bias and cannot be folded: choose no recipe that rotates."
        )
    return free, (bias.double() / gain.where(gain != 0, 1.0)).to(bias.dtype)


# --- blocks -----------------------------------------------------------------------------------------------------------


def _stream_edges(anatomy: BlockAnatomy) -> Iterator[tuple[Norm, Edge]]:
    """The norms that read the residual stream, with the edge to what reads them."""
    for edge in anatomy.edges:
        if isinstance(edge.source, Norm) and edge.source in anatomy.reads:
            yield edge.source, edge


def _reader_weights(block: nn.Module, edge: Edge) -> list[Tensor]:
    others = [cast(Tensor, block.get_submodule(path).weight) for path in edge.others]
    return [*(site.weight(block) for site in edge.readers), *others]


def _bias(block: nn.Module, path: str) -> Tensor:
    return cast(Tensor, block.get_submodule(path).bias)


def _rotate(rows: Tensor, q: Tensor) -> None:
    """`rotate_rows` in place, in pieces."""
    for part in torch.split(rows, CHUNK):
        part.copy_(rotate_rows(part, q))


@torch.no_grad()
def fold_norms(block: nn.Module, anatomy: BlockAnatomy) -> None:
    """Folds every gain that multiplies the residual stream's channels into the readers, routers and experts too.

    A bias goes into the readers' biases where all have one, else it stays in the norm (as β/g).
    """
    for norm, edge in _stream_edges(anatomy):
        module = block.get_submodule(norm.name)
        weight, bias = cast(Tensor, module.weight), _bias(block, norm.name) if norm.bias else None
        if bias is not None and not edge.others and all(site.bias for site in edge.readers):
            for site in edge.readers:
                repaired = _bias(block, site.name)
                repaired.add_((site.weight(block).double() @ bias.double()).to(repaired.dtype))
            bias.zero_()
        free, rest = free_norm(norm, weight, bias)
        gain = effective_gain(norm, weight)
        for reader in _reader_weights(block, edge):
            for part in torch.split(reader, CHUNK):
                part.copy_(fold_rows(part, gain))
        weight.copy_(free)
        if bias is not None and rest is not None:
            bias.copy_(rest)


@torch.no_grad()
def rotate_block(block: nn.Module, anatomy: BlockAnatomy, q: Tensor) -> None:
    """Lets a block with folded norms live on the residual stream x Q, for Q [D, D] of the kind its model allows."""
    for norm, edge in _stream_edges(anatomy):
        for weight in _reader_weights(block, edge):
            _rotate(weight, q)
        if norm.bias:
            bias = _bias(block, norm.name)
            bias.copy_(rotate_rows(bias, q))
    for site in anatomy.sites:
        if site.name in anatomy.writes:
            _rotate(site.weight(block).T, q)
            if site.bias:
                bias = _bias(block, site.name)
                bias.copy_(rotate_rows(bias, q))


@torch.no_grad()
def rotate_heads(block: nn.Module, anatomy: BlockAnatomy, matrix: Tensor) -> None:
    """Multiplies V within every head by an invertible matrix [h, h], and the output projection by its inverse.

    The same for all heads, so that grouped queries share it. A block without such an edge is left as it is.
    """
    width = matrix.shape[0]
    for edge in anatomy.edges:
        if edge.kind != "value":
            continue
        assert isinstance(edge.source, Rows)
        assert all(channel % width == j % width for j, channel in enumerate(edge.channels or ())), "heads are not whole"
        for weight in (reader.weight(block) for reader in edge.readers):
            weight.copy_(_per_head(matrix, weight.shape[1]).to(weight.device).inverse_weight(weight))
        tensors = [edge.source.site.weight(block)]
        if edge.source.site.bias:
            tensors.append(_bias(block, edge.source.site.name)[:, None])
        for tensor in tensors:
            rows = source_rows(edge, tensor)
            values = tensor[rows].double().T
            turned = _per_head(matrix.double(), values.shape[1]).to(values.device).apply(values)
            tensor[rows] = turned.T.to(tensor.dtype)


def _per_head(matrix: Tensor, width: int) -> Map:
    return Kronecker(None, matrix, (width // matrix.shape[0], matrix.shape[0]))


@torch.no_grad()
def absorb(block: nn.Module, site: Site, online: Map) -> None:
    """Makes a site's weight that for inputs which pass through `online` first (W becomes W P⁻ᵀ)."""
    for part in torch.split(site.weight(block), CHUNK):
        part.copy_(online.inverse_weight(part))


# --- a whole model in memory ------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_model(model: nn.Module, anatomy: Anatomy) -> None:
    """Folds the norms of all blocks and the one before the head, which is untied first."""
    for block, part in _blocks(model, anatomy):
        fold_norms(block, part)
    head = model.get_submodule(anatomy.head)
    table = cast(Tensor, head.weight)
    if table is model.get_submodule(anatomy.embedding).weight:
        head.weight = nn.Parameter(table.clone(), requires_grad=table.requires_grad)
    if anatomy.final_norm is not None:
        norm = model.get_submodule(anatomy.final_norm.name)
        weight = cast(Tensor, norm.weight)
        head_weight = cast(Tensor, head.weight)
        head_weight.copy_(fold_rows(head_weight, effective_gain(anatomy.final_norm, weight)))
        free, rest = free_norm(anatomy.final_norm, weight, cast(Tensor, norm.bias) if anatomy.final_norm.bias else None)
        weight.copy_(free)
        if rest is not None:
            cast(Tensor, norm.bias).copy_(rest)


@torch.no_grad()
def rotate_model(model: nn.Module, anatomy: Anatomy, q: Tensor) -> None:
    """Rotates the residual stream of a model with folded norms, from the embeddings to the head."""
    for block, part in _blocks(model, anatomy):
        rotate_block(block, part, q)
    for path in (*anatomy.rotations.embeddings, anatomy.head):
        _rotate(cast(Tensor, model.get_submodule(path).weight), q)
    if anatomy.final_norm is not None and anatomy.final_norm.bias:
        bias = _bias(model, anatomy.final_norm.name)
        bias.copy_(rotate_rows(bias, q))


def _blocks(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[nn.Module, BlockAnatomy]]:
    yield from zip(cast(nn.ModuleList, model.get_submodule(anatomy.layers)), anatomy.blocks, strict=True)
