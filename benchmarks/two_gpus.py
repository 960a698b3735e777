"""Seconds a Llama-3-8B-shaped block on one GPU and on several, in the same lanes, and whether the files are the same.

    python benchmarks/two_gpus.py [--gpus 1 2] [--methods gptq gptq-at-once awq rtn] [--samples 128] [--length 2048]

Random models of one block and of three are quantized on the same random tokens; a block is half the difference, so
that starting processes, loading and writing do not count. Each run is a process of its own, which starts one for each
GPU if there are several. The first run of each kind, which compiles kernels and fills the disk's cache, is not counted.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from block_training import LLAMA_8B
from memory import make_model
from safetensors.torch import save_file

METHODS = {
    "gptq": ("gptq-w4a16-g128",),
    "gptq-at-once": ("gptq-w4a16-g128", "gptq.true_sequential=false"),
    "awq": ("awq-w4a16-g128",),
    "awq+gptq": ("awq+gptq-w4a16-g128",),
    "rtn": ("rtn-w4a16-g128",),
}
RUN = """
import json, sys, time, lowbit
from safetensors.torch import load_file
model, tokens, output, gpus, lanes, recipe, *settings = sys.argv[1:]
windows = list(load_file(tokens)["calibration"])
began = time.perf_counter()
done = lowbit.quantize(model, recipe, output, calibration=windows, settings=settings, gpus=int(gpus), lanes=int(lanes))
seconds = [block["seconds"] for block in done.blocks]
print(json.dumps({"seconds": time.perf_counter() - began, "memory": done.peak_memory_bytes, "last": seconds[-1]}))
"""


def main() -> None:
    """Make both models, run every method on every number of GPUs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--lanes", type=int, help="by default the most GPUs; every number has to divide it")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["gptq", "gptq-at-once", "awq"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokenizer", default="demo", help="model whose tokenizer the random models borrow")
    arguments = parser.parse_args()
    lanes = arguments.lanes or max(arguments.gpus)
    print(f"{torch.cuda.get_device_name()}, {lanes} lanes, {arguments.samples} x {arguments.length} tokens")
    print("| method | GPUs | seconds a block | of | times as fast | files as on the first | host memory |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        models = {blocks: make_model(scratch / f"{blocks}", arguments.tokenizer, shape(blocks)) for blocks in (1, 3)}
        ids = torch.randint(0, LLAMA_8B["vocab_size"], (arguments.samples, arguments.length))
        save_file({"calibration": ids}, scratch / "tokens.safetensors")
        for method in arguments.methods:
            compare(method, arguments.gpus, lanes, arguments.rounds, models, scratch)


def shape(blocks: int) -> dict[str, object]:
    """A model of so many blocks."""
    return {**LLAMA_8B, "num_hidden_layers": blocks}


def compare(method: str, gpus: list[int], lanes: int, rounds: int, models: dict[int, Path], scratch: Path) -> None:
    """The rows of one method."""
    medians: list[float] = []
    for count in gpus:
        measured(method, count, lanes, models[1], scratch)
        runs = []
        for _ in range(rounds):
            one, three = (measured(method, count, lanes, models[blocks], scratch) for blocks in (1, 3))
            runs.append((three["seconds"] - one["seconds"]) / 2)
        medians.append(statistics.median(runs))
        same = "yes" if equal(place(scratch, gpus[0], 3), place(scratch, count, 3)) else "NO"
        listed = ", ".join(f"{seconds:.2f}" for seconds in runs)
        print(
            f"| {method} | {count} | {medians[-1]:.2f} | {listed} (the last block {three['last']:.2f}) "
            f"| {medians[0] / medians[-1]:.2f} | {same} | {three['memory'] / 2**30:.1f} GiB |",
            flush=True,
        )
    for count in gpus:
        shutil.rmtree(place(scratch, count, 3))


def place(scratch: Path, gpus: int, blocks: int) -> Path:
    """Where the model of so many blocks goes that so many GPUs have quantized."""
    return scratch / f"out-{gpus}-{blocks}"


def measured(method: str, gpus: int, lanes: int, model: Path, scratch: Path) -> dict[str, float]:
    """What one run printed of itself; of the larger model the files stay."""
    blocks = int(model.name)
    output = place(scratch, gpus, blocks)
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-c", RUN, str(model), str(scratch / "tokens.safetensors"), str(output)]
    command += [str(gpus), str(lanes), *METHODS[method]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    if blocks == 1:
        shutil.rmtree(output)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def equal(one: Path, other: Path) -> bool:
    """Whether two runs wrote the same shards, byte for byte."""
    names = sorted(file.name for file in one.glob("*.safetensors"))
    assert names == sorted(file.name for file in other.glob("*.safetensors")) and names
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


if __name__ == "__main__":
    main()
