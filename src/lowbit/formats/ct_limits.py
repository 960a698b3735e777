"""What compressed-tensors cannot carry, and what its clients do with what it can: asked before a weight is read.

A refusal is for what no reader would compute as lowbit does. What some reader leaves out or does otherwise is a notice:
releases are vLLM 0.32, transformers 5.24 and compressed-tensors 0.20, whose sources these sentences were read from and
whose behaviour the tests of clients hold them to.
"""

from __future__ import annotations

from ..numerics.kv import KV
from ..numerics.maps import Hadamard, Map
from ..numerics.spec import BF16, E2M1, E2M3, E4M3, PLAIN, Float, Int, Spec
from .ct_schemes import NVFP4, PACKED, format_name, has_exponents, in_experts, is_local, is_symmetric

MAPPED = (
    "compressed-tensors export carries no online maps but Hadamard transforms of all channels, a power of two of them: "
    "use native, or merge rotations (quarot.across=false and quarot.down=false, or spinquant.merged=true)"
)
SUMMED = "compressed-tensors cannot carry a weight that is a sum of parts: use native, or a recipe without corrections"
SPARSE = (
    "compressed-tensors has dropped its sparse layouts after 0.14, and vLLM with it: use native, or give what is kept "
    "codes, for instance -w4a16-g128"
)
CLIPPED = "compressed-tensors has no clips of inputs: use native, or a recipe that does not learn them"
NOT_LINEAR = "compressed-tensors knows Linear modules only: use native"
ORDERED = "compressed-tensors has dropped group indices (g_idx): use gptq.groups=static, or no act_order"


def refuse(
    weights: Spec | None,
    activation: Spec | None,
    *,
    shape: tuple[int, int] | None = None,
    transposed: bool = False,
    ordered: bool = False,
    mapped: Map | bool = False,
) -> str | None:
    """Why the format cannot carry a layer of these formats (None: 16 bits), with advice, or None if it can.

    `transposed`: the module stores [I, O] (GPT-2's Conv1D). `ordered`: groups follow another order of the columns.
    `mapped`: inputs pass this online map, or one that is not known yet.
    """
    if mapped and transform_of(mapped) is None:
        return MAPPED
    if weights is None:
        return None if activation is None else "compressed-tensors clients quantize inputs of quantized weights only"
    if transposed:
        return NOT_LINEAR
    if ordered:
        return ORDERED
    return _refuse_weights(weights, activation, shape) or _refuse_activation(weights, activation)


def refuse_whole(*, kv: KV | None, corrected: bool) -> str | None:
    """Why the format cannot carry a model with such a cache, or with corrections of weights, or None if it can."""
    if kv is not None and (reason := refuse_cache(kv)) is not None:
        return reason
    return SUMMED if corrected else None


def refuse_cache(kv: KV) -> str | None:
    """Why the format cannot carry such a cache, or None if it can."""
    if kv.keys is None or kv.keys != kv.values or not kv.static or kv.rule not in ("symmetric", "e4m3"):
        return (
            "compressed-tensors carries caches with calibrated symmetric ranges, as many bits for keys as for values: "
            "set layout tensor or head and rule e4m3 or symmetric, or keep the cache in 16 bits"
        )
    return None


def transform_of(mapped: Map | bool) -> Hadamard | None:
    """The map, where it is one that `transform_config` can describe: Sylvester's matrix over all channels."""
    known = isinstance(mapped, Hadamard) and mapped.repeat == 1 and mapped.order & (mapped.order - 1) == 0
    return mapped if known else None  # type: ignore[return-value]


def _refuse_weights(spec: Spec, activation: Spec | None, shape: tuple[int, int] | None) -> str | None:
    number, columns = spec.number, None if shape is None else shape[1]
    if number == BF16:
        return SPARSE
    if spec.scale == "e4m3" or has_exponents(spec):
        width = 16 if spec.scale == "e4m3" else 32
        numbers: tuple[object, ...] = (E2M1,) if spec.scale == "e4m3" else (E2M1, E2M3, E4M3)
        if number not in numbers or spec.block != (1, width):
            return (
                f"compressed-tensors export carries {spec.scale} scales for {_listed(numbers)} in groups of {width}, "
                f"not {spec}: use {'nvfp4' if width == 16 else 'mxfp4 or mxfp8'}, or half scales"
            )
        if columns is not None and columns % width:
            return f"compressed-tensors needs whole groups of {width}, which do not divide {columns}: use int4 or fp8"
        return None
    if not isinstance(number, Int) and number != E4M3:
        return f"compressed-tensors export carries E4M3 float weights, not {number}: use fp8, nvfp4 or mxfp4"
    if spec.scale not in PLAIN:
        return f"compressed-tensors export carries plain floating-point scales, not {spec.scale}: use native, or half"
    return _refuse_units(spec, activation)


