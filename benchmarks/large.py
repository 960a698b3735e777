"""Large models from disk to finished shards on one GPU: seconds in all and a block, and the peak of GPU memory.

    python benchmarks/large.py llama3-8b --blocks 32 [--recipes gptq-w4a16-g128 awq-w4a16-g128] [--gpu-memory 6]

Weights and text are random, shapes are those of the models named. `whole` is what all blocks of the model would take at
the same rate, where fewer are run. The files were just written, so reading them is reading the system's cache; a short
run before compiles the kernels. `--profile` runs once more and tells the seconds of every phase (`phases.py`).
A mixture's block takes `--blocks 2` (DeepSeek's first one is dense) and `--vocabulary 1000`, which saves making tables.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import phases
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MixtralConfig

import lowbit
from lowbit.formats.base import copy_companions
from lowbit.formats.source import locate

SHAPES: dict[str, tuple[type, int, dict[str, Any]]] = {
    "llama3-8b": (LlamaConfig, 32, {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}),
    "llama3-70b": (LlamaConfig, 80, {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}),
    "mixtral-8x7b": (MixtralConfig, 32, {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}),
    "deepseek-lite": (
        DeepseekV3Config,
        27,
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
    ),
}
"""Configuration, blocks of the whole model, and shape. `deepseek-lite` is DeepSeek-V2-Lite's shape in V3's code, its
dense block of 10944 widened to whole groups."""


def main() -> None:
    """Make the model, quantize it by every recipe, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--recipes", nargs="+", default=["gptq-w4a16-g128"])
    parser.add_argument("--gpu-memory", type=float, help="GiB that a run is to take")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--profile", action="store_true", help="seconds of each phase, in a run of its own")
    parser.add_argument("--tokenizer", default="demo", help="model whose tokenizer the random model borrows")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    whole = SHAPES[arguments.shape][1]
    windows = list(torch.randint(0, arguments.vocabulary, (arguments.samples, arguments.length)))
    limit = None if arguments.gpu_memory is None else int(arguments.gpu_memory * 2**30)
    print(f"| {arguments.shape} | seconds, {arguments.blocks} blocks | a block | whole ({whole}) | peak GPU memory |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        model = make(Path(scratch) / "model", arguments)
        for recipe in arguments.recipes:
            lowbit.quantize(model, recipe, f"{scratch}/short", calibration=windows[:2], restart=True)
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            done = lowbit.quantize(model, recipe, f"{scratch}/{recipe}", calibration=windows, gpu_memory=limit)
            total = time.perf_counter() - began
            block = statistics.median(report["seconds"] for report in done.blocks[1:] or done.blocks)
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"| {recipe} | {total:.1f} | {block:.2f} | {total * whole / arguments.blocks:.0f} | {peak:.1f} GiB |",
                flush=True,
            )
            if arguments.profile:
                profile(model, recipe, f"{scratch}/profiled", windows, limit)


def profile(model: Path, recipe: str, output: str, windows: list[torch.Tensor], limit: int | None) -> None:
    """Run once more and print seconds by phase, over all blocks."""
    with phases.measured() as seconds:
        done = lowbit.quantize(model, recipe, output, calibration=windows, gpu_memory=limit, restart=True)
    print("  blocks:", ", ".join(f"{report['seconds']:.2f}" for report in done.blocks))
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {name}: {spent:.2f}", flush=True)


def make(path: Path, arguments: argparse.Namespace) -> Path:
    """A random checkpoint of the shape, made on the GPU."""
    kind, _, shape = SHAPES[arguments.shape]
    defaults = {"num_key_value_heads": 8, "vocab_size": arguments.vocabulary, "max_position_embeddings": 8192}
    config = kind(**{**defaults, **shape, "num_hidden_layers": arguments.blocks, "tie_word_embeddings": False})
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size="4GB")
    copy_companions(locate(arguments.tokenizer), path)
    del model
    torch.cuda.empty_cache()
    return path


if __name__ == "__main__":
    main()
