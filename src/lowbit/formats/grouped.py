"""What GPTQ's and AWQ's files have in common: integer codes in 32-bit words, and one fp16 scale per group of columns.

Both formats keep unsigned codes with a zero-point for every group, both are read by the same software, and both say
what is not quantized by patterns on module names. They differ in how codes lie in words and in what else
config.json may say, which is in `gptq.py` and `awq.py`. Shape letters: O output rows, I input columns, G groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..numerics.grid import Grid
from ..numerics.qtensor import QLayer, QTensor, QWeight
from ..numerics.spec import Int, ScaleDtype, Spec, per_group
from .base import Names, copy_companions, module_names, read, shards
from .files import write_index, write_shard

NATIVE_SCALES: dict[torch.dtype, ScaleDtype] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
"""How the scales of foreign files are described: by the dtype they are stored in."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The linears that vLLM runs as one, under a name of its own, by which it looks patterns up."""

EXPERTS = "transformers 5 has a mixture's experts as one parameter, and reads no GPTQ or AWQ into it"


# --- refusals ---------------------------------------------------------------------------------------------------------


def refuse_layer(
    form: str, weights: Spec | None, activation: Spec | None, bits: Sequence[int], transposed: bool, mapped: bool
) -> str | None:
    """Why neither format can carry a layer like this, with advice, or None; `bits` are the widths that `form` has."""
    if mapped:
        return (
            f"{form} carries no online maps of a linear's inputs: use native, or merge all rotations "
            "(quarot.across=false and quarot.down=false, or spinquant.merged=true)"
        )
    assert weights is not None, "layers of 16 bits are no matter of the format unless their inputs are mapped"
    number = weights.number
    if transposed:
        return f"{form} export writes Linear modules only, not transposed ones (Conv1D): use native"
    if activation is not None:
        return f"{form} files describe weights alone, not {activation} inputs: use compressed-tensors, or -a16"
    if not isinstance(number, Int):
        return f"{form} files hold integer codes, not {number}: use an integer format, or compressed-tensors"
    if number.bits not in bits:
        listed = " or ".join(", ".join(map(str, bits)).rsplit(", ", 1))
        return f"{form} clients read weights of {listed} bits, not {number.bits}: use one of these, or native"
    if number.rule == "asymmetric-deepspeed":
        return f"{form} cannot hold the unbounded zero-points of asymmetric-deepspeed: use asymmetric"
    if weights.block[0] != 1:
        return f"{form} has one scale per row or group of a row, not {weights}: use one of these"
    if weights.scale not in ("half", "float16"):
        return f"{form} files store scales as fp16, which cannot hold {weights.scale} ones: use half"
    return None


def notices(weights: Spec) -> list[str]:
    """What a user should know of clients of both formats."""
    found = []
    if weights.scale == "float16":
        found.append("clients that compute in bf16 round float16 scales: use half")
    if weights.bits == 4 and weights.group not in (32, 64, 128, 256):
        found.append("on CPUs, transformers multiplies 4-bit weights in groups of 32, 64, 128 and 256 columns only")
    return found


def refuse_sum(form: str) -> str:
    """What is said of weights that have corrections or several parts."""
    return f"{form} cannot carry a weight that is a sum of parts: use native, or a recipe without corrections"


def check_layer(form: str, layer: QLayer, reason: str | None) -> None:
    """Raise ValueError where `reason` was found, or where the layer has something that only native can store."""
    if reason is not None:
        raise ValueError(reason)
    if not layer.plain:
        raise ValueError(refuse_sum(form))


# --- one layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codes:
    """A weight as these files spell it: s (q - z) with unsigned q."""

    codes: Tensor
    """uint8 [O, I]"""
    scale: Tensor
    """[O, G]"""
    zero: Tensor
    """uint8 [O, G]"""


def spell(layer: QLayer) -> Codes:
    """The unsigned spelling of a layer's codes: symmetric ones move up by 2^(b-1), which becomes their zero-point."""
    part = layer.weight.parts[0]
    number, zero = part.grid.spec.number, part.grid.zero
    assert isinstance(number, Int)
    half = 1 << (number.bits - 1)
    codes = part.codes.view(torch.uint8) + half if number.signed else part.codes
    zero = torch.full_like(part.grid.scale, half) if zero is None else zero
    return Codes(codes, part.grid.scale, zero.to(torch.uint8))


