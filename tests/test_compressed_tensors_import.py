"""compressed-tensors and FP8 checkpoints of other tools, read into codes: values are the package's own, bit for bit.

Most are made here by the package from random weights. Those of llm-compressor, made in its own environment with a small
calibration, must give its logits (LOWBIT_LLMCOMPRESSOR_PYTHON names an interpreter that has it).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ct_cases import CASES, layer
from torch import Tensor, nn

import lowbit
from lowbit.formats import compressed_tensors as ct
from lowbit.formats import fp8
from lowbit.formats.ct_tensors import to_words
from lowbit.modules.linear import QLinear
from lowbit.numerics.maps import Hadamard, Kronecker
from lowbit.numerics.spec import E4M3, Int, Spec, nvfp4, per_channel, per_group, per_tensor, per_token

pytest.importorskip("compressed_tensors")

SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
    "w4a16-no-strategy": {"weights": {"num_bits": 4, "group_size": 32}},
    "w4a16-asym": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}},
    "w3a16-asym": {"weights": {"num_bits": 3, "strategy": "channel", "symmetric": False}},
    "w8a8": {
        "weights": {"strategy": "channel"},
        "input_activations": {"strategy": "token", "dynamic": True},
    },
    "w8a8-defaults": {"weights": {}, "input_activations": {"dynamic": True}},
    "w4a8-as-bytes": {
        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        "input_activations": {"strategy": "token", "dynamic": True},
        "format": "int-quantized",
    },
    "fp8": {
        "weights": {"type": "float", "strategy": "tensor"},
        "input_activations": {"type": "float", "strategy": "tensor"},
    },
    "fp8-block": {
        "weights": {"type": "FLOAT", "strategy": "block", "block_structure": "32x32"},
        "input_activations": {"type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
    },
    "naive": {"weights": {"num_bits": 8, "strategy": "channel", "symmetric": False}, "format": "naive-quantized"},
    "nvfp4": {
        "weights": {
            **{"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            "scale_dtype": "torch.float8_e4m3fn",
        },
        "input_activations": {
            **{"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
            "scale_dtype": "torch.float8_e4m3fn",
        },
    },
    "mxfp4": {
        "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    },
}


def made_by_the_package(scheme: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """(module, its tensors as the package stores them, the weight that the package reads from them), from a random
    Linear [48, 96] with scales from its own observers."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
    from compressed_tensors.quantization.utils import calculate_qparams

    parsed = QuantizationScheme(targets=["Linear"], **scheme)
    module = nn.Linear(96, 48, bias=False)
    initialize_module_for_quantization(module, parsed)
    weight, args = module.weight.data, parsed.weights
    if args.strategy in ("group", "tensor_group"):
        units = weight.unflatten(1, (-1, args.group_size))
        low, high = units.amin(-1), units.amax(-1)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        blocks = nn.functional.pad(weight, (0, 0, 0, -48 % rows)).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        axis = (0, 1) if args.strategy == "tensor" else (1,)
        low, high = weight.amin(axis, keepdim=True), weight.amax(axis, keepdim=True)
    if args.strategy == "tensor_group":
        module.weight_global_scale.data = (448 * 6 / weight.abs().max()).reshape(1)
    scale, zero = calculate_qparams(low, high, args, getattr(module, "weight_global_scale", None))
    module.weight_scale.data = scale.float().reshape(module.weight_scale.shape)
    if hasattr(module, "weight_zero_point") and zero.dtype == torch.int8:
        module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)
    for name in ("input_scale", "input_global_scale"):
        if hasattr(module, name):
            getattr(module, name).data.fill_(300.0 if "global" in name else 0.02)
    form = parsed.format or infer_module_format(nn.Linear, parsed).value
    compressor = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
    state = compressor.compress({**dict(module.named_parameters()), **dict(module.named_buffers())}, parsed)
    state = {name: tensor.data.clone() for name, tensor in state.items()}
    return module, state, compressor.decompress(dict(state), parsed)["weight"]


