"""The GPTQ format, held to packers written as loops, to foreign options of the format, and to GPTQModel itself."""

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
    LLAMA,
    Answer,
    Run,
    call,
    client_answers,
    client_logits,
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
from families import build
from tiny import tokenizer

import lowbit
from lowbit.formats import base, grouped
from lowbit.formats import gptq as form
from lowbit.graph.skeleton import build_skeleton
from lowbit.modules.linear import install
from lowbit.numerics.qtensor import QLayer, QWeight
from lowbit.numerics.spec import (
    E4M3,
    NF4,
    Int,
    Rule,
    Spec,
    mx,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)

WIDTHS = (2, 3, 4, 8)
RULES: tuple[Rule, ...] = ("symmetric", "asymmetric")


def grouped_by(bits: int, rule: Rule = "symmetric", size: int = 32) -> Spec:
    return per_group(Int(bits, rule), size)


def plain_codes(layer: QLayer) -> tuple[list[list[int]], list[list[int]]]:
    """Unsigned codes [O][I] and zero-points [O][G] of a layer, as numbers."""
    part = layer.weight.parts[0]
    number, zero = part.grid.spec.number, part.grid.zero
    assert isinstance(number, Int)
    half = 2 ** (number.bits - 1)
    codes = part.codes.int() + (half if number.signed else 0)
    zeros = torch.full_like(part.grid.scale, half) if zero is None else zero
    return codes.tolist(), zeros.int().tolist()


# --- oracles ----------------------------------------------------------------------------------------------------------