def layer_of(spelled: Codes, bits: int, symmetric: bool, index: Tensor | None = None) -> QLayer:
    """The inverse of `spell`; `index` [I] is the group of every column, None where groups lie in order.

    Codes that are called symmetric but have another zero-point than 2^(b-1) somewhere stay unsigned. Groups of unequal
    sizes (a last one that is shorter) are cut into equal ones, which repeat their scale.
    """
    codes, scale, zero = spelled.codes, spelled.scale, spelled.zero
    half, columns = 1 << (bits - 1), codes.shape[-1]
    width, order = -(-columns // scale.shape[-1]), None
    if index is not None:
        order, times, width = _equal_groups(index, scale.shape[-1])
        scale, zero = (x.repeat_interleave(times, -1) for x in (scale, zero))
    spec_scale = NATIVE_SCALES[scale.dtype]
    if symmetric and (zero.is_meta or bool((zero == half).all())):
        spec = per_group(Int(bits), -1 if width == columns else width, scale=spec_scale)
        grid, codes = Grid(spec, scale.float()), (codes - half).view(torch.int8)
    else:
        spec = per_group(Int(bits, "asymmetric"), -1 if width == columns else width, scale=spec_scale)
        grid = Grid(spec, scale.float(), zero.float())
    return QLayer(QWeight((QTensor(codes, grid, order),)))


def _equal_groups(index: Tensor, groups: int) -> tuple[Tensor | None, Tensor, int]:
    """(order of the columns, None if natural; parts that every group is cut into; columns of each part)."""
    counts = torch.bincount(index.long(), minlength=groups)
    width = gcd(*counts.tolist())
    order = torch.argsort(index, stable=True)
    natural = torch.equal(order, torch.arange(len(order), device=order.device))
    return None if natural else order, counts // width, width


def linears_in(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules of which `tensors` holds packed codes."""
    return sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))


# --- a whole model ----------------------------------------------------------------------------------------------------


def convert(source: Path, target: Path, names: Names, pack: Callable[[str, str, QLayer], Mapping[str, Tensor]]) -> None:
    """Fill the directory `target` with the shards of a run, `pack`(client's name, model's name, layer) for each layer.

    Raises ValueError where nothing is quantized.
    """
    files, found = shards(source), False
    for number, file in enumerate(files):
        layers, tensors = read(file, names)
        for name, (path, layer) in layers.items():
            tensors.update(pack(name, path, layer))
            found = True
        write_shard(target / f"model-{number + 1:05d}-of-{len(files):05d}.safetensors", tensors)
    if not found:
        raise ValueError(f"no linear of {source} is quantized: export needs a run with quantized weights")
    write_index(target, (file.name for file in target.glob("*.safetensors")))
    copy_companions(source, target)


Rules = dict[str, dict[str, object]]
"""What is different about the modules that are not like most; nothing at all where they are not quantized."""


def dynamic(rules: Rules) -> Rules:
    """The field by which GPTQModel and vLLM know these modules: an exact pattern each, with what is different."""
    return {f"{'+' if rule else '-'}:^{re.escape(name)}$": rule for name, rule in sorted(rules.items())}


def with_fused(rules: Rules, every: Collection[str]) -> tuple[Rules, list[str]]:
    """(rules with those for the modules that vLLM makes of several of `every`; fused modules whose parts differ).

    A rule that all parts of a fused module share is also the fused module's, and one that all experts of a mixture
    share is the mixture's.
    """
    wholes: dict[str, list[str]] = {}
    for name in every:
        parent, _, leaf = name.rpartition(".")
        mixture, inside, _ = name.partition(".experts.")
        if inside:
            wholes.setdefault(f"{mixture}.experts", []).append(name)
            continue
        for fused, parts in FUSED.items():
            if leaf in parts:
                wholes.setdefault(f"{parent}.{fused}", []).append(name)
    found, torn = dict(rules), []
    for whole, members in wholes.items():
        kinds = [rules.get(member) for member in members]
        if any(kind != kinds[0] for kind in kinds):
            torn.append(whole)
        elif kinds[0] is not None:
            found[whole] = kinds[0]
    return found, sorted(torn)


def labels(name: str, path: str) -> tuple[str, ...]:
    """The names by which clients look a linear up: as in the checkpoint, and as in transformers' own tree."""
    return (name,) if name == path else (name, path)


class Found:
    """What a conversion learns of a model's linears on the way: which are quantized, and how that must be said."""

    def __init__(self, skeleton: nn.Module, names: Names) -> None:
        self.ordered = False
        """Whether some layer's groups follow another order of its columns."""
        self.head = False
        """Whether the output layer is quantized."""
        self._told: dict[str, str] = {}
        self._skeleton, self._names = skeleton, names
        self._quantized: set[str] = set()

    def add(self, form: str, name: str, path: str, layer: QLayer) -> None:
        """Note a quantized linear. Raises ValueError where the module is no Linear."""
        module = self._skeleton.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{path} is a {type(module).__name__}, and {form} export writes Linear modules only")
        self._quantized.add(path)
        self.ordered |= any(part.order is not None for part in layer.weight.parts)
        self.head |= module is self._output()
        for kind, text in self._notices(name, path):
            self._told.setdefault(kind, text)

    def _notices(self, name: str, path: str) -> Iterator[tuple[str, str]]:
        """(what about, a sentence) on clients that do not find a linear; the first linear speaks for its like."""
        if name not in (path, *(path.replace("gate_up_proj", leaf) for leaf in FUSED["gate_up_proj"])):
            yield "names", f"GPTQModel 7.6 looks {name} up as {path}: export with --names transformers for it"
        elif name.endswith(".gate_up_proj"):
            yield "parts", f"GPTQModel 7.6 splits {name} and does not find its parts; transformers and vLLM read it"
        if ".experts." in name:
            yield "experts", EXPERTS

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to say of clients."""
        return tuple(self._told.values())

    def plain(self) -> list[str]:
        """Every other linear inside the blocks, by the names that clients know."""
        found: set[str] = set()
        for path, module in self._skeleton.named_modules():
            if not isinstance(module, nn.Linear) or path in self._quantized or module is self._output():
                continue
            for name, _ in module_names(path, self._names):
                found.update(labels(name, path))
        return sorted(found)

    def _output(self) -> nn.Module | None:
        find = getattr(self._skeleton, "get_output_embeddings", None)
        return None if find is None else cast("nn.Module | None", find())
