"""The MLX format, held to packers written as loops, to every option that MLX's own models use, and to mlx-lm itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import (
    LINEARS,
    call,
    client_answers,
    client_python,
    llama,
    logits_of,
    make_run,
    quantize,
    same,
    tensors_of,
    windows,
)
from families import TINY
from tiny import save_model
from torch import Tensor

import lowbit
from lowbit.formats import base
from lowbit.formats import mlx as form
from lowbit.formats.files import read_shard, write_json, write_shard
from lowbit.formats.mlx_config import configuration, remarks
from lowbit.graph.skeleton import build_skeleton
from lowbit.numerics.kv import KV
from lowbit.numerics.qtensor import QLayer, QWeight
from lowbit.numerics.spec import (
    E2M1,
    E4M3,
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

CASES: dict[str, Spec] = {
    **{f"w{bits}": per_group(Int(bits), 32) for bits in form.WIDTHS},
    **{f"w{bits}-asym": per_group(Int(bits, "asymmetric"), 32) for bits in form.WIDTHS},
    "w4-least": per_group(Int(4, "asymmetric"), 32, scale="float16-min"),
    "w4-g64": per_group(Int(4), 64),
    "w4-g128": per_group(Int(4), 128),
    "w4-g96": per_group(Int(4), 96),
    "w4-row": per_channel(Int(4)),
    "w4-tensor": per_tensor(Int(4)),
    "w4-columns": Spec(Int(4), (-1, 32)),
    "w4-float32": per_group(Int(4), 32, scale="float32"),
    "w4-bfloat16": per_group(Int(4), 32, scale="bfloat16"),
    "w4-restricted": per_group(Int(4, "symmetric-restricted"), 32),
    "w4-unsigned": per_group(Int(4, "symmetric-unsigned"), 32),
    "w4-raw": per_group(Int(4, "asymmetric-raw"), 32),
    "mxfp4": mx(E2M1),
    "mxfp8": mx(E4M3),
}
SHAPE = (7, 384)


def layer(case: str, shape: tuple[int, int] = SHAPE) -> QLayer:
    return quantize(torch.randn(shape) + 0.3, CASES[case])


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}


# --- oracles ----------------------------------------------------------------------------------------------------------


def words_of(row: list[int], bits: int) -> list[int]:
    """A row of codes as one number of as many bits as there are, cut into words from its lowest end."""
    whole = sum(code << (bits * i) for i, code in enumerate(row))
    return [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(len(row) * bits // 32)]


def code_in(words: list[int], bits: int, i: int) -> int:
    """Code i of a row of words."""
    whole = sum(word << (32 * j) for j, word in enumerate(words))
    return (whole >> (bits * i)) & ((1 << bits) - 1)


def dequantized(tensors: dict[str, Tensor], bits: int, group: int) -> Tensor:
    """The affine mode's definition, element by element: scale · q + bias."""
    words, scales, biases = (tensors[kind].tolist() for kind in ("weight", "scales", "biases"))
    columns = len(words[0]) * 32 // bits
    return torch.tensor(
        [
            [scales[o][i // group] * code_in(words[o], bits, i) + biases[o][i // group] for i in range(columns)]
            for o in range(len(words))
        ]
    )


# --- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", form.WIDTHS)
def test_words_are_one_stream_of_bits(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 96), dtype=torch.uint8)
    packed = form._to_words(codes, bits)
    assert packed.dtype == torch.uint32
    assert packed.tolist() == [words_of(row, bits) for row in codes.tolist()]
    assert torch.equal(form._from_words(packed, bits), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("mx")])
def test_scale_times_code_plus_bias_is_the_weight(case: str, dtype: torch.dtype) -> None:
    given = layer(case)
    settings = form.settings_of(given)
    packed = local(form.pack("m", given, dtype))
    assert packed["scales"].shape == packed["biases"].shape == (7, 384 // settings["group_size"])
    assert packed["scales"].dtype == packed["biases"].dtype
    found = dequantized(packed, settings["bits"], settings["group_size"])
    if case == "w4-float32":  # the sum of two products rounds where the product of a sum does not
        torch.testing.assert_close(found, given.weight.dequantize(), rtol=0, atol=1e-6)
    else:
        assert torch.equal(found, given.weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 384), (1, 384), (33, 768)])