def _refuse_units(spec: Spec, activation: Spec | None) -> str | None:
    """Objections to a weight of integers or E4M3 with plain scales."""
    if isinstance(spec.number, Int) and spec.number.rule == "asymmetric-deepspeed":
        return "compressed-tensors cannot hold the unbounded zero-points of asymmetric-deepspeed: use asymmetric"
    if spec.square and isinstance(spec.number, Int):
        return f"compressed-tensors clients read square blocks of E4M3 only, not {spec}: use a scale per row or group"
    if not spec.square and spec.block[0] != 1 and spec.block != (-1, -1):
        return (
            f"compressed-tensors export has one scale per tensor, row, group of a row or square, not {spec}: "
            "use one of these"
        )
    if spec.block == (-1, -1) and format_name(spec, activation) == PACKED:
        return "compressed-tensors clients read packed integers with a scale per row or group only: use one of these"
    return None


def _refuse_activation(weights: Spec, spec: Spec | None) -> str | None:
    if spec is None:
        return None
    if weights.scale == "e4m3" or spec.scale == "e4m3":
        return _refuse_nvfp4_inputs(weights, spec)
    number = spec.number
    if has_exponents(spec):
        return _refuse_exponents(weights, spec)
    if isinstance(number, Int) and (not isinstance(weights.number, Int) or has_exponents(weights)):
        return f"no compressed-tensors client multiplies {weights.number} by {number}: use one kind for both"
    if not isinstance(number, Int) and isinstance(weights.number, Int) and weights.bits == 8:
        return f"no compressed-tensors client multiplies {weights.number} by {number}: use one kind for both"
    if not isinstance(number, Int) and number != E4M3:
        return f"compressed-tensors clients read integer and E4M3 activations, not {number}: use a8 or afp8"
    if not spec.dynamic and spec.block != (-1, -1):
        return f"compressed-tensors activations are static per tensor, not {spec}: make them so, or dynamic"
    if spec.dynamic and spec.block[0] != 1:
        return f"compressed-tensors activations are dynamic per token or group, not {spec}: use one of these"
    return _refuse_ranges(spec)


def _refuse_ranges(spec: Spec) -> str | None:
    """Objections to how inputs with plain scales find and store them."""
    number = spec.number
    if spec.scale not in PLAIN:
        return f"compressed-tensors activations have plain floating-point scales, not {spec.scale}: use float32"
    if isinstance(number, Int) and not number.signed:
        return "compressed-tensors clients add an activation's zero-point before rounding, lowbit after: use symmetric"
    if isinstance(number, Int) and spec.dynamic and number.rule != "symmetric":
        return f"compressed-tensors clients find ranges by the symmetric rule, not {number.rule}: use symmetric"
    if spec.dynamic and spec.scale != "float32":
        return f"compressed-tensors clients do not round dynamic scales to {spec.scale}: use float32"
    return None


def _refuse_nvfp4_inputs(weights: Spec, spec: Spec) -> str | None:
    if weights.scale != "e4m3" or spec.number != E2M1 or spec.block != (1, 16) or spec.scale != "e4m3":
        return (
            f"compressed-tensors clients multiply NVFP4 weights by NVFP4 or 16-bit inputs only, not {spec}: use these"
        )
    if not is_local(spec):
        return (
            "compressed-tensors clients need a calibrated tensor scale of NVFP4 inputs, where lowbit finds one for "
            "every token: use nvfp4-static, or nvfp4a16"
        )
    return None


def _refuse_exponents(weights: Spec, spec: Spec) -> str | None:
    """Objections to inputs with shared exponents, which clients find from a unit's largest value in a few bits."""
    if not has_exponents(weights) or spec.number != weights.number or spec.block != (1, 32) or not spec.dynamic:
        return (
            f"compressed-tensors clients multiply MX weights by inputs of the same kind, not {weights.number} by "
            f"{spec}: use the same kind, or 16 bits"
        )
    if spec.number == E4M3:
        return (
            "compressed-tensors clients find MXFP8 exponents by a rule that lowbit does not have: "
            "use mxfp8a16, or fp8 with a scale per token"
        )
    if spec.scale != "e8m0-even":
        return f"compressed-tensors clients find exponents of inputs as e8m0-even does, not {spec.scale}: use e8m0-even"
    return None


def _listed(numbers: tuple[object, ...]) -> str:
    *others, last = (str(number) for number in numbers)
    return f"{', '.join(others)} and {last}" if others else last


# --- notices ----------------------------------------------------------------------------------------------------------


def notices(weights: Spec, activation: Spec | None) -> tuple[str, ...]:
    """What a user should know of clients that read such a layer differently, or not at all."""
    form, found = format_name(weights, activation), list[str]()
    if form == PACKED:
        found += _of_packed(weights, activation)
    elif form == NVFP4 or has_exponents(weights):
        found += _of_small_floats(weights)
    elif weights.square:
        found += _of_squares(weights, activation)
    elif weights.group != -1 or not is_symmetric(weights.number):
        found.append("vLLM has no kernel for 8-bit weights like these, grouped or asymmetric; transformers reads them")
    elif weights.block == (-1, -1):
        found.append("vLLM rounds q, k, v (and gate, up) again to the largest of their scales: use a scale per row")
    integer = activation is not None and isinstance(activation.number, Int)
    if activation is not None and integer and activation.dynamic and activation.bits == 8:
        found.append("vLLM's int8 kernel divides a token's range by 127, lowbit and compressed-tensors by 127.5")
    if activation is not None and integer and activation.bits not in (4, 8):
        found.append(f"vLLM multiplies by inputs of 4 and 8 bits, not {activation.bits}; transformers reads them")
    return tuple(found)


