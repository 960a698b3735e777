"""GPTQ: what GPTQModel, vLLM and transformers read. All of it is spelled from stored codes; nothing is rounded here.

    qweight  int32 [I b/32, O]  codes, one little-endian bit stream down every output's column
    qzeros   int32 [G, O b/32]  zero-points, one bit stream along every group's row
    scales   fp16 [G, O]
    g_idx    int32 [I]          the group of every input column, in order or (act-order) not

Symmetric codes move up by 2^(b-1), which becomes their zero-point. The first version of the format stores zero-points
minus one, which cannot say zero: clients add the one inside a field, or to a whole word, or without masking. Symmetric
models are written in version 1, which every client reads, and models with an asymmetric layer in version 2
(`checkpoint_format` gptq_v2). Layers unlike most are named in `dynamic`, an exact pattern each, and where a block keeps
linears in 16 bits, `modules_in_block_to_quantize` lists the others for transformers, which does not know `dynamic`.

Shape letters: O output rows, I input columns, G groups, b bits.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import bits
from ..numerics.kv import KV
from ..numerics.qtensor import QLayer
from ..numerics.spec import Int, Spec
from . import grouped
from .base import CACHED, Names, new_directory, read_config, shards, unchanged
from .files import shard_header, write_json
from .grouped import Codes
from .native import spec_from_json

CLIENTS = ("gptqmodel", "vllm", "transformers")

WIDTHS = (2, 3, 4, 8)
WHOLE = {2: 16, 3: 32, 4: 8, 8: 4}
"""Codes that fill whole words, by their bits."""
GROUPS = (16, 32, 64, 128, 256, 512, 1024)
"""Columns of a group that GPTQModel reads, besides whole rows."""
FIELDS = ("qweight", "qzeros", "scales", "g_idx")

Scheme = dict[str, Any]
"""Bits, group size and symmetry of a layer, as they stand in config.json and in an entry of `dynamic`."""


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

    `transposed`: the module stores [I, O] (GPT-2's Conv1D). `ordered`: groups follow another order of the columns,
    which is what g_idx is for. `mapped`: inputs pass an online map.
    """
    reason = grouped.refuse_layer("GPTQ", weights, activation, WIDTHS, transposed, mapped)
    if reason is not None or weights is None:
        return reason
    whole_row = weights.group == -1 or (shape is not None and weights.group >= shape[1])
    if not whole_row and weights.group not in GROUPS:
        listed = ", ".join(map(str, GROUPS))
        return f"GPTQ clients read whole rows or groups of {listed} columns, not {weights.group}: use one of these"
    unit = WHOLE[weights.bits]
    if shape is not None and (shape[0] % unit or shape[1] % unit):
        return (
            f"GPTQ packs {unit} codes of {weights.bits} bits into whole words, and {shape[0]} x {shape[1]} is no "
            "multiple of that: ignore this layer with --ignore, or use compressed-tensors"
        )
    return None


def refuse_whole(*, kv: KV | None, corrected: bool) -> str | None:
    """Why the format cannot carry a model with such a cache, or with corrections of weights, or None if it can."""
    if kv is not None:
        return CACHED
    return grouped.refuse_sum("GPTQ") if corrected else None


def notices(weights: Spec, activation: Spec | None) -> tuple[str, ...]:
    """What a user should know of clients that read such a layer differently, or not at all."""
    found = grouped.notices(weights)
    symmetric = isinstance(weights.number, Int) and weights.number.symmetric
    if not symmetric:
        found.append("asymmetric layers make this a gptq_v2 checkpoint, which tools older than GPTQModel do not read")
    if not symmetric or weights.bits not in (4, 8):
        found.append("vLLM reads symmetric GPTQ weights of 4 and 8 bits only; GPTQModel and transformers read these")
    elif weights.bits == 8:
        found.append("vLLM runs 8-bit GPTQ weights on GPUs only; GPTQModel and transformers run them anywhere")
    return tuple(found)


# --- tensors ----------------------------------------------------------------------------------------------------------


