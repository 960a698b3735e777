"""Perplexity and seconds of many recipes on one model, several at a time, as rows of JSON and a Markdown table.

    python benchmarks/methods.py MODEL --calibration calib.txt --texts wiki=test.txt:256 books=books.txt:128 \\
        --recipes rtn-w4a4 quarot+gptq-w4a4kv4 … --jobs 8 --json rows.jsonl

Without `--recipes` it is the whole grid of METHODS by SCHEMES, each with plain rounding and with GPTQ; with `--study
llama3` it is Table 1 of the low-bit LLaMA3 study, printed as the paper prints it. Calibration is
128 windows of 512 tokens (seed 0); perplexity is fp32 on windows of 512 that do not overlap. Every row is a process of
its own, spread over the GPUs there are; what the plan refuses, and what takes longer than `--limit`, is a row that says
so. Rows already in the file of `--json` are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

SCHEMES = ("w8a8", "w6a6", "w4a8", "w4a4", "w4a4kv4", "w4a16-g128", "w3a16-g128")
CACHES = ("w16a16kv4", "w16a16kv3", "w16a16kv2")
FLOATS = ("fp8", "wfp4afp8-g128", "nvfp4", "mxfp4")
METHODS = ("rtn", "smoothquant", "osplus", "omniquant", "affinequant", "quarot", "spinquant", "flatquant")
CHEAP = ("rtn", "smoothquant", "osplus", "quarot")
ROW = """
import json, sys, time, lowbit
model, recipe, output, calibration, texts, settings = json.loads(sys.argv[1])
began = time.perf_counter()
run = lowbit.quantize(model, recipe, output, calibration=calibration, samples=128, length=512, settings=settings)
seconds = time.perf_counter() - began
blocks = sum(block["seconds"] for block in run.blocks)
row = {"seconds": seconds, "bits": run.bits_per_weight, "paper_bits": run.paper_bits, "blocks": blocks}
for name, (file, limit) in texts.items():
    report = lowbit.evaluate(output, perplexity=[file], window=512, limit=limit)
    row[name] = report.perplexity[file].perplexity
print("ROW", json.dumps(row))
"""


def grid() -> list[str]:
    """Every method by every scheme, with plain rounding and GPTQ."""
    rounded = [f"{method}{end}" for method in METHODS for end in ("", "+gptq")]
    rounded = ["gptq" if name == "rtn+gptq" else name for name in rounded]
    caches = [f"{method}-{scheme}" for scheme in CACHES for method in ("rtn", "quarot", "spinquant", "flatquant")]
    floats = [f"{m}{end}-{s}" for s in FLOATS for m in CHEAP for end in ("", "+gptq") if f"{m}{end}" != "rtn+gptq"]
    return [f"{name}-{scheme}" for scheme in SCHEMES for name in rounded] + caches + floats


def study(name: str) -> list[str]:
    """The recipes of a study, in its order."""
    from lowbit.recipes.papers import PAPERS, PREFIX

    found = [f"{PREFIX}{paper}" for paper in PAPERS if paper.startswith(f"{name}/")]
    if not found:
        raise SystemExit(f"no recipe is called papers/{name}/…: `lowbit recipes` lists them")
    return found


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE:WINDOWS")
    parser.add_argument("--recipes", nargs="+", default=None)
    parser.add_argument("--study", help="the recipes papers/STUDY/…, for instance llama3")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="of methods that a recipe has")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="spread the jobs over this many GPUs")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one row")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    done = dict(finished(arguments.json))
    recipes = study(arguments.study) if arguments.study else arguments.recipes or grid()
    missing = [recipe for recipe in recipes if recipe not in done]
    lock, places = threading.Lock(), SimpleQueue[int]()
    for job in range(arguments.jobs):
        places.put(job)

    def work(recipe: str) -> None:
        place = places.get()
        row = {"recipe": recipe, **measure(arguments, recipe, place % arguments.gpus if arguments.gpus else None)}
        places.put(place)
        with lock:
            done[recipe] = row
            print(json.dumps(row), file=sys.stderr, flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    print(json.dumps(row), file=file)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(work, missing))
    texts = [text.partition("=")[0] for text in arguments.texts]
    if arguments.study:
        print_study(texts, {recipe: done[recipe] for recipe in recipes})
    else:
        print_table(texts, done)


def finished(file: Path | None, key: str = "recipe") -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of an earlier call by what they call themselves."""
    if file is not None and file.exists():
        for line in file.read_text().splitlines():
            row = json.loads(line)
            yield row[key], row


def measure(arguments: argparse.Namespace, recipe: str, gpu: int | None) -> dict[str, Any]:
    """Quantize and evaluate in a process of its own."""
    texts = files_of(arguments.texts)
    methods = recipe.partition("-")[0].split("+")
    settings = [setting for setting in arguments.settings if setting.split(".")[0] in methods]
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    with tempfile.TemporaryDirectory() as scratch:
        request = json.dumps([arguments.model, recipe, f"{scratch}/out", arguments.calibration, texts, settings])
        try:
            done = subprocess.run(
                [sys.executable, "-c", ROW, request],
                capture_output=True,
                text=True,
                timeout=arguments.limit,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"longer than {arguments.limit:.0f} s"}
    return row_of(done)


def files_of(texts: Sequence[str]) -> dict[str, tuple[str, int]]:
    """NAME=FILE:WINDOWS of the command line -> (file, windows) by name."""
    files = {}
    for text in texts:
        name, _, rest = text.partition("=")
        file, _, limit = rest.rpartition(":")
        files[name] = (file, int(limit))
    return files


def row_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The row that a process printed, or its last words."""
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if not rows:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    found: dict[str, Any] = json.loads(rows[-1][4:])
    return found


def print_table(texts: list[str], rows: dict[str, dict[str, Any]]) -> None:
    """Markdown, in the order in which rows were asked for."""
    print(f"| recipe | bits, paper | bits, file | {' | '.join(texts)} | seconds |")
    print("|---|---|---|" + "---|" * (len(texts) + 1))
    for recipe, row in rows.items():
        if "failed" in row:
            print(f"| {recipe} | | | {row['failed']} |{' |' * len(texts)}")
        else:
            found = " | ".join(f"{row[text]:.3f}" for text in texts)
            print(f"| {recipe} | {row['paper_bits']:.2f} | {row['bits']:.3f} | {found} | {row['seconds']:.0f} |")


def print_study(texts: list[str], rows: dict[str, dict[str, Any]]) -> None:
    """Markdown with a row's method, bits of weights and inputs and group, as papers print tables."""
    from lowbit.recipes import resolve

    print(f"| method | #W | #A | #G | {' | '.join(texts)} | bits, paper | bits, file | seconds |")
    print("|---|---|---|---|" + "---|" * (len(texts) + 3))
    for name, row in rows.items():
        scheme = resolve(name).recipe.scheme
        method, _, _ = name.rpartition("/")[2].partition("-")
        inputs = 16 if scheme.activations is None else scheme.activations.bits
        group = scheme.weights.group if scheme.weights is not None and scheme.weights.group > 0 else "-"
        if "failed" in row:
            print(f"| {method} | | {inputs} | {group} | {row['failed']} |" + " |" * (len(texts) + 2))
            continue
        found = " | ".join(f"{row[text]:.2f}" for text in texts)
        counted = f"{row['paper_bits']:.2f} | {row['bits']:.2f} | {row['seconds']:.0f}"
        print(f"| {method} | {row['paper_bits']:.3g} | {inputs} | {group} | {found} | {counted} |")


if __name__ == "__main__":
    main()