@pytest.mark.parametrize("case", CASES)
def test_unpack_gives_back_every_bit(case: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    given = layer(case, shape)
    settings, packed = form.settings_of(given), form.pack("m", given, dtype)
    back = form.unpack("m", packed, settings)
    assert torch.equal(back.weight.dequantize(), given.weight.dequantize())
    again = form.pack("m", back, dtype)
    assert form.settings_of(back) == settings
    for name, tensor in packed.items():
        if case == "w4-float32" or (case == "w4-bfloat16" and dtype == torch.float16):
            again[name] = again[name].to(tensor.dtype)  # narrower scales than the file had may turn out to be exact
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


@pytest.mark.parametrize("bits", form.WIDTHS)
def test_codes_come_back_as_they_were(bits: int) -> None:
    for rule in (f"w{bits}", f"w{bits}-asym"):
        given = layer(rule)
        assert same(given, form.unpack("m", form.pack("m", given, torch.bfloat16), form.settings_of(given)))


@pytest.mark.parametrize("case", CASES)
def test_meta_tensors_get_the_true_shapes(case: str) -> None:
    given = layer(case)
    expected, meta = form.pack("m", given, torch.bfloat16), QLayer(given.weight.to("meta"))
    packed = form.pack("m", meta, torch.bfloat16)
    assert {n: (t.shape, t.dtype) for n, t in packed.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    assert all(tensor.is_meta for tensor in packed.values())
    assert form.unpack("m", packed, form.settings_of(meta)).weight.shape == SHAPE


def test_scales_take_the_dtype_in_which_biases_are_exact() -> None:
    def kind(case: str, dtype: torch.dtype) -> torch.dtype:
        tensors = local(form.pack("m", layer(case), dtype))
        return tensors["scales"].dtype

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert kind("w4", dtype) == kind("w4-unsigned", dtype) == dtype
        assert kind("w4-asym", dtype) == kind("w4-raw", dtype) == kind("w4-float32", dtype) == torch.float32
        assert kind("w4-least", dtype) == torch.float16
    assert kind("w4-bfloat16", torch.bfloat16) == torch.bfloat16
    assert kind("w4-bfloat16", torch.float16) == torch.float32
    assert kind("mxfp4", torch.bfloat16) == torch.uint8


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_foreseen(case: str) -> None:
    packed = form.pack("m", layer(case), torch.bfloat16)
    assert form.stored_bytes(CASES[case], SHAPE) == sum(tensor.nbytes for tensor in packed.values())


def test_a_bias_beyond_the_dtype_is_refused() -> None:
    large = quantize(torch.randn(4, 64) * 1e5, per_group(Int(8), 32))
    form.pack("m", large, torch.bfloat16)
    with pytest.raises(ValueError, match=r"the biases of m are not exact in torch.float16: .* bfloat16"):
        form.pack("m", large, torch.float16)


def test_a_target_is_narrowed_to_least_values() -> None:
    narrowed = base.narrowed(base.find("mlx"), per_group(Int(4, "asymmetric-raw"), 64))
    assert narrowed == per_group(Int(4, "asymmetric"), 64, scale="float16-min")
    for kept in (CASES["w4"], CASES["mxfp4"], CASES["w4-least"], CASES["w4-unsigned"]):
        assert form.narrow(kept) == kept


# --- what it refuses, and what it tells -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_accepted(case: str) -> None:
    assert form.refuse(CASES[case], None) is None or case == "w4-g96"
    assert form.refuse(CASES[case], None, shape=SHAPE) is None


@pytest.mark.parametrize(
    ("weights", "inputs", "reason"),
    [
        (per_group(Int(7), 32), None, "2, 3, 4, 5, 6 or 8 bits, not 7"),
        (per_group(Int(1), 32), None, "not 1: use one of these"),
        (per_group(Int(4), 16), None, "do not divide the 16: use -g32"),
        (per_group(Int(4, "asymmetric-deepspeed"), 32), None, "use asymmetric"),
        (per_group(Int(4, "asymmetric"), 32, scale="float32"), None, "use half scales"),
        (per_group(Int(4), 32, scale="e8m0"), None, "not e8m0: use half"),
        (per_block(Int(4), 32), None, "one scale per group of a row"),
        (Spec(Int(4), (4, 32)), None, "one scale per group of a row"),
        (per_group(NF4, 64), None, "integers, mxfp4 and mxfp8, not nf4"),
        (nvfp4(), None, "use mxfp4a16"),
        (per_channel(E4M3), None, "use mxfp8a16"),
        (per_channel(Int(8)), per_token(Int(8)), "use a weight-only recipe"),
    ],
)
def test_refusals(weights: Spec, inputs: Spec | None, reason: str) -> None:
    found = form.refuse(weights, inputs)
    assert found is not None
    assert reason in found
    given = replace(quantize(torch.randn(64, 64), weights), activation=inputs)
    with pytest.raises(ValueError, match="MLX"):
        form.pack("m", given, torch.bfloat16)


def test_refusals_of_a_layer() -> None:
    given = layer("w4")
    part = given.weight.parts[0]
    assert "Conv1D" in str(form.refuse(CASES["w4"], None, transposed=True))
    assert "spinquant.merged=true" in str(form.refuse(None, None, mapped=True))
    assert "do not divide the 688 of 688 columns" in str(form.refuse(CASES["w4-row"], None, shape=(4, 688)))
    with pytest.raises(ValueError, match=r"gptq.groups=static"):
        form.pack("m", QLayer(QWeight((replace(part, order=torch.randperm(384)),))), torch.bfloat16)
    with pytest.raises(ValueError, match="sum of parts"):
        form.pack("m", QLayer(QWeight((part, part))), torch.bfloat16)
    assert "keeps the cache in 16 bits" in str(form.refuse_whole(kv=KV(4, 4), corrected=False))
    assert "without corrections" in str(form.refuse_whole(kv=None, corrected=True))
    assert form.refuse_whole(kv=None, corrected=False) is None


def test_families_that_mlx_lm_lacks_are_refused() -> None:
    assert "mlx-lm 0.32 has no opt models: use gguf" in str(form.refuse_model({"model_type": "opt"}))
    assert form.refuse_model({"model_type": "llama"}) is None


def test_notices() -> None:
    def told(case: str) -> str:
        return "\n".join(form.notices(CASES[case], None))

    assert [case for case in ("w4-g64", "w3", "mxfp4", "mxfp8") if told(case)] == []
    assert "--target mlx" in told("w4-asym")
    assert "fp16 scales in float32" in told("w4-least")
    assert "use half" in told("w4-float32")
    assert "takes space" in told("w4-row")


# --- the configuration ------------------------------------------------------------------------------------------------


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    config = TINY[family]()
    settings = {"a": {"bits": 4, "group_size": 32, "mode": "affine"}}
    written = {key: value for key, value in {**config.to_dict(), **changes}.items() if value != "gone"}
    return configuration(written, settings, build_skeleton(config))


def test_what_transformers_renamed_is_written_under_its_old_name_too() -> None:
    plain = config_of("llama", tie_word_embeddings="gone")
    assert (plain["rope_theta"], plain["tie_word_embeddings"]) == (10000.0, False)
    assert config_of("qwen3_moe")["num_experts"] == 4
    gemma = config_of("gemma3")
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1000000.0, 10000.0)
    assert gemma["sliding_window_pattern"] == 2
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    assert config_of("llama", rope_parameters=scaled)["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert config_of("llama", rope_theta=7.0)["rope_theta"] == 7.0


def test_windows_that_mlx_lm_leaves_out_are_told() -> None:
    (told,) = remarks(TINY["mistral"]().to_dict())
    assert "more than 6 tokens" in told
    assert remarks(TINY["gemma3"]().to_dict()) == remarks(TINY["mixtral"]().to_dict()) == ()


def test_most_modules_need_no_settings_of_their_own() -> None:
    usual, odd = ({"bits": bits, "group_size": 64, "mode": "affine"} for bits in (4, 8))
    config = configuration({}, {"a": usual, "b": odd, "c": usual}, build_skeleton(TINY["llama"]()))
    assert config["quantization"] == {**usual, "b": odd}
    assert config["quantization_config"] == config["quantization"]


# --- whole models -----------------------------------------------------------------------------------------------------


def test_an_exported_directory_reads_back_as_the_run_it_came_from(tmp_path: Path) -> None:
    formats = {LINEARS: CASES["w4"], "*.down_proj": CASES["w8-asym"], "*.0.*.k_proj": None}
    run = make_run(tmp_path / "run", llama(), formats)
    told = form.export_directory(run.path, tmp_path / "out", run.skeleton)
    assert any("--target mlx" in text for text in told)
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["model.layers.1.mlp.down_proj"]["bits"] == 8
    assert form.recognizes(config)
    assert not form.recognizes({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}})
    found, rest = form.layers(tensors_of(tmp_path / "out"), config)
    assert found.keys() == run.layers.keys()
    assert all(same(found[name], run.layers[name]) for name in found)
    assert "model.layers.0.self_attn.k_proj.weight" in rest
    model = lowbit.load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits_of(model, windows()), logits_of(run.reference, windows()))


