"""compressed-tensors export of one linear, held to the package's own reader and writer.

`compress` and `decompress` of the package are the independent truth for bytes, its pydantic classes for the
configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ct_cases import CASES, SMALL, W4, W8A8, layer, quantize
from torch import Tensor, nn

from lowbit.formats import base
from lowbit.formats import compressed_tensors as ct
from lowbit.modules.linear import quantize_activation
from lowbit.numerics.kv import KV
from lowbit.numerics.maps import Hadamard, Kronecker
from lowbit.numerics.qtensor import QLayer, QTensor, QWeight
from lowbit.numerics.spec import (
    E2M1,
    E3M2,
    E4M3,
    E5M2,
    NF4,
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

pytest.importorskip("compressed_tensors")


def their_scheme(mine: ct.Scheme):  # type: ignore[no-untyped-def]
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme(targets=["Linear"], **mine)


def local(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bytes, dtypes and shapes."""
    ours, theirs = (tensor.reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(ours, theirs)


# --- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_unpack_gives_back_every_bit(case: str, dtype: torch.dtype) -> None:
    given = layer(case)
    packed, scheme = ct.pack("m", given, dtype), ct.scheme_of(given)
    back = ct.unpack("m", packed, scheme)
    mine, theirs = given.weight.parts[0], back.weight.parts[0]
    assert torch.equal(theirs.grid.scale, mine.grid.scale)
    assert (theirs.grid.outer is None) == (mine.grid.outer is None)
    if mine.grid.outer is not None and theirs.grid.outer is not None:
        assert torch.equal(theirs.grid.outer, mine.grid.outer)
    assert torch.equal(back.weight.dequantize(), given.weight.dequantize())
    if mine.grid.spec.number != Int(mine.grid.spec.bits, "symmetric-unsigned"):
        assert torch.equal(theirs.codes, mine.codes)
        assert theirs.codes.dtype == mine.codes.dtype
    if scheme["weights"]["symmetric"]:
        assert theirs.grid.zero is None
    else:
        assert torch.equal(theirs.grid.zero, mine.grid.zero)
    assert (back.input_grid is None) == (given.input_grid is None)
    if given.input_grid is not None and back.input_grid is not None:
        assert torch.equal(back.input_grid.scale, given.input_grid.scale)
    again = ct.pack("m", back, dtype)
    assert again.keys() == packed.keys()
    assert all(same(again[name], packed[name]) for name in packed)
    assert ct.scheme_of(back) == scheme


@pytest.mark.parametrize("case", CASES)
def test_the_package_reads_the_same_weight(case: str) -> None:
    """Its `decompress`, in fp32 as transformers runs it with dtype=float32, is our `dequantize` bit for bit.

    Small floats it makes bfloat16 of, whatever is asked for.
    """
    from compressed_tensors.compressors import BaseCompressor

    given = layer(case)
    state = local(ct.pack("m", given, torch.bfloat16))
    if state["weight_scale"].dtype == torch.bfloat16:
        state["weight_scale"] = state["weight_scale"].float()
    scheme = their_scheme(ct.scheme_of(given))
    found = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
    dtype = torch.bfloat16 if case in (*SMALL, "mxfp8a16") else torch.float32
    assert found.dtype == dtype
    assert torch.equal(found, given.weight.dequantize(dtype))


@pytest.mark.parametrize("case", CASES)
def test_the_package_writes_the_same_bytes(case: str) -> None:
    """Its `compress`, given our values, scales and zero-points, stores what `pack` stores."""
    from compressed_tensors.compressors import BaseCompressor

    given = layer(case)
    mine, scheme = local(ct.pack("m", given, torch.bfloat16)), their_scheme(ct.scheme_of(given))
    part = given.weight.parts[0]
    state = {"weight": given.weight.dequantize(), "weight_scale": part.grid.scale.float()}
    if part.grid.outer is not None:
        state["weight_scale"] = (part.grid.scale / part.grid.outer).round(decimals=6)
        state["weight_global_scale"] = mine["weight_global_scale"]
    if scheme.weights.strategy == "tensor":
        state["weight_scale"] = state["weight_scale"].reshape(1)
    if not scheme.weights.symmetric:
        assert part.grid.zero is not None
        zero = (part.grid.zero - 2 ** (part.grid.spec.bits - 1)).to(torch.int8)
        state["weight_zero_point"] = zero.reshape(state["weight_scale"].shape)
    written = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
    inputs = {"input_scale", "input_global_scale"}
    ours = {"weight_scale"} if mine["weight_scale"].is_floating_point() and part.grid.outer is None else set()
    if part.grid.spec.number == E2M1:
        mine["weight_packed"] = positive_zeros(mine["weight_packed"])
    for name in mine.keys() - inputs - ours:
        assert same(mine[name], written[name]), name
    assert written.keys() == mine.keys() - inputs


def positive_zeros(packed: Tensor) -> Tensor:
    """E2M1 codes with the sign of zeros lost, as the package loses it."""
    low, high = packed & 15, packed >> 4
    return torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4


@pytest.mark.parametrize("case", CASES)
def test_the_package_would_choose_the_same_format(case: str) -> None:
    """Except below 8 bits with quantized inputs, where it would spend a byte on every weight and vLLM takes words."""
    from compressed_tensors.compressors.format import infer_module_format

    scheme = ct.scheme_of(layer(case))
    expected = infer_module_format(nn.Linear, their_scheme({**scheme, "format": None})).value
    assert scheme["format"] == ("pack-quantized" if case.startswith(("w4a8", "w4a4", "w4afp8")) else expected)


@pytest.mark.parametrize("case", ["w4", "w3-asym", "w8a8-static", "w8a8-asym", "fp8", "fp8-block", "nvfp4", "mxfp6"])
@pytest.mark.parametrize("shape", [(7, 32), (33, 160)])
def test_meta_tensors_get_the_true_shapes(case: str, shape: tuple[int, int]) -> None:
    given = layer(case, shape)
    expected = ct.pack("m", given, torch.bfloat16)
    part = given.weight.parts[0]
    grid = part.grid.to("meta")
    inputs = None if given.input_grid is None else replace(given.input_grid, scale=given.input_grid.scale.to("meta"))
    meta = QLayer(QWeight((QTensor(part.codes.to("meta"), grid),)), given.activation, inputs)
    packed = ct.pack("m", meta, torch.bfloat16)
    assert {n: (t.shape, t.dtype) for n, t in packed.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    assert ct.unpack("m", packed, ct.scheme_of(meta)).weight.shape == given.weight.shape


def test_scales_take_the_dtype_that_holds_them() -> None:
    half, full = layer("w4"), layer("w4-float32-scales")
    assert ct.pack("m", half, torch.float16)["m.weight_scale"].dtype == torch.float16
    assert ct.pack("m", half, torch.bfloat16)["m.weight_scale"].dtype == torch.bfloat16
    assert ct.pack("m", full, torch.bfloat16)["m.weight_scale"].dtype == torch.float32


def test_rows_of_a_layer_are_the_layer_of_the_rows() -> None:
    weight = torch.randn(64, 96)
    for case in ("w4", "w3-asym", "w8a8-static", "fp8"):
        whole = quantize(weight, CASES[case])
        top, bottom = base.rows(whole, slice(0, 32)), base.rows(whole, slice(32, None))
        assert torch.equal(torch.cat([top.weight.dequantize(), bottom.weight.dequantize()]), whole.weight.dequantize())
        assert (top.activation, top.input_grid) == (whole.activation, whole.input_grid)
        assert ct.pack("m", bottom, torch.bfloat16)["m.weight_scale"].shape[0] in (1, 32)


# --- what it refuses, and what it tells -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_accepted(case: str) -> None:
    assert ct.refuse(*CASES[case]) is None


@pytest.mark.parametrize(
    ("weights", "inputs", "reason"),
    [
        (per_group(Int(4, "asymmetric-deepspeed"), 32), None, "unbounded zero-points"),
        (per_channel(E5M2), None, "E4M3 float weights, not fp8 e5m2"),
        (per_channel(E2M1), None, "E4M3 float weights"),
        (per_group(NF4, 64), None, "E4M3 float weights, not nf4: use fp8, nvfp4 or mxfp4"),
        (per_block(Int(8), 128), None, "square blocks of E4M3 only"),
        (Spec(Int(4), (-1, 32)), None, "one scale per tensor, row, group of a row or square"),
        (mx(E3M2), None, "e8m0 scales for fp4 e2m1, fp6 e2m3 and fp8 e4m3 in groups of 32, not fp6 e3m2"),
        (mx(Int(8)), None, "use mxfp4 or mxfp8, or half scales"),
        (Spec(E2M1, (1, 32), "e4m3"), None, "e4m3 scales for fp4 e2m1 in groups of 16"),
        (per_group(Int(4), 32, scale="m2"), None, "plain floating-point scales, not m2"),
        (nvfp4(), nvfp4(dynamic=True), "a calibrated tensor scale of NVFP4 inputs"),
        (nvfp4(), per_token(E4M3), "multiply NVFP4 weights by NVFP4 or 16-bit inputs only"),
        (per_channel(E4M3), nvfp4(), "multiply NVFP4 weights by NVFP4 or 16-bit inputs only"),
        (mx(E2M1), mx(E2M1, dynamic=True), "as e8m0-even does, not e8m0"),
        (mx(E4M3), mx(E4M3, scale="e8m0-even", dynamic=True), "MXFP8 exponents by a rule that lowbit does not have"),
        (mx(E2M1), mx(E4M3, dynamic=True), "multiply MX weights by inputs of the same kind"),
        (per_channel(E4M3), mx(E4M3, dynamic=True), "multiply MX weights by inputs of the same kind"),
        (mx(E2M1), per_token(Int(8)), "no compressed-tensors client multiplies"),
        (per_tensor(Int(4)), None, "a scale per row or group only"),
        (per_tensor(Int(4)), per_token(Int(8)), "a scale per row or group only"),
        (per_channel(Int(8)), per_token(E4M3), "no compressed-tensors client multiplies int8 by fp8 e4m3"),
        (per_channel(E4M3), per_token(Int(8)), "no compressed-tensors client multiplies"),
        (per_channel(E4M3), per_token(E5M2), "not fp8 e5m2"),
        (W8A8[0], per_tensor(Int(8), dynamic=True), "dynamic per token or group"),
        (W8A8[0], per_channel(Int(8)), "are static per tensor"),
        (W8A8[0], per_token(Int(8, "asymmetric")), "zero-point before rounding"),
        (W8A8[0], per_tensor(Int(8, "asymmetric")), "zero-point before rounding"),
        (W8A8[0], per_token(Int(8, "symmetric-restricted")), "by the symmetric rule"),
        (W8A8[0], per_token(Int(8), scale="half"), "do not round dynamic scales"),
    ],
)
def test_refusals(weights: Spec, inputs: Spec | None, reason: str) -> None:
    found = ct.refuse(weights, inputs)
    assert found is not None
    assert reason in found
    if inputs is not None and not inputs.dynamic and inputs.block != (-1, -1) and inputs.scale != "e4m3":
        return  # such ranges are not calibrated
    given = quantize(torch.randn(128, 128), (weights, inputs))
    with pytest.raises(ValueError, match="compressed-tensors"):
        ct.pack("m", given, torch.bfloat16)


def test_refusals_of_a_layer() -> None:
    given = layer("w4")
    ordered = replace(given.weight.parts[0], order=torch.randperm(96))
    assert "Linear modules only" in str(ct.refuse(W4, None, transposed=True))
    assert "gptq.groups=static" in str(ct.refuse(W4, None, ordered=True))
    with pytest.raises(ValueError, match="has dropped group indices"):
        ct.pack("m", replace(given, weight=QWeight((ordered,))), torch.bfloat16)
    with pytest.raises(ValueError, match="sum of parts"):
        ct.pack("m", replace(given, weight=QWeight(given.weight.parts * 2)), torch.bfloat16)


def test_the_package_has_dropped_group_indices() -> None:
    """The reason for refusing them: were they to come back, so should `weight_g_idx`."""
    from compressed_tensors.quantization import QuantizationArgs

    with pytest.raises(ValueError, match="has been removed"):
        QuantizationArgs(num_bits=4, group_size=32, strategy="group", actorder="group")


def test_notices() -> None:
    def told(case: str) -> str:
        return "\n".join(ct.notices(*CASES[case]))

    assert [case for case in ("w4", "w4-channel", "fp8", "fp8-block", "wfp8a16") if told(case)] == []
    assert "again to the largest of their scales" in told("fp8-static")
    assert "before weights in squares" in told("fp8-block-a16")
    assert "on Hopper only" in told("w4afp8")
    assert "to bfloat16" in told("nvfp4")
    assert "cannot read MXFP6" in told("mxfp6")
    assert "on Blackwell" in told("mxfp4a16")
    assert "3-bit weights on GPUs only" in told("w3")
    assert [bits for bits in range(1, 9) if "since 0.18" in told(f"w{bits}")] == [3, 5, 6, 7]
    assert "not 1" in told("w1")
    assert "transformers 5.23 and 5.24 cannot read asymmetric" in told("w4-asym")
    assert "by 127.5" in told("w8a8")
    assert "static inputs" in told("w4a8-static")
    assert "grouped or asymmetric" in told("w8a8-asym")
    assert "grouped or asymmetric" in told("fp8-group")
    assert "use half" in told("w4-float32-scales")


def test_shapes_that_groups_do_not_divide_are_refused() -> None:
    assert ct.refuse(nvfp4(), None, shape=(64, 688)) is None
    assert "whole groups of 32, which do not divide 688" in str(ct.refuse(mx(E2M1), None, shape=(64, 688)))
    assert "whole groups of 16" in str(ct.refuse(nvfp4(), None, shape=(64, 40)))


def test_online_maps_are_carried_where_the_package_knows_them() -> None:
    assert ct.refuse(W4, None, mapped=Hadamard(64)) is None
    assert ct.refuse(None, None, mapped=Hadamard(64)) is None
    for mapped in (Hadamard(12), Hadamard(4, 16), Kronecker(torch.eye(8), None, (8, 8)), True):
        assert "a power of two of them: use native" in str(ct.refuse(W4, None, mapped=mapped))


def test_caches() -> None:
    assert ct.refuse_whole(kv=KV(8, 8, "tensor", rule="e4m3"), corrected=False) is None
    assert ct.refuse_whole(kv=KV(4, 4, "head", rule="symmetric"), corrected=False) is None
    for kv in (
        KV(8, 8),
        KV(8, 8, "tensor"),
        KV(8, None, "tensor", rule="symmetric"),
        KV(8, 4, "head", rule="symmetric"),
    ):
        assert "caches with calibrated symmetric ranges" in str(ct.refuse_whole(kv=kv, corrected=False))
    assert "sum of parts" in str(ct.refuse_whole(kv=None, corrected=True))


@pytest.mark.parametrize("case", [case for case, (_, inputs) in CASES.items() if inputs is not None])
def test_the_package_quantizes_inputs_to_the_same_values(case: str) -> None:
    """Its `forward_quantize` on the scales that were written, small and large groups and zeros among the inputs."""
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    given = layer(case)
    tensors, scheme = local(ct.pack("m", given, torch.bfloat16)), their_scheme(ct.scheme_of(given))
    module = nn.Linear(96, 40)
    module.quantization_status = QuantizationStatus.COMPRESSED
    for name in ("input_scale", "input_global_scale"):
        if name in tensors:
            module.register_parameter(name, nn.Parameter(tensors[name].float()))
    x = torch.randn(2, 9, 96) * torch.logspace(-6, 0.5, 96)
    x[0, 0] = 0
    assert given.activation is not None
    theirs = forward_quantize(module, x, "input", scheme.input_activations)
    assert torch.equal(quantize_activation(x, given.activation, given.input_grid), theirs)


# --- the configuration ------------------------------------------------------------------------------------------------


def as_the_package_writes(config: Mapping[str, object], directory: Path) -> dict[str, object]:
    """The dictionary after a round trip through the package's classes and its own writer of config.json."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.transform import TransformConfig

    read = QuantizationConfig.model_validate(config)
    transforms = TransformConfig.model_validate({"config_groups": {}})
    ModelCompressor(quantization_config=read, transform_config=transforms).update_config(str(directory))
    written = json.loads((directory / "config.json").read_text("utf8"))["quantization_config"]
    assert written.pop("transform_config") == {"config_groups": {}}
    return {**written, "transform_config": {}, "version": ct.VERSION}


@pytest.mark.parametrize("case", CASES)
def test_one_scheme_targets_every_linear(case: str, tmp_path: Path) -> None:
    scheme = ct.scheme_of(layer(case))
    config = ct.quantization_config({"a.q": scheme, "a.k": dict(scheme)}, ["lm_head"])
    assert config["format"] == scheme["format"]
    assert config["ignore"] == ["lm_head"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert json.loads(json.dumps(config)) == as_the_package_writes(config, tmp_path)


def test_several_schemes_target_modules_by_name(tmp_path: Path) -> None:
    four, eight, fp8 = (ct.scheme_of(layer(case)) for case in ("w4", "w8", "fp8"))
    same = ct.quantization_config({"a.q": four, "a.experts.0.w1": eight, "b.q": four}, [])
    assert same["format"] == "pack-quantized"
    assert [group["targets"] for group in same["config_groups"].values()] == [["a.experts.0.w1"], ["a.q", "b.q"]]
    mixed = ct.quantization_config({"a": four, "b": fp8}, [])
    assert mixed["format"] == "mixed-precision"
    assert [group["format"] for group in mixed["config_groups"].values()] == ["pack-quantized", "float-quantized"]
    for config in (same, mixed):
        assert json.loads(json.dumps(config)) == as_the_package_writes(config, tmp_path)
