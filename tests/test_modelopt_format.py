"""ModelOpt checkpoints, held to readers written as loops, to nvidia-modelopt's own packers and config converter, and to
vLLM."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import call, client_answers, client_python, make_run, tensors_of, windows
from exported import llama as llama_config
from families import TINY
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit.formats import modelopt as form
from lowbit.formats.files import read_shard, write_json, write_shard
from lowbit.formats.foreign import foreign_config
from lowbit.formats.modelopt_config import mirrored, of_experts, quantization, settings_in
from lowbit.numerics.grid import Grid, fit_range
from lowbit.numerics.kv import KV, Affine
from lowbit.numerics.qtensor import QAttention, QLayer, QTensor, QWeight
from lowbit.numerics.spec import (
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

Formats = tuple[Spec, Spec | None]

STATIC = per_tensor(E4M3, scale="float32")
CASES: dict[str, tuple[str, Formats]] = {
    "fp8-tensor": ("FP8", (per_tensor(E4M3, scale="float32"), STATIC)),
    "fp8-tensor-half": ("FP8", (per_tensor(E4M3), STATIC)),
    "fp8": ("FP8_PER_CHANNEL_PER_TOKEN", (per_channel(E4M3, scale="float32"), per_token(E4M3))),
    "w4": ("W4A16_AWQ", (per_group(Int(4), 32), None)),
    "w4-g128": ("W4A16_AWQ", (per_group(Int(4), 128), None)),
    "w4-unsigned": ("W4A16_AWQ", (per_group(Int(4, "symmetric-unsigned"), 32), None)),
    "w4-float32": ("W4A16_AWQ", (per_group(Int(4), 32, scale="float32"), None)),
    "w4afp8": ("W4A8_AWQ", (per_group(Int(4), 32), STATIC)),
    "nvfp4a16": ("W4A16_NVFP4", (nvfp4(), None)),
    "nvfp4": ("NVFP4", (nvfp4(), nvfp4())),
}
SHAPE = (6, 256)


def layer_of(weight: Tensor, formats: Formats) -> QLayer:
    """Rounded to nearest on the min-max grid; static inputs get a range of ±3."""
    weights, inputs = formats
    grid = fit_range(weight.float(), weights)
    scale = None
    if inputs is not None and not inputs.dynamic:
        scale = Grid(inputs, torch.full((1, 1), 3 / 448 / (6 if inputs == nvfp4() else 1)))
    return QLayer(QWeight((QTensor(grid.encode(weight.float()), grid),)), inputs, scale)


def layer(case: str, shape: tuple[int, int] = SHAPE) -> QLayer:
    return layer_of(torch.randn(shape) * 0.1, CASES[case][1])


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("m."): tensor for name, tensor in tensors.items()}


# --- one layer --------------------------------------------------------------------------------------------------------

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def by_hand(tensors: dict[str, Tensor], algo: str) -> Tensor:
    """The weight of a linear by its algorithm's definition, value by value in double precision."""
    stored, scale = tensors["weight"], tensors["weight_scale"].double()
    if algo.startswith("FP8"):
        return stored.double() * (scale if algo == "FP8" else scale[:, None])
    rows, columns = stored.shape
    if "NVFP4" in algo:
        values = torch.empty(rows, 2 * columns, dtype=torch.float64)
        outer = tensors["weight_scale_2"].double()
        for o in range(rows):
            for i in range(2 * columns):
                code = int(stored[o, i // 2]) >> (4 * (i % 2)) & 15
                values[o, i] = math.copysign(E2M1[code & 7], -1 if code & 8 else 1) * scale[o, i // 16] * outer
        return values
    values = torch.empty(2 * rows, columns, dtype=torch.float64)
    group = columns // scale.shape[1]
    for o in range(2 * rows):
        for i in range(columns):
            code = int(stored[o // 2, i]) >> (4 * (o % 2)) & 15
            values[o, i] = (code - 16 if code > 7 else code) * scale[o, i // group]
    return values


@pytest.mark.parametrize("case", CASES)
def test_a_reader_by_hand_gets_the_same_numbers(case: str) -> None:
    given, (algo, _) = layer(case), CASES[case]
    tensors = local(form.pack("m", given, torch.bfloat16))
    assert form.algorithm_of(given) == algo
    torch.testing.assert_close(by_hand(tensors, algo).float(), given.weight.dequantize(), rtol=2**-22, atol=0)
    if given.input_grid is not None:
        assert torch.equal(tensors["input_scale"], given.input_grid.scale.reshape(()))


@pytest.mark.parametrize("shape", [(6, 256), (2, 512), (34, 384)])
@pytest.mark.parametrize("case", CASES)
def test_unpack_gives_back_every_bit(case: str, shape: tuple[int, int]) -> None:
    given = layer(case, shape)
    packed = form.pack("m", given, torch.bfloat16)
    back = form.unpack("m", packed, CASES[case][0])
    assert torch.equal(back.weight.dequantize(), given.weight.dequantize())
    assert back.activation == given.activation
    assert (back.input_grid is None) == (given.input_grid is None)
    again = form.pack("m", back, torch.bfloat16)
    assert again.keys() == packed.keys()
    for name in packed:
        assert again[name].dtype == packed[name].dtype
        assert torch.equal(again[name].float(), packed[name].float()), name


@pytest.mark.parametrize("case", CASES)
def test_meta_tensors_get_the_true_shapes(case: str) -> None:
    given = layer(case)
    expected = form.pack("m", given, torch.bfloat16)
    inputs = None if given.input_grid is None else given.input_grid.to("meta")
    meta = replace(given, weight=given.weight.to("meta"), input_grid=inputs)
    packed = form.pack("m", meta, torch.bfloat16)
    assert {n: (t.shape, t.dtype) for n, t in packed.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    assert all(tensor.is_meta for tensor in packed.values())
    assert form.unpack("m", packed, CASES[case][0]).weight.shape == given.weight.shape


def test_the_divisor_is_a_power_of_two_that_brings_weights_into_range() -> None:
    for factor in (1e-3, 0.1, 56.0, 300.0):
        given = layer_of(torch.randn(SHAPE) * factor, CASES["w4afp8"][1])
        divisor = form.divisor_of(given)
        scaled = given.weight.dequantize() / divisor
        assert math.log2(divisor).is_integer()
        assert 100 < 8 / 7 * scaled.abs().max() <= 448 * 8 / 7
        scale = given.weight.parts[0].grid.scale
        assert torch.equal((scale.half() / divisor).float() * divisor, scale)  # as TensorRT-LLM divides


def test_pre_quant_scale_is_there_and_does_nothing() -> None:
    tensors = form.pack("m", layer("w4"), torch.float16)
    assert torch.equal(tensors["m.pre_quant_scale"], torch.ones(256, dtype=torch.float16))
    tensors["m.pre_quant_scale"][3] = 2
    with pytest.raises(ValueError, match="pre_quant_scale, which codes cannot take in"):
        form.unpack("m", tensors, "W4A16_AWQ")


# --- what it refuses, and what it tells -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_accepted(case: str) -> None:
    assert form.refuse(*CASES[case][1]) is None
    assert form.refuse(*CASES[case][1], shape=SHAPE) is None


@pytest.mark.parametrize(
    ("weights", "inputs", "reason"),
    [
        (nvfp4(), nvfp4(dynamic=True), "use nvfp4-static, or nvfp4a16"),
        (per_channel(E4M3), None, "16-bit inputs: use fp8"),
        (per_channel(E4M3), STATIC, "a scale per tensor for both and static inputs"),
        (per_tensor(E4M3), per_token(E4M3), "use fp8 (rows and tokens have scales)"),
        (per_channel(E4M3), per_token(E5M2), "use fp8"),
        (per_block(E4M3, 128), None, "use fp8"),
        (per_group(Int(4, "asymmetric"), 64), None, "use symmetric weights in groups"),
        (per_channel(Int(4)), None, "use symmetric weights in groups"),
        (per_group(Int(4), 64), per_token(E4M3), "w4afp8-g128-static"),
        (per_group(Int(8), 64), None, "use fp8, nvfp4-static"),
        (per_group(NF4, 64), None, "use fp8, nvfp4-static"),
        (mx(E4M3), None, "use fp8"),
    ],
)
def test_refusals(weights: Spec, inputs: Spec | None, reason: str) -> None:
    found = form.refuse(weights, inputs)
    assert found is not None
    assert reason in found
    with pytest.raises(ValueError, match="ModelOpt has no checkpoint of"):
        form.pack("m", layer_of(torch.randn(128, 128), (weights, inputs)), torch.bfloat16)


def test_refusals_of_a_layer() -> None:
    given, w4 = layer("w4"), CASES["w4"][1][0]
    (part,) = given.weight.parts
    assert "Linear modules only" in str(form.refuse(w4, None, transposed=True))
    assert "spinquant.merged=true" in str(form.refuse(None, None, mapped=True))
    assert "two rows to a byte, and there are 7" in str(form.refuse(w4, None, shape=(7, 64)))
    assert "less than 128: use -g64" in str(form.refuse(CASES["w4-g128"][1][0], None, shape=(8, 96)))
    with pytest.raises(ValueError, match=r"gptq.groups=static"):
        form.pack("m", QLayer(QWeight((replace(part, order=torch.randperm(256)),))), torch.bfloat16)
    with pytest.raises(ValueError, match="sum of parts"):
        form.pack("m", QLayer(QWeight((part, part))), torch.bfloat16)
    with pytest.raises(ValueError, match="clips of inputs"):
        form.pack("m", replace(layer("fp8"), input_clip=torch.ones(2)), torch.bfloat16)
    four = layer("nvfp4a16")
    (part,) = four.weight.parts
    torn = replace(part.grid, outer=part.grid.outer.expand(6, 1))
    with pytest.raises(ValueError, match="different tensor scales"):
        form.pack("m", QLayer(QWeight((replace(part, grid=torn),))), torch.bfloat16)


def test_caches() -> None:
    kv = KV(8, 8, "tensor", rule="e4m3")
    assert form.refuse_whole(kv=kv, corrected=False) is None
    assert "layout tensor and rule e4m3" in str(form.refuse_whole(kv=KV(4, 4), corrected=False))
    assert "without corrections" in str(form.refuse_whole(kv=None, corrected=True))
    affine = tuple(Affine(torch.full((1, 1, 1, 1, 1), scale), None) for scale in (0.5, 0.25))
    given = QAttention(kv, affine=(affine[0], affine[1]))
    found = form.pack_attention("a", given)
    assert {name: tensor.item() for name, tensor in found.items()} == {
        "a.k_proj.k_scale": 0.5,
        "a.v_proj.v_scale": 0.25,
    }
    with pytest.raises(ValueError, match=r"quarot.keys=false"):
        form.pack_attention("a", replace(given, clips=torch.ones(2, 2)))


def test_notices() -> None:
    told = {case: "\n".join(form.notices(*formats)) for case, (_, formats) in CASES.items()}
    assert all("wrong logits" in text for text in told.values())
    assert "largest of their scales" in told["fp8-tensor"]
    assert "vLLM does not" in told["w4-g128"]
    assert "groups of 64 and 128" in told["w4"]
    assert "groups of 64 and 128" not in told["w4-g128"]
    assert "E4M3 before it multiplies" in told["w4afp8"]
    assert "use half" in told["w4-float32"]
    assert "on GPUs only" in told["nvfp4"]
    by_row, by_tensor = ({"quant_algo": algo} for algo in ("FP8_PER_CHANNEL_PER_TOKEN", "FP8"))
    expert, other = "model.layers.0.mlp.experts.1.up_proj", "model.layers.0.self_attn.q_proj"
    assert "into no expert" in "".join(of_experts({other: by_row, expert: by_row}))
    assert of_experts({other: by_row, expert: by_tensor}) == ()


# --- whole models -----------------------------------------------------------------------------------------------------


def exported(tmp_path: Path, recipe: str, family: str = "llama", **options: Any) -> tuple[Path, Path]:
    """A tiny model, quantized by a recipe and exported: (run directory, export)."""
    model = save_model(family, tmp_path / "model", dtype=torch.bfloat16)
    text = save_text(tmp_path / "text.txt")
    options = {"calibration": str(text), "samples": 4, "length": 32, **options}
    lowbit.quantize(model, recipe, tmp_path / "run", target="modelopt", **options)
    lowbit.export(tmp_path / "run", tmp_path / "out", format="modelopt")
    return tmp_path / "run", tmp_path / "out"


@pytest.mark.parametrize(
    ("family", "recipe", "algo"),
    [
        ("llama", "rtn-fp8", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("llama-tied", "rtn-w4a16-g32", "W4A16_AWQ"),
        ("llama", "rtn-w4afp8-g32-static", "W4A8_AWQ"),
        ("qwen3", "rtn-nvfp4-static", "NVFP4"),
        ("mixtral", "rtn-nvfp4a16", "W4A16_NVFP4"),
        ("mixtral", "rtn-fp8", "FP8_PER_CHANNEL_PER_TOKEN"),
    ],
)
def test_an_export_reads_back_as_the_run_it_came_from(family: str, recipe: str, algo: str, tmp_path: Path) -> None:
    run, out = exported(tmp_path, recipe, family)
    config = foreign_config(out)
    stated = config["hf_quant_config"]["quantization"]
    assert (stated["quant_algo"], config["quantization_config"]["quant_algo"]) == (algo, algo)
    assert "lm_head" in stated["exclude_modules"]
    assert form.recognizes(config)
    assert not form.recognizes({"quantization_config": {"quant_method": "fp8"}})
    with torch.no_grad():
        one, other = (lowbit.load(path, dtype=torch.float32)(windows()).logits for path in (run, out))
    assert torch.equal(one, other)


def test_linears_that_are_joined_share_a_divisor(tmp_path: Path) -> None:
    _, out = exported(tmp_path, "rtn-w4afp8-g32-static")
    tensors = tensors_of(out)
    for block in range(2):
        joined = [f"model.layers.{block}.self_attn.{name}_proj" for name in "qkv"]
        assert len({float(tensors[f"{name}.weight_scale_2"]) for name in joined}) == 1
        assert len({float(tensors[f"{name}.input_scale"]) for name in joined}) == 1


def test_several_formats_are_mixed_precision(tmp_path: Path) -> None:
    formats = {"*_proj": nvfp4(), "*.down_proj": CASES["w4"][1][0], "*.0.*.k_proj": None}
    run = make_run(tmp_path / "run", llama_config(), formats)
    told = form.export_directory(run.path, tmp_path / "out", run.skeleton)
    config = foreign_config(tmp_path / "out")
    stated = config["hf_quant_config"]["quantization"]
    assert stated["quant_algo"] == "MIXED_PRECISION"
    assert stated["quantized_layers"]["model.layers.1.mlp.down_proj"]["quant_algo"] == "W4A16_AWQ"
    assert stated["exclude_modules"] == ["lm_head", "model.layers.0.self_attn.k_proj"]
    found, rest = form.layers(tensors_of(tmp_path / "out"), config)
    assert found.keys() == run.layers.keys()
    assert all(torch.equal(found[n].weight.dequantize(), run.layers[n].weight.dequantize()) for n in found)
    assert "model.layers.0.self_attn.k_proj.weight" in rest
    assert any("NVFP4 weights of q, k, v" in text for text in told)  # each found its own scale in this run
    del stated["quantized_layers"]["model.layers.1.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"does not say how model.layers.1.mlp.down_proj"):
        form.layers(tensors_of(tmp_path / "out"), config)
    with pytest.raises(ValueError, match="does not read ModelOpt's MXFP8"):
        form.layers(tensors_of(tmp_path / "out"), {"quantization_config": {"quant_algo": "mxfp8"}})


def test_refusals_of_a_whole_model(tmp_path: Path) -> None:
    embedding = make_run(tmp_path / "embedding", llama_config(), {"*.embed_tokens": CASES["w4"][1][0]})
    with pytest.raises(ValueError, match=r"embed_tokens is no Linear"):
        form.export_directory(embedding.path, tmp_path / "out", embedding.skeleton)
    plain = make_run(tmp_path / "plain", TINY["llama"](), {})
    with pytest.raises(ValueError, match=r"no linear of .* is quantized"):
        form.export_directory(plain.path, tmp_path / "out", plain.skeleton)
    assert not (tmp_path / "out").exists()


# --- nvidia-modelopt --------------------------------------------------------------------------------------------------

THEIRS = """
import json, sys, torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
given, asked, found = load_file(sys.argv[1] + "/in.safetensors"), json.load(open(sys.argv[1] + "/asked.json")), {}
names = {"FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8_pc_pt", "W4A16_AWQ": "int4_awq", "W4A8_AWQ": "w4a8_awq"}
for case, (algo, group) in asked["layers"].items():
    scale, outer = given[case + ".weight_scale"], given.get(case + ".weight_scale_2")
    kind = names.get(algo, "nvfp4")
    found[case] = to_quantized_weight(given[case + ".values"], scale, kind, outer, group)
    if kind == "nvfp4":
        packed = NVFP4QTensor(torch.Size(given[case + ".values"].shape), torch.float32, given[case + ".weight"])
        values = packed.dequantize(torch.float32, scale=scale, double_scale=outer, block_sizes={-1: 16})
        found[case + ".values"] = values
save_file({name: tensor.view(torch.uint8).contiguous() for name, tensor in found.items() if tensor.element_size() == 1}
    | {name: tensor.contiguous() for name, tensor in found.items() if tensor.element_size() > 1},
    sys.argv[1] + "/out.safetensors")
converted = [convert_hf_quant_config_format(whole) for whole in asked["configs"]]
json.dump(converted, open(sys.argv[1] + "/configs.json", "w"))
"""


@pytest.mark.client
def test_modelopt_writes_the_same_bytes_and_reads_the_same_numbers(tmp_path: Path) -> None:
    """Its packers, given our values and scales, its NVFP4 reader, and its way from one configuration to the other."""
    python = client_python("modelopt")
    given = {case: layer(case) for case in CASES}
    packed = {case: form.pack(case, given[case], torch.float32) for case in CASES}
    values = {f"{case}.values": given[case].weight.dequantize() for case in CASES}
    write_shard(tmp_path / "in.safetensors", {k: v for each in (*packed.values(), values) for k, v in each.items()})
    groups = {case: given[case].weight.parts[0].grid.spec.group for case in CASES}
    every = {case: settings_in(CASES[case][0], groups[case]) for case in CASES}
    configs = [
        quantization({"a.b": kind, "a.c": kind}, ["lm_head"], cached) for kind in every.values() for cached in (0, 1)
    ]
    configs.append(quantization(every, ["lm_head", "a*"], False))
    asked = {"layers": {case: (CASES[case][0], groups[case]) for case in CASES}, "configs": configs}
    write_json(tmp_path / "asked.json", asked)
    call([python, "-c", THEIRS, str(tmp_path)])
    found = read_shard(tmp_path / "out.safetensors")
    for case in CASES:
        ours = packed[case][f"{case}.weight"].view(torch.uint8)
        if "nvfp4" in case:  # it has no negative zero
            assert torch.equal(found[f"{case}.values"], given[case].weight.dequantize())
            continue
        assert torch.equal(found[case], ours), case
    for whole, theirs in zip(configs, json.loads((tmp_path / "configs.json").read_text("utf8")), strict=True):
        mine = mirrored(whole)
        mine.pop("group_size", None)  # which theirs leaves to the other file where it says no more
        assert mine == theirs


# --- vLLM -------------------------------------------------------------------------------------------------------------


@pytest.mark.client
def test_vllm_scores_it_as_it_scores_compressed_tensors(tmp_path: Path) -> None:
    """The same codes through another loader and the same kernel: every log-probability is equal."""
    client_python("vllm")
    lowbit.quantize("demo", "rtn-fp8", tmp_path / "run")  # a larger one takes minutes: FP8 has no kernel for CPUs
    names = ("modelopt", "compressed-tensors")
    for name in names:
        lowbit.export(tmp_path / "run", tmp_path / name, format=name)
    exports = {name: (tmp_path / name, windows(2000, 1, 32)) for name in names}
    answer = client_answers("vllm", exports, tmp_path / "jobs")
    one, other = (answer(name)[0] for name in names)
    assert torch.equal(one, other)
