"""The tables of `lowbit speed`: their rows, and how they are told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """Microseconds of one piece of work: the limit, torch in 16 bits or step by step, its own operator, and ours."""

    work: str
    tokens: int
    limit: float
    plain: float
    library: float | None
    lowbit: float | None

    @property
    def times(self) -> float | None:
        """How many times faster than plain torch."""
        return None if self.lowbit is None else self.plain / self.lowbit


@dataclass
class Speed:
    """Tables by name, and what could not be measured."""

    device: str
    torch: str
    copy_bytes_per_second: float
    product_flops: float
    tables: dict[str, list[Row]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON of `lowbit speed --json`."""
        rows = {name: [{**asdict(row), "times": row.times} for row in rows] for name, rows in self.tables.items()}
        return {**asdict(self), "tables": rows}

    def lines(self) -> Iterator[str]:
        """What the screen says, in Markdown."""
        yield f"{self.device}, torch {self.torch}"
        rates = self.copy_bytes_per_second / 1e9, self.product_flops / 1e12
        yield f"copy {rates[0]:,.0f} GB/s, bf16 product {rates[1]:,.2f} TFLOP/s"
        for name, rows in self.tables.items():
            yield f"\n{name}, microseconds\n"
            yield "| | M | limit | torch | its own operator | lowbit | times |"
            yield "|---|---|---|---|---|---|---|"
            for row in rows:
                found = (row.limit, row.plain, row.library, row.lowbit)
                cells = ["–" if value is None else f"{value:.1f}" for value in found]
                times = "–" if row.times is None else f"{row.times:.2f}"
                yield f"| {' | '.join([row.work, str(row.tokens), *cells, times])} |"
        yield from (f"\nmissing: {reason}" for reason in self.missing)
