"""Seconds a Llama-3-8B-shaped block on one GPU, GPTQ and AWQ W4 g128, lowbit against llm-compressor in one call.

    python benchmarks/peer_blocks.py --peer-python PEER/bin/python [--methods gptq awq] [--samples 128] [--length 2048]

Both quantize random models of one block and of several on the same random tokens; a block is its share of the
difference, so that loading, writing and the start of CUDA do not count for either. lowbit takes nine blocks and
llm-compressor three: what starting takes differs by a second from run to run, which is as long as lowbit's block. Each
run is a process of its own; the first one of each, which compiles kernels and fills the disk's cache, is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from block_training import LLAMA_8B
from memory import make_model
from safetensors.torch import save_file

HERE = Path(__file__).parent
OUR_BLOCKS, PEER_BLOCKS = 9, 3
RECIPES = {"gptq": "gptq-w4a16-g128", "awq": "awq-w4a16-g128"}
OURS = """
import json, sys, time, torch, lowbit
from safetensors.torch import load_file
recipe, limit, model, tokens, output = sys.argv[1:]
torch.ones(1, device="cuda")
began = time.perf_counter()
rows = list(load_file(tokens)["calibration"])
lowbit.quantize(model, recipe, output, calibration=rows, gpu_memory=int(limit) << 30 if limit else None)
print(json.dumps({"seconds": time.perf_counter() - began, "peak": torch.cuda.max_memory_allocated()}))
"""


def main() -> None:
    """Make both models, run both tools by every method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--gpu-memory", type=int, default=6, help="GiB of lowbit's second row")
    parser.add_argument("--tokenizer", default="demo", help="model whose tokenizer the random models borrow")
    arguments = parser.parse_args()
    print("| method | tool | seconds a block | of | peak GPU memory |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        models = {
            blocks: str(make_model(Path(scratch) / f"{blocks}", arguments.tokenizer, shape(blocks)))
            for blocks in (1, OUR_BLOCKS, PEER_BLOCKS)
        }
        tokens = f"{scratch}/tokens.safetensors"
        ids = torch.randint(0, LLAMA_8B["vocab_size"], (arguments.samples, arguments.length))
        save_file({"calibration": ids}, tokens)
        for method in arguments.methods:
            ours = [sys.executable, "-c", OURS, RECIPES[method]]
            peer = [arguments.peer_python, str(HERE / "peers" / "llmcompressor_blocks.py"), method]
            tools = {
                "lowbit": (OUR_BLOCKS, [*ours, ""]),
                f"lowbit --gpu-memory {arguments.gpu_memory}GiB": (OUR_BLOCKS, [*ours, str(arguments.gpu_memory)]),
                "llm-compressor": (PEER_BLOCKS, peer),
            }
            medians = []
            for tool, (blocks, command) in tools.items():
                measured(command, models[1], tokens, scratch)
                runs = [difference(command, models, blocks, tokens, scratch) for _ in range(arguments.rounds)]
                seconds = [run["seconds"] for run in runs]
                medians.append(statistics.median(seconds))
                peak = max(run["peak"] for run in runs) / 2**30
                listed = ", ".join(f"{each:.2f}" for each in seconds)
                print(f"| {method} | {tool} | {medians[-1]:.2f} | {listed} | {peak:.1f} GiB |", flush=True)
            print(f"| {method} | | {medians[2] / medians[0]:.2f} times as long | | |", flush=True)


def shape(blocks: int) -> dict[str, Any]:
    """A model of so many blocks."""
    return {**LLAMA_8B, "num_hidden_layers": blocks}


def difference(command: list[str], models: dict[int, str], blocks: int, tokens: str, scratch: str) -> dict[str, float]:
    """Seconds of a block, by runs of one and of so many, and the peak of the larger run."""
    one, many = (measured(command, models[count], tokens, scratch) for count in (1, blocks))
    return {"seconds": (many["seconds"] - one["seconds"]) / (blocks - 1), "peak": many["peak"]}


def measured(command: list[str], model: str, tokens: str, scratch: str) -> dict[str, float]:
    """What one run printed of itself: its seconds and its peak of GPU memory in bytes."""
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        done = subprocess.run([*command, model, tokens, f"{output}/out"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