def config(schemes: Mapping[str, Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    """A config.json whose groups are these schemes, by a target."""
    groups = {f"group_{i}": {"targets": [target], **scheme} for i, (target, scheme) in enumerate(schemes.items())}
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups, "version": "0.19.0", "ignore": []}
    return {"quantization_config": {**quantization, **changes}}


@pytest.mark.parametrize("name", SCHEMES)
def test_what_the_package_writes_is_read(name: str) -> None:
    _, state, weight = made_by_the_package(SCHEMES[name])
    tensors = {f"a.b.{key}": tensor for key, tensor in state.items()} | {
        "a.b.bias": torch.ones(48),
        "norm.weight": torch.ones(9),
    }
    stated = config({"Linear": SCHEMES[name]})
    assert ct.recognizes(stated)
    found, rest = ct.layers(tensors, stated)
    assert rest.keys() == {"a.b.bias", "norm.weight"}
    assert torch.equal(found["a.b"].weight.dequantize(weight.dtype), weight)


def test_formats_of_inputs() -> None:
    def read(name: str):  # type: ignore[no-untyped-def]
        _, state, _ = made_by_the_package(SCHEMES[name])
        found, _ = ct.layers({f"m.{key}": value for key, value in state.items()}, config({"Linear": SCHEMES[name]}))
        return found["m"]

    assert read("w8a8").activation == per_token(Int(8))
    assert read("w8a8-defaults").activation == per_tensor(Int(8), scale="float32", dynamic=True)
    assert read("fp8-block").activation == Spec(E4M3, (1, 32), "float32", dynamic=True)
    static, local = read("fp8"), read("nvfp4")
    assert static.activation == per_tensor(E4M3, scale="float32")
    assert static.input_grid.scale.tolist() == [[torch.tensor(0.02).item()]]
    assert local.activation == nvfp4()
    assert torch.equal(local.input_grid.scale, torch.tensor([[1 / 300]]))


@pytest.mark.parametrize("case", CASES)
def test_what_lowbit_writes_is_read(case: str) -> None:
    given = layer(case)
    packed = ct.pack("m", given, torch.bfloat16)
    found, rest = ct.layers(packed, config({"Linear": ct.scheme_of(given)}, version=ct.VERSION))
    assert rest == {}
    assert torch.equal(found["m"].weight.dequantize(), given.weight.dequantize())
    assert found["m"].activation == given.activation or case == "w4a8-static"


def test_targets_are_names_then_patterns_then_classes() -> None:
    eight = SCHEMES["w8a8"]
    _, state, weight = made_by_the_package(eight)
    four = SCHEMES["w4a16"]
    _, other, small = made_by_the_package(four)
    tensors = {f"layers.0.q.{key}": tensor for key, tensor in state.items()}
    tensors |= {f"layers.0.k.{key}": tensor for key, tensor in other.items()}
    for schemes in (
        {"Linear": four, "layers.0.q": eight},
        {"re:.*q$": eight, "re:.*": four},
        {"re:.*k": four, "Linear": eight},
        {"Linear": eight, "re:.*k": four},
    ):
        found, rest = ct.layers(tensors, config(schemes))
        assert rest == {}
        assert torch.equal(found["layers.0.q"].weight.dequantize(), weight)
        assert torch.equal(found["layers.0.k"].weight.dequantize(), small)
    with pytest.raises(ValueError, match="no target of config_groups says what they mean"):
        ct.layers(tensors, config({"layers.1.q": four, "layers.1.k": eight}))


def test_codes_of_old_releases_with_gaps_and_loose_zero_points() -> None:
    """Before 0.18 a word held 32 // b codes, and early releases did not pack zero-points."""
    codes = torch.randint(0, 8, (5, 96))
    words = torch.zeros(5, 10, dtype=torch.int64)
    for column in range(96):
        words[:, column // 10] |= codes[:, column] << 3 * (column % 10)
    zero = torch.randint(-4, 4, (5, 3), dtype=torch.int8)
    scale = torch.rand(5, 3)
    tensors = {
        "m.weight_packed": words.to(torch.int32),
        "m.weight_shape": torch.tensor([5, 96]),
        "m.weight_scale": scale,
        "m.weight_zero_point": zero,
    }
    scheme = {"weights": {"num_bits": 3, "group_size": 32, "symmetric": False}}
    found, _ = ct.layers(tensors, config({"Linear": scheme}, version="0.9.0"))
    expected = (codes.float() - 4 - zero.float().repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    assert torch.equal(found["m"].weight.dequantize(), expected)


def test_groups_in_the_order_of_activations() -> None:
    """Releases before 0.20 say which group a column belongs to."""
    index = torch.arange(96, dtype=torch.int32)[torch.randperm(96)] // 32
    codes, scale = torch.randint(-8, 8, (4, 96), dtype=torch.int8), torch.rand(4, 3)
    tensors = {
        "m.weight_packed": to_words((codes + 8).to(torch.uint8), 4),
        "m.weight_shape": torch.tensor([4, 96]),
        "m.weight_scale": scale,
        "m.weight_g_idx": index,
    }
    scheme = {"weights": {"num_bits": 4, "group_size": 32, "actorder": "group"}}
    found, rest = ct.layers(tensors, config({"Linear": scheme}))
    assert rest == {}
    assert torch.equal(found["m"].weight.dequantize(), codes.float() * scale[:, index.long()])
    again = found["m"].weight.parts[0].group_index
    assert again is not None and torch.equal(again, index)


def test_transforms_are_read() -> None:
    given = layer("w4")
    packed = ct.pack("m.down", given, torch.bfloat16) | {"m.down.R4_input.weight": torch.ones(2, 2)}
    place = {"targets": ["re:.*down$"], "location": "input"}

    def read(columns: int, **scheme: Any):  # type: ignore[no-untyped-def]
        part = layer("w4", (40, columns))
        tensors = ct.pack("m.down", part, torch.bfloat16) | {"m.down.R4_input.weight": torch.ones(2, 2)}
        group = {"type": "hadamard", "apply": [{"targets": ["re:.*down$"], "location": "input"}], **scheme}
        return ct.layers(
            tensors, config({"Linear": ct.scheme_of(part)}, transform_config={"config_groups": {"R4": group}})
        )

    found, rest = read(64)
    assert found["m.down"].input_map == Hadamard(64)
    assert rest == {}
    found, _ = read(96, head_dim=32)
    blocks = found["m.down"].input_map
    assert isinstance(blocks, Kronecker)
    assert torch.equal(blocks.matrix()[:32, :32], Hadamard(32).matrix().float().double())
    assert not blocks.matrix()[:32, 32:].any()
    with pytest.raises(ValueError, match="does not read random-hadamard transforms at input"):
        read(64, type="random-hadamard")
    merged = {"type": "hadamard", "apply": [{**place, "location": "weight_output"}]}
    scheme = config({"Linear": ct.scheme_of(given)}, transform_config={"config_groups": {"R1": merged}})
    found, rest = ct.layers(packed, scheme)
    assert found["m.down"].input_map is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "marlin-24"}, "of format marlin-24"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "of format sparse-24-bitmask"),
        ({"quantization_status": "frozen"}, "save_compressed=True"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "remove kv_cache_scheme"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "preset schemes"),
        ({"config_groups": {"g": {"targets": ["Linear"], "output_activations": {"num_bits": 8}}}}, "quantized outputs"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 16}}}}, "numbers of type int16"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"strategy": "attn_head"}}}},
            "strategy 'attn_head'",
        ),
    ],
)
def test_what_is_not_read(changes: Mapping[str, Any], reason: str) -> None:
    tensors = ct.pack("m", layer("w4"), torch.bfloat16)
    with pytest.raises(ValueError, match=reason):
        ct.layers(tensors, config({"Linear": SCHEMES["w4a16"]}, **changes))


