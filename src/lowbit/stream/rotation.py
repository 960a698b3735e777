"""How a rotation of the whole model is carried out while the model streams by, one piece at a time.

It acts in three places: on a block before anything is observed of it, on the tables that the first hidden states are
looked up in, and on what is stored outside the blocks. All of them ask here, so that what is propagated is what is
stored. A block's "original" is from then on the rotated block: the float stream of a rotated run is the original
model's stream times Q.

The head is untied from the embedding, since only one of them takes the final norm's gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..formats.files import Streamed
from ..graph.anatomy import Anatomy
from ..graph.rotate import (
    effective_gain,
    fold_norms,
    free_norm,
    rotate_block,
    rotate_heads,
    rotate_rows,
    rotation_refusal,
)
from ..methods.base import LearnedRotation, Rotation
from ..methods.recipe import Recipe
from ..numerics.maps import Map
from .checkpoint import Checkpoint
from .work import BlockWork


class Turning:
    """A rotation with its matrices, on one model."""

    def __init__(
        self,
        rotation: Rotation,
        matrices: Mapping[str, Tensor],
        anatomy: Anatomy,
        checkpoint: Checkpoint,
        device: torch.device,
    ) -> None:
        self._rotation, self._anatomy, self._checkpoint, self._device = rotation, anatomy, checkpoint, device
        self._matrices = {name: matrix.to(device, torch.float64) for name, matrix in matrices.items()}
        self.residual = self._matrices.get("residual")
        self._gain: Tensor | None = None
        self._norm: dict[str, Tensor] = {}
        norm = anatomy.final_norm
        if self.residual is not None and norm is not None:
            names = [f"{norm.name}.weight", *([f"{norm.name}.bias"] if norm.bias else [])]
            stored = list(checkpoint.read(names).values())
            self._gain = effective_gain(norm, stored[0])
            free, rest = free_norm(norm, stored[0], stored[1] if norm.bias else None)
            self._norm[names[0]] = free
            if rest is not None:
                self._norm[names[1]] = rotate_rows(rest, self.residual.cpu())

    def turn(self, work: BlockWork, index: int) -> None:
        """Rotate a block whose tensors are as the checkpoint has them."""
        part = work.anatomy
        work.widen()
        if self.residual is not None:
            fold_norms(work.block, part)
            rotate_block(work.block, part, self.residual)
            work.residual = self.residual
        heads = self._matrices.get(f"heads.{index}")
        if heads is not None:
            rotate_heads(work.block, part, heads)
        online = self._rotation.online(self._anatomy, index)
        for tap in part.taps:
            if tap.name in online:
                work.set_map(tap, online[tap.name].to(self._device))
        work.key_map = self._rotation.key_map(self._anatomy, index)
        work.turned = True

    # --- outside the blocks -------------------------------------------------------------------------------------------

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """What stands in the place of rows [N, D] of a parameter outside the blocks, in their dtype."""
        if self.residual is None or rows.dim() != 2:
            return rows
        if name == f"{self._anatomy.head}.weight":
            folded = rows if self._gain is None else rows.double() * self._gain
            return self._rotated(folded, rows.dtype)
        tables = [f"{path}.weight" for path in self._anatomy.rotations.embeddings]
        return self._rotated(rows, rows.dtype) if name in tables else rows

    def _rotated(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.residual is not None
        return rotate_rows(rows.to(self._device, torch.float64), self.residual).to("cpu", dtype)

    def stored(self) -> dict[str, Tensor | Streamed]:
        """Every parameter outside the blocks, a few rows at a time, the head by itself."""
        inside, head = f"{self._anatomy.layers}.", f"{self._anatomy.head}.weight"
        own = {head} if self.residual is not None else set()
        names = [n for n in self._checkpoint.names() if not n.startswith(inside)]
        return {n: self._norm.get(n, self._streamed(n)) for n in names if n in own or n not in self._checkpoint.tied}

    def _streamed(self, name: str) -> Streamed:
        whole = self._checkpoint.streamed(name)

        def parts() -> Iterator[Tensor]:
            for part in whole.parts():
                yield self.rows(name, part)

        return Streamed(whole.dtype, whole.shape, parts)


# --- before a weight is read ------------------------------------------------------------------------------------------


def check(anatomy: Anatomy, recipe: Recipe) -> None:
    """Raise ValueError, in one sentence, where the model does not allow what the recipe's rotation does."""
    rotation = recipe.rotation
    if rotation is not None and rotation.residual and (refusal := rotation_refusal(anatomy)) is not None:
        raise ValueError(f"{refusal[:-1]} ({rotation.name}): choose a recipe without it")


def online_sites(anatomy: Anatomy, recipe: Recipe) -> list[dict[str, Map]]:
    """For every block the sites whose inputs pass an online map of the recipe's rotation, with that map."""
    if recipe.rotation is None:
        return [{}] * len(anatomy.blocks)
    found = []
    for index, part in enumerate(anatomy.blocks):
        maps = recipe.rotation.online(anatomy, index)
        found.append({site.name: maps[tap.name] for tap in part.taps if tap.name in maps for site in tap.sites})
    return found


def unties(anatomy: Anatomy, recipe: Recipe) -> bool:
    """Whether the head is stored by itself although the model shares it with the embedding."""
    return anatomy.tied and recipe.rotation is not None and recipe.rotation.residual


def learning_bytes(anatomy: Anatomy, recipe: Recipe, checkpoint: Checkpoint, window: int) -> int:
    """Memory for learning a rotation: fp32 parameters four times, if they are 16 bits in the files (they, merged ones,
    rounded ones, gradients), and the tape of one window.
    """
    if not isinstance(recipe.rotation, LearnedRotation):
        return 0
    block = anatomy.blocks[0]
    tape = 4 * window * sum(4 * sum(site.shape) for site in block.sites) * len(anatomy.blocks)
    return 8 * checkpoint.nbytes(checkpoint.names()) + tape


def notices(
    anatomy: Anatomy, recipe: Recipe, checkpoint: Checkpoint, window: int, device: torch.device | None
) -> Iterator[str]:
    """What a user should know of the recipe's rotation on this model, and what a learned one learns from."""
    rotation = recipe.rotation
    if rotation is None:
        return
    if unties(anatomy, recipe):
        size = checkpoint.nbytes([f"{anatomy.embedding}.weight"]) / 1e6
        yield f"{rotation.name} unties the head from the embedding, which takes {size:,.1f} MB more"
    if not anatomy.rotations.heads:
        yield f"{rotation.name} leaves values within heads as they are: this model's attention does not allow it"
    if recipe.folds and any(online_sites(anatomy, recipe)):
        names = "+".join(fold.name for fold in recipe.folds)
        yield f"{names} leaves the inputs alone that {rotation.name} maps online"
    if isinstance(rotation, LearnedRotation):
        batch = rotation.batch_of(max(1, window), device or torch.device("cpu"))
        size = learning_bytes(anatomy, recipe, checkpoint, window) / 1e9
        yield (
            f"{rotation.name} holds the whole model in memory while it learns, about {size:,.1f} GB, and takes "
            f"{batch * window} tokens a step ({rotation.name}.batch={batch})"
        )
