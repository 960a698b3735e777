"""From a recipe to files: what only compressed-tensors' clients need of a run, and what a plan refuses for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import save_text
from tiny import tokenizer as tiny_tokenizer

import lowbit
from lowbit.formats.files import read_shard
from lowbit.modules.attention import attached
from lowbit.modules.linear import QLinear, local_grid, quantize_activation
from lowbit.numerics.grid import Grid
from lowbit.numerics.kv import KV, Affine, decode, encode, fake_quantize, fit
from lowbit.numerics.maps import Hadamard
from lowbit.numerics.spec import nvfp4
from lowbit.recipes.document import from_dict, to_dict
from lowbit.recipes.grammar import parse

OPTIONS = {"samples": 4, "length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose feed-forward has a power of two of channels, and a text beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, **sizes, **heads, initializer_range=0.2)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer(128).save_pretrained(path)
    save_text(path / "text.txt")
    return path


def quantized(model: Path, out: Path, recipe: str, *settings: str) -> Path:
    given = {"target": "compressed-tensors", "calibration": str(model / "text.txt"), "settings": settings, **OPTIONS}
    lowbit.quantize(model, recipe, out, **given)
    return out


# --- NVFP4 inputs with a calibrated tensor scale ----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["rtn-nvfp4-static", "gptq-nvfp4-static"])
def test_nvfp4_is_calibrated_and_shared_as_servers_expect(recipe: str, model: Path, tmp_path: Path) -> None:
    run = quantized(model, tmp_path / "run", recipe)
    loaded = lowbit.load(run, dtype=torch.float32)
    layers = {name: each.layer for name, each in loaded.named_modules() if isinstance(each, QLinear)}
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        joined = [layers[f"model.layers.1.{name}"] for name in names]
        assert len({float(each.weight.parts[0].grid.outer) for each in joined}) == 1
        assert len({float(each.input_grid.scale) for each in joined}) == 1
    told: list[str] = []
    lowbit.export(run, tmp_path / "out", notice=told.append)
    assert not any("tensor scales" in notice for notice in told)
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf8"))["weight_map"]
    tensors = read_shard(tmp_path / "out" / names["model.layers.0.mlp.down_proj.input_global_scale"])
    stored = tensors["model.layers.0.mlp.down_proj.input_global_scale"]
    assert torch.equal(1 / stored.reshape(1, 1), layers["model.layers.0.mlp.down_proj"].input_grid.scale)


def test_the_tensor_scale_covers_what_was_seen() -> None:
    x = torch.randn(5, 64) * 3
    outer = (x.abs().max() / 6 / 448).reshape(1, 1)
    grid = local_grid(x, Grid(nvfp4(), outer))
    for row, scales in zip(x.unflatten(1, (4, 16)), grid.scale, strict=True):
        for group, scale in zip(row, scales, strict=True):
            wanted = (group.abs().max() / 6 * (1 / outer)).to(torch.float8_e4m3fn).float() / (1 / outer)
            assert float(scale) == float(wanted)
    spread = torch.cat([torch.full((1, 16), 1e-9), torch.ones(1, 16), torch.zeros(1, 16)], 1)
    found = quantize_activation(spread, nvfp4(), Grid(nvfp4(), torch.full((1, 1), 1 / 6 / 448)))
    assert torch.equal(found[:, :16], torch.zeros(1, 16)), "too small for any scale"
    assert torch.allclose(found[:, 16:32], torch.ones(1, 16), rtol=0.05)
    assert torch.equal(found[:, 32:], torch.zeros(1, 16))


def test_static_nvfp4_is_written_down() -> None:
    recipe = parse("rtn-nvfp4-static")
    assert recipe.scheme.activations == nvfp4()
    assert recipe.calibrated
    assert from_dict(to_dict(recipe)).recipe.scheme == recipe.scheme
    with pytest.raises(ValueError, match="drop -static"):
        parse("rtn-mxfp4-static")


# --- E4M3 keys and values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["token", "tensor", "head"])
def test_e4m3_keys_and_values(layout: str) -> None:
    part = KV(8, 8, layout, rule="e4m3").key_quantizer  # type: ignore[arg-type]
    assert part is not None
    x = torch.randn(2, 3, 7, 16) * 5
    affine = fit(*part.range(x), part)
    assert affine.offset is None
    expected = (x / affine.scale.float().squeeze(3)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    expected = expected * affine.scale.float().squeeze(3)
    given: Affine | None = affine if part.static else None
    assert torch.equal(fake_quantize(x, part, affine=given), expected)
    stored = encode(x, part, affine=given)
    assert stored.codes.shape == x.shape and stored.codes.dtype == torch.uint8
    assert torch.equal(decode(stored, part, 16, affine=given), expected)


def test_e4m3_has_8_bits() -> None:
    with pytest.raises(ValueError, match="E4M3 keys and values have 8 bits"):
        KV(4, 4, "tensor", rule="e4m3")


def test_a_calibrated_cache_is_exported(model: Path, tmp_path: Path) -> None:
    run = quantized(model, tmp_path / "run", "rtn-fp8kv8", "scheme.kv.layout=tensor", "scheme.kv.rule=e4m3")
    lowbit.export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))["quantization_config"]
    assert config["kv_cache_scheme"]["type"] == "float"
    stored = {
        name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in read_shard(file).items()
    }
    for path, layer in attached(lowbit.load(run, dtype=torch.float32)).items():
        for side, affine in zip("kv", layer.affine, strict=True):
            assert affine is not None
            assert torch.equal(stored[f"{path}.{side}_scale"], affine.scale.float().reshape(1))


# --- online transforms ------------------------------------------------------------------------------------------------


def test_rotations_that_clients_know_are_planned_and_exported(model: Path, tmp_path: Path) -> None:
    run = quantized(model, tmp_path / "run", "quarot-w4a16-g32", "quarot.across=false")
    lowbit.export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))["quantization_config"]
    (scheme,) = config["transform_config"]["config_groups"].values()
    assert [target.rpartition(".")[2] for target in scheme["apply"][0]["targets"]] == ["down_proj", "down_proj"]
    loaded = lowbit.load(run, dtype=torch.float32)
    assert loaded.get_submodule("model.layers.0.mlp.down_proj").layer.input_map == Hadamard(128)  # type: ignore[union-attr]
    again = lowbit.load(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("recipe", "settings", "reason"),
    [
        ("quarot-w4a16-g32", (), r"o_proj: compressed-tensors export carries no online maps but Hadamard"),
        ("flatquant-w4a16", (), "carries no online maps but Hadamard"),
        ("rtn-nvfp4", (), "q_proj: compressed-tensors clients need a calibrated tensor scale"),
        ("rtn-mxfp4", (), "as e8m0-even does"),
        ("rtn-w4a16kv8", (), "caches with calibrated symmetric ranges"),
    ],
)
def test_plans_refuse_the_rest(
    recipe: str, settings: tuple[str, ...], reason: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        quantized(model, tmp_path / "run", recipe, *settings)
