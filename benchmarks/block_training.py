"""Seconds a block of the trained methods on Llama-3-8B-shaped blocks (random weights, random tokens) on one GPU.

    python benchmarks/block_training.py --recipes flatquant-w4a4kv4 [--samples 128] [--length 2048] [--set …]

The model has two such blocks and goes through the whole pipeline; the second block is timed beside the first,
which carries the start of CUDA. `--profile` prints where the device's time goes in that run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from memory import make_model

import lowbit

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Make the model, run every recipe, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--set", dest="settings", nargs="*", default=[])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tokenizer", default="demo", help="model whose tokenizer the random model borrows")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    windows = list(torch.randint(0, LLAMA_8B["vocab_size"], (arguments.samples, arguments.length)))
    print("| recipe | seconds, first block | second block | error before | after | peak GPU memory |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model", arguments.tokenizer, LLAMA_8B)
        for recipe in arguments.recipes:
            torch.cuda.reset_peak_memory_stats()
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) if arguments.profile else torch.no_grad() as profile:
                done = lowbit.quantize(
                    model, recipe, f"{scratch}/{recipe}", calibration=windows, settings=arguments.settings
                )
            first, second = done.blocks
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"| {recipe} | {first['seconds']:.1f} | {second['seconds']:.1f} | {second['error_before']:.3g} "
                f"| {second['error_after']:.3g} | {peak:.1f} GiB |",
                flush=True,
            )
            if arguments.profile:
                print(
                    profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
                )


if __name__ == "__main__":
    main()