def scheme_of(layer: QLayer) -> Scheme:
    """What config.json says of a layer. Raises ValueError where the format cannot carry it."""
    part = layer.weight.parts[0] if layer.weight.parts else None
    spec = None if part is None else part.grid.spec
    shape = (layer.weight.shape[0], layer.weight.shape[1])
    mapped = layer.input_map is not None
    reason = refuse(spec, layer.activation, shape=shape, mapped=mapped) if spec or mapped else None
    grouped.check_layer("GPTQ", layer, reason)
    assert spec is not None
    assert isinstance(spec.number, Int)
    group = spec.group if spec.group in GROUPS and spec.group <= shape[1] else -1
    return {"bits": spec.bits, "group_size": group, "sym": spec.number.symmetric}


def pack(name: str, layer: QLayer, *, version: int = 1) -> dict[str, Tensor]:
    """The tensors of one linear, `name` being its module; `version` 1 stores zero-points minus one.

    Raises ValueError where the format cannot carry the layer.
    """
    scheme_of(layer)
    spelled, part = grouped.spell(layer), layer.weight.parts[0]
    width, columns = part.grid.spec.bits, layer.weight.shape[1]
    index = part.group_index
    if index is None:
        groups = spelled.scale.shape[1]
        index = torch.arange(columns, dtype=torch.int32, device=spelled.codes.device) // (columns // groups)
    zeros = bits.to_words(spelled.zero.T, width)
    tensors = {
        "qweight": bits.to_words(spelled.codes, width).T,
        "qzeros": _minus_one(zeros, width, spelled.zero.shape[0], 1) if version == 1 else zeros,
        "scales": spelled.scale.T.half(),
        "g_idx": index,
    }
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def _minus_one(zeros: Tensor, width: int, rows: int, one: int) -> Tensor:
    """Words of zero-points, each minus `one` (1 or -1), as GPTQModel does it for files of version 1.

    It treats words of 2, 4 or 8 bits as a whole, so that a zero borrows from its neighbour and gets it back when read.
    """
    if width == 3:
        return bits.to_words((bits.from_words(zeros, width, rows) - one) & 7, width)
    ones = sum(1 << shift for shift in range(0, 32, width))
    return ((zeros.long() - one * ones + (1 << 31)) % (1 << 32) - (1 << 31)).int()


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], *, version: int = 1) -> QLayer:
    """The inverse of `pack`: codes, scales and zero-points bit for bit. `scheme` has the fields of `Scheme`."""
    qweight, qzeros, scales = (tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales"))
    index = tensors.get(f"{name}.g_idx")
    width, rows = int(scheme["bits"]), scales.shape[1]
    columns = qweight.shape[0] * 32 // width if index is None else len(index)
    if qweight.shape[0] != -(-columns * width // 32):
        raise ValueError(f"{name}.qweight does not hold {columns} columns of {width} bits: its config.json is wrong")
    if index is None:
        size = columns if scheme["group_size"] == -1 else scheme["group_size"]
        index = torch.arange(columns, device=qweight.device) // size
    zeros = _minus_one(qzeros, width, rows, -1) if version == 1 else qzeros
    codes = bits.from_words(qweight.T, width, columns)
    spelled = Codes(codes, scales.T.contiguous(), bits.from_words(zeros, width, rows).T.contiguous())
    return grouped.layer_of(spelled, width, scheme["sym"], None if codes.is_meta or index.is_meta else index)


# --- a whole model ----------------------------------------------------------------------------------------------------


def export_directory(source: Path, target: Path, skeleton: nn.Module, names: Names = unchanged) -> tuple[str, ...]:
    """Write the finished run directory `source` as a GPTQ model into the new directory `target`.

    `skeleton` is the model without weights (parameters on meta, experts unfused): it tells which modules are linears.
    `names` gives the clients' names of a parameter. Returns what a user should know of clients. Raises ValueError where
    the format cannot carry some layer.
    """
    schemes: dict[str, Scheme] = {}
    told: dict[str, None] = {}
    found = grouped.Found(skeleton, names)
    version = 2 if _any_asymmetric(source) else 1

    def convert(name: str, path: str, layer: QLayer) -> dict[str, Tensor]:
        found.add("GPTQ", name, path, layer)
        packed = pack(name, layer, version=version)
        schemes.update(dict.fromkeys(grouped.labels(name, path), scheme_of(layer)))
        told.update(dict.fromkeys(notices(layer.weight.parts[0].grid.spec, None)))
        return packed

    with new_directory(target) as directory:
        grouped.convert(source, directory, names, convert)
        config, remarks = quantization_config(schemes, found.plain(), ordered=found.ordered, head=found.head)
        config["checkpoint_format"] = config["format"] = "gptq" if version == 1 else "gptq_v2"
        write_json(directory / "config.json", {**read_config(source), "quantization_config": config})
        write_json(directory / "quantize_config.json", config)
    return (*told, *remarks, *found.remarks)


def _any_asymmetric(source: Path) -> bool:
    """Whether a run has a layer with zero-points of its own, from the headers of its files."""
    for file in shards(source):
        stored = json.loads(shard_header(file).metadata.get("lowbit", '{"formats": []}'))
        for spec in map(spec_from_json, stored["formats"]):
            if spec is not None and isinstance(spec.number, Int) and not spec.number.symmetric:
                return True
    return False


def quantization_config(
    schemes: Mapping[str, Scheme], plain: Collection[str], *, ordered: bool = False, head: bool = False
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the `quantization_config` of config.json but for the version, what to say of clients).

    `schemes` are those of the quantized modules and `plain` the linears that stay in 16 bits, by the names that clients
    know; `ordered` says that some groups follow another order, `head` that the output layer is quantized.
    """
    kinds = Counter(json.dumps(scheme, sort_keys=True) for scheme in schemes.values())
    base = json.loads(kinds.most_common(1)[0][0])
    rules: dict[str, Scheme] = {name: {} for name in plain}
    for name, scheme in schemes.items():
        if scheme != base:
            rules[name] = {key: value for key, value in scheme.items() if value != base[key]}
    rules, torn = grouped.with_fused(rules, {*schemes, *plain})
    config = {"quant_method": "gptq", **base, "desc_act": ordered, "lm_head": head, "pack_dtype": "int32"}
    if rules:
        config["dynamic"] = grouped.dynamic(rules)
    if plain:
        config["modules_in_block_to_quantize"] = [sorted(schemes)]
    remarks = []
    if len(kinds) > 1:
        remarks.append("transformers reads one width and group size for all GPTQ layers, GPTQModel one for each")
    if ordered and any(scheme["group_size"] != -1 for scheme in schemes.values()):
        remarks.append("vLLM has dropped act-order with groups (desc_act): use gptq.groups=static for it")
    if torn:
        remarks.append(f"vLLM runs the parts of {torn[0]} as one and cannot load them, since they differ")
    return config, tuple(remarks)


# --- reading back -----------------------------------------------------------------------------------------------------


def recognizes(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a GPTQ checkpoint."""
    stated = config.get("quantization_config") or {}
    return str(stated.get("quant_method", stated.get("method", ""))).lower() == "gptq"


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
    """(layers by checkpoint module name, every other tensor) of GPTQ tensors under any of the format's options.

    Raises ValueError on options that change what the tensors mean and that lowbit does not know.
    """
    stated = config["quantization_config"]
    version = _version(stated)
    rest, found = dict(tensors), {}
    for name in grouped.linears_in(tensors):
        mine = {f"{name}.{key}": rest.pop(f"{name}.{key}") for key in FIELDS if f"{name}.{key}" in rest}
        found[name] = unpack(name, mine, _scheme_in(name, stated), version=version)
    return found, rest


def _version(stated: Mapping[str, Any]) -> int:
    form = str(stated.get("checkpoint_format") or stated.get("format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"lowbit reads GPTQ files of format gptq and gptq_v2, not {form}: save the model as one of these"
        )
    for key, known in (("pack_dtype", "int32"), ("rotation", None)):
        if stated.get(key, known) not in (known, None):
            raise ValueError(f"lowbit does not read GPTQ checkpoints with {key}={stated[key]}: save it without")
    return 1 if form == "gptq" else 2


def _scheme_in(name: str, stated: Mapping[str, Any]) -> Scheme:
    """The scheme of a module: the checkpoint's, but for what the first matching pattern of `dynamic` says."""
    scheme = {"group_size": -1, "sym": True, **stated}
    for pattern, changes in (stated.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            scheme.update(changes)
            break
    if scheme["bits"] not in WIDTHS:
        raise ValueError(f"lowbit reads GPTQ weights of 2, 3, 4 and 8 bits, and {name} has {scheme['bits']}")
    return {key: scheme[key] for key in ("bits", "group_size", "sym")}