def exported(tmp_path: Path, family: str, recipe: str, **options: Any) -> tuple[Path, Path]:
    """A tiny model, quantized by a recipe and exported: (run directory, export)."""
    model = save_model(family, tmp_path / "model", dtype=torch.bfloat16)
    lowbit.quantize(model, recipe, tmp_path / "run", **options)
    lowbit.export(tmp_path / "run", tmp_path / "out", format="mlx")
    return tmp_path / "run", tmp_path / "out"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_stacked_and_come_apart(family: str, tmp_path: Path) -> None:
    run, out = exported(tmp_path, family, "rtn-w4a16-g32")
    tensors = tensors_of(out)
    parent, width = ("block_sparse_moe", 96) if family == "mixtral" else ("mlp", 32)
    stack = f"model.layers.0.{parent}.switch_mlp.gate_proj"
    assert tensors[f"{stack}.weight"].shape == (4, width, 8)
    assert tensors[f"{stack}.biases"].shape == (4, width, 2)
    assert not any(".experts." in name for name in tensors)
    models = [lowbit.load(path, dtype=torch.float32) for path in (run, out)]
    assert torch.equal(*(logits_of(model, windows()) for model in models))


def test_asymmetric_weights_made_for_mlx_are_small_and_exact(tmp_path: Path) -> None:
    run, out = exported(tmp_path, "llama", "rtn-w4a16-g32-asym", target="mlx")
    kinds = {tensor.dtype for name, tensor in tensors_of(out).items() if name.endswith((".scales", ".biases"))}
    assert kinds == {torch.float16}
    models = [lowbit.load(path, dtype=torch.float32) for path in (run, out)]
    assert torch.equal(*(logits_of(model, windows()) for model in models))


