"""Linears and runs of tiny models in every format that compressed-tensors carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from exported import write_run
from torch import Tensor, nn

from lowbit.formats.files import write_json
from lowbit.graph.skeleton import build_skeleton, model_from_config, unfuse_experts
from lowbit.numerics.grid import Grid, fit_range, grid_from_range
from lowbit.numerics.maps import Map
from lowbit.numerics.qtensor import QAttention, QLayer, QTensor, QWeight
from lowbit.numerics.spec import (
    E2M1,
    E2M3,
    E4M3,
    Int,
    Spec,
    mx,
    nvfp4,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)

Formats = tuple[Spec, Spec | None]

W4, W3 = per_group(Int(4), 32), per_group(Int(3), 32)
W8A8: Formats = (per_channel(Int(8), scale="float32"), per_token(Int(8)))
W8A8_STATIC: Formats = (per_tensor(Int(8), scale="float32"), per_tensor(Int(8), scale="float32"))
FP8: Formats = (per_channel(E4M3, scale="float32"), per_token(E4M3))
FP8_STATIC: Formats = (per_tensor(E4M3, scale="float32"), per_tensor(E4M3, scale="float32"))

CASES: dict[str, Formats] = {
    **{f"w{b}": (per_group(Int(b), 32), None) for b in range(1, 9)},
    **{f"w{b}-asym": (per_group(Int(b, "asymmetric"), 32), None) for b in range(1, 9)},
    "w4-channel": (per_channel(Int(4)), None),
    "w4-channel-asym": (per_channel(Int(4, "asymmetric")), None),
    "w4-wide-group": (per_group(Int(4), 128), None),
    "w4-restricted": (per_group(Int(4, "symmetric-restricted"), 16), None),
    "w4-unsigned": (per_group(Int(4, "symmetric-unsigned"), 16), None),
    "w4-raw": (per_group(Int(4, "asymmetric-raw"), 16), None),
    "w4-float32-scales": (per_group(Int(4), 32, scale="float32"), None),
    "w4a8": (W4, per_token(Int(8))),
    "w4a8-static": (W4, per_tensor(Int(8))),
    "w8a8": W8A8,
    "w8a8-group": (per_group(Int(8), 32), per_token(Int(8))),
    "w8a8-static": W8A8_STATIC,
    "w8a8-asym": (per_channel(Int(8, "asymmetric"), scale="float32"), per_token(Int(8))),
    "w8a8-tensor-asym": (per_tensor(Int(8, "asymmetric")), per_token(Int(8))),
    "w8a8-unsigned": (per_channel(Int(8, "symmetric-unsigned"), scale="float32"), per_token(Int(8))),
    "fp8": FP8,
    "fp8-static": FP8_STATIC,
    "fp8-group": (per_group(E4M3, 32, scale="float32"), per_token(E4M3)),
    "wfp8a16": (per_channel(E4M3, scale="float32"), None),
    "w4a4": (W4, per_token(Int(4))),
    "w4a8-input-groups": (W4, Spec(Int(8), (1, 32), "float32", dynamic=True)),
    "w4afp8": (W4, per_token(E4M3)),
    "fp8-block": (per_block(E4M3, 32), Spec(E4M3, (1, 32), "float32", dynamic=True)),
    "fp8-block-a16": (Spec(E4M3, (32, 64), "float32"), None),
    "nvfp4": (nvfp4(), nvfp4()),
    "nvfp4a16": (nvfp4(), None),
    "mxfp4": (mx(E2M1), mx(E2M1, scale="e8m0-even", dynamic=True)),
    "mxfp4a16": (mx(E2M1, scale="e8m0-ceil"), None),
    "mxfp4afp8": (mx(E2M1), Spec(E4M3, (1, 32), "float32", dynamic=True)),
    "mxfp6": (mx(E2M3), mx(E2M3, scale="e8m0-even", dynamic=True)),
    "mxfp6a16": (mx(E2M3), None),
    "mxfp8a16": (mx(E4M3), None),
}
SMALL = tuple(case for case in CASES if case.startswith(("nvfp4", "mxfp4", "mxfp6")))
"""Weights that the package dequantizes to bfloat16."""


def quantize(weight: Tensor, formats: Formats) -> QLayer:
    """Rounded to nearest on the min-max grid; static inputs get a range of ±3."""
    weights, inputs = formats
    grid = fit_range(weight.float(), weights)
    static = inputs is not None and not inputs.dynamic
    input_grid = None
    if static and inputs is not None:
        input_grid = grid_from_range(torch.tensor([[-2.0]]), torch.tensor([[3.0]]), inputs)
        input_grid = input_grid if input_grid.outer is None else Grid(inputs, input_grid.outer)
    return QLayer(QWeight((QTensor(grid.encode(weight.float()), grid),)), inputs, input_grid)


def layer(case: str, shape: tuple[int, int] = (40, 96)) -> QLayer:
    return quantize(torch.randn(shape) + 0.3, CASES[case])


# --- a whole model ----------------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}


@dataclass
class Run:
    """A finished run directory, the model that lowbit loads from it in fp32, and its skeleton."""

    path: Path
    reference: nn.Module
    skeleton: nn.Module


def make_run(  # type: ignore[no-untyped-def]
    path: Path,
    config,
    formats: Mapping[str, Formats | None],
    *,
    maps: Mapping[str, Map] | None = None,
    attention: QAttention | None = None,
) -> Run:
    """Quantize a random model; the last pattern that matches a linear's name gives its formats.

    `maps` are applied online to the inputs of linears by their last name; `attention` is every attention's cache.
    """
    model = model_from_config(config).to(torch.bfloat16)
    unfuse_experts(model)
    rest = dict(model.state_dict())
    layers: dict[str, QLayer | QAttention] = {}
    if config.tie_word_embeddings:
        del rest["lm_head.weight"]
    for name, module in model.named_modules():
        chosen = [given for pattern, given in formats.items() if fnmatchcase(name, pattern)]
        if chosen and chosen[-1] is not None and module._parameters.get("weight") is not None:
            weight, map = rest.pop(f"{name}.weight").float(), (maps or {}).get(name.rpartition(".")[2])
            layer = quantize(weight if map is None else map.inverse_weight(weight), chosen[-1])
            layers[name] = replace(layer, input_map=map)
        if attention is not None and name.endswith("self_attn"):
            layers[name] = attention
    reference = write_run(path, model, layers, rest)
    write_json(path / "plan.json", {})
    write_json(path / "tokenizer.json", {"some": "tokens"})
    return Run(path, reference, build_skeleton(config))


def llama(**changes: object):  # type: ignore[no-untyped-def]
    from transformers import LlamaConfig

    return LlamaConfig(**{**TINY, **changes})


def windows(count: int = 2, length: int = 24) -> Tensor:
    return torch.randint(96, (count, length), generator=torch.Generator().manual_seed(1))


EVERY = "*.layers.*_proj"
