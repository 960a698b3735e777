"""What the command line shows while it works (on stderr) and when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from .api import Quantized
    from .prepare import Prepared
    from .stream.allocate import Allocation


class _Bar:
    """A progress bar that appears with the first step and stays quiet where stderr is no terminal."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class BlockProgress(_Bar):
    """One step per block; the last block's error stands beside the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._console = console
        self._task: Any = None

    def on_block(self, index: int, count: int, report: Mapping[str, Any] | None) -> None:
        """A block has started (report None) or is finished."""
        if self._task is None:
            self._task = self._bar.add_task("quantizing", total=count)
        if report is None:
            self._bar.update(self._task, completed=index)
            return
        error = f"error {report['error_before']:.2e} -> {report['error_after']:.2e}"
        self._bar.update(self._task, completed=index + 1, description=f"{report['name']}  {error}")
        if not self._console.is_terminal:
            self._console.print(
                f"{report['name']}  {error}  {report['seconds']:.1f} s", highlight=False, soft_wrap=True
            )
        starved = report.get("experts", {}).get("rounded_to_nearest", [])
        if starved:
            self._console.print(
                f"note: {report['name']}: {len(starved)} expert linears saw too few tokens and were rounded to nearest "
                f"({', '.join(starved[:3])}…)",
                highlight=False,
                soft_wrap=True,
            )


class TextProgress(_Bar):
    """One bar per evaluated text."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._tasks: dict[str, Any] = {}

    def on_text(self, text: str, done: int, total: int) -> None:
        """`done` of `total` windows of `text` are scored."""
        if text not in self._tasks:
            self._tasks[text] = self._bar.add_task(text, total=total)
        self._bar.update(self._tasks[text], completed=done)


def plan_lines(prepared: Prepared) -> list[str]:
    """The plan in a few lines: formats, sizes, memory and time."""
    from .stream.plan import plan_summary

    plan = prepared.plan
    where = f"computing in {prepared.record['dtype']} on {prepared.device}"
    lines = [f"recipe {plan.recipe.name}: {len(plan.formats)} blocks, {where}"]
    if prepared.allocation is not None:
        lines += allocation_lines(prepared.allocation)
    for label, names in plan_summary(plan).items() if prepared.allocation is None else ():
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        lines.append(f"  {label}: {shown}")
    lines.append(
        f"bits per weight {plan.bits_per_weight:.3f} over {plan.quantized_weights / 1e6:,.1f} M quantized weights"
    )
    lines.append(
        f"memory about {plan.peak_bytes / 1e9:.1f} GB; {plan.flops / 1e12:,.2f} TFLOP, {_time(plan.flops, prepared)}"
    )
    return lines


def _time(flops: float, prepared: Prepared) -> str:
    """An estimate from the speed of a matrix product here and now."""
    from .stream.plan import matmul_rate

    seconds = flops / matmul_rate(prepared.dtype, prepared.device)
    return f"about {seconds / 60:.0f} minutes" if seconds > 120 else f"about {max(1, round(seconds))} seconds"


def allocation_lines(allocation: Allocation) -> list[str]:
    """How many linears of every kind have which width, and what is predicted of it."""
    return [
        *(f"  {line}" for line in allocation.table()),
        f"predicted: loss {allocation.loss:.4f} nats per token above the original's, files of at most "
        f"{allocation.size_bytes / 1e6:,.1f} MB",
    ]


def result_lines(result: Quantized) -> list[str]:
    """What a finished run says."""
    counted = "" if result.paper_bits is None else f" ({result.paper_bits:.2f} as papers count)"
    return [
        f"{result.path}: {result.bits_per_weight:.3f} bits per weight{counted}, {result.bits_per_parameter:.3f} per "
        f"parameter, {result.size_bytes / 1e6:,.1f} MB",
        f"{result.seconds:.1f} s, peak memory {result.peak_memory_bytes / 1e9:.2f} GB",
        *([] if result.allocation is None else allocation_lines(result.allocation)),
    ]