def test_refusals_of_a_whole_model(tmp_path: Path) -> None:
    mixed = {"*.experts.0.*": CASES["w4"], "*.experts.[123].*": CASES["w8"]}
    run = make_run(tmp_path / "mixed", TINY["mixtral"](), mixed)
    with pytest.raises(ValueError, match="which differ in format here"):
        form.export_directory(run.path, tmp_path / "out", run.skeleton)
    latent = make_run(tmp_path / "latent", TINY["deepseek_v3"](), {"*.kv_b_proj": CASES["w4"]})
    with pytest.raises(ValueError, match=r"kv_b_proj on loading and rounds it again: .*--ignore"):
        form.export_directory(latent.path, tmp_path / "out", latent.skeleton)
    plain = make_run(tmp_path / "plain", llama(), {})
    with pytest.raises(ValueError, match=r"no linear of .* is quantized"):
        form.export_directory(plain.path, tmp_path / "out", plain.skeleton)
    assert not (tmp_path / "out").exists()


# --- foreign models ---------------------------------------------------------------------------------------------------


def affine(scale: Tensor, bias: Tensor, bits: int = 4) -> tuple[QWeight, Tensor]:
    """(what is read of random codes with these scales and biases, their value by definition)."""
    codes = torch.randint(0, 1 << bits, (len(scale), 32 * scale.shape[1]), dtype=torch.uint8)
    tensors = {"m.weight": form._to_words(codes, bits), "m.scales": scale, "m.biases": bias}
    spread = [x.float().repeat_interleave(32, -1) for x in (scale, bias)]
    settings = {"bits": bits, "group_size": 32}
    return form.unpack("m", tensors, settings).weight, spread[0] * codes.float() + spread[1]