def column_words(column: list[int], bits: int) -> list[int]:
    """The words of a column of codes as GPTQ's first packer wrote them: word by word, code by code."""
    words = []
    if bits != 3:
        for start in range(0, len(column), 32 // bits):
            words.append(sum(code << (bits * i) for i, code in enumerate(column[start : start + 32 // bits])))
        return words
    for start in range(0, len(column), 32):
        q = column[start : start + 32]
        first, second, third = 0, 0, 0
        for k in range(10):
            first |= q[k] << (3 * k)
            second |= q[11 + k] << (3 * k + 1)
            third |= q[22 + k] << (3 * k + 2)
        first |= (q[10] & 3) << 30
        second |= (q[10] >> 2) | ((q[21] & 1) << 31)
        third |= q[21] >> 1
        words += [first, second, third]
    return words


def signed(word: int) -> int:
    return (word + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_those_of_a_packer_written_as_loops(bits: int, rule: Rule) -> None:
    given = quantize(torch.randn(32, 96) + 0.2, grouped_by(bits, rule))
    codes, zeros = plain_codes(given)
    packed = form.pack("m", given, version=2)
    expected = [[signed(word) for word in column_words(row, bits)] for row in codes]
    assert packed["m.qweight"].T.tolist() == expected
    by_group = [[zeros[o][g] for o in range(32)] for g in range(3)]
    assert packed["m.qzeros"].tolist() == [[signed(word) for word in column_words(row, bits)] for row in by_group]
    assert torch.equal(packed["m.scales"].float(), given.weight.parts[0].grid.scale.T)
    assert packed["m.scales"].dtype == torch.float16
    assert packed["m.g_idx"].tolist() == [i // 32 for i in range(96)]
    assert {tensor.dtype for name, tensor in packed.items() if name != "m.scales"} == {torch.int32}


@pytest.mark.parametrize("bits", WIDTHS)
def test_version_1_stores_zeros_minus_one(bits: int) -> None:
    """In symmetric layers every field is 2^(b-1) - 1."""
    packed = form.pack("m", quantize(torch.randn(32, 64), grouped_by(bits)), version=1)
    words = column_words([2 ** (bits - 1) - 1] * 32, bits)
    assert packed["m.qzeros"].tolist() == [[signed(word) for word in words]] * 2


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_a_zero_of_version_1_borrows_within_its_word(bits: int) -> None:
    """GPTQModel adds and takes one from all fields of a word by one addition of two words."""
    weight = torch.rand(32, 64) + 0.1
    weight[::3] -= 1
    given = quantize(weight, grouped_by(bits, "asymmetric"))
    zeros = form.pack("m", given, version=2)["m.qzeros"]
    assert (given.weight.parts[0].grid.zero == 0).any()
    ones = int("0" * (bits - 1) + "1", 2) * sum(2 ** (bits * i) for i in range(32 // bits))
    expected = [[signed(word % 2**32 - ones) for word in row] for row in zeros.tolist()]
    assert form.pack("m", given, version=1)["m.qzeros"].tolist() == expected


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", (1, 2))
@pytest.mark.parametrize("ordered", (False, True))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", (16, 32, -1))
def test_unpack_gives_back_every_bit(bits: int, rule: Rule, ordered: bool, version: int, size: int) -> None:
    unit = form.WHOLE[bits]
    rows, columns = 7 * unit, 5 * 32
    given = quantize(torch.randn(rows, columns) + 0.3, grouped_by(bits, rule, size), ordered=ordered and size > 0)
    scheme = form.scheme_of(given)
    packed = form.pack("m", given, version=version)
    back = form.unpack("m", packed, scheme, version=version)
    assert same(back, given)
    assert torch.equal(back.weight.dequantize(), given.weight.dequantize())
    again = form.pack("m", back, version=version)
    assert all(torch.equal(again[name], packed[name]) for name in packed)
    assert form.scheme_of(back) == scheme


@pytest.mark.parametrize("rule", ("symmetric-restricted", "symmetric-full", "symmetric-unsigned", "asymmetric-raw"))
def test_other_rules_have_the_same_spelling(rule: Rule) -> None:
    given = quantize(torch.randn(32, 64), grouped_by(4, rule))
    back = form.unpack("m", form.pack("m", given), form.scheme_of(given))
    assert torch.equal(back.weight.dequantize(), given.weight.dequantize())
    assert form.scheme_of(back) == form.scheme_of(given)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_meta_tensors_get_the_true_shapes(bits: int, rule: Rule) -> None:
    given = quantize(torch.randn(32, 96), grouped_by(bits, rule), ordered=True)
    part = given.weight.parts[0].to("meta")
    meta = QLayer(QWeight((part,)))
    packed, expected = form.pack("m", meta), form.pack("m", given)
    assert {n: (t.shape, t.dtype) for n, t in packed.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    assert form.unpack("m", packed, form.scheme_of(meta)).weight.shape == given.weight.shape


# --- what it refuses, and what it tells -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "inputs", "reason"),
    [
        (grouped_by(5), None, "2, 3, 4 or 8 bits, not 5"),
        (per_channel(E4M3), None, "integer codes, not fp8 e4m3"),
        (Spec(NF4, (1, 32)), None, "integer codes, not nf4"),
        (mx(Int(8)), None, "store scales as fp16"),
        (per_group(Int(4), 32, scale="float32"), None, "cannot hold float32 ones: use half"),
        (per_group(Int(4), 32, scale="bfloat16"), None, "cannot hold bfloat16 ones: use half"),
        (grouped_by(4), per_token(Int(8)), "weights alone"),
        (grouped_by(4, "asymmetric-deepspeed"), None, "unbounded zero-points"),
        (per_tensor(Int(4)), None, "one scale per row or group"),
        (grouped_by(4, size=48), None, "groups of 16, 32, 64, 128, 256, 512, 1024 columns, not 48"),
    ],
)
def test_refusals(weights: Spec, inputs: Spec | None, reason: str) -> None:
    found = form.refuse(weights, inputs)
    assert found is not None
    assert reason in found
    assert ": use" in found
    with pytest.raises(ValueError, match=re.escape(reason)):
        form.pack("m", replace(quantize(torch.randn(96, 96), weights), activation=inputs))


@pytest.mark.parametrize("bits", WIDTHS)
def test_shapes_that_do_not_fill_words_are_refused(bits: int) -> None:
    unit = form.WHOLE[bits]
    spec = per_channel(Int(bits))
    assert form.refuse(spec, None, shape=(unit, 3 * unit)) is None
    for shape in ((unit + 1, unit), (unit, unit + 1)):
        found = form.refuse(spec, None, shape=shape)
        assert found is not None
        assert f"packs {unit} codes of {bits} bits into whole words, and {shape[0]} x {shape[1]}" in found
        with pytest.raises(ValueError, match="whole words"):
            form.pack("m", quantize(torch.randn(shape), spec))


def test_refusals_of_a_layer_and_of_a_model() -> None:
    given = quantize(torch.randn(32, 64), grouped_by(4))
    assert "Conv1D" in str(form.refuse(grouped_by(4), None, transposed=True))
    assert "online maps" in str(form.refuse(None, None, mapped=True))
    assert form.refuse(grouped_by(4), None, ordered=True, shape=(32, 64)) is None
    assert form.refuse(grouped_by(4, size=48), None, shape=(32, 48)) is None, "a group that is the whole row"
    with pytest.raises(ValueError, match="sum of parts"):
        form.pack("m", replace(given, weight=QWeight(given.weight.parts * 2)))
    assert "corrections" in str(form.refuse_whole(kv=None, corrected=True))
    assert form.refuse_whole(kv=None, corrected=False) is None


def test_notices() -> None:
    assert form.notices(grouped_by(4), None) == ()
    assert "GPUs only" in "".join(form.notices(grouped_by(8), None))
    assert "4 and 8 bits only" in "".join(form.notices(grouped_by(3), None))
    assert "gptq_v2" in "".join(form.notices(grouped_by(4, "asymmetric"), None))
    assert "use half" in "".join(form.notices(per_group(Int(4), 32, scale="float16"), None))
    assert "groups of 32, 64, 128 and 256" in "".join(form.notices(grouped_by(4, size=16), None))
    assert base.find("gptq") is form


# --- the configuration ------------------------------------------------------------------------------------------------


def overrides(config: dict[str, Any], name: str) -> dict[str, Any] | bool | None:
    """What `dynamic` says of a module, as GPTQModel and vLLM look it up: False where it is not quantized."""
    for pattern, changes in config.get("dynamic", {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return False if pattern.startswith("-:") else changes
    return None


def test_one_scheme_needs_no_patterns() -> None:
    scheme = {"bits": 4, "group_size": 32, "sym": True}
    config, remarks = form.quantization_config({"a.q_proj": scheme, "a.k_proj": dict(scheme)}, [])
    assert remarks == ()
    assert config == {
        "quant_method": "gptq",
        **scheme,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }


def test_layers_unlike_most_are_named() -> None:
    four, eight = {"bits": 4, "group_size": 32, "sym": True}, {"bits": 8, "group_size": 32, "sym": False}
    schemes = {f"m.1.{leaf}": four for leaf in ("q_proj", "o_proj", "gate_proj", "up_proj")}
    schemes |= {f"m.11.{leaf}": eight for leaf in ("q_proj", "k_proj", "v_proj")}
    config, remarks = form.quantization_config(schemes, ["m.1.k_proj", "m.1.v_proj"], ordered=True)
    assert overrides(config, "m.11.q_proj") == {"bits": 8, "sym": False}
    assert overrides(config, "m.11.qkv_proj") == {"bits": 8, "sym": False}, "the module that vLLM makes of the three"
    assert overrides(config, "m.1.k_proj") is False
    assert overrides(config, "m.1.q_proj") is None
    assert overrides(config, "m.1.k_proj_norm") is None
    assert config["modules_in_block_to_quantize"] == [sorted(schemes)]
    assert "m.1.qkv_proj" in "".join(remarks)
    assert "desc_act" in "".join(remarks)
    assert "one width and group size" in "".join(remarks)


def test_experts_that_stay_whole_take_their_mixture_with_them() -> None:
    rules, torn = grouped.with_fused({"a.experts.0.w1": {}, "a.experts.1.w1": {}}, ["a.experts.0.w1", "a.experts.1.w1"])
    assert rules["a.experts"] == {}
    assert torn == []
    _, torn = grouped.with_fused({"a.experts.0.w1": {}}, ["a.experts.0.w1", "a.experts.1.w1"])
    assert torn == ["a.experts"]


# --- foreign options --------------------------------------------------------------------------------------------------


def stated(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, **changes}}


def test_recognizes() -> None:
    assert form.recognizes(stated())
    assert not form.recognizes({"quantization_config": {"quant_method": "awq"}})
    assert not form.recognizes({"quantization_config": None})
    assert not form.recognizes({})


def test_tensors_of_several_modules_and_widths() -> None:
    four = quantize(torch.randn(32, 64), grouped_by(4), ordered=True)
    three = quantize(torch.randn(32, 96), grouped_by(3, "asymmetric", 16))
    tensors = {**form.pack("a.q", four, version=2), **form.pack("a.o", three, version=2)}
    tensors |= {"a.q.bias": torch.ones(32), "norm.weight": torch.ones(64)}
    changes = {"bits": 3, "group_size": 16, "sym": False}
    config = stated(checkpoint_format="gptq_v2", dynamic={"-:.*k$": {}, "+:a\\.o": changes, ".*o$": {"bits": 2}})
    layers, rest = form.layers(tensors, config)
    assert same(layers["a.q"], four)
    assert same(layers["a.o"], three)
    assert sorted(rest) == ["a.q.bias", "norm.weight"]


def test_a_last_group_that_is_shorter_keeps_every_value() -> None:
    """40 columns in groups of 16: the files have three scales, of 16, 16 and 8 columns."""
    codes, zero = torch.randint(0, 16, (8, 40), dtype=torch.uint8), torch.randint(1, 16, (8, 3), dtype=torch.uint8)
    scale = torch.rand(8, 3).half()
    for index in (torch.arange(40) // 16, (torch.arange(40) // 16)[torch.randperm(40)]):
        wide = index.long()
        expected = (codes.float() - zero.float()[:, wide]) * scale.float()[:, wide]
        tensors = {
            "m.qweight": torch.tensor([[signed(w) for w in column_words(row, 4)] for row in codes.tolist()]).int().T,
            "m.qzeros": torch.tensor([[signed(w) for w in column_words(row, 4)] for row in zero.T.tolist()]).int(),
            "m.scales": scale.T,
            "m.g_idx": index.int(),
        }
        layers, _ = form.layers(tensors, stated(checkpoint_format="gptq_v2", sym=False, group_size=16))
        assert torch.equal(layers["m"].weight.dequantize(), expected)
    del tensors["m.g_idx"]
    layers, _ = form.layers(tensors, stated(checkpoint_format="gptq_v2", sym=False, group_size=16))
    natural = torch.arange(40) // 16
    expected = (codes.float() - zero.float()[:, natural]) * scale.float()[:, natural]
    assert torch.equal(layers["m"].weight.dequantize(), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"checkpoint_format": "marlin"}, "not marlin"),
        ({"pack_dtype": "int16"}, "pack_dtype=int16"),
        ({"rotation": "hadamard"}, "rotation=hadamard"),
        ({"bits": 5}, "and m has 5"),
        ({"bits": 8}, "does not hold 64 columns of 8 bits"),
    ],
)
def test_options_that_cannot_be_read_are_refused(changes: dict[str, Any], reason: str) -> None:
    tensors = form.pack("m", quantize(torch.randn(32, 64), grouped_by(4)))
    with pytest.raises(ValueError, match=reason):
        form.layers(tensors, stated(**changes))


# --- a whole model ----------------------------------------------------------------------------------------------------

MIXED: dict[str, Spec | None] = {
    LINEARS: grouped_by(4),
    "*.down_proj": grouped_by(8, "asymmetric", 16),
    "*.1.*.o_proj": grouped_by(3),
    "*.0.*.k_proj": None,
    "*.1.mlp.up_proj": grouped_by(2, size=64),
}


def test_an_exported_directory_reads_back_as_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), MIXED, ordered="*.q_proj")
    told = "\n".join(form.export_directory(run.path, tmp_path / "out", run.skeleton))
    assert "gptq_v2" in told
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))
    stated = config["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text("utf8")) == stated
    assert (stated["checkpoint_format"], stated["desc_act"], stated["bits"]) == ("gptq_v2", True, 4)
    assert config["tie_word_embeddings"] is False
    layers, rest = form.layers(tensors_of(tmp_path / "out"), config)
    expected = layers_of(run.path)
    assert layers.keys() == expected.keys() == run.layers.keys()
    assert all(same(layers[name], expected[name]) for name in layers)
    again = build_skeleton(llama())
    install(again, layers, rest, torch.float32)
    assert torch.equal(logits_of(again, windows()), logits_of(run.reference, windows()))


def test_symmetric_models_are_version_1(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(tie_word_embeddings=True), {LINEARS: grouped_by(4)})
    assert form.export_directory(run.path, tmp_path / "out", run.skeleton) == ()
    stated = json.loads((tmp_path / "out" / "quantize_config.json").read_text("utf8"))
    assert stated["checkpoint_format"] == "gptq"
    assert not {"dynamic", "modules_in_block_to_quantize"} & stated.keys()


def test_checkpoints_with_names_of_their_own(tmp_path: Path) -> None:
    """A mixture's experts have names in the checkpoint that neither transformers nor GPTQModel has."""
    run = make_run(tmp_path / "run", llama(), {LINEARS: grouped_by(4), "*.up_proj": None})

    def names(name: str) -> list[tuple[str, slice]]:
        return [(name.replace("mlp.down_proj", "ffn.w2").replace("mlp.up_proj", "ffn.w3"), slice(None))]

    told = form.export_directory(run.path, tmp_path / "out", run.skeleton, names)
    down = "model.layers.0.mlp.down_proj"
    assert f"GPTQModel 7.6 looks model.layers.0.ffn.w2 up as {down}" in "".join(told)
    stated = json.loads((tmp_path / "out" / "quantize_config.json").read_text("utf8"))
    for name in ("model.layers.1.ffn.w3", "model.layers.1.mlp.up_proj"):
        assert overrides(stated, name) is False
    assert {"model.layers.1.ffn.w2", "model.layers.1.mlp.down_proj"} < set(stated["modules_in_block_to_quantize"][0])
    assert "model.layers.0.ffn.w2.qweight" in tensors_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("named", "router", "expert"),
    [
        ("checkpoint", "block_sparse_moe.gate", "block_sparse_moe.experts.3.w1"),
        ("transformers", "mlp.gate", "mlp.experts.3.gate_proj"),
    ],
)
def test_experts_are_named_for_the_client_that_is_asked_for(
    named: str, router: str, expert: str, tmp_path: Path
) -> None:
    build("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer(128).save_pretrained(tmp_path / "model")
    run = lowbit.quantize(tmp_path / "model", "rtn-w4a16-g32", tmp_path / "run").path
    told: list[str] = []
    lowbit.export(run, tmp_path / "out", format="gptq", names=named, notice=told.append)
    assert {f"model.layers.1.{router}.weight", f"model.layers.1.{expert}.qweight"} < tensors_of(tmp_path / "out").keys()
    assert any("--names transformers" in text for text in told) == (named == "checkpoint")
    assert any("reads no GPTQ or AWQ into it" in text for text in told)
    with pytest.raises(ValueError, match=r"only GPTQModel .* use --format gptq or awq"):
        lowbit.export(run, tmp_path / "other", names="transformers")
    with pytest.raises(ValueError, match="--names llama"):
        lowbit.export(run, tmp_path / "other", format="gptq", names="llama")


def test_bad_directories(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {LINEARS: grouped_by(4)})
    with pytest.raises(ValueError, match="holds something already"):
        form.export_directory(run.path, run.path, run.skeleton)
    unquantized = make_run(tmp_path / "plain", llama(), {})
    with pytest.raises(ValueError, match=r"no linear of .* is quantized"):
        form.export_directory(unquantized.path, tmp_path / "out", run.skeleton)
    embedded = make_run(tmp_path / "embedded", llama(), {"*.embed_tokens": grouped_by(8)})
    with pytest.raises(ValueError, match=r"embed_tokens is a Embedding, and GPTQ export writes Linear modules only"):
        form.export_directory(embedded.path, tmp_path / "out", run.skeleton)
    assert not (tmp_path / "out").exists()


# --- GPTQModel --------------------------------------------------------------------------------------------------------

CLIENT_CASES: dict[str, dict[str, Spec | None]] = {
    "w2": {LINEARS: grouped_by(2)},
    "w3-asym": {LINEARS: grouped_by(3, "asymmetric", 16)},
    "w4": {LINEARS: grouped_by(4)},
    "w4-channel": {LINEARS: per_channel(Int(4))},
    "w8": {LINEARS: grouped_by(8), "lm_head": grouped_by(8)},
    "mixed": MIXED,
    "experts": {LINEARS: grouped_by(4)},
}


def mixture():  # type: ignore[no-untyped-def]
    from transformers import MixtralConfig

    return MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)


def halves(name: str) -> list[tuple[str, slice]]:
    """The tensors of a Mixtral's checkpoint."""
    if ".gate_up_proj." not in name:
        return [(name, slice(None))]
    width = LLAMA["intermediate_size"]
    return [(name.replace("gate_up_proj", w), slice(i * width, (i + 1) * width)) for i, w in enumerate(("w1", "w3"))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of every case, exported beside it as `CASE-out`."""
    place, made = tmp_path_factory.mktemp("gptq"), {}
    for case, formats in CLIENT_CASES.items():
        torch.manual_seed(0)
        config = mixture() if case == "experts" else llama()
        made[case] = make_run(place / case, config, formats, ordered="*.q_proj")
        form.export_directory(made[case].path, place / f"{case}-out", made[case].skeleton, base.by_modules(halves))
    return made


@pytest.fixture(scope="module")
def gptqmodel(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Answer:
    exports = {case: (run.path.with_name(f"{case}-out"), windows()) for case, run in runs.items()}
    return client_answers("gptqmodel", exports, tmp_path_factory.mktemp("gptqmodel") / "jobs")


@pytest.mark.client
@pytest.mark.parametrize("case", CLIENT_CASES)
def test_gptqmodel_computes_what_lowbit_computes(case: str, runs: dict[str, Run], gptqmodel: Answer) -> None:
    logits, found = gptqmodel(case)
    assert found["dtype"] == "float32"
    assert float((logits - logits_of(runs[case].reference, windows())).abs().max()) <= 1e-5


QUANTIZE = """
import os, sys
os.environ.update(HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1", GPTQMODEL_CPU_WORKERS="2")
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
source, target, bits, sym, version, windows = sys.argv[1:]
torch.manual_seed(0)
config = QuantizeConfig(bits=int(bits), group_size=32, desc_act=True, sym=sym == "True", format=version)
model = GPTQModel.load(source, config, backend=BACKEND.GPTQ_TORCH, device="cpu")
rows = torch.load(windows)
model.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows], batch_size=1)
model.save(target)
"""


@pytest.mark.client
@pytest.mark.parametrize(("bits", "sym", "version"), [(4, True, "gptq"), (3, False, "gptq_v2")])
def test_what_gptqmodel_quantizes_computes_the_same_here(bits: int, sym: bool, version: str, tmp_path: Path) -> None:
    """Its own GPTQ with act-order, saved by itself, against our reading of its files."""
    python = client_python("gptqmodel")
    source = make_run(tmp_path / "run", llama(), {})
    config = json.loads((source.path / "config.json").read_text("utf8"))
    del config["quantization_config"]
    (source.path / "config.json").write_text(json.dumps(config), "utf8")
    torch.save(windows(count=16, length=48), tmp_path / "windows.pt")
    settings = [str(bits), str(sym), version, str(tmp_path / "windows.pt")]
    call([python, "-c", QUANTIZE, str(source.path), str(tmp_path / "theirs"), *settings])
    logits, _ = client_logits("gptqmodel", tmp_path / "theirs", windows(), tmp_path / "job")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text("utf8"))
    assert form.recognizes(config)
    layers, rest = form.layers(tensors_of(tmp_path / "theirs"), config)
    assert len(layers) == 14
    assert any(layer.weight.parts[0].order is not None for layer in layers.values())
    model = build_skeleton(llama())
    install(model, layers, rest, torch.float32)
    assert float((logits - logits_of(model.eval(), windows())).abs().max()) <= 1e-5


def test_the_client_is_told_apart_from_its_script() -> None:
    """The script has the name of the package that it imports, so it must not be found first."""
    text = (Path(form.__file__).parents[1] / "runtime" / "clients" / "gptqmodel.py").read_text("utf8")
    assert text.index("sys.path.remove") < text.index("from gptqmodel import")
