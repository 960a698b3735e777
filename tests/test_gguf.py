"""GGUF files: names against the gguf package's tables, whole models there and back, vocabulary, refusals.

Reading back compares with `lowbit.load` of the run that was exported, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import TINY
from gguf_models import FAMILIES, exported, logits_of, read_back, save_wide, wide, windows
from tiny import save_model
from transformers import AutoConfig, AutoTokenizer

import lowbit
from lowbit.formats import gguf_config, gguf_names
from lowbit.formats.gguf import narrow, notices, open_file, refuse, refuse_model, refuse_whole
from lowbit.formats.gguf_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, read_vocabulary
from lowbit.modules.linear import QLinear
from lowbit.numerics.kv import KV
from lowbit.numerics.spec import E4M3, NF4, Int, Spec, kquant, nvfp4, per_channel, per_group, per_token

gguf = pytest.importorskip("gguf", reason="needs pip install 'lowbit[gguf]'")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", gguf_names.FAMILIES)
def test_names_are_those_of_the_gguf_package(model_type: str) -> None:
    family = gguf_names.FAMILIES[model_type]
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    known = gguf.get_tensor_name_map(arch, 3)
    paths = ["model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.2.{path}" for path in family.blocks)]
    for path in paths:
        if path == "lm_head" and model_type in ("gemma", "gemma2"):
            continue  # such models have none
        ours, expert = gguf_names.to_gguf(f"{path}.weight", family)
        assert expert is None and ours == known.get_name(f"{path}.weight", try_suffixes=(".weight",))
        assert gguf_names.from_gguf(ours, family) == f"{path}.weight"
    for path in family.experts:
        ours, expert = gguf_names.to_gguf(f"model.layers.2.{family.mixture}.experts.7.{path}.weight", family)
        assert expert == 7 and ours.removesuffix(".weight") in {
            known.get_name(f"model.layers.2.{family.mixture}.experts.{path}"),
            known.get_name(f"model.layers.2.feed_forward.experts.{path}"),
            f"blk.2.{family.experts[path]}",
        }
        assert gguf_names.from_gguf(ours, family) == f"model.layers.2.{family.mixture}.experts.{{}}.{path}.weight"
    assert gguf_names.from_gguf("blk.0.nothing.weight", family) is None
    with pytest.raises(ValueError, match="GGUF has no name for model"):
        gguf_names.to_gguf("model.layers.0.nothing.weight", family)


def test_rows_alternate_between_the_halves_of_a_head() -> None:
    rows = torch.arange(2 * 6)[:, None]
    mixed = gguf_names.permuted(rows, 2)
    assert mixed.flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(gguf_names.unpermuted(mixed, 2), rows)


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
def test_a_configuration_comes_back_as_the_same_model(family: str) -> None:
    config = AutoConfig.for_model("gemma", head_dim=16, hidden_size=64) if family == "gemma" else TINY[family]()
    config.norm_topk_prob = True  # the only way that clients compute Qwen's mixtures
    content = config.to_dict()
    arch = gguf_names.family(content["model_type"]).arch
    fields = {**gguf_config.metadata(content), "general.architecture": arch}
    for token, key in {"bos": "bos", "eos": "eos", "padding": "pad"}.items():
        fields[f"tokenizer.ggml.{token}_token_id"] = content[f"{key}_token_id"]
    found = gguf_config.configuration(fields, {}, content["tie_word_embeddings"])
    again = AutoConfig.for_model(found.pop("model_type"), **found).to_dict()
    left_out = {"architectures", "initializer_range", "attention_dropout", "dtype", "use_cache", "transformers_version"}
    wide = {"sliding_window", "layer_types"} if family == "mistral" else set()
    for key in (content.keys() & again.keys()) - left_out - wide - {"model_type", "output_router_logits"}:
        if key == "head_dim" and content[key] is None:
            continue
        if isinstance(content[key], float):
            assert again[key] == pytest.approx(content[key]), key
        else:
            assert again[key] == content[key], key


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rope_scaling_comes_back(rope: dict[str, Any]) -> None:
    config = TINY["llama"]()
    config.max_position_embeddings, config.head_dim = 32768, 128
    config.rope_parameters = {"rope_theta": 500000.0, **rope}
    content = config.to_dict()
    fields = {**gguf_config.metadata(content), "general.architecture": "llama"}
    found = gguf_config.configuration(fields, gguf_config.rope_tensors(content), False)
    assert found["rope_parameters"] == {"rope_theta": 500000.0, **rope}


def test_llama3_factors_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = TINY["llama"]()
    config.head_dim = 128
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config.rope_parameters = rope
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert torch.allclose(plain.float() / gguf_config.llama3_factors(rope, 128), expected, rtol=1e-5)


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_with_the_codes_that_were_stored(family: str, tmp_path: Path) -> None:
    model = wide(family, tmp_path / "model")
    run, file = exported(model, "minmax+rtn-q4k", tmp_path, overrides=["*.down_proj=w8a16-g32"])
    original, back = lowbit.load(run, dtype=torch.float32), read_back(file)
    pairs = 0
    for name, module in original.named_modules():
        if isinstance(module, QLinear):
            assert torch.equal(back.get_submodule(name).weight, module.weight), name
            pairs += 1
    assert pairs >= 4
    ids = windows(original.config.vocab_size)
    assert torch.allclose(logits_of(back, ids), logits_of(original, ids), atol=1e-5)
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type.name in ("Q4_K", "Q8_0"):
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            assert values.numel() == int(tensor.n_elements)


@pytest.mark.parametrize(
    "recipe", ["rtn-w4a16-g64", "rtn-w4a16-g32-asym", "rtn-w5a16-g32-asym", "rtn-w5a16", "mxfp4a16"]
)
def test_every_kind_of_plain_block(recipe: str, tmp_path: Path) -> None:
    run, file = exported(wide("llama", tmp_path / "model"), recipe, tmp_path)
    original, back = lowbit.load(run, dtype=torch.float32), read_back(file)
    ids = windows(original.config.vocab_size)
    assert torch.equal(logits_of(back, ids), logits_of(original, ids))


def test_without_the_target_zero_points_are_refused_at_export(tmp_path: Path) -> None:
    lowbit.quantize(wide("llama", tmp_path / "model"), "rtn-w4a16-g32-asym", tmp_path / "run")
    with pytest.raises(ValueError, match=r"layers\.0\..*quantize again with --target gguf"):
        lowbit.export(tmp_path / "run", tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_the_size_is_that_of_blocks(tmp_path: Path) -> None:
    _, file = exported(wide("llama", tmp_path / "model"), "minmax+rtn-q4k", tmp_path)
    reader = gguf.GGUFReader(file)
    blocks = [tensor for tensor in reader.tensors if tensor.tensor_type.name == "Q4_K"]
    assert len(blocks) == 7
    assert all(int(tensor.n_bytes) == int(tensor.n_elements) // 256 * 144 for tensor in blocks)


# --- vocabulary -------------------------------------------------------------------------------------------------------


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    model = save_wide("llama", tmp_path / "model", tokens="bytes", vocab_size=400, bos_token_id=0, eos_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = read_vocabulary(model, {"vocab_size": 410})
    assert found is not None and found.model == "gpt2" and found.pre == "gpt-2" and not found.notices
    assert found.tokens[:400] == tokenizer.convert_ids_to_tokens(range(400)) and found.tokens[405] == "[PAD405]"
    assert found.kinds[0] == CONTROL and set(found.kinds[1:400]) == {NORMAL}
    assert found.special["bos"] == found.special["eos"] == 0 and found.flags["add_bos_token"] is False
    assert found.merges is not None and all(len(merge.split(" ")) == 2 for merge in found.merges)


def test_a_sentencepiece_vocabulary_scores_its_merges(tmp_path: Path) -> None:
    model = save_wide("llama", tmp_path / "model", tokens="pieces", vocab_size=500)
    found = read_vocabulary(model, {"vocab_size": 500})
    assert found is not None and found.model == "llama" and found.flags["add_space_prefix"] is True
    assert found.kinds[0] == UNKNOWN and found.kinds[3] == BYTE and found.kinds[1] == CONTROL
    assert found.special == {"bos": 1, "eos": 2, "unknown": 0}
    merges = json.loads((model / "tokenizer.json").read_text("utf8"))["model"]["merges"]
    place = found.tokens.index("".join(merges[5]))
    assert found.scores is not None and found.scores[place] == -5.0


def test_pre_tokenizers_are_told_by_what_they_split_on(tmp_path: Path) -> None:
    model = save_wide("llama", tmp_path / "model", tokens="bytes", vocab_size=400)
    content = json.loads((model / "tokenizer.json").read_text("utf8"))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    for regex, name in {llama3: "llama-bpe", llama3.replace("{1,3}", ""): "qwen2", r"\w+": "default"}.items():
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
        (model / "tokenizer.json").write_text(json.dumps(content), "utf8")
        found = read_vocabulary(model, {"vocab_size": 400})
        assert found is not None and found.pre == name and bool(found.notices) == (name == "default")


def test_a_tokenizer_that_clients_do_not_know_is_said(tmp_path: Path) -> None:
    told: list[str] = []
    model = wide("llama", tmp_path / "model")
    lowbit.quantize(model, "rtn-w8a16-g32", tmp_path / "run", target="gguf")
    lowbit.export(tmp_path / "run", tmp_path / "out", format="gguf", notice=told.append)
    assert any("no vocabulary" in text for text in told)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "activation", "options", "reason"),
    [
        (per_group(Int(4), 32), per_token(Int(8)), {}, "use 16-bit activations"),
        (per_group(Int(4), 32), None, {"mapped": True}, "merge all rotations"),
        (per_group(Int(4), 32), None, {"transposed": True}, "use native"),
        (per_group(Int(4), 32), None, {"ordered": True}, "gptq.groups=static"),
        (per_group(Int(4), 16), None, {}, "groups of a multiple"),
        (per_group(Int(4), 32), None, {"shape": (8, 48)}, "keep this linear in 16 bits"),
        (kquant(4), None, {"shape": (8, 96)}, "blocks of 256 columns"),
        (per_group(Int(8, "asymmetric"), 32), None, {}, "use symmetric integers"),
        (per_group(Int(4), 32, scale="float32"), None, {}, "use half"),
        (per_channel(E4M3), None, {}, "K-quant"),
        (per_group(NF4, 64), None, {}, "K-quant"),
        (nvfp4(), None, {}, "K-quant"),
    ],
)
def test_refusals(weights: Spec, activation: Spec | None, options: dict[str, Any], reason: str) -> None:
    told = refuse(weights, activation, **options)
    assert told is not None and reason in told and "\n" not in told


def test_what_is_not_refused_has_its_notices() -> None:
    assert refuse(per_group(Int(4), 32), None, shape=(8, 64)) is None and not notices(per_group(Int(4), 32), None)
    assert "4.5 bits" in notices(per_group(Int(3), 128), None)[1]
    assert "--target gguf" in notices(per_group(Int(4, "asymmetric"), 32), None)[0]
    assert narrow(per_group(Int(4, "asymmetric"), 32)).scale == "float16-min"
    assert narrow(per_group(Int(4), 32)) == per_group(Int(4), 32) and narrow(kquant(4)) == kquant(4)
    assert refuse_whole(kv=KV(4, 4), corrected=False) and refuse_whole(kv=None, corrected=True)
    assert refuse_whole(kv=None, corrected=False) is None


@pytest.mark.parametrize("family", ["opt", "gpt2", "bloom"])
def test_other_families_are_refused_before_a_weight_is_read(family: str, tmp_path: Path) -> None:
    model = save_model(family, tmp_path / "model")
    with pytest.raises(ValueError, match="GGUF export knows llama"):
        lowbit.quantize(model, "rtn-w4a16-g32", tmp_path / "run", target="gguf")


def test_models_that_clients_compute_otherwise_are_refused() -> None:
    config = TINY["gemma2"]().to_dict()
    assert refuse_model(config) is None
    assert "share one matrix" in str(refuse_model({**config, "tie_word_embeddings": False}))
    assert "root of 16" in str(refuse_model({**config, "query_pre_attn_scalar": 24}))
    assert "computes silu" in str(refuse_model({**TINY["llama"]().to_dict(), "hidden_act": "relu"}))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "rope scaling" in str(refuse_model({**TINY["llama"]().to_dict(), "rope_parameters": dynamic}))
    assert "window of 6" in gguf_config.notices(TINY["mistral"]().to_dict())[0]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind, but long enough to look at")
    with pytest.raises(ValueError, match="no GGUF file"):
        open_file(tmp_path / "x.gguf")
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "bloom")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="not bloom"):
        open_file(tmp_path / "y.gguf")