def test_biases_that_are_no_multiple_of_a_scale() -> None:
    scale, bias = torch.randn(6, 3).bfloat16(), torch.randn(6, 3).bfloat16()
    weight, expected = affine(scale, bias)
    assert [part.grid.spec.scale for part in weight.parts] == ["float16-min"]
    assert torch.equal(weight.dequantize(), expected)
    for kind in (torch.float32, torch.bfloat16):  # what fp16 cannot hold
        weight, expected = affine((scale.float() * 1.0001e-6).to(kind), (bias.float() * 1.0001e-6).to(kind))
        assert len(weight.parts) == 2
        assert torch.equal(weight.dequantize(), expected)


def test_scales_of_zero_and_below() -> None:
    scale = torch.tensor([[0.0, -0.5, 0.25]], dtype=torch.float16)
    weight, expected = affine(scale, torch.tensor([[1.0, 4.0, -0.75]], dtype=torch.float16))
    assert torch.equal(weight.dequantize(), expected)
    weight, expected = affine(scale, -3 * scale)
    assert torch.equal(weight.dequantize(), expected)


def test_settings_are_found_by_name() -> None:
    given = {name: quantize(torch.randn(4, 128), per_group(Int(bits), size)) for name, bits, size in GIVEN}
    tensors = {key: value for name, x in given.items() for key, value in form.pack(name, x, torch.bfloat16).items()}
    own = {name: {"bits": bits, "group_size": size} for name, bits, size in GIVEN[1:]}
    config = {"quantization": {"group_size": 32, "bits": 4, **own}}
    found, rest = form.layers({**tensors, "norm.weight": torch.ones(4)}, config)
    assert rest.keys() == {"norm.weight"}
    assert all(same(found[name], given[name]) for name in given)
    with pytest.raises(ValueError, match="how usual is stored"):
        form.layers(tensors, {"quantization": {"group_size": 128, "bits": 4}})
    with pytest.raises(ValueError, match="not nvfp4"):
        form.layers(tensors, {"quantization": {"group_size": 32, "bits": 4, "mode": "nvfp4", **own}})


GIVEN = [("usual", 4, 32), ("wide", 8, 32), ("odd", 3, 64)]


# --- the client -------------------------------------------------------------------------------------------------------


@pytest.mark.client
@pytest.mark.parametrize("case", CASES)
def test_mlx_dequantizes_to_the_same_numbers(case: str, tmp_path: Path) -> None:
    """`mx.dequantize` in float32, which is where codes, scales and biases are exact."""
    python = client_python("mlx")
    given = layer(case)
    settings = form.settings_of(given)
    tensors = local(form.pack("m", given, torch.bfloat16))
    write_shard(tmp_path / "in.safetensors", tensors)
    write_json(tmp_path / "settings.json", settings)
    call([python, "-c", DEQUANTIZE, str(tmp_path)])
    found = read_shard(tmp_path / "out.safetensors")["weight"]
    if case == "w4-float32":
        torch.testing.assert_close(found, given.weight.dequantize(), rtol=0, atol=1e-6)
    else:
        assert torch.equal(found, given.weight.dequantize())


