"""Models that other tools quantized: read by lowbit's own readers, under any names, and written again bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import logits_of, same, tensors_of, windows
from families import TINY, build
from tiny import save_model
from torch import Tensor

import lowbit
from lowbit.cli import main
from lowbit.formats import foreign, fp8
from lowbit.formats.base import stack
from lowbit.formats.files import read_shard, write_index, write_json, write_shard
from lowbit.modules.linear import QLinear
from lowbit.numerics.grid import fit_range
from lowbit.numerics.qtensor import QLayer, QTensor, QWeight
from lowbit.numerics.spec import E4M3, Int, Spec, nvfp4, per_channel, per_group, per_tensor, per_token

FORMATS = ("compressed-tensors", "gptq", "awq", "gguf", "mlx")
FAMILIES = ("llama", "llama-tied", "mixtral", "qwen2", "phi3", "gemma3", "qwen3_moe")


def quantized(path: Path, family: str, recipe: str = "rtn-w4a16-g32") -> Path:
    """A run directory of a tiny model."""
    model = save_model(family, path / "model", dtype=torch.bfloat16)
    return lowbit.quantize(model, recipe, path / "run", dtype="float32").path


def layers_of(model: Any) -> dict[str, QLayer]:
    return {name: module.layer for name, module in model.named_modules() if isinstance(module, QLinear)}


def place(directory: Path) -> Path:
    """What to load of an export: its .gguf file, or the directory."""
    return next(directory.glob("*.gguf"), directory)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_exported_is_read_back(family: str, form: str, tmp_path: Path) -> None:
    run = quantized(tmp_path, family)
    try:
        lowbit.export(run, tmp_path / "out", format=form)
    except ValueError as error:
        assert ":" in str(error)
        pytest.skip(str(error))
    ours, theirs = (lowbit.load(path, dtype=torch.float32) for path in (run, place(tmp_path / "out")))
    batch = windows(vocabulary=128)
    assert torch.equal(logits_of(ours, batch), logits_of(theirs, batch))
    before, after = layers_of(ours), layers_of(theirs)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].weight.parts[0].codes, after[name].weight.parts[0].codes) for name in before)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq", "mlx"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_imported_model_is_exported_to_the_same_bytes(family: str, form: str, tmp_path: Path) -> None:
    run = quantized(tmp_path, family)
    lowbit.export(run, tmp_path / "out", format=form)
    result = lowbit.import_model(tmp_path / "out", tmp_path / "in")
    lowbit.export(result.path, tmp_path / "again", format=form)
    first, second = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
    configs = [json.loads((tmp_path / name / "config.json").read_text("utf8")) for name in ("out", "again")]
    assert configs[0] == configs[1]
    assert result.bits_per_weight == pytest.approx(4.5)


def test_a_chain_of_formats_leaves_codes_unchanged(tmp_path: Path) -> None:
    run = quantized(tmp_path, "llama")
    reference = layers_of(lowbit.load(run, dtype=torch.float32))
    for form in ("gptq", "compressed-tensors", "gguf", "awq"):
        lowbit.export(run, tmp_path / form, format=form)
        run = lowbit.import_model(place(tmp_path / form), tmp_path / f"{form}-in").path
    found = layers_of(lowbit.load(run, dtype=torch.float32))
    assert found.keys() == reference.keys()
    for name, layer in reference.items():
        assert torch.equal(layer.weight.parts[0].codes, found[name].weight.parts[0].codes)
        assert torch.equal(layer.weight.dequantize(), found[name].weight.dequantize())


def test_an_interrupted_import_goes_on(tmp_path: Path) -> None:
    lowbit.export(quantized(tmp_path, "llama"), tmp_path / "out", format="gptq")
    path = lowbit.import_model(tmp_path / "out", tmp_path / "in").path
    whole = {file.name: file.read_bytes() for file in path.glob("*.safetensors*")}
    (path / "model.safetensors.index.json").unlink()
    (path / "model-00003-of-00003.safetensors").unlink()
    lowbit.import_model(tmp_path / "out", path)
    assert {file.name: file.read_bytes() for file in path.glob("*.safetensors*")} == whole


def test_the_command_line_reads_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not main(["quantize", "demo", "--recipe", "rtn-w4a16-g32", "--output", str(tmp_path / "run")])
    assert not main(["export", str(tmp_path / "run"), "--format", "gguf", "--output", str(tmp_path / "out")])
    file = str(tmp_path / "out" / "model.gguf")
    options = ["--perplexity", "demo", "--window", "64", "--limit", "2", "--json"]
    assert not main(["evaluate", file, *options, str(tmp_path / "direct.json")])
    assert not main(["import", file, "--output", str(tmp_path / "in")])
    assert not main(["evaluate", str(tmp_path / "in"), *options, str(tmp_path / "imported.json")])
    assert not main(["evaluate", str(tmp_path / "run"), *options, str(tmp_path / "run.json")])
    found = [json.loads((tmp_path / f"{n}.json").read_text("utf8")) for n in ("direct", "imported", "run")]
    assert found[0]["perplexity"] == found[1]["perplexity"] == found[2]["perplexity"]
    assert [each["bits_per_weight"] for each in found] == [pytest.approx(4.5)] * 3
    capsys.readouterr()


# --- FP8 in squares ---------------------------------------------------------------------------------------------------


def fp8_directory(
    path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict, **stated: Any
) -> Path:
    """A tiny Llama as DeepSeek-V3 is released: E4M3 in squares of 32, the head and embedding in bf16."""
    model = build("llama").to(torch.bfloat16)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = value
            continue
        rows, columns = value.shape
        factors = torch.rand(-(-rows // 32), -(-columns // 32)) / 100
        spread = factors.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        tensors[name] = (value.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = factors
    path.mkdir()
    write_shard(path / "model-00001-of-00001.safetensors", change(tensors))
    write_index(path, ["model-00001-of-00001.safetensors"])
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], **stated}
    write_json(path / "config.json", {**model.config.to_dict(), "dtype": "bfloat16", "quantization_config": how})
    return path


def test_fp8_squares_are_read(tmp_path: Path) -> None:
    path = fp8_directory(tmp_path / "fp8")
    stored = read_shard(path / "model-00001-of-00001.safetensors")
    model = lowbit.load(path, dtype=torch.float32)
    layers = layers_of(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        weight, factors = stored[f"{name}.weight"], stored[f"{name}.weight_scale_inv"]
        spread = factors.repeat_interleave(32, 0).repeat_interleave(32, 1)[: weight.shape[0], : weight.shape[1]]
        assert torch.equal(layer.weight.dequantize(), weight.float() * spread)
        assert layer.activation == Spec(E4M3, (1, 32), "float32", dynamic=True)
    x = torch.randn(3, 64)
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    groups = x.reshape(3, 2, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 448
    rounded = ((groups / scale).to(torch.float8_e4m3fn).float() * scale).reshape(3, 64)
    assert torch.allclose(linear(x), rounded @ linear.weight.T, atol=1e-5)


def test_fp8_of_a_whole_tensor_with_calibrated_inputs(tmp_path: Path) -> None:
    def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            if name.endswith("_scale_inv"):
                found[name.replace("_scale_inv", "_scale")] = torch.tensor(0.01)
                found[name.replace("weight_scale_inv", "input_scale")] = torch.tensor(0.02)
            else:
                found[name] = tensor
        return found

    path = fp8_directory(tmp_path / "fp8", whole, weight_block_size=None, activation_scheme="static")
    layer = layers_of(lowbit.load(path, dtype=torch.float32))["model.layers.1.mlp.down_proj"]
    stored = read_shard(path / "model-00001-of-00001.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(layer.weight.dequantize(), stored.float() * torch.tensor(0.01))
    assert layer.input_grid is not None
    assert layer.input_grid.scale.tolist() == [[pytest.approx(0.02)]]


def test_fp8_refusals() -> None:
    codes, factor = torch.zeros(64, 64, dtype=torch.float8_e4m3fn), torch.ones(3, 2)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    with pytest.raises(ValueError, match=r"factors of shape \[3, 2\] for a weight of 64 x 64"):
        fp8.layers({"a.weight": codes, "a.weight_scale_inv": factor}, config)
    with pytest.raises(ValueError, match="E4M3 weights only"):
        fp8.layers({"a.weight": codes.view(torch.int8), "a.weight_scale_inv": factor}, config)


def test_fp8_is_exported_further(tmp_path: Path) -> None:
    """What DeepSeek released as fp8 becomes compressed-tensors and comes back the same."""
    path = lowbit.import_model(fp8_directory(tmp_path / "fp8"), tmp_path / "in").path
    try:
        lowbit.export(path, tmp_path / "ct")
    except ValueError as error:
        pytest.skip(str(error))
    one, other = (layers_of(lowbit.load(each, dtype=torch.float32)) for each in (path, tmp_path / "ct"))
    assert all(torch.equal(one[n].weight.dequantize(), other[n].weight.dequantize()) for n in one)


# --- parts of a fused weight ------------------------------------------------------------------------------------------


def layer_of(rows: int, columns: int, spec: Spec, activation: Spec | None = None) -> QLayer:
    weight = torch.randn(rows, columns)
    grid = fit_range(weight, spec)
    return QLayer(QWeight((QTensor(grid.encode(weight), grid),)), activation)


@pytest.mark.parametrize(
    "spec",
    [
        per_group(Int(4), 32),
        per_group(Int(3, "asymmetric"), 32),
        per_channel(Int(8), scale="float32"),
        per_tensor(E4M3, scale="float32"),
        nvfp4(),
        Spec(E4M3, (32, 32), "float32"),
    ],
    ids=str,
)
def test_parts_are_stacked_and_split_again(spec: Spec) -> None:
    from lowbit.formats.base import rows

    parts = [layer_of(32, 64, spec), layer_of(96, 64, spec)]
    whole = stack(parts)
    assert torch.equal(whole.weight.dequantize(), torch.cat([part.weight.dequantize() for part in parts]))
    for part, cut in zip(parts, (slice(0, 32), slice(32, 128)), strict=True):
        again = rows(whole, cut)
        assert torch.equal(again.weight.dequantize(), part.weight.dequantize())
        assert torch.equal(again.weight.parts[0].codes, part.weight.parts[0].codes)
        if spec.scale == "e4m3":
            assert same(again, part)
            assert again.weight.parts[0].grid.outer is not None
            assert again.weight.parts[0].grid.outer.shape == (1, 1)


def test_parts_that_cannot_be_stacked() -> None:
    four, eight = per_group(Int(4), 32), per_group(Int(8), 32)
    with pytest.raises(ValueError, match="different formats"):
        stack([layer_of(8, 64, four), layer_of(8, 64, eight)])
    with pytest.raises(ValueError, match="different formats"):
        stack([layer_of(8, 64, four), layer_of(8, 64, four, per_token(Int(8)))])
    with pytest.raises(ValueError, match="blocks of 32 do not divide"):
        stack([layer_of(40, 64, Spec(E4M3, (32, 32), "float32")), layer_of(64, 64, Spec(E4M3, (32, 32), "float32"))])


# --- what is not imported ---------------------------------------------------------------------------------------------


def test_what_is_not_foreign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "demo", "--output", str(tmp_path / "x")]) == 2
    assert "in no quantized format that lowbit reads" in capsys.readouterr().err
    run = quantized(tmp_path, "llama")
    assert main(["import", str(run), "--output", str(tmp_path / "x")]) == 2
    assert "it needs no import" in capsys.readouterr().err
    lowbit.export(run, tmp_path / "out", format="gptq")
    assert main(["export", str(tmp_path / "out"), "--format", "awq", "--output", str(tmp_path / "x")]) == 2
    assert "lowbit import" in capsys.readouterr().err
    assert not foreign.is_foreign(tmp_path / "model")
    assert not (tmp_path / "x").exists()


def test_a_half_quantized_fused_weight_is_refused(tmp_path: Path) -> None:
    """One of two experts' projections that transformers fuses is left in 16 bits."""
    lowbit.export(quantized(tmp_path, "mixtral"), tmp_path / "out", format="compressed-tensors")
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = read_shard(file)
        for name in [n for n in tensors if ".experts.0.w1." in n]:
            del tensors[name]
        if any(".experts.0." in name for name in tensors):
            prefix = next(n for n in tensors if ".experts.0.w3." in n).partition(".experts.")[0]
            tensors[f"{prefix}.experts.0.w1.weight"] = torch.zeros(96, 64, dtype=torch.bfloat16)
        write_shard(file, tensors)
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    write_index(tmp_path / "out", [file.name for file in (tmp_path / "out").glob("*.safetensors")])
    with pytest.raises(ValueError, match=r"only a part of .* is quantized"):
        lowbit.load(tmp_path / "out")


def test_a_model_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    path = fp8_directory(tmp_path / "fp8", lambda t: {k: v for k, v in t.items() if "o_proj" not in k})
    with pytest.raises(ValueError, match=r"the fp8 model lacks .*o_proj"):
        lowbit.load(path)


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("model.layers.0.q_proj.weight_packed", "model.layers.0.q_proj"),
        ("model.layers.0.q_proj.weight", "model.layers.0.q_proj"),
        ("model.layers.0.q_proj.weight.quant_state.bitsandbytes__nf4", "model.layers.0.q_proj"),
        ("model.layers.0.q_proj.weight.absmax", "model.layers.0.q_proj"),
        ("model.norm.weight", "model.norm"),
    ],
)
def test_the_module_of_a_tensor(tensor: str, module: str) -> None:
    assert foreign.module_of(tensor) == module


def test_every_family_is_known() -> None:
    assert set(FAMILIES) <= TINY.keys()
