"""A run directory: what a run intends, what it has finished, and how it goes on after being killed.

`plan.json` is written first and never changes; every finished block is one shard and one report, each under its name
only when complete; the index is written last and says that all is done. Nothing else is trusted on a restart. Timings
go to `journal.jsonl`, the only file that may differ between an interrupted and an uninterrupted run.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..formats import native
from ..formats.files import INDEX, read_shard, shard_header, write_index, write_json, write_shard
from ..numerics.qtensor import QAttention, QLayer
from .provenance import Piece

PLAN, JOURNAL, NAMES = "plan.json", "journal.jsonl", "names.json"
SCRATCH = "scratch"
ALLOCATION = "reports/allocation.json"
"""The widths that a budget was spent on, and what they were chosen from."""
ROTATION = "reports/rotation.safetensors"
"""The matrices of a learned rotation: merged into the model, so kept beside the reports and not among its weights."""


class RunDirectory:
    """The output of one run, blocks 0 … count - 1 and the rest of the model."""

    def __init__(self, path: Path, blocks: int) -> None:
        self.path = path
        self.blocks = blocks

    # --- opening ------------------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, plan: Mapping[str, Any], *, restart: bool) -> Iterator[None]:
        """Create the directory, or go on in it if it holds the same plan; locked against a second run meanwhile.

        Raises ValueError where it holds something else, another plan (naming the field), or another run at work.
        """
        self._claim(restart)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another run is writing to {self.path}: wait for it, or choose another --output"
                ) from None
            try:
                self._begin(plan)
                yield
            finally:
                (self.path / ".lock").unlink(missing_ok=True)

    def _claim(self, restart: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: choose a directory for --output")
        holds = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
        if holds and holds != [".lock"] and PLAN not in holds:
            raise ValueError(
                f"{self.path} holds something else ({', '.join(holds[:3])}): choose an empty or new directory"
            )
        if restart and PLAN in holds:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)

    def _begin(self, plan: Mapping[str, Any]) -> None:
        file = self.path / PLAN
        if not file.exists():
            write_json(file, plan)
            return
        try:
            before = json.loads(file.read_text(encoding="utf8"))
        except json.JSONDecodeError:
            raise ValueError(f"{file} cannot be read: start over with --restart") from None
        change = first_difference(before, json.loads(json.dumps(plan)))
        if change is not None:
            raise ValueError(
                f"{self.path} was begun with another plan, {change}: repeat the first command to resume, "
                "or start over with --restart"
            )

    @property
    def complete(self) -> bool:
        """Whether every block and the index are there."""
        return (self.path / INDEX).exists()

    # --- shards -------------------------------------------------------------------------------------------------------

    def shard(self, index: int) -> Path:
        """Shard 0 holds what lies outside the blocks; shard i + 1 holds block i."""
        return self.path / f"model-{index + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    def finished(self) -> int:
        """How many blocks from the first one on are complete."""
        return next((i for i in range(self.blocks) if not self._done(i)), self.blocks)

    def _done(self, block: int) -> bool:
        return self.shard(block + 1).exists() and self._report(block).exists()

    def write_block(
        self,
        block: int,
        prefix: str,
        layers: Mapping[str, QLayer | QAttention],
        rest: Mapping[str, Tensor],
        report: Any,
    ) -> None:
        """Store a finished block: the report first, so that a shard never lacks one."""
        named = {f"{prefix}.{name}": layer for name, layer in layers.items()}
        tensors = {f"{prefix}.{name}": tensor for name, tensor in rest.items()}
        for name, layer in named.items():
            tensors.update(native.pack(name, layer))
        self._report(block).parent.mkdir(exist_ok=True)
        write_json(self._report(block), report)
        write_shard(self.shard(block + 1), tensors, native.describe(named))

    def read_block(self, block: int, prefix: str) -> tuple[dict[str, QLayer | QAttention], dict[str, Tensor]]:
        """What `write_block` stored, by name within the block."""
        path = self.shard(block + 1)
        layers, rest = native.unpack(shard_header(path).metadata, read_shard(path))
        cut = len(prefix) + 1
        return {name[cut:]: layer for name, layer in layers.items()}, {
            name[cut:]: tensor for name, tensor in rest.items()
        }

    def finish(self) -> None:
        """Write the index: the run is complete."""
        scratch = self.path / SCRATCH
        if scratch.exists():
            shutil.rmtree(scratch)
        for snapshot in self.path.glob("hidden-*.safetensors"):
            snapshot.unlink()
        write_index(self.path, [self.shard(i).name for i in range(self.blocks + 1)])

    # --- reports ------------------------------------------------------------------------------------------------------

    def _report(self, block: int) -> Path:
        return self.path / "reports" / f"block-{block:05d}.json"

    def keep(self, name: str, data: Mapping[str, Any]) -> None:
        """Write something else that the run must find again."""
        (self.path / name).parent.mkdir(exist_ok=True)
        write_json(self.path / name, data)

    def report(self, block: int) -> dict[str, Any]:
        """What was reported of a finished block."""
        return dict(json.loads(self._report(block).read_text(encoding="utf8")))

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one line to the journal."""
        with (self.path / JOURNAL).open("a", encoding="utf8") as journal:
            journal.write(json.dumps(entry) + "\n")

    def journal(self) -> list[dict[str, Any]]:
        """Every line of the journal; a line cut short by a kill is dropped."""
        file, entries = self.path / JOURNAL, []
        for line in file.read_text(encoding="utf8").splitlines() if file.exists() else ():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return entries


def begun_with(path: Path) -> dict[str, Any]:
    """What plan.json of a directory says; nothing where there is none. One that cannot be read is refused later."""
    try:
        return dict(json.loads((path / PLAN).read_text(encoding="utf8")))
    except (OSError, ValueError):
        return {}


def first_difference(before: Any, after: Any, path: str = "") -> str | None:
    """The first field in which two plans differ, as a phrase; None if they agree."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            found = first_difference(before.get(key), after.get(key), f"{path}.{key}" if path else key)
            if found is not None:
                return found
        return None
    if before == after:
        return None
    return f"{path} was {_short(before)} and is now {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


class Named(Protocol):
    """A model's parameters and where they lie in a checkpoint: `Checkpoint`, or another tool's model."""

    def names(self, prefix: str = "") -> tuple[str, ...]:
        """See `Checkpoint`."""

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """See `Checkpoint`."""


def checkpoint_names(checkpoint: Named) -> dict[str, list[tuple[str, int, bool]]]:
    """Parameter -> its pieces' (checkpoint name, rows, transposed), where they are not simply itself."""
    names = {}
    for name in checkpoint.names():
        pieces = [
            (piece.name, len(piece.columns if piece.transposed else piece.rows), piece.transposed)
            for piece in checkpoint.pieces(name)
        ]
        if len(pieces) > 1 or pieces[0][0] != name or pieces[0][2]:
            names[name] = pieces
    return names
