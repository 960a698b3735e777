"""compressed-tensors export, held to the package's own reader and writer and to transformers.

`compress` and `decompress` of the package are the independent truth for bytes, its pydantic classes for the
configuration, and a model reloaded by transformers for everything together.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowbit.formats import base, native
from lowbit.formats import compressed_tensors as ct
from lowbit.formats.files import read_shard, write_index, write_json, write_shard
from lowbit.graph.skeleton import build_skeleton, model_from_config, unfuse_experts
from lowbit.modules.linear import QLinear, install
from lowbit.numerics.grid import fit_range
from lowbit.numerics.qtensor import QLayer, QTensor, QWeight
from lowbit.numerics.spec import (
    E2M1,
    E4M3,
    E5M2,
    Int,
    Spec,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)
from lowbit.runtime import verify

pytest.importorskip("compressed_tensors")

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
}


def quantize(weight: Tensor, formats: Formats) -> QLayer:
    """Rounded to nearest on the min-max grid; static inputs get a range of ±3."""
    weights, inputs = formats
    grid = fit_range(weight.float(), weights)
    static = inputs is not None and not inputs.dynamic
    input_grid = fit_range(torch.tensor([[-2.0, 3.0]]), inputs) if static and inputs is not None else None
    return QLayer(QWeight((QTensor(grid.encode(weight.float()), grid),)), inputs, input_grid)


def layer(case: str, shape: tuple[int, int] = (40, 96)) -> QLayer:
    return quantize(torch.randn(shape) + 0.3, CASES[case])


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
    """Its `decompress`, in fp32 as transformers runs it with dtype=float32, is our `dequantize` bit for bit."""
    from compressed_tensors.compressors import BaseCompressor

    given = layer(case)
    state = local(ct.pack("m", given, torch.bfloat16))
    state["weight_scale"] = state["weight_scale"].float()
    scheme = their_scheme(ct.scheme_of(given))
    found = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, given.weight.dequantize())


@pytest.mark.parametrize("case", CASES)
def test_the_package_writes_the_same_bytes(case: str) -> None:
    """Its `compress`, given our values, scales and zero-points, stores what `pack` stores."""
    from compressed_tensors.compressors import BaseCompressor

    given = layer(case)
    mine, scheme = local(ct.pack("m", given, torch.bfloat16)), their_scheme(ct.scheme_of(given))
    part = given.weight.parts[0]
    state = {"weight": given.weight.dequantize(), "weight_scale": part.grid.scale.float()}
    if scheme.weights.strategy == "tensor":
        state["weight_scale"] = state["weight_scale"].reshape(1)
    if not scheme.weights.symmetric:
        assert part.grid.zero is not None
        zero = (part.grid.zero - 2 ** (part.grid.spec.bits - 1)).to(torch.int8)
        state["weight_zero_point"] = zero.reshape(state["weight_scale"].shape)
    written = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
    for name in mine.keys() - {"weight_scale", "input_scale"}:
        assert same(mine[name], written[name]), name
    assert written.keys() == mine.keys() - {"input_scale"}


@pytest.mark.parametrize("case", CASES)
def test_the_package_would_choose_the_same_format(case: str) -> None:
    """Except below 8 bits with quantized inputs, where it would spend a byte on every weight."""
    from compressed_tensors.compressors.format import infer_module_format

    scheme = ct.scheme_of(layer(case))
    expected = infer_module_format(nn.Linear, their_scheme({**scheme, "format": None})).value
    assert scheme["format"] == ("pack-quantized" if case.startswith("w4a8") else expected)


@pytest.mark.parametrize("case", ["w4", "w3-asym", "w8a8-static", "w8a8-asym", "fp8"])
@pytest.mark.parametrize("shape", [(7, 32), (33, 160)])
def test_meta_tensors_get_the_true_shapes(case: str, shape: tuple[int, int]) -> None:
    given = layer(case, shape)
    expected = ct.pack("m", given, torch.bfloat16)
    part = given.weight.parts[0]
    grid = replace(
        part.grid, scale=part.grid.scale.to("meta"), zero=None if part.grid.zero is None else part.grid.zero.to("meta")
    )
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
        (per_block(E4M3, 128), None, "one scale per tensor, row or group"),
        (Spec(Int(4), (-1, 32)), None, "one scale per tensor, row or group"),
        (per_tensor(Int(4)), None, "a scale per row or group only"),
        (per_tensor(Int(4)), per_token(Int(8)), "a scale per row or group only"),
        (per_channel(Int(6)), per_token(Int(6)), "not int6: use 8 or 16 bits"),
        (per_channel(Int(4)), per_token(E4M3), "no compressed-tensors client multiplies int4 by fp8 e4m3"),
        (per_channel(E4M3), per_token(Int(8)), "no compressed-tensors client multiplies"),
        (per_channel(E4M3), per_token(E5M2), "not fp8 e5m2"),
        (W8A8[0], per_tensor(Int(8), dynamic=True), "dynamic per token or static per tensor"),
        (W8A8[0], per_channel(Int(8)), "dynamic per token or static per tensor"),
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

    assert [case for case in ("w4", "w4-channel", "fp8", "fp8-static", "w8a8-static", "wfp8a16") if told(case)] == []
    assert "3-bit weights on GPUs only" in told("w3")
    assert [bits for bits in range(1, 9) if "since 0.18" in told(f"w{bits}")] == [3, 5, 6, 7]
    assert "not 1" in told("w1")
    assert "transformers 5.23 cannot read asymmetric" in told("w4-asym")
    assert "by 127.5" in told("w8a8")
    assert "static inputs" in told("w4a8-static")
    assert "grouped or asymmetric" in told("w8a8-asym")
    assert "grouped or asymmetric" in told("fp8-group")
    assert "use half" in told("w4-float32-scales")


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


def make_run(path: Path, config, formats: Mapping[str, Formats | None]) -> Run:  # type: ignore[no-untyped-def]
    """Quantize a random model; the last pattern that matches a linear's name gives its formats."""
    model = model_from_config(config).to(torch.bfloat16)
    unfuse_experts(model)
    layers, rest = {}, dict(model.state_dict())
    if config.tie_word_embeddings:
        del rest["lm_head.weight"]
    for name, module in model.named_modules():
        chosen = [given for pattern, given in formats.items() if fnmatchcase(name, pattern)]
        if chosen and chosen[-1] is not None and module._parameters.get("weight") is not None:
            layers[name] = quantize(rest.pop(f"{name}.weight"), chosen[-1])
    path.mkdir()
    for index, inside in enumerate((False, True)):
        mine = {name: layer for name, layer in layers.items() if (".layers." in name) == inside}
        tensors = {name: tensor for name, tensor in rest.items() if (".layers." in name) == inside}
        for name, layer in mine.items():
            tensors.update(native.pack(name, layer))
        write_shard(path / f"model-{index + 1:05d}-of-00002.safetensors", tensors, native.describe(mine))
    write_index(path, [file.name for file in path.glob("*.safetensors")])
    written = {**config.to_dict(), "dtype": "bfloat16", "architectures": [type(model).__name__]}
    write_json(path / "config.json", {**written, "quantization_config": {"quant_method": "lowbit"}})
    write_json(path / "plan.json", {})
    write_json(path / "tokenizer.json", {"some": "tokens"})
    reference = build_skeleton(config)
    install(reference, layers, rest, torch.float32)
    reference.tie_weights()
    return Run(path, reference.eval(), build_skeleton(config))


