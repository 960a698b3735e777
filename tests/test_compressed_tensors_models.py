"""compressed-tensors export of whole models, held to transformers with the package behind it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from ct_cases import CASES, EVERY, FP8_STATIC, TINY, W3, W4, W8A8, Formats, Run, llama, make_run, quantize, windows
from torch import Tensor

from lowbit.formats import base, native
from lowbit.formats import compressed_tensors as ct
from lowbit.formats.files import read_shard, write_index, write_json, write_shard
from lowbit.graph.skeleton import build_skeleton
from lowbit.modules.linear import QLinear
from lowbit.numerics.kv import KV, fake_quantize, fit
from lowbit.numerics.maps import Hadamard
from lowbit.numerics.qtensor import QAttention
from lowbit.numerics.spec import Int, per_group
from lowbit.runtime import verify
from lowbit.runtime.clients import transformers

pytest.importorskip("compressed_tensors")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the client here instead of in a process of its own, which would import transformers anew."""

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, str(Path(transformers.__file__))]
        transformers.run(Path(command[2]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(verify.subprocess, "run", run)
    yield


def test_a_client_in_its_own_process_computes_the_same_logits(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {EVERY: (W4, None)})
    assert ct.export_directory(run.path, tmp_path / "out", run.skeleton) == ()
    found = verify.verify("transformers", tmp_path / "out", run.reference, windows())
    assert found.passed, found.message
    assert found.max_logit_difference is not None
    assert found.max_logit_difference <= 1e-5
    assert (found.top1, found.linears_compared, found.unequal_codes) == (1.0, 0, 0)
    assert found.client == "transformers"
    assert "compressed-tensors" in found.version


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "case",
    [
        *("w3", "w8-asym", "w4a8-static", "w4a4", "w4afp8", "w8a8", "w8a8-static", "fp8", "fp8-static", "wfp8a16"),
        *("fp8-block", "fp8-block-a16", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4afp8", "mxfp6", "mxfp8a16"),
    ],
)
def test_transformers_computes_what_lowbit_computes(case: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {EVERY: CASES[case]})
    ct.export_directory(run.path, tmp_path / "out", run.skeleton)
    found = verify.verify("transformers", tmp_path / "out", run.reference, windows())
    if not found.passed:  # the newest release cannot read this, and that must be said
        assert case.endswith("-asym")
        assert found.message.startswith("not verified: transformers 5.")
        assert "pip install transformers==5.22.0" in found.message
        assert found.max_logit_difference is None
        return
    assert found.max_logit_difference is not None
    assert found.max_logit_difference <= 1e-5
    assert found.passed, found.message
    assert found.linears_compared == (0 if CASES[case][1] is None else 14)
    assert found.unequal_codes == 0


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("case", ["w4", "w8a8", "fp8"])
def test_online_hadamard_transforms_are_the_packages_own(case: str, tmp_path: Path) -> None:
    """Logits are equal with the package's `apply_transform_config`, which transformers 5.24 does not call by itself."""
    config = llama(intermediate_size=128)
    run = make_run(tmp_path / "run", config, {EVERY: CASES[case]}, maps={"down_proj": Hadamard(128)})
    told = ct.export_directory(run.path, tmp_path / "out", run.skeleton)
    assert any("ignores transform_config" in notice for notice in told)
    written = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))["quantization_config"]
    (scheme,) = written["transform_config"]["config_groups"].values()
    assert scheme["apply"][0]["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    found = verify.verify("transformers", tmp_path / "out", run.reference, windows())
    assert found.passed, found.message
    assert found.remarks == (transformers.HELPED,)
    assert found.max_logit_difference is not None
    if CASES[case][1] is None:  # elsewhere the order of summation in the transform may turn a code of an input
        assert found.max_logit_difference <= 1e-5
    del written["transform_config"]["config_groups"]
    whole = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))
    write_json(tmp_path / "out" / "config.json", {**whole, "quantization_config": written | {"transform_config": {}}})
    without = verify.verify("transformers", tmp_path / "out", run.reference, windows())
    assert not without.passed, "the transform matters"


