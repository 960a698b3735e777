"""What `lowbit evaluate` found, as JSON and as a table: one object, so that file and screen cannot differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .divergence import Divergence
from .perplexity import Perplexity
from .tasks import TaskScores

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class EvaluationReport:
    """Results under the names the user gave; None is what was not measured.

    bits_per_weight: of the quantized sites; bits_per_parameter: of the whole file; size_bytes: of the weight files.
    """

    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    tasks: TaskScores = field(default_factory=dict)
    against: Divergence | None = None
    bits_per_weight: float | None = None
    bits_per_parameter: float | None = None
    size_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object; every key is always there, null where nothing was measured."""
        return asdict(self)

    def table(self) -> Table:
        """A two-column table for the screen."""
        from rich.table import Table

        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        for name, value in self._rows():
            table.add_row(name, value)
        return table

    def _rows(self) -> Iterator[tuple[str, str]]:
        for name, found in self.perplexity.items():
            yield f"perplexity {name}", f"{found.perplexity:.3f}  ({found.windows} windows of {found.window} tokens)"
        for task, metrics in self.tasks.items():
            for metric, score in metrics.items():
                value, stderr = score["value"], score["stderr"]
                yield f"{task} {metric}", f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
        if self.against is not None:
            yield "KL from the original", f"{self.against.kl:.5f} nats"
            yield "same first choice", f"{self.against.top1:.2%}"
            yield "cosine of the outputs", f"{self.against.cosine:.5f}"
        if self.bits_per_weight is not None:
            yield "bits per weight", f"{self.bits_per_weight:.3f}"
        if self.bits_per_parameter is not None:
            yield "bits per parameter", f"{self.bits_per_parameter:.3f}"
        if self.size_bytes is not None:
            yield "size on disk", f"{self.size_bytes / 1e6:,.1f} MB"
