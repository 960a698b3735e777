"""The AWQ format, held to a packer written as loops, to foreign options of the format, and to GPTQModel itself."""

from __future__ import annotations

import json
import re
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
    layers_of,
    llama,
    logits_of,
    make_run,
    quantize,
    same,
    tensors_of,
    windows,
)

from lowbit.formats import awq as form
from lowbit.formats import base
from lowbit.graph.skeleton import build_skeleton
from lowbit.modules.linear import install
from lowbit.numerics import bits
from lowbit.numerics.qtensor import QLayer, QWeight
from lowbit.numerics.spec import E4M3, Int, Rule, Spec, per_channel, per_group, per_tensor, per_token

RULES: tuple[Rule, ...] = ("symmetric", "asymmetric")


def int4(rule: Rule = "symmetric", size: int = 32) -> Spec:
    return per_group(Int(4, rule), size)


def row_words(row: list[int]) -> list[int]:
    """The words of codes that lie side by side, as AWQ's own packer fills them: eight outputs, even ones first."""
    words = []
    for start in range(0, len(row), 8):
        word = 0
        for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            word |= row[start + output] << (4 * place)
        words.append((word + 2**31) % 2**32 - 2**31)
    return words


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_words_are_those_of_a_packer_written_as_loops(rule: Rule) -> None:
    given = quantize(torch.randn(24, 96) + 0.2, int4(rule))
    part, packed = given.weight.parts[0], form.pack("m", given)
    codes = part.codes.int() + (8 if rule == "symmetric" else 0)
    zeros = torch.full((24, 3), 8) if part.grid.zero is None else part.grid.zero.int()
    assert packed["m.qweight"].tolist() == [row_words(column) for column in codes.T.tolist()]
    assert packed["m.qzeros"].tolist() == [row_words(group) for group in zeros.T.tolist()]
    assert torch.equal(packed["m.scales"].float(), part.grid.scale.T)
    assert [packed[f"m.{name}"].dtype for name in form.FIELDS] == [torch.int32, torch.int32, torch.float16]


@pytest.mark.parametrize("size", (16, 32, -1))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", ((8, 32), (56, 96), (40, 160)))
def test_unpack_gives_back_every_bit(shape: tuple[int, int], rule: Rule, size: int) -> None:
    given = quantize(torch.randn(shape) + 0.3, int4(rule, size))
    packed = form.pack("m", given)
    back = form.unpack("m", packed)
    assert same(back, given)
    assert torch.equal(back.weight.dequantize(), given.weight.dequantize())
    again = form.pack("m", back)
    assert all(torch.equal(again[name], packed[name]) for name in packed)


@pytest.mark.parametrize("rule", RULES)
def test_meta_tensors_get_the_true_shapes(rule: Rule) -> None:
    given = quantize(torch.randn(40, 96), int4(rule))
    meta = QLayer(QWeight((given.weight.parts[0].to("meta"),)))
    packed, expected = form.pack("m", meta), form.pack("m", given)
    assert {n: (t.shape, t.dtype) for n, t in packed.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    assert form.unpack("m", packed).weight.shape == given.weight.shape


# --- what it refuses, and what it tells -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "inputs", "reason"),
    [
        (per_group(Int(3), 32), None, "weights of 4 bits, not 3"),
        (per_channel(E4M3), None, "integer codes, not fp8 e4m3"),
        (per_group(Int(4), 32, scale="float32"), None, "cannot hold float32 ones: use half"),
        (int4(), per_token(Int(8)), "weights alone"),
        (int4("asymmetric-deepspeed"), None, "unbounded zero-points"),
        (per_tensor(Int(4)), None, "one scale per row or group"),
        (int4(size=48), None, "groups of 16, 32, 64, 128 columns, not 48"),
    ],
)
def test_refusals(weights: Spec, inputs: Spec | None, reason: str) -> None:
    found = form.refuse(weights, inputs)
    assert found is not None
    assert reason in found
    assert ": use" in found
    with pytest.raises(ValueError, match=re.escape(reason)):
        form.pack("m", replace(quantize(torch.randn(96, 96), weights), activation=inputs))