def llama(**changes: object):  # type: ignore[no-untyped-def]
    from transformers import LlamaConfig

    return LlamaConfig(**{**TINY, **changes})


def windows(count: int = 2, length: int = 24) -> Tensor:
    return torch.randint(96, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the client here instead of in a process of its own, which would import transformers anew."""

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "lowbit.runtime.verify"]
        verify._run_client(Path(command[3]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(verify.subprocess, "run", run)
    yield


EVERY = "*.layers.*_proj"


def test_a_client_in_its_own_process_computes_the_same_logits(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {EVERY: (W4, None)})
    assert ct.export_directory(run.path, tmp_path / "out", run.skeleton) == ()
    found = verify.verify_transformers(tmp_path / "out", run.reference, windows())
    assert found.passed, found.message
    assert found.max_logit_difference is not None
    assert found.max_logit_difference <= 1e-5
    assert (found.top1, found.linears_compared, found.unequal_codes) == (1.0, 0, 0)
    assert found.client == "transformers"
    assert "compressed-tensors" in found.version


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "case", ["w3", "w8-asym", "w4a8-static", "w8a8", "w8a8-static", "fp8", "fp8-static", "wfp8a16"]
)
def test_transformers_computes_what_lowbit_computes(case: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {EVERY: CASES[case]})
    ct.export_directory(run.path, tmp_path / "out", run.skeleton)
    found = verify.verify_transformers(tmp_path / "out", run.reference, windows())
    if not found.passed:  # the newest release cannot read this, and that must be said
        assert case.endswith("-asym")
        assert found.message.startswith("not verified: transformers 5.")
        assert "pip install transformers==5.22.0" in found.message
        assert found.max_logit_difference is None
        return
    assert found.max_logit_difference is not None
    assert found.max_logit_difference <= 1e-5
    assert found.linears_compared == (0 if CASES[case][1] is None else 14)
    assert found.unequal_codes == 0


@pytest.mark.usefixtures("in_process")
def test_overrides_ignored_linears_and_a_tied_head(tmp_path: Path) -> None:
    formats: dict[str, Formats | None] = {
        EVERY: (W4, None),
        "*.down_proj": W8A8,
        "*.1.*.o_proj": (W3, None),
        "*.0.*.k_proj": None,
    }
    run = make_run(tmp_path / "run", llama(tie_word_embeddings=True), formats)
    told = ct.export_directory(run.path, tmp_path / "out", run.skeleton)
    assert len(told) == 3  # 3 bits: on GPUs, and since 0.18; 127 against 127.5
    written = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))
    config = written["quantization_config"]
    assert config["ignore"] == ["lm_head", "model.layers.0.self_attn.k_proj"]
    assert config["format"] == "mixed-precision"
    targets = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert targets[8] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert targets[3] == ["model.layers.1.self_attn.o_proj"]
    assert len(targets[4]) == 10
    assert written["tie_word_embeddings"] is True
    found = verify.verify_transformers(tmp_path / "out", run.reference, windows())
    assert found.passed, found.message
    assert (found.linears_compared, found.max_logit_difference) == (2, 0.0)


def test_what_an_exported_directory_holds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {EVERY: (W4, None)})
    ct.export_directory(run.path, tmp_path / "out", run.skeleton)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert names == {*shards, "model.safetensors.index.json", "config.json", "tokenizer.json"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf8"))["weight_map"]
    stored = {name for shard in shards for name in read_shard(tmp_path / "out" / shard)}
    assert index.keys() == stored
    assert {name.rpartition(".")[2] for name in stored if "layers.0.self_attn.q_proj" in name} == {
        "weight_packed",
        "weight_scale",
        "weight_shape",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert {**config, "quantization_config": None} == {
        **json.loads((run.path / "config.json").read_text("utf8")),
        "quantization_config": None,
    }


def test_bad_directories(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {"*.q_proj": (per_group(Int(4), 32), W8A8[1]), "*.k_proj": (W4, None)})
    with pytest.raises(ValueError, match="holds something already"):
        ct.export_directory(run.path, run.path, run.skeleton)
    with pytest.raises(ValueError, match="not a finished lowbit directory"):
        ct.export_directory(tmp_path / "nothing", tmp_path / "out", run.skeleton)
    unquantized = make_run(tmp_path / "plain", llama(), {})
    with pytest.raises(ValueError, match=r"no linear of .* is quantized"):
        ct.export_directory(unquantized.path, tmp_path / "out", run.skeleton)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "plain"}


def test_a_conv1d_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64, dtype="bfloat16")
    skeleton = build_skeleton(config)
    name = "transformer.h.0.attn.c_attn"
    given = {name: quantize(torch.randn(192, 64), (W4, None))}
    run = tmp_path / "run"
    run.mkdir()
    write_shard(run / "model.safetensors", native.pack(name, given[name]), native.describe(given))
    write_index(run, ["model.safetensors"])
    write_json(run / "config.json", config.to_dict())
    with pytest.raises(ValueError, match=r"c_attn is a Conv1D, and compressed-tensors knows Linear modules only"):
        ct.export_directory(run, tmp_path / "out", skeleton)
    assert not (tmp_path / "out").exists()


def test_find() -> None:
    assert base.find("compressed-tensors") is ct
    with pytest.raises(ValueError, match="did you mean compressed-tensors"):
        base.find("compressed_tensor")
    with pytest.raises(ValueError, match="lowbit exports compressed-tensors"):
        base.find("gguf")


# --- mixtures ---------------------------------------------------------------------------------------------------------


def mixtral_names(name: str) -> tuple[tuple[str, slice], ...]:
    name = name.replace(".mlp.", ".block_sparse_moe.")
    if "gate_up_proj" in name:
        first, second = (name.replace("gate_up_proj", leaf) for leaf in ("w1", "w3"))
        return (first, slice(0, 160)), (second, slice(160, 320))
    return ((name.replace("down_proj", "w2") if ".experts." in name else name, slice(None)),)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Formats], Run]:
    from transformers import MixtralConfig

    def make(formats: Formats) -> Run:
        torch.manual_seed(0)
        config = MixtralConfig(**TINY, num_local_experts=4)
        return make_run(tmp_path_factory.mktemp("mixtral") / "run", config, {EVERY: formats})

    return make


@pytest.mark.usefixtures("in_process")
def test_experts_get_the_names_that_clients_know(mixtral: Callable[[Formats], Run], tmp_path: Path) -> None:
    run = mixtral((W4, None))
    ct.export_directory(run.path, tmp_path / "out", run.skeleton, mixtral_names)
    tensors = read_shard(tmp_path / "out" / "model-00002-of-00002.safetensors")
    experts = {name for name in tensors if ".experts." in name}
    assert experts == {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}.{kind}"
        for layer in range(2)
        for expert in range(4)
        for leaf in ("w1", "w2", "w3")
        for kind in ("weight_packed", "weight_scale", "weight_shape")
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))["quantization_config"]
    gates = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(2)]
    assert config["ignore"] == ["lm_head", *gates]
    (group,) = config["config_groups"].values()
    fused = run.reference.get_submodule("model.layers.1.mlp.experts.2.gate_up_proj")
    assert isinstance(fused, QLinear)
    halves = [
        ct.unpack(f"model.layers.1.block_sparse_moe.experts.2.{leaf}", tensors, group).weight.dequantize()
        for leaf in ("w1", "w3")
    ]
    assert torch.equal(torch.cat(halves), fused.weight)
    found = verify.verify_transformers(tmp_path / "out", run.reference, windows())
    assert found.passed, found.message
    assert torch.equal(fused.weight, torch.cat(halves)), "the reference was left as it was"


@pytest.mark.usefixtures("in_process")
def test_transformers_does_not_quantize_the_inputs_of_experts(
    mixtral: Callable[[Formats], Run], tmp_path: Path
) -> None:
    run = mixtral(FP8_STATIC)
    ct.export_directory(run.path, tmp_path / "out", run.skeleton, mixtral_names)
    found = verify.verify_transformers(tmp_path / "out", run.reference, windows())
    assert found.passed, found.message
    assert "does not quantize the inputs of a mixture's experts" in found.message
    assert found.linears_compared == 8


def test_int8_experts_are_told_of(mixtral: Callable[[Formats], Run], tmp_path: Path) -> None:
    run = mixtral(W8A8)
    told = ct.export_directory(run.path, tmp_path / "out", run.skeleton, mixtral_names)
    assert any("int8 experts" in notice for notice in told)


def test_experts_that_a_checkpoint_keeps_fused_are_refused(mixtral: Callable[[Formats], Run], tmp_path: Path) -> None:
    run = mixtral((W4, None))

    def fused(name: str) -> tuple[tuple[str, slice], ...]:
        return (
            ((name.split(".experts.")[0] + ".experts.gate_up_proj", slice(None)),)
            if ".experts." in name
            else ((name, slice(None)),)
        )

    with pytest.raises(ValueError, match=r"keeps .* inside .*experts.gate_up_proj"):
        ct.export_directory(run.path, tmp_path / "out", run.skeleton, fused)


# --- verification fails loudly ----------------------------------------------------------------------------------------


def tamper(directory: Path, suffix: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Rewrite the first tensor whose name ends so; None removes it."""
    file = directory / "model-00002-of-00002.safetensors"
    tensors = read_shard(file)
    name = min(name for name in tensors if name.endswith(suffix))
    changed = change(tensors.pop(name))
    write_shard(file, tensors if changed is None else {**tensors, name: changed})
    (directory / "model.safetensors.index.json").unlink()
    write_index(directory, [path.name for path in directory.glob("*.safetensors")])


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("case", "suffix", "change", "message"),
    [
        ("w4", "q_proj.weight_packed", lambda words: words ^ 1, "failed: largest logit difference"),
        ("w4", "v_proj.weight_scale", lambda scale: scale * 1.01, "failed: largest logit difference"),
        (
            "w4",
            "v_proj.weight_scale",
            lambda scale: None,
            "did not load as written, the first: .*v_proj.weight_scale is missing",
        ),
        (
            "w8a8-static",
            "q_proj.input_scale",
            lambda scale: scale * 1.01,
            "other codes in 1 linears, the first .*q_proj;",
        ),
        ("fp8", "down_proj.weight_scale", lambda scale: scale * 3, "failed: equal codes on equal inputs, but"),
    ],
)
def test_a_wrong_export_does_not_pass(
    case: str, suffix: str, change: Callable[[Tensor], Tensor | None], message: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", llama(initializer_range=0.3), {EVERY: CASES[case]})
    ct.export_directory(run.path, tmp_path / "out", run.skeleton)
    tamper(tmp_path / "out", suffix, change)
    found = verify.verify_transformers(tmp_path / "out", run.reference, windows())
    assert not found.passed
    assert re.search(message, found.message), found.message


@pytest.mark.usefixtures("in_process")
def test_a_client_that_flattens_tokens_is_found_out(tmp_path: Path) -> None:
    """transformers' OPT gives fc1 a matrix of all tokens, for which the package finds one range instead of many."""
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=96,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        dtype="bfloat16",
    )
    run = make_run(tmp_path / "run", config, {"*.layers.*_proj": W8A8, "*.fc?": W8A8})
    ct.export_directory(run.path, tmp_path / "out", run.skeleton)
    found = verify.verify_transformers(tmp_path / "out", run.reference, windows())
    assert not found.passed
    assert "in 2 linears, the first model.decoder.layers.0.fc1, whose inputs it flattens" in found.message


def test_without_the_package_nothing_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "find_spec", lambda _: None)
    found = verify.verify_transformers(tmp_path, nn.Module(), windows())
    assert not found.passed
    assert found.message.startswith("not verified: compressed-tensors is not installed")


def test_a_killed_client_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", llama(), {EVERY: (W4, None)})
    monkeypatch.setattr(verify.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, "", ""))
    found = verify.verify_transformers(run.path, run.reference, windows())
    assert not found.passed
    assert "killed by signal 9" in found.message
