"""The main job on the model in the package: quantize it by four methods at 4 and 3 bits, prove the cost, export, use.

Run with `make demo`, or `python examples/demo.py` where lowbit is installed. It takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import lowbit

METHODS = ("rtn", "gptq", "awq", "awq+gptq")
WINDOWS = {"window": 512, "limit": 32}
CALIBRATION = {"calibration": "demo", "samples": 16, "length": 512}
PROMPT = "The old man looked at the sea and"


def main() -> None:
    """Print the table, then what the exported model says."""
    console = Console()
    table = Table(
        "recipe",
        "perplexity",
        "KL",
        "bits/weight",
        "MB",
        "seconds",
        title="lowbit demo: 5.9 M parameters, packaged text",
    )
    original = lowbit.evaluate("demo", **WINDOWS)
    table.add_row(
        "original", f"{original.perplexity['demo'].perplexity:.2f}", "", "16", f"{original.size_bytes / 1e6:.1f}", ""
    )
    with tempfile.TemporaryDirectory() as scratch:
        for bits in (4, 3):
            table.add_section()
            for method in METHODS:
                recipe = f"{method}-w{bits}a16-g128"
                console.print(f"quantizing with {recipe} …", highlight=False)
                run = lowbit.quantize("demo", recipe, Path(scratch) / recipe, **CALIBRATION)
                report = lowbit.evaluate(run.path, against="demo", **WINDOWS)
                table.add_row(
                    recipe,
                    f"{report.perplexity['demo'].perplexity:.2f}",
                    f"{report.against.kl:.4f}",
                    f"{report.bits_per_weight:.3f}",
                    f"{report.size_bytes / 1e6:.1f}",
                    f"{run.seconds:.1f}",
                )
        console.print(table)
        exported = Path(scratch) / "compressed-tensors"
        console.print("exporting awq+gptq-w4a16-g128 to compressed-tensors, reloading it through transformers …")
        result = lowbit.export(Path(scratch) / "awq+gptq-w4a16-g128", exported, verify="transformers")
        console.print("\n".join(result.lines()), highlight=False, soft_wrap=True)
        console.print(f"\n{lowbit.generate(exported, PROMPT, tokens=40, temperature=0.7)}", highlight=False)
        if not result.passed:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
