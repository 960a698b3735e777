"""GGUF: what llama.cpp and Ollama read. One file holds codes, configuration and vocabulary; nothing is rounded here.

The container is written by the `gguf` package; what goes into it is made here from stored codes: blocks by
`gguf_blocks`, names by `gguf_names`, keys by `gguf_config`, the vocabulary by `gguf_vocab`; `gguf_read` reads back. A
file's head lists every tensor before the first byte of data, so the run directory is gone through twice: on the meta
device first, then for real, shard by shard. Tensors that are not quantized keep their own 16 bits; vectors and routers
are fp32, as clients want them. Shape letters: O output rows, B bytes of a row, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.kv import KV
from ..numerics.qtensor import QLayer
from ..numerics.spec import SUPER, Int, Spec
from . import gguf_blocks as blocks
from . import gguf_config, gguf_names
from .base import CACHED, Names, new_directory, parse, shards, unchanged
from .files import read_shard, shard_header
from .gguf_names import Family
from .gguf_read import open_file
from .gguf_vocab import Vocabulary, read_vocabulary
from .gguf_write import Stored, pack_float, write_file

__all__ = [
    "CLIENTS",
    "export_directory",
    "narrow",
    "notices",
    "open_file",
    "pack",
    "refuse",
    "refuse_model",
    "stored_bytes",
]

CLIENTS = ("llamacpp",)
FILE = "model.gguf"

MAPPED = (
    "GGUF export carries no online maps of a linear's inputs: use native, or merge all rotations "
    "(quarot.across=false and quarot.down=false, or spinquant.merged=true)"
)
SUMMED = "GGUF cannot carry a weight that is a sum of parts: use native, or a recipe without corrections"


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
    """Why the format cannot carry a layer of these formats (None: 16 bits), with advice, or None if it can."""
    if mapped:
        return MAPPED
    if activation is not None:
        return (
            f"GGUF's clients choose for themselves how inputs are quantized, not {activation}: use 16-bit activations"
        )
    assert weights is not None, "layers of 16 bits are no matter of the format unless their inputs are mapped"
    if transposed:
        return "GGUF export knows Linear modules only: use native"
    if ordered:
        return "GGUF has no group indices: use gptq.groups=static, or no act_order"
    kind = blocks.kind_of(weights)
    if kind is None:
        return _refuse_weights(weights)
    width = blocks.BLOCK if weights.scale != "kquant" else SUPER
    if weights.group != -1 and weights.group % blocks.BLOCK and weights.scale != "kquant":
        return f"GGUF has a scale per {blocks.BLOCK} columns, not per {weights.group}: use groups of a multiple of that"
    if shape is not None and shape[1] % width:
        return f"{kind} has blocks of {width} columns, which do not divide {shape[1]}: keep this linear in 16 bits"
    return None


def _refuse_weights(spec: Spec) -> str:
    number = spec.number
    if not isinstance(number, Int):
        return f"GGUF has no type for {spec}: use integers, mxfp4a16 or a K-quant (q2k to q6k)"
    if spec.scale not in ("half", "float16", "float16-min"):
        return f"GGUF stores scales in fp16, not as {spec.scale}: use half"
    return f"GGUF's types with least values have 4 and 5 bits, not {spec.bits}: use symmetric integers"


def refuse_whole(*, kv: KV | None, corrected: bool) -> str | None:
    """Why the format cannot carry a model with such a cache, or with corrections of weights, or None if it can."""
    if kv is not None:
        return CACHED
    return SUMMED if corrected else None


def refuse_model(config: Mapping[str, Any]) -> str | None:
    """Why clients would not compute a model of this configuration (all fields present), or None."""
    if config["model_type"] not in gguf_names.FAMILIES:
        return gguf_names.refusal(config["model_type"])
    return gguf_config.refuse(config)


def narrow(weights: Spec) -> Spec:
    """The format as GGUF stores it, decided before anything is rounded: asymmetric integers of 4 and 5 bits have their
    least value in fp16, which -z s of a zero-point is in general not.
    """
    kind = blocks.kind_of(weights)
    if kind not in ("Q4_1", "Q5_1") or weights.square or weights.scale == "float16-min":
        return weights
    number = Int(weights.bits, "asymmetric")
    return Spec(number, weights.block, "float16-min")


def stored_bytes(weights: Spec, shape: tuple[int, int]) -> int:
    """Bytes of a weight [O, I], which blocks of 32 columns and wider types can make more than its codes and scales."""
    kind = blocks.kind_of(weights)
    assert kind is not None, "ask refuse first"
    return blocks.bytes_of(shape, kind)


def notices(weights: Spec, activation: Spec | None) -> tuple[str, ...]:
    """What a user should know of clients that read such a layer differently, or at another size."""
    kind = blocks.kind_of(weights)
    if kind is None:
        return ()
    form = blocks.KINDS[kind]
    found = []
    if weights.bits < form.spec.bits:
        found.append(f"GGUF carries {weights.number} in {kind}, which takes as much room as {form.spec.number}")
    if weights.scale != "kquant" and weights.group != blocks.BLOCK:
        found.append(f"{kind} repeats a scale for every 32 columns: {8 * form.bytes / form.columns:g} bits per weight")
    if weights.minima is False and isinstance(weights.number, Int) and not weights.number.symmetric:
        found.append("zero-points are carried only where fp16 holds -z s: quantize with --target gguf to be sure")
    return tuple(found)


# --- tensors ----------------------------------------------------------------------------------------------------------


def pack(name: str, layer: QLayer) -> Stored:
    """One linear. Raises ValueError, naming it, where no type holds exactly its values."""
    if layer.input_map is not None:
        raise ValueError(f"{name}: {MAPPED}")
    if not layer.plain:
        raise ValueError(f"{name}: {SUMMED}")
    part = layer.weight.parts[0]
    reason = refuse(
        part.grid.spec, layer.activation, shape=(part.shape[0], part.shape[1]), ordered=part.order is not None
    )
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    try:
        return Stored(*blocks.pack(part))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def converted(
    layers: Mapping[str, tuple[str, QLayer]], tensors: Mapping[str, Tensor], family: Family, heads: tuple[int, int]
) -> dict[str, Stored]:
    """The tensors of one file of a run directory under GGUF's names, in the order of the run's."""
    found: dict[str, Stored] = {}
    experts: dict[str, dict[int, Stored]] = {}

    def add(name: str, stored: Stored) -> None:
        ours, expert = gguf_names.to_gguf(name, family)
        count = gguf_names.heads_of(ours, family, heads)
        if count is not None:
            stored = Stored(stored.kind, gguf_names.permuted(stored.data, count))
        if expert is None:
            found[ours] = stored
        else:
            experts.setdefault(ours, {})[expert] = stored

    for name, (_, layer) in layers.items():
        add(f"{name}.weight", pack(name, layer))
    for name, tensor in tensors.items():
        shifted = tensor.float() + 1 if gguf_names.is_shifted(name, family) else tensor
        whole = tensor.dim() < 2 or name.endswith((".gate.weight",))
        stored = pack_float(shifted, "F32" if whole else None)
        add(name, Stored(stored.kind, stored.data.reshape(-1, 4)) if tensor.dim() < 2 else stored)
    for ours, parts in experts.items():
        kinds = {stored.kind for stored in parts.values()}
        if len(kinds) > 1:
            raise ValueError(f"{ours}: GGUF keeps experts as one tensor of one type, not {' and '.join(sorted(kinds))}")
        found[ours] = Stored(kinds.pop(), gguf_names.stacked({i: s.data for i, s in parts.items()}, ours))
    return {name: _vector(name, stored) for name, stored in found.items()}


def _vector(name: str, stored: Stored) -> Stored:
    """Vectors, held as one number per row while rows were permuted, flat again."""
    flat = stored.kind == "F32" and stored.data.dim() == 2 and stored.data.shape[1] == 4
    return Stored(stored.kind, stored.data.reshape(-1)) if flat else stored


# --- a whole model ----------------------------------------------------------------------------------------------------


def export_directory(source: Path, target: Path, skeleton: nn.Module, names: Names = unchanged) -> tuple[str, ...]:
    """Write the finished run directory `source` as `model.gguf` in the new directory `target`.

    `skeleton` is the model without weights; its configuration says what the file is told of it. Returns what a user
    should know of clients. Raises ValueError, in one sentence, where the format cannot carry some layer or the model.
    """
    config = skeleton.config.to_dict()  # type: ignore[union-attr, operator]
    reason = refuse_model(config)
    if reason is not None:
        raise ValueError(reason)
    family = gguf_names.family(config["model_type"])
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    files = shards(source)
    vocabulary = read_vocabulary(source, config)
    told = dict.fromkeys((*gguf_config.notices(config), *_vocabulary_notices(vocabulary)))

    def parts(real: bool) -> Iterator[Mapping[str, Stored]]:
        for file in files:
            layers, tensors = parse(file, read_shard(file) if real else _without_values(file), names)
            told.update(dict.fromkeys(text for _, layer in layers.values() for text in _remarks(layer)))
            yield converted(layers, tensors, family, heads)

    with new_directory(target) as directory:
        write_file(directory / FILE, config, vocabulary, parts, source.resolve().name)
    return tuple(told)


def _remarks(layer: QLayer) -> tuple[str, ...]:
    return notices(layer.weight.parts[0].grid.spec, layer.activation)


def _vocabulary_notices(vocabulary: Vocabulary | None) -> tuple[str, ...]:
    if vocabulary is None:
        return ("the model's tokenizer is none that GGUF knows, so the file has no vocabulary: give clients token ids",)
    return vocabulary.notices


def _without_values(file: Path) -> dict[str, Tensor]:
    """A shard's tensors on the meta device."""
    entries = shard_header(file).tensors
    return {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