def test_recognition() -> None:
    assert not ct.recognizes({})
    assert not ct.recognizes({"quantization_config": {"quant_method": "gptq"}})
    assert ct.recognizes({"compression_config": {"config_groups": {}}})
    assert fp8.recognizes({"quantization_config": {"quant_method": "fp8"}})


# --- FP8 as its makers publish it -------------------------------------------------------------------------------------


def fp8_config(**changes: Any) -> dict[str, Any]:
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], **changes}
    return {"quantization_config": quantization}


def test_blocks_are_what_transformers_dequantizes(tmp_path: Path) -> None:
    """A DeepSeek-style checkpoint of a tiny model, loaded by transformers with dequantize=True."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes))
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        blocks = (
            nn.functional.pad(tensor, (0, -columns % 32, 0, -rows % 32)).unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
        )
        scale = blocks.abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        tensors[name] = (tensor / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    stated = {**model.config.to_dict(), **fp8_config(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True),
    )
    found, rest = fp8.layers(tensors, stated)
    assert len(found) == 7
    assert not any("scale" in name for name in rest)
    for name, layer_ in found.items():
        assert torch.equal(layer_.weight.dequantize(), plain.get_submodule(name).weight), name
        assert layer_.activation == Spec(E4M3, (1, 32), "float32", dynamic=True)
    ours = lowbit.load(tmp_path, dtype=torch.float32)
    assert sum(isinstance(module, QLinear) for module in ours.modules()) == 7


def test_other_scales_of_fp8() -> None:
    codes = torch.randn(8, 64).to(torch.float8_e4m3fn)

    def read(scale: Tensor, given: Tensor | None = None, **changes: Any):  # type: ignore[no-untyped-def]
        tensors = {"m.weight": codes, "m.weight_scale": scale, "m.bias": torch.ones(8)}
        tensors |= {} if given is None else {"m.input_scale": given}
        found, rest = fp8.layers(tensors, fp8_config(**changes))
        assert rest.keys() == {"m.bias"}
        return found["m"]

    tensor = read(torch.tensor(0.5), torch.tensor(0.25), weight_block_size=None, activation_scheme="static")
    assert tensor.weight.parts[0].grid.spec == per_tensor(E4M3, scale="float32")
    assert tensor.input_grid.scale.tolist() == [[0.25]]
    rows = read(torch.rand(8, 1).bfloat16(), weight_block_size=None)
    assert rows.weight.parts[0].grid.spec == per_channel(E4M3, scale="bfloat16")
    assert rows.activation == per_token(E4M3)
    powers = read(torch.full((1, 2), 0.25).to(torch.float8_e8m0fnu), scale_fmt="ue8m0")
    assert powers.activation == Spec(E4M3, (1, 32), "e8m0-rceil", dynamic=True)
    assert torch.equal(powers.weight.dequantize(), codes.float() / 4)
    with pytest.raises(ValueError, match="does not explain"):
        read(torch.rand(3, 3))
    with pytest.raises(ValueError, match=r"is stored as torch.bfloat16"):
        fp8.layers({"m.weight": codes.bfloat16(), "m.weight_scale": torch.rand(1)}, fp8_config())


# --- llm-compressor ---------------------------------------------------------------------------------------------------

LLMCOMPRESSOR = """
import sys
import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM

