"""AWQ in its GEMM layout: what vLLM, transformers and GPTQModel read, spelled from stored codes, nothing rounded here.

    qweight  int32 [I, O/8]  4-bit codes of eight outputs to a word, in the order 0 2 4 6 1 3 5 7
    qzeros   int32 [G, O/8]  zero-points in the same order
    scales   fp16 [G, O]

There are 4 bits, one group size for the whole model, and always zero-points (`zero_point` true is what every kernel
wants); symmetric codes move up by 8, which becomes theirs. Linears that stay in 16 bits are named twice: in
`modules_to_not_convert` for transformers and vLLM, which look for these names inside the names of modules, and in
`dynamic` for GPTQModel. GPTQModel has since given the layout other widths, without the interleaving; these are read.

Shape letters: O output rows, I input columns, G groups, b bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..numerics import bits
from ..numerics.kv import KV
from ..numerics.qtensor import QLayer
from ..numerics.spec import Spec
from . import grouped
from .base import CACHED, Names, new_directory, read_config, unchanged
from .files import write_json
from .grouped import Codes

CLIENTS = ("gptqmodel", "vllm", "transformers")

GROUPS = (16, 32, 64, 128)
"""Columns of a group that GPTQModel reads, besides whole rows."""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs whose codes lie in a word, lowest bits first."""
FIELDS = ("qweight", "qzeros", "scales")


# --- what the format can carry ----------------------------------------------------------------------------------------


def refuse(
    weights: Spec | None,
    activation: Spec | None,
    *,
    shape: tuple[int, int] | None = None,
    transposed: bool = False,
    ordered: bool = False,
    mapped: bool = False,
) -> str | None:
    """Why the format cannot carry a layer of these formats (None: 16 bits), with advice, or None if it can.

    `transposed`: the module stores [I, O] (GPT-2's Conv1D). `ordered`: groups follow another order of the columns.
    `mapped`: inputs pass an online map.
    """
    reason = grouped.refuse_layer("AWQ", weights, activation, (4,), transposed, mapped)
    if reason is not None or weights is None:
        return reason
    if ordered:
        return "AWQ has no group index: use gptq.groups=static, no act_order, or export as GPTQ"
    if weights.group != -1 and weights.group not in GROUPS:
        listed = ", ".join(map(str, GROUPS))
        return f"AWQ clients read whole rows or groups of {listed} columns, not {weights.group}: use one of these"
    if shape is None:
        return None
    if shape[0] % 8:
        return f"AWQ packs 8 outputs into a word, and {shape[0]} is no multiple: ignore this layer with --ignore"
    if weights.group > shape[1]:
        return (
            f"AWQ has one group size for the whole model, and {weights.group} is more than a layer's {shape[1]} "
            "columns: use smaller groups"
        )
    return None


def refuse_whole(*, kv: KV | None, corrected: bool) -> str | None:
    """Why the format cannot carry a model with such a cache, or with corrections of weights, or None if it can."""
    if kv is not None:
        return CACHED
    return grouped.refuse_sum("AWQ") if corrected else None


def notices(weights: Spec, activation: Spec | None) -> tuple[str, ...]:
    """What a user should know of clients that read such a layer differently, or not at all."""
    return tuple(grouped.notices(weights))


# --- tensors ----------------------------------------------------------------------------------------------------------


