"""Perplexity of every weight-only method at several widths on one model, as a Markdown table.

    python benchmarks/accuracy.py MODEL --calibration calib.txt --texts wiki=test.txt:256 books=books.txt:128

Calibration is 128 windows of 512 tokens (seed 0); perplexity is fp32 on windows of 512 that do not overlap.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import lowbit

SCHEMES = ("w4a16-g128", "w4a16-g128-asym", "w3a16-g128", "w3a16-g128-asym", "w2a16-g64", "w2a16-g64-asym")
METHODS = ("rtn", "gptq", "awq", "awq+gptq")


def main() -> None:
    """Run the grid and print rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE:WINDOWS")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--set", dest="settings", nargs="*", default=[])
    arguments = parser.parse_args()
    texts = dict(text.split("=", 1) for text in arguments.texts)
    print(f"| scheme | method | bits | {' | '.join(texts)} | seconds |")
    print("|---|---|---|" + "---|" * (len(texts) + 1))
    print(f"| original | | 16 | {' | '.join(scores(arguments.model, texts)[0])} | |", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for scheme in arguments.schemes:
            for method in arguments.methods:
                output = Path(scratch) / f"{method}-{scheme}"
                began = time.perf_counter()
                lowbit.quantize(
                    arguments.model,
                    f"{method}-{scheme}",
                    output,
                    calibration=arguments.calibration,
                    samples=128,
                    length=512,
                    settings=[s for s in arguments.settings if s.split(".")[0] in method.split("+")],
                )
                seconds = time.perf_counter() - began
                found, bits = scores(str(output), texts)
                print(f"| {scheme} | {method} | {bits:.3f} | {' | '.join(found)} | {seconds:.0f} |", flush=True)


def scores(model: str, texts: dict[str, str]) -> tuple[list[str], float]:
    """(perplexity on every text, bits per weight)."""
    found = []
    bits = 16.0
    for text in texts.values():
        file, _, limit = text.rpartition(":")
        report = lowbit.evaluate(model, perplexity=[file], window=512, limit=int(limit))
        found.append(f"{report.perplexity[file].perplexity:.3f}")
        bits = report.bits_per_weight or bits
    return found, bits


if __name__ == "__main__":
    main()
