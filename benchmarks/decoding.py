"""Tokens per second at batch 1 of a Llama-3-8B-shaped model with random weights: 16 bits against codes, in one run.

    python benchmarks/decoding.py [--blocks 32] [--schemes w4 w8 w8a8 fp8] [--kv kv8 kv4 kivi2] [--compiled]
                                  [--prompt 128] [--tokens 128]

Every model decodes by the same loop (`runtime.decode`): a cache of fixed length and a recorded step. Weights are made
on the device, so that no checkpoint of 16 GB is needed; speed does not depend on their values. Seconds are those of
an answer in which every step is replayed, less those of one that ends after its first token; medians of five. `--kv`
adds rows whose keys and values are kept as codes, to every scheme; what they gain shows behind a long prompt.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from torch import nn

from lowbit.kernels.timing import limits
from lowbit.modules.attention import attach, attention_modules, detach
from lowbit.numerics.grid import Grid
from lowbit.numerics.kv import KV, kivi
from lowbit.numerics.qtensor import QLayer, QTensor, QWeight
from lowbit.numerics.spec import E2M1, E4M3, Int, Spec, mx, nvfp4, per_channel, per_group, per_token
from lowbit.runtime.decode import Decoder
from lowbit.runtime.fast import build, slow

HEAD = per_group(Int(8), 128)
"""The format of the head in schemes that end in -head8."""
SCHEMES: dict[str, tuple[Spec, Spec | None]] = {
    "w4": (per_group(Int(4), 128), None),
    "w4-head8": (per_group(Int(4), 128), None),
    "w4-asym": (per_group(Int(4, "asymmetric"), 128), None),
    "w3": (per_group(Int(3), 128), None),
    "w2": (per_group(Int(2, "asymmetric"), 64), None),
    "w8": (per_group(Int(8), 128), None),
    "nvfp4": (nvfp4(), None),
    "mxfp4": (mx(E2M1), None),
    "w8a8": (per_channel(Int(8), scale="float32"), per_token(Int(8))),
    "fp8": (per_channel(E4M3, scale="float32"), per_token(E4M3)),
}

CACHES: dict[str, KV] = {
    "kv8": KV(8, 8),
    "kv4": KV(4, 4),
    "kv4-g32": KV(4, 4, "group", 32),
    "kv2-g32": KV(2, 2, "group", 32),
    "kivi4": kivi(4, 4),
    "kivi2": kivi(2, 2),
}


def llama(blocks: int, length: int) -> nn.Module:
    """Llama-3-8B's shapes in bf16, of random weights, on the device, for texts of this length."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=max(8192, length), rms_norm_eps=1e-5,
        dtype=torch.bfloat16, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cuda")
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(0, 0.02)
    rotary = model.model.rotary_emb
    rotary.inv_freq = 1 / (500000.0 ** (torch.arange(0, 128, 2, device="cuda") / 128))
    return model.eval().requires_grad_(False)


def random_layer(linear: nn.Linear, weights: Spec, inputs: Spec | None) -> QLayer:
    """A layer of a linear's shape with random codes and plausible scales."""
    rows, columns = linear.weight.shape
    number = weights.number
    if isinstance(number, Int):
        kind = torch.int8 if number.signed else torch.uint8
        codes = torch.randint(number.low, number.high + 1, (rows, columns), device="cuda", dtype=kind)
    elif number == E4M3:
        codes = torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = torch.randint(0, 1 << number.bits, (rows, columns), device="cuda", dtype=torch.uint8)
    groups = 1 if weights.group == -1 else columns // weights.group
    scale = torch.full((rows, groups), 2.0 ** (-5 - min(number.bits, 7)), device="cuda")
    zero = torch.full_like(scale, 2.0 ** (number.bits - 1)) if isinstance(number, Int) and not number.signed else None
    outer = scale[:1, :1] if weights.relative else None
    return QLayer(QWeight((QTensor(codes, Grid(weights, scale, zero, outer)),)), inputs)


def quantize(model: nn.Module, weights: Spec, inputs: Spec | None, head: Spec | None) -> None:
    """Put fast layers of random codes in place of a model's linears; the head keeps 16 bits without a format."""
    for name, module in list(model.named_modules()):
        spec, given = (head, None) if name == "lm_head" else (weights, inputs)
        if isinstance(module, nn.Linear) and spec is not None:
            path, _, leaf = name.rpartition(".")
            layer = build(random_layer(module, spec, given), None, torch.bfloat16, "cuda")
            setattr(model.get_submodule(path), leaf, layer)
    assert not slow(model), slow(model)


def store(model: nn.Module, kv: KV | None) -> None:
    """Let a model keep its keys and values in a format, or in 16 bits."""
    for _, attention in list(attention_modules(model)):
        detach(attention)
        if kv is not None:
            attach(attention, kv)


def cache_bytes(decoder: Decoder) -> int:
    """What a decoder's cache takes."""
    layers = decoder._cache.layers
    return sum(getattr(layer, "bytes", None) or layer.keys.nbytes + layer.values.nbytes for layer in layers)


def measure(model: nn.Module, prompt: int, tokens: int, compiled: bool) -> tuple[float, float, int]:
    """(tokens per second, seconds until the first answer's end, bytes of the cache) of one text."""
    ids = torch.randint(0, 128000, (1, prompt), device="cuda")
    decoder = Decoder(model, prompt + tokens, compiled=compiled)  # type: ignore[arg-type]

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        decoder(ids, count)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    first = seconds(tokens)
    seconds(1)
    speed = statistics.median((tokens - 1) / (seconds(tokens) - seconds(1)) for _ in range(5))
    return speed, first, cache_bytes(decoder)


def main() -> None:
    """Print a row for 16 bits and one for every scheme, with every kind of cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--schemes", nargs="*", default=["w4", "w8a8", "fp8"], choices=SCHEMES)
    parser.add_argument("--kv", nargs="+", default=[], choices=CACHES)
    parser.add_argument("--compiled", action="store_true", help="let torch.compile fuse what lies between products")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rates = limits()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.blocks} blocks, head in 16 bits")
    print(f"copy {rates[0] / 1e6:.2f} TB/s, prompt {arguments.prompt}, {arguments.tokens} tokens\n")
    print("| | tokens/s | times bf16 | GB of weights | GB of cache | limit tokens/s | first answer s |")
    print("|---|---|---|---|---|---|---|")
    base = 0.0
    for name in ("bf16", *arguments.schemes):
        gc.collect()  # a recorded step holds its model
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = llama(arguments.blocks, arguments.prompt + arguments.tokens)
        if name != "bf16":
            quantize(model, *SCHEMES[name], HEAD if name.endswith("head8") else None)
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated() - before
        read = held - model.model.embed_tokens.weight.nbytes  # type: ignore[union-attr,operator]
        for kind in (None, *arguments.kv):
            store(model, None if kind is None else CACHES[kind])
            speed, first, cache = measure(model, arguments.prompt, arguments.tokens, arguments.compiled)
            base = base or speed
            limit = 1e6 * rates[0] / (read + cache)
            label = name if kind is None else f"{name} {kind}"
            print(
                f"| {label} | {speed:.1f} | {speed / base:.2f} | {held / 1e9:.2f} | {cache / 1e9:.3f} | {limit:.0f} | "
                f"{first:.1f} |",
                flush=True,
            )
            torch._dynamo.reset()
        del model


if __name__ == "__main__":
    main()