def test_refusals_of_a_layer_and_of_a_model() -> None:
    given = quantize(torch.randn(32, 64), int4())
    assert form.refuse(int4(), None, shape=(24, 96)) is None
    assert form.refuse(per_channel(Int(4)), None, shape=(24, 7)) is None
    assert "8 outputs into a word, and 28" in str(form.refuse(int4(), None, shape=(28, 96)))
    assert "128 is more than a layer's 96 columns" in str(form.refuse(int4(size=128), None, shape=(32, 96)))
    assert "Conv1D" in str(form.refuse(int4(), None, transposed=True))
    assert "online maps" in str(form.refuse(None, None, mapped=True))
    assert "gptq.groups=static" in str(form.refuse(int4(), None, ordered=True))
    with pytest.raises(ValueError, match="no group index"):
        form.pack("m", quantize(torch.randn(32, 64), int4(), ordered=True))
    with pytest.raises(ValueError, match="sum of parts"):
        form.pack("m", replace(given, weight=QWeight(given.weight.parts * 2)))
    assert "corrections" in str(form.refuse_whole(kv=None, corrected=True))
    assert form.refuse_whole(kv=None, corrected=False) is None
    assert form.notices(int4(), None) == ()
    assert "use half" in "".join(form.notices(per_group(Int(4), 32, scale="float16"), None))
    assert base.find("awq") is form


def test_one_group_size_and_names_that_tell_modules_apart() -> None:
    with pytest.raises(ValueError, match="not 16 and 32: use GPTQ"):
        form.quantization_config({"a": 16, "b": 32}, [])
    with pytest.raises(ValueError, match=r"cannot tell m\.gate_proj from m\.gate,"):
        form.quantization_config({"m.gate_proj": 32}, ["m.gate"])
    config = form.quantization_config({"m.o_proj": 32}, ["m.gate_proj", "m.up_proj"])
    assert config["modules_to_not_convert"] == ["m.gate_proj", "m.up_proj"]
    assert sorted(config["dynamic"]) == [f"-:^m\\.{leaf}$" for leaf in ("gate_proj", "gate_up_proj", "up_proj")]
    assert form.quantization_config({"m": -1}, [])["group_size"] == -1


# --- foreign options --------------------------------------------------------------------------------------------------


def stated(**changes: Any) -> dict[str, Any]:
    fields = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
    return {"quantization_config": {**fields, **changes}}


def test_recognizes() -> None:
    assert form.recognizes(stated())
    assert not form.recognizes({"quantization_config": {"quant_method": "gptq"}})
    assert not form.recognizes({})


def test_tensors_of_several_modules() -> None:
    one, other = quantize(torch.randn(32, 64), int4()), quantize(torch.randn(16, 96), int4("asymmetric", 16))
    tensors = {**form.pack("a", one), **form.pack("b", other), "a.bias": torch.ones(32)}
    tensors["b.scales"] = tensors["b.scales"].bfloat16()
    layers, rest = form.layers(tensors, stated())
    assert same(layers["a"], one)
    assert same(layers["b"], other)
    assert [layer.weight.parts[0].grid.spec.scale for layer in layers.values()] == ["float16", "bfloat16"]
    assert sorted(rest) == ["a.bias"]


@pytest.mark.parametrize("width", (2, 3, 8))
def test_the_widths_that_gptqmodel_added_are_not_interleaved(width: int) -> None:
    codes, zero = (torch.randint(0, 2**width, (32, n), dtype=torch.uint8) for n in (64, 2))
    scale = torch.rand(32, 2).half()
    tensors = {
        "m.qweight": bits.to_words(codes.T, width),
        "m.qzeros": bits.to_words(zero.T, width),
        "m.scales": scale.T,
    }
    layers, _ = form.layers(tensors, stated(bits=width))
    group = torch.arange(64) // 32
    expected = (codes.float() - zero.float()[:, group]) * scale.float()[:, group]
    assert torch.equal(layers["m"].weight.dequantize(), expected)


def test_other_layouts_are_refused() -> None:
    tensors = form.pack("m", quantize(torch.randn(32, 64), int4()))
    with pytest.raises(ValueError, match="not gemv_fast"):
        form.layers(tensors, stated(version="gemv_fast"))
    with pytest.raises(ValueError, match="does not hold 32 outputs of 8 bits"):
        form.layers(tensors, stated(bits=8))
    del tensors["m.qzeros"]
    with pytest.raises(ValueError, match="m has no zero-points"):
        form.layers(tensors, stated())