DEQUANTIZE = """
import json, sys
import mlx.core as mx
given = mx.load(sys.argv[1] + "/in.safetensors")
asked = json.load(open(sys.argv[1] + "/settings.json"))
scales, biases = given["scales"], given.get("biases")
if biases is not None:
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
asked = {"group_size": asked["group_size"], "bits": asked["bits"], "mode": asked["mode"]}
weight = mx.dequantize(given["weight"], scales, biases, **asked, dtype=mx.float32)
mx.save_safetensors(sys.argv[1] + "/out.safetensors", {"weight": weight})
"""


MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "rtn-w4a16-g32", {}),
    ("llama", "rtn-w8a16", {"ignore": ["*.down_proj"]}),
    ("llama-tied", "rtn-w3a16-g32-asym", {}),
    ("llama-tied", "rtn-w4a16-g32-asym", {"target": "mlx"}),
    ("qwen2", "rtn-w6a16-g32", {}),
    ("qwen3", "rtn-mxfp4a16", {}),
    ("llama", "rtn-mxfp8a16", {}),
    ("mistral", "rtn-w5a16-g32", {}),
    ("phi3", "rtn-w2a16-g32", {}),
    ("gemma2", "rtn-w4a16-g32", {}),
    ("gemma3", "rtn-w4a16-g32", {}),
    ("mixtral", "rtn-w4a16-g32", {}),
    ("qwen3_moe", "rtn-w4a16-g32", {}),
    ("deepseek_v3", "rtn-w4a16-g32", {"ignore": ["*.kv_b_proj"]}),
]


@pytest.mark.client
def test_mlx_lm_computes_what_lowbit_computes(tmp_path: Path) -> None:
    client_python("mlx")
    runs, exports = {}, {}
    for index, (family, recipe, options) in enumerate(MODELS):
        case = f"{index} {family} {recipe}"
        (tmp_path / str(index)).mkdir()
        runs[case], out = exported(tmp_path / str(index), family, recipe, **options)
        length = 6 if family in ("mistral", "gemma2") else 24  # they get no window there, see `remarks`
        exports[case] = out, windows(length=length)
    answer = client_answers("mlx", exports, tmp_path / "jobs")
    for case, run in runs.items():
        found, said = answer(case)
        assert said["client"] == "mlx"
        expected = logits_of(lowbit.load(run, dtype=torch.float32), exports[case][1])
        assert float((found - expected).abs().max()) <= 1e-5, case


CONVERT = """
import sys
from mlx_lm import convert
for model in sys.argv[1:]:
    convert(model, model + "-theirs", quantize=True, q_group_size=32, q_bits=int(model[-1]))
"""


@pytest.mark.client
def test_models_that_mlx_lm_quantized(tmp_path: Path) -> None:
    """Its own converter, from models of any dtype: lowbit reads what it wrote, and computes what it computes."""
    python = client_python("mlx")
    made = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for bits, family in ((3, "llama"), (4, "mixtral"), (8, "llama")):
            made.append(save_model(family, tmp_path / f"{family}-{str(dtype)[6:]}-{bits}", dtype=dtype))
    call([python, "-c", CONVERT, *map(str, made)])
    theirs = {path.name: path.with_name(f"{path.name}-theirs") for path in made}
    exports = {name: (path, windows()) for name, path in theirs.items()}
    answer = client_answers("mlx", exports, tmp_path / "jobs")
    for name, path in theirs.items():
        loaded = lowbit.load(path, dtype=torch.float32)
        assert float((answer(name)[0] - logits_of(loaded, windows())).abs().max()) <= 1e-5, name
