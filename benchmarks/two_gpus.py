"""Seconds a Llama-3-8B-shaped block on one GPU and on several, in the same lanes, and whether the files are the same.

    python benchmarks/two_gpus.py [--gpus 1 2] [--methods gptq gptq-at-once awq rtn] [--samples 128] [--length 2048]

A random model of a few blocks is quantized on random tokens. A block's seconds are those from the end of the first one,
which compiles kernels, to the end of the last one, over their number: starting processes and reading the text do not
count, writing shards does. Each run is a process of its own, which starts one for each GPU if there are several.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
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
began, ends = time.perf_counter(), []
def hear(block, blocks, report):
    if report is not None:
        ends.append(time.perf_counter())
done = lowbit.quantize(model, recipe, output, calibration=windows, settings=settings, gpus=int(gpus), lanes=int(lanes),
                       on_block=hear)
block = (ends[-1] - ends[0]) / (len(ends) - 1)
print(json.dumps({"block": block, "first": ends[0] - began, "memory": done.peak_memory_bytes}))
"""


def main() -> None:
    """Make the model, run every method on every number of GPUs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--lanes", type=int, help="by default the most GPUs; every number has to divide it")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["gptq", "gptq-at-once", "awq"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--tokenizer", default="demo", help="model whose tokenizer the random model borrows")
    arguments = parser.parse_args()
    lanes = arguments.lanes or max(arguments.gpus)
    print(f"{torch.cuda.get_device_name()}, {lanes} lanes, {arguments.samples} x {arguments.length} tokens")
    print("| method | GPUs | seconds a block | times as fast | files as on the first | until the first ends | memory |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shape = {**LLAMA_8B, "num_hidden_layers": arguments.blocks}
        make_model(scratch / "model", arguments.tokenizer, shape)
        ids = torch.randint(0, LLAMA_8B["vocab_size"], (arguments.samples, arguments.length))
        save_file({"calibration": ids}, scratch / "tokens.safetensors")
        for method in arguments.methods:
            compare(method, arguments.gpus, lanes, scratch)


def compare(method: str, gpus: list[int], lanes: int, scratch: Path) -> None:
    """The rows of one method."""
    base = 0.0
    for count in gpus:
        found = measured(method, count, lanes, scratch)
        base = base or found["block"]
        same = "yes" if equal(scratch / f"{gpus[0]}", scratch / f"{count}") else "NO"
        print(
            f"| {method} | {count} | {found['block']:.2f} | {base / found['block']:.2f} | {same} "
            f"| {found['first']:.1f} s | {found['memory'] / 2**30:.1f} GiB of the host |",
            flush=True,
        )
    for count in gpus:
        shutil.rmtree(scratch / f"{count}")


def measured(method: str, gpus: int, lanes: int, scratch: Path) -> dict[str, float]:
    """What one run printed of itself; its files stay."""
    command = [sys.executable, "-c", RUN, *(str(scratch / name) for name in ("model", "tokens.safetensors", f"{gpus}"))]
    command += [str(gpus), str(lanes), *METHODS[method]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def equal(one: Path, other: Path) -> bool:
    """Whether two runs wrote the same shards, byte for byte."""
    names = sorted(file.name for file in one.glob("*.safetensors"))
    assert names == sorted(file.name for file in other.glob("*.safetensors")) and names
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


if __name__ == "__main__":
    main()