# --- a whole model ----------------------------------------------------------------------------------------------------

IGNORED: dict[str, Spec | None] = {
    LINEARS: int4(size=16),
    "*.1.*.o_proj": int4("asymmetric", 16),
    "*.0.*.k_proj": None,
    "*.1.mlp.up_proj": None,
}


def test_an_exported_directory_reads_back_as_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), IGNORED)
    (told,) = form.export_directory(run.path, tmp_path / "out", run.skeleton)
    assert "groups of 32, 64, 128 and 256" in told
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))
    ignored = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"]
    assert config["quantization_config"]["modules_to_not_convert"] == ignored
    layers, rest = form.layers(tensors_of(tmp_path / "out"), config)
    expected = layers_of(run.path)
    assert layers.keys() == expected.keys()
    assert all(same(layers[name], expected[name]) for name in layers)
    again = build_skeleton(llama())
    install(again, layers, rest, torch.float32)
    assert torch.equal(logits_of(again, windows()), logits_of(run.reference, windows()))


def test_bad_directories(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {LINEARS: int4(), "lm_head": int4()})
    with pytest.raises(ValueError, match="keep the output layer lm_head in 16 bits"):
        form.export_directory(run.path, tmp_path / "out", run.skeleton)
    unquantized = make_run(tmp_path / "plain", llama(), {})
    with pytest.raises(ValueError, match=r"no linear of .* is quantized"):
        form.export_directory(unquantized.path, tmp_path / "out", run.skeleton)
    mixed = make_run(tmp_path / "mixed", llama(), {LINEARS: int4(), "*.o_proj": int4(size=16)})
    with pytest.raises(ValueError, match="one group size for the whole model"):
        form.export_directory(mixed.path, tmp_path / "out", run.skeleton)
    assert not (tmp_path / "out").exists()


# --- GPTQModel --------------------------------------------------------------------------------------------------------

DEQUANTIZE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
source, target, size = sys.argv[1:]
tensors = {k: v for file in sorted(Path(source).glob("*.safetensors")) for k, v in load_file(file).items()}
found = {}
for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
    packed, zeros, scales = (tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales"))
    found[name] = dequantize_gemm(packed, zeros, scales.float(), 4, int(size)).T.contiguous()
save_file(found, target)
"""


@pytest.mark.client
def test_gptqmodel_unpacks_the_same_weights(tmp_path: Path) -> None:
    """Its own function on the file's tensors, in fp32: bit for bit what lowbit dequantizes."""
    python = client_python("gptqmodel")
    run = make_run(tmp_path / "run", llama(), IGNORED)
    form.export_directory(run.path, tmp_path / "out", run.skeleton)
    (tmp_path / "theirs").mkdir()
    call([python, "-c", DEQUANTIZE, str(tmp_path / "out"), str(tmp_path / "theirs" / "a.safetensors"), "16"])
    theirs = tensors_of(tmp_path / "theirs")
    assert theirs.keys() == run.layers.keys()
    assert all(torch.equal(theirs[name], layer.weight.dequantize()) for name, layer in run.layers.items())


@pytest.mark.client
def test_gptqmodel_computes_what_lowbit_computes(tmp_path: Path) -> None:
    """Its torch kernel multiplies in fp16 whatever it is given: logits agree to that."""
    runs = {}
    for rule in RULES:
        runs[rule] = make_run(tmp_path / rule, llama(), {**IGNORED, LINEARS: int4(rule, 16)})
        form.export_directory(runs[rule].path, tmp_path / f"{rule}-out", runs[rule].skeleton)
    exports = {rule: (tmp_path / f"{rule}-out", windows()) for rule in runs}
    answer = client_answers("gptqmodel", exports, tmp_path / "jobs")
    for rule, run in runs.items():
        logits, found = answer(rule)
        assert found["dtype"] == "float16"
        expected = logits_of(run.reference, windows())
        assert float((logits - expected).abs().max()) <= 2**-10 * float(expected.abs().max()), rule