source, target, scheme, windows, logits = sys.argv[1:]
torch.set_num_threads(1)
tokens = np.load(windows).tolist()
data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
kind = GPTQModifier if scheme.startswith("W4") else QuantizationModifier
oneshot(
    model=model,
    dataset=data,
    recipe=[kind(targets="Linear", ignore=["lm_head"], scheme=scheme)],
    max_seq_length=len(tokens[0]),
    num_calibration_samples=len(tokens),
)
model.save_pretrained(target, save_compressed=True)
model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
with torch.no_grad():
    found = [model(input_ids=torch.tensor([row]), use_cache=False).logits.float() for row in tokens]
np.save(logits, torch.cat(found).numpy())
"""


@pytest.mark.client
@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W8A8", "FP8", "FP8_BLOCK"])
def test_checkpoints_of_llm_compressor_give_its_logits(scheme: str, tmp_path: Path) -> None:
    python = os.environ.get("LOWBIT_LLMCOMPRESSOR_PYTHON")
    if python is None:
        pytest.skip("LOWBIT_LLMCOMPRESSOR_PYTHON names no interpreter with llm-compressor")
    windows = torch.randint(3, 2000, (4, 48), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "windows.npy", windows.numpy())
    source = Path(lowbit.__file__).with_name("assets") / "demo"
    arguments = [source, tmp_path / "out", scheme, tmp_path / "windows.npy", tmp_path / "logits.npy"]
    ended = subprocess.run(
        [python, "-c", LLMCOMPRESSOR, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    theirs = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    model = lowbit.load(tmp_path / "out", dtype=torch.float32)
    assert sum(isinstance(module, QLinear) for module in model.modules()) == 49
    with torch.no_grad():
        ours = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in windows])
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_groups_are_not_needed_to_match_a_wide_group() -> None:
    """A group as wide as the row is a group to the package, and a row's scale all the same."""
    given = layer("w4-wide-group")
    assert ct.scheme_of(given)["weights"]["strategy"] == "channel"
    found, _ = ct.layers(
        ct.pack("m", given, torch.bfloat16), config({"Linear": {"weights": {"num_bits": 4, "group_size": 96}}})
    )
    assert found["m"].weight.parts[0].grid.spec == per_group(Int(4), 96, scale="bfloat16")
    assert torch.equal(found["m"].weight.dequantize(), given.weight.dequantize())