def _of_packed(weights: Spec, activation: Spec | None) -> list[str]:
    found = []
    if not is_symmetric(weights.number):
        found.append("transformers 5.23 and 5.24 cannot read asymmetric packed weights; 5.22 and vLLM can")
    if 32 % weights.bits:
        found.append(f"compressed-tensors packs {weights.bits}-bit weights this way since 0.18: older ones cannot read")
    if weights.bits == 1:
        found.append("vLLM reads packed weights of 2 to 8 bits, not 1; transformers reads them")
    elif activation is not None and isinstance(activation.number, Float):
        found.append("vLLM multiplies 4-bit weights by E4M3 on Hopper only, by group and symmetric; transformers reads")
    elif activation is not None and not activation.dynamic:
        found.append(f"vLLM has no kernel for {weights.bits}-bit weights with static inputs, transformers does")
    elif activation is not None or weights.bits != 4:
        kind = "" if activation is None else " with quantized inputs"
        found.append(f"vLLM runs packed {weights.bits}-bit weights{kind} on GPUs only; transformers reads them")
    if weights.scale != "half":
        found.append(f"clients round the {weights.scale} scales of packed weights to their own dtype: use half")
    return found


def _of_small_floats(weights: Spec) -> list[str]:
    found = []
    if weights.bits < 8:
        found.append("transformers dequantizes 4-bit and 6-bit floats to bfloat16, whatever it computes in")
    if weights.bits == 6:
        return [*found, "vLLM 0.32 cannot read MXFP6; transformers reads it"]
    if has_exponents(weights):
        found.append("vLLM quantizes the inputs of MX weights on Blackwell, whether the recipe does or not")
    return [*found, "vLLM runs NVFP4 and MX weights on GPUs only; transformers reads them"]


def _of_squares(weights: Spec, activation: Spec | None) -> list[str]:
    grouped = activation is not None and activation.dynamic and activation.block == (1, weights.block[0])
    if grouped:
        return []
    return [f"vLLM quantizes inputs by groups of {weights.block[0]} before weights in squares; the recipe does not"]


def remarks(name: str, weights: Spec, activation: Spec | None, shape: tuple[int, int]) -> tuple[str, ...]:
    """The notices of a layer [O, I], with those that depend on its shape and place."""
    form, found = format_name(weights, activation), []
    if form == "int-quantized" and in_experts(name):
        found.append("transformers 5.24 cannot read a mixture's int8 experts; vLLM can")
    if in_experts(name) and (form in (NVFP4, "mxfp8-quantized") or weights.square):
        found.append("transformers 5.24 misreads the scales of a mixture's experts in this format; vLLM reads them")
    if in_experts(name) and form == "float-quantized" and not weights.square:
        found.append("vLLM's kernels for CPUs run FP8 experts in squares of 128 only, those for GPUs run these")
    if form == PACKED and any(size % 32 for size in shape):
        found.append("vLLM's CPU kernel for packed weights needs rows and columns in multiples of 32, unlike some here")
    if weights.square and any(size % side for size, side in zip(shape, weights.block, strict=True)):
        found.append("vLLM needs rows and columns that square blocks divide, unlike some here; transformers does not")
    return (*notices(weights, activation), *found)


ONLINE = (
    "transformers 5.24 ignores transform_config and gives wrong logits until compressed_tensors.transform."
    "apply_transform_config(model, …) is called; vLLM applies it, on CUDA and without tensor parallelism"
)
"""Told of models whose inputs pass an online Hadamard transform."""

FILLED = (
    "weights that are dropped are written as zeros like any others: compressed-tensors has had no sparse layout since "
    "0.15, and the model is as large as without pruning"
)
"""Told of pruned models."""

FUSED = "vLLM joins q, k, v and gate, up, which have different formats here, and cannot load them: give each set one"

UNEVEN = (
    "vLLM joins q, k, v and gate, up under the largest of their NVFP4 tensor scales, which differ here and should not: "
    "quantize again with a method that does not train ranges"
)
"""Told of NVFP4 models whose joined linears were not rounded together."""


def caches(kv: KV) -> tuple[str, ...]:
    """What a user should know of clients that read such a cache differently, or not at all."""
    ignored = "transformers 5.24 ignores the scales of keys and values, 5.19 quantizes with them"
    if kv.rule == "e4m3":
        started = "vLLM stores E4M3 keys and values where it is started with --kv-cache-dtype fp8"
        return (ignored, f"{started}; on CPUs it cuts bits off instead of rounding")
    return (ignored, "vLLM reads caches of E4M3 only")