def pack(name: str, layer: QLayer) -> dict[str, Tensor]:
    """The tensors of one linear, `name` being its module. Raises ValueError where the format cannot carry the layer."""
    group_size(layer)
    spelled = grouped.spell(layer)
    tensors = {
        "qweight": bits.to_words(_interleaved(spelled.codes.T), 4),
        "qzeros": bits.to_words(_interleaved(spelled.zero.T), 4),
        "scales": spelled.scale.T.half().contiguous(),
    }
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def unpack(name: str, tensors: Mapping[str, Tensor], width: int = 4) -> QLayer:
    """The inverse of `pack`: codes, scales and zero-points bit for bit, symmetric where every zero-point is 8."""
    qweight, qzeros, scales = (tensors[f"{name}.{key}"] for key in FIELDS)
    rows = scales.shape[1]
    if qweight.shape[1] != -(-rows * width // 32):
        raise ValueError(f"{name}.qweight does not hold {rows} outputs of {width} bits: its config.json is wrong")
    codes, zero = (bits.from_words(words, width, rows) for words in (qweight, qzeros))
    if width == 4:
        codes, zero = _in_order(codes), _in_order(zero)
    spelled = Codes(codes.T.contiguous(), scales.T.contiguous(), zero.T.contiguous())
    return grouped.layer_of(spelled, width, symmetric=not zero.is_meta)


def _interleaved(codes: Tensor) -> Tensor:
    """Codes [n, O] with every eight outputs in the order of their place in a word."""
    return codes.unflatten(-1, (-1, 8))[..., list(ORDER)].flatten(-2)


def _in_order(codes: Tensor) -> Tensor:
    """The inverse of `_interleaved`."""
    return codes.unflatten(-1, (-1, 8))[..., [ORDER.index(i) for i in range(8)]].flatten(-2)


def group_size(layer: QLayer) -> int:
    """The columns of the layer's groups, as config.json states them. Raises ValueError where AWQ cannot carry it."""
    part = layer.weight.parts[0] if layer.weight.parts else None
    spec, ordered = (None, False) if part is None else (part.grid.spec, part.order is not None)
    mapped = layer.input_map is not None
    shape = (layer.weight.shape[0], layer.weight.shape[1])
    reason = None
    if spec is not None or mapped:
        reason = refuse(spec, layer.activation, shape=shape, ordered=ordered, mapped=mapped)
    grouped.check_layer("AWQ", layer, reason)
    assert spec is not None
    return spec.group


# --- a whole model ----------------------------------------------------------------------------------------------------


def export_directory(source: Path, target: Path, skeleton: nn.Module, names: Names = unchanged) -> tuple[str, ...]:
    """Write the finished run directory `source` as an AWQ model into the new directory `target`.

    `skeleton` is the model without weights (parameters on meta, experts unfused): it tells which modules are linears.
    `names` gives the clients' names of a parameter. Returns what a user should know of clients. Raises ValueError where
    the format cannot carry some layer.
    """
    sizes: dict[str, int] = {}
    told: dict[str, None] = {}
    found = grouped.Found(skeleton, names)

    def convert(name: str, path: str, layer: QLayer) -> dict[str, Tensor]:
        found.add("AWQ", name, path, layer)
        if found.head:
            raise ValueError(f"AWQ clients keep the output layer {path} in 16 bits: drop -head8, or export as GPTQ")
        sizes.update(dict.fromkeys(grouped.labels(name, path), group_size(layer)))
        told.update(dict.fromkeys(notices(layer.weight.parts[0].grid.spec, None)))
        return pack(name, layer)

    with new_directory(target) as directory:
        grouped.convert(source, directory, names, convert)
        config = quantization_config(sizes, found.plain())
        write_json(directory / "config.json", {**read_config(source), "quantization_config": config})
    return (*told, *found.remarks)


def quantization_config(sizes: Mapping[str, int], plain: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, for the group sizes of quantized modules and the linears in 16 bits.

    Raises ValueError where group sizes differ, or a client would take a quantized module for one in 16 bits.
    """
    if len(set(sizes.values())) > 1:
        one, other = sorted(set(sizes.values()))[:2]
        raise ValueError(f"AWQ has one group size for the whole model, not {one} and {other}: use GPTQ, or one of them")
    taken = next(((name, kept) for kept in plain for name in sizes if kept in name), None)
    if taken is not None:
        raise ValueError(f"AWQ clients cannot tell {taken[0]} from {taken[1]}, which stays in 16 bits: use GPTQ")
    rules, _ = grouped.with_fused({name: {} for name in plain}, {*sizes, *plain})
    config = {
        "quant_method": "awq",
        "version": "gemm",
        "format": "gemm",
        "bits": 4,
        "group_size": next(iter(sizes.values())),
        "zero_point": True,
        "modules_to_not_convert": sorted(plain) or None,
    }
    return {**config, "dynamic": grouped.dynamic(rules)} if rules else config


# --- reading back -----------------------------------------------------------------------------------------------------


def recognizes(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of an AWQ checkpoint."""
    stated = config.get("quantization_config") or {}
    return str(stated.get("quant_method", stated.get("method", ""))).lower() == "awq"


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
    """(layers by checkpoint module name, every other tensor) of AWQ tensors in the GEMM layout.

    Raises ValueError on the format's other layouts, which no longer have writers.
    """
    stated = config["quantization_config"]
    version = str(stated.get("version") or stated.get("format") or "gemm").lower()
    width = int(stated.get("bits", stated.get("w_bit", 4)))
    if version != "gemm":
        raise ValueError(f"lowbit reads AWQ checkpoints of version gemm, not {version}: convert the model to gemm")
    rest, found = dict(tensors), {}
    for name in grouped.linears_in(tensors):
        mine = {f"{name}.{key}": rest.pop(f"{name}.{key}") for key in FIELDS if f"{name}.{key}" in rest}
        if len(mine) < len(FIELDS):
            raise ValueError(f"{name} has no zero-points or scales, which AWQ's gemm layout has: download it again")
        found[name] = unpack(name, mine, width)
    return found, rest
