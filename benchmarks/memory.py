"""Peak resident memory of quantizing a random Llama of 1.3 billion parameters (2.6 GB in bf16), RTN and GPTQ.

    python benchmarks/memory.py [--scratch DIR]

The model is made block by block; each run is a process of its own whose peak the kernel counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from lowbit.formats.files import write_index, write_shard

CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def main() -> None:
    """Make the model, run both recipes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--tokenizer", default="demo", help="model whose tokenizer the random model borrows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        model = make_model(Path(scratch) / "model", arguments.tokenizer)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        print(f"model on disk: {size / 1e9:.2f} GB\n")
        print("| recipe | peak resident | seconds | bits/weight |\n|---|---|---|---|")
        for recipe, options in (("rtn-w4a16-g128", []), ("gptq-w4a16-g128", ["--samples", "16", "--length", "512"])):
            output, report = f"{scratch}/{recipe}", f"{scratch}/{recipe}.json"
            command = [sys.executable, "-m", "lowbit", "quantize", str(model), "--recipe", recipe, "--output", output]
            subprocess.run([*command, "--json", report, *options], check=True, stdout=subprocess.DEVNULL)
            found = json.loads(Path(report).read_text())
            peak, seconds, bits = found["peak_memory_bytes"] / 1e9, found["seconds"], found["bits_per_weight"]
            print(f"| {recipe} | {peak:.2f} GB | {seconds:.0f} | {bits:.3f} |", flush=True)
            shutil.rmtree(output)


def make_model(path: Path, tokenizer: str, shape: Mapping[str, Any] = CONFIG) -> Path:
    """A random checkpoint, one shard per block."""
    from lowbit.formats.base import copy_companions
    from lowbit.formats.source import locate

    path.mkdir(parents=True)
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(path)
    copy_companions(locate(tokenizer), path)
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = d * config.num_key_value_heads // config.num_attention_heads
    attention = {f"self_attn.{name}_proj": (kv if name in "kv" else d, d) for name in "qkvo"}
    shapes = {**attention, "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    files = ["model-outside.safetensors"]
    outside = {"model.embed_tokens.weight": matrix(v, d), "model.norm.weight": ones(d)}
    if not config.tie_word_embeddings:
        outside["lm_head.weight"] = matrix(v, d)
    write_shard(path / files[0], outside)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ones(d)
        files.append(f"model-block-{layer:02d}.safetensors")
        write_shard(path / files[-1], tensors)
    write_index(path, files)
    return path


def matrix(rows: int, columns: int) -> torch.Tensor:
    """Random bf16 weights."""
    return torch.randn(rows, columns, dtype=torch.bfloat16) * columns**-0.5


def ones(width: int) -> torch.Tensor:
    """A norm's gain."""
    return torch.ones(width, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
