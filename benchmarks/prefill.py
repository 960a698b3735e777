"""Seconds of reading a long prompt with a Llama-3-8B-shaped model of random weights: 16 bits against codes, in one run.

    python benchmarks/prefill.py [--blocks 32] [--batch 8] [--length 2048] [--schemes w8a8 fp8 …] [--compiled]

Linears of one input are joined first, as they are when a model writes (`runtime.siblings`). `-flat` puts FlatQuant's
online transforms in front of every linear: what they cost is the row beside the same scheme without. Every row is the
median of ten forward passes that end in one token's scores for each text; limits are the products at the measured rate
of a large one in bf16.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from dataclasses import replace

import torch
from decoding import SCHEMES, llama, random_layer
from torch import Tensor, nn

from lowbit.kernels.timing import limits
from lowbit.numerics.maps import Kronecker, Map, random_orthogonal
from lowbit.numerics.spec import Int, per_channel, per_token
from lowbit.runtime.fast import build, slow
from lowbit.runtime.siblings import merge

FORMATS = {**SCHEMES, "w4a4": (per_channel(Int(4), scale="float32"), per_token(Int(4)))}
ROUNDS = 10


def flat_map(name: str) -> Map:
    """FlatQuant's transform in front of a linear: across heads in front of o_proj, in two factors elsewhere."""
    sides = {"o_proj": (32, None), "down_proj": (112, 128)}.get(name.rpartition(".")[2], (64, 64))
    left, right = (None if side is None else random_orthogonal(side, side).float() for side in sides)
    return Kronecker(left, right, (sides[0], sides[1] or 128))


def quantize(model: nn.Module, scheme: str) -> None:
    """Put fast layers of random codes in place of a model's linears, the head aside."""
    weights, inputs = FORMATS[scheme.removesuffix("-flat")]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            path, _, leaf = name.rpartition(".")
            layer = random_layer(module, weights, inputs)
            if scheme.endswith("-flat"):
                layer = replace(layer, input_map=flat_map(name))
            setattr(model.get_submodule(path), leaf, build(layer, None, torch.bfloat16, "cuda"))
    assert not slow(model), slow(model)


@torch.no_grad()
def measure(model: nn.Module, ids: Tensor, compiled: bool) -> float:
    """Milliseconds of a forward pass."""

    def run() -> Tensor:
        scores: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
        return scores

    merge(model, run)
    forward = torch.compile(run, dynamic=False) if compiled else run
    for _ in range(3):
        forward()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        forward()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    """Print a row for 16 bits and one for every scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    choices = [*FORMATS, *(f"{name}-flat" for name in FORMATS)]
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "fp8", "w4a4", "w4a4-flat"], choices=choices)
    parser.add_argument("--compiled", action="store_true", help="let torch.compile fuse what lies between products")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rate = limits()[1] / 1e6
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.blocks} blocks, head in 16 bits")
    print(f"{arguments.batch} texts of {arguments.length} tokens, products in bf16 at {rate:.0f} TFLOP/s\n")
    print("| | ms | times bf16 | limit ms | peak GB |\n|---|---|---|---|---|")
    ids = torch.randint(0, 128000, (arguments.batch, arguments.length), device="cuda")
    base = 0.0
    for name in ("bf16", *arguments.schemes):
        gc.collect()
        torch.cuda.empty_cache()
        model = llama(arguments.blocks, arguments.length)
        matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]  # type: ignore[union-attr,operator]
        limit = 2e-9 * ids.numel() * sum(matrix.numel() for matrix in matrices) / rate
        del matrices
        if name != "bf16":
            quantize(model, name)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = measure(model, ids, arguments.compiled)
        base = base or found
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"| {name} | {found:.1f} | {base / found:.2f} | {limit:.1f} | {peak:.2f} |", flush=True)
        del model
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
