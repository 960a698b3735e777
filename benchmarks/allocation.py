"""Perplexity at equal bits per weight: chosen bits against equal bits, against more for the outer blocks or down_proj.

    python benchmarks/allocation.py MODEL --calibration calib.txt --texts wiki=test.txt:256 books=books.txt:128 \\
        --recipe gptq-g128 --budgets 2.5 3 3.5 --jobs 4 --json rows.jsonl

Mixtures made by hand start from the widest uniform width within the budget and spend the rest a width at a time: on
whole blocks, from both ends of the model inwards, or on down_proj, block after block, again and again. Uniform rows are
the widths beside every budget. Calibration is 128 windows of 512 tokens (seed 0); perplexity is fp32 on windows of 512
that do not overlap. Every row is a process of its own; rows already in the file of `--json` are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from methods import files_of, finished, row_of

from lowbit.prepare import prepare
from lowbit.recipes import widths
from lowbit.recipes.grammar import with_width
from lowbit.request import Request
from lowbit.stream.plan import Plan, site_bytes

ROW = """
import json, sys, time, lowbit
model, recipe, output, calibration, texts, options = json.loads(sys.argv[1])
began = time.perf_counter()
run = lowbit.quantize(model, recipe, output, calibration=calibration, samples=128, length=512, **options)
row = {"seconds": time.perf_counter() - began, "bits": run.bits_per_weight, "bytes": run.size_bytes}
for name, (file, limit) in texts.items():
    report = lowbit.evaluate(output, perplexity=[file], window=512, limit=limit)
    row[name] = report.perplexity[file].perplexity
if run.allocation is not None:
    row["table"] = run.allocation.table()
print("ROW", json.dumps(row))
"""

Mixture = dict[str, int]
"""Pattern -> width, of the linears that are not of the base's."""


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE:WINDOWS")
    parser.add_argument("--recipe", default="gptq-g128", help="a name that leaves the bits of weights open")
    parser.add_argument("--budgets", nargs="+", type=float, default=[2.5, 3.0, 3.5])
    parser.add_argument("--sensitivity", nargs="+", choices=("fisher", "kl"), default=["fisher"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    plans = {bits: _plan(arguments.model, with_width(arguments.recipe, bits)) for bits in widths(arguments.recipe)}
    rows = dict(_rows(arguments.recipe, arguments.budgets, arguments.sensitivity, plans))
    done, lock = dict(finished(arguments.json, "row")), threading.Lock()

    def work(name: str) -> None:
        row = {"row": name, **_measure(arguments, *rows[name])}
        with lock:
            done[name] = row
            print(json.dumps(row), file=sys.stderr, flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    print(json.dumps(row), file=file)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(work, [name for name in rows if name not in done]))
    _print_table([text.partition("=")[0] for text in arguments.texts], {name: done[name] for name in rows})


def _plan(model: str, recipe: str) -> Plan:
    return prepare(Request(model, f"rtn-{recipe.partition('-')[2]}")).plan


def _rows(
    recipe: str, budgets: list[float], kinds: list[str], plans: dict[int, Plan]
) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """(name, (recipe, options of `quantize`)) of every row."""
    for bits in budgets:
        base = max(width for width, plan in plans.items() if plan.bits_per_weight <= bits)
        wider = min(width for width in plans if width > base)
        for width in (base, wider):
            yield f"{recipe} uniform {width}", (with_width(recipe, width), {})
        by_hand = {"outer blocks": _outer_blocks(plans, base, bits), "down_proj": _down(plans, base, bits)}
        for way, mixture in by_hand.items():
            overrides = [f"{p}={with_width(recipe, width).partition('-')[2]}" for p, width in mixture.items()]
            yield f"{recipe} {bits:g} {way}", (with_width(recipe, base), {"overrides": overrides})
        for kind in kinds:
            yield f"{recipe} {bits:g} chosen by {kind}", (recipe, {"bits": bits, "sensitivity": kind})


def _outer_blocks(plans: dict[int, Plan], base: int, bits: float) -> Mixture:
    """As many blocks as fit, from both ends, one width up."""
    anatomy = plans[base].anatomy
    count = len(anatomy.blocks)
    order = sorted(range(count), key=lambda index: (min(index, count - 1 - index), index))
    names = [f"{anatomy.full_name(index, '')}.*" for index in order]
    return _spend(plans, base, bits, names, rounds=1)


def _down(plans: dict[int, Plan], base: int, bits: float) -> Mixture:
    """down_proj of block after block a width up, and from the first one again, while it fits."""
    anatomy = plans[base].anatomy
    names = [f"{anatomy.full_name(index, '')}.*.down_proj" for index in range(len(anatomy.blocks))]
    return _spend(plans, base, bits, names, rounds=len(plans))


def _spend(plans: dict[int, Plan], base: int, bits: float, names: list[str], rounds: int) -> Mixture:
    """Raise what the patterns match a width at a time, in turn, until the next step would exceed the budget."""
    found: Mixture = {}
    for _ in range(rounds):
        for name in names:
            wider = min((width for width in plans if width > found.get(name, base)), default=None)
            if wider is None or _bits(plans, base, {**found, name: wider}) > bits:
                return found
            found[name] = wider
    return found


def _bits(plans: dict[int, Plan], base: int, mixture: Mixture) -> float:
    """Bits per weight of a mixture."""
    stored, anatomy = 0, plans[base].anatomy
    for index, block in enumerate(anatomy.blocks):
        for site in block.sites:
            name = anatomy.full_name(index, site.name)
            width = next((width for pattern, width in mixture.items() if fnmatchcase(name, pattern)), base)
            recipe = plans[width].recipe
            assert recipe.scheme.weights is not None
            stored += site_bytes(site.shape, recipe.scheme.weights, recipe)
    return 8 * stored / plans[base].quantized_weights


def _measure(arguments: argparse.Namespace, recipe: str, options: dict[str, Any]) -> dict[str, Any]:
    """Quantize and evaluate in a process of its own."""
    texts = files_of(arguments.texts)
    with tempfile.TemporaryDirectory() as scratch:
        request = json.dumps([arguments.model, recipe, f"{scratch}/out", arguments.calibration, texts, options])
        done = subprocess.run([sys.executable, "-c", ROW, request], capture_output=True, text=True)
    return row_of(done)


def _print_table(texts: list[str], rows: dict[str, dict[str, Any]]) -> None:
    """Markdown, and how many linears have which width where that was chosen."""
    print(f"| row | bits | {' | '.join(texts)} | seconds |")
    print("|---|---|" + "---|" * (len(texts) + 1))
    for name, row in rows.items():
        if "failed" in row:
            print(f"| {name} | | {row['failed']} |{' |' * len(texts)}")
        else:
            found = " | ".join(f"{row[text]:.3f}" for text in texts)
            print(f"| {name} | {row['bits']:.3f} | {found} | {row['seconds']:.0f} |")
    for name, row in rows.items():
        if "table" in row:
            print("\n".join(["", name, *row["table"]]))


if __name__ == "__main__":
    main()