def test_a_map_that_no_client_knows_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", llama(), {EVERY: (W4, None)}, maps={"o_proj": Hadamard(4, 16)})
    with pytest.raises(ValueError, match=r"o_proj: compressed-tensors export carries no online maps but Hadamard"):
        ct.export_directory(run.path, tmp_path / "out", run.skeleton)


@pytest.mark.parametrize("layout", ["tensor", "head"])
@pytest.mark.parametrize("rule", ["e4m3", "symmetric"])
def test_scales_of_a_cache_quantize_as_the_package_does(rule: str, layout: str, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    kv = KV(8, 8, layout, rule=rule)  # type: ignore[arg-type]
    side = kv.key_quantizer
    assert side is not None
    seen = [3 * torch.randn(2, 2, 9, 16) for _ in range(2)]
    keys, values = (fit(*side.range(x), side) for x in seen)
    run = make_run(tmp_path / "run", llama(), {EVERY: (W4, None)}, attention=QAttention(kv, affine=(keys, values)))
    told = ct.export_directory(run.path, tmp_path / "out", run.skeleton)
    assert any("ignores the scales of keys and values" in notice for notice in told)
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))["quantization_config"]
    tensors = read_shard(tmp_path / "out" / "model-00002-of-00002.safetensors")
    arguments = QuantizationArgs.model_validate(config["kv_cache_scheme"])
    module = torch.nn.Module()
    module.quantization_status = QuantizationStatus.COMPRESSED  # type: ignore[assignment]
    for name, x, affine in (("k", seen[0], keys), ("v", seen[1], values)):
        stored = tensors[f"model.layers.1.self_attn.{name}_scale"]
        assert stored.shape == ((1,) if layout == "tensor" else (2, 1, 1))
        module.register_parameter(f"{name}_scale", torch.nn.Parameter(stored))
        theirs = forward_quantize(module, x, name, arguments)
        assert torch.allclose(fake_quantize(x, side, affine=affine), theirs, rtol=0, atol=1e-5)


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
    assert len(told) == 4  # 3 bits: on GPUs, and since 0.18; 127 against 127.5; q and v without k
    assert told[-1].startswith("vLLM joins q, k, v")
    written = json.loads((tmp_path / "out" / "config.json").read_text("utf8"))
    config = written["quantization_config"]
    assert config["ignore"] == ["lm_head", "model.layers.0.self_attn.k_proj"]
    assert config["format"] == "mixed-precision"
    targets = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert targets[8] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert targets[3] == ["model.layers.1.self_attn.o_proj"]
    assert len(targets[4]) == 10
    assert written["tie_word_embeddings"] is True
    found = verify.verify("transformers", tmp_path / "out", run.reference, windows())
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
        base.find("zip")


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
    found = verify.verify("transformers", tmp_path / "out", run.reference, windows())
    assert found.passed, found.message
    assert torch.equal(fused.weight, torch.cat(halves)), "the reference was left as it was"


@pytest.mark.usefixtures("in_process")
def test_transformers_does_not_quantize_the_inputs_of_experts(
    mixtral: Callable[[Formats], Run], tmp_path: Path
) -> None:
    run = mixtral(FP8_STATIC)
    ct.export_directory(run.path, tmp_path / "out", run.skeleton, mixtral_names)
    found = verify.verify("transformers", tmp_path / "out", run.reference, windows())
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
    found = verify.verify("transformers", tmp_path / "out", run.reference, windows())
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
    found = verify.verify("transformers", tmp_path / "out", run.reference, windows())
    assert not found.passed
    assert "in 2 linears, the first model.decoder.layers.0.fc1, whose inputs it flattens" in found.message


def test_a_killed_client_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", llama(), {EVERY: (W4, None)})
    monkeypatch.setattr(verify.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, "", ""))
    found = verify.verify("transformers", run.path, run.reference, windows())
    assert not found.passed
    assert "killed by signal 9" in found.message
