"""Every registered method on every kind of scheme, end to end, against one oracle: the stored codes in a plain model.

The oracle knows nothing of the pipeline: it takes transformers' own model, puts dequantized weights and stored tensors
into it by name, quantizes inputs by hooks written from the formula, and must give the logits that `lowbit.load` gives.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from families import TINY, build, tokens
from tiny import save_model, save_text, tokenizer
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit.formats import native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods import CLIPS, ROUNDS, TRANSFORMS
from lowbit.methods.base import outcomes
from lowbit.numerics.spec import Float, Int
from lowbit.recipes import parse
from lowbit.stream.checkpoint import Checkpoint

SCHEMES = [
    "w8a16",
    "w4a16-g32",
    "w4a16-g32-asym",
    "w3a16-g16",
    "w2a16-g16-asym",
    "wfp4a16-g16",
    "fp8a16",
    "w8a8",
    "w8a8-static",
    "w6a6",
    "w4a8-g32",
    "fp8",
]
OTHER_FORMATS = [
    "nvfp4",
    "mxfp4amxfp8",
    "mxint8a16",
    "nf4-g32-double",
    "wfp6afp8-g16-pow2",
    "wfp4afp8-g16-m2",
    "w4a16-g8-row",
]
"""On these the methods that fit ranges or round; every slot is seen, not every pairing."""
METHODS = sorted({*TRANSFORMS, *CLIPS, *ROUNDS} - {"minmax"}) + ["awq+gptq", "smoothquant+gptq", "mse+gptq"]
QUICK = {"spinquant": ["spinquant.steps=1"], "osplus": ["osplus.steps=8"]}
"""What takes long and is tested elsewhere."""


def accepted(method: str, scheme: str) -> bool:
    """Whether the format is one that the method has ranges for; what is not is refused (test_hqq and others)."""
    recipe = parse(f"{method}-{scheme}")
    try:
        return recipe.scheme.weights is None or bool(outcomes(recipe.clip, recipe.scheme.weights))
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def _plain_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers picks some families' tokenizer classes by the model's type, whatever tokenizer.json says."""
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda self: tokenizer(self.config.vocab_size))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, calibration text)."""
    root = tmp_path_factory.mktemp("llama")
    return save_model("llama", root / "model"), save_text(root / "text.txt")


def quantize(model: Path, text: Path, recipe: str, output: Path, **options: object) -> lowbit.api.Quantized:
    return lowbit.quantize(model, recipe, output, calibration=str(text), samples=8, length=32, **options)


def oracle_logits(name: str, run: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' own model holding what the run directory stores."""
    from lowbit.graph.skeleton import unfuse_experts

    model = build(name)
    unfuse_experts(model)
    state = model.state_dict()  # shares memory with the model; buffers included
    for file in run.glob("*.safetensors"):
        layers, rest = native.unpack(shard_header(file).metadata, read_shard(file))
        for path, tensor in rest.items():
            state[path].copy_(tensor)
        for path, layer in layers.items():
            module = model.get_submodule(path)
            weight = layer.weight.dequantize()
            module.weight.data.copy_(weight.T if isinstance(module, Conv1D) else weight)
            if layer.input_map is not None:
                # Held to dense products in test_maps; here inputs must fall on the same codes, to the last bit.
                module.register_forward_pre_hook(lambda _module, args, map=layer.input_map: (map.apply(args[0]),))
            if layer.activation is not None:
                module.register_forward_pre_hook(input_quantizer(layer))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def input_quantizer(layer):
    number = layer.activation.number
    if layer.activation.group > 0:
        return block_quantizer(number, layer.activation.group)

    def hook(_module, args):
        x = args[0].float()
        if layer.input_grid is not None:
            scale = layer.input_grid.scale
        elif isinstance(number, Int):
            scale = 2 * x.abs().amax(-1, keepdim=True) / (2**number.bits - 1)
        else:
            scale = x.abs().amax(-1, keepdim=True) / number.largest
        if isinstance(number, Float):
            codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        else:
            codes = (x / scale).round().clamp(-(2 ** (number.bits - 1)), 2 ** (number.bits - 1) - 1)
        return (codes * scale,)

    return hook


def block_quantizer(number, group):
    """MX with E8M0 scales by the floor rule, in blocks of 32, and NVFP4 with a scale per token, in blocks of 16."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def hook(_module, args):
        x = args[0].float().unflatten(-1, (-1, group))
        amax = x.abs().amax(-1, keepdim=True)
        if group == 32:
            scale = torch.exp2(amax.double().log2().floor() - (8 if number.bits == 8 else 2)).float()
        else:
            outer = amax.amax((-2, -1), keepdim=True) / 6 / 448
            scale = (amax / 6 / outer).clamp(2**-6, 448).to(torch.float8_e4m3fn).float() * outer
        y = x / scale
        if number.bits == 8:
            y = y.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        else:
            y = table[(y.abs()[..., None] - table).abs().argmin(-1)] * y.sign()  # no ties
        return ((y * scale).flatten(-2),)

    return hook


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        *((method, scheme) for method, scheme in product(METHODS, SCHEMES) if accepted(method, scheme)),
        *product(("rtn", "mse", "gptq", "awq", "smoothquant+gptq"), OTHER_FORMATS),
    ],
)
def test_every_method_on_every_scheme(llama: tuple[Path, Path], tmp_path: Path, method: str, scheme: str) -> None:
    model, text = llama
    settings = QUICK.get(method, [])
    result = quantize(model, text, f"{method}-{scheme}", tmp_path / "out", settings=settings)
    assert all(0 <= block["error_after"] < 1 for block in result.blocks)
    ids = tokens()
    loaded = lowbit.load(result.path, dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(input_ids=ids, use_cache=False).logits
    assert logits.isfinite().all()
    assert (logits - oracle_logits("llama", result.path, ids)).abs().max() <= 1e-5 * logits.abs().max()
    size = native.sizes(result.path)
    original = sum(p.numel() for p in build("llama").parameters())
    assert size.parameters == original
    assert result.bits_per_weight == pytest.approx(8 * size.stored_bytes / size.quantized_weights)


@pytest.mark.parametrize("recipe", ["awq+gptq-w4a16-g16", "smoothquant+gptq-w8a8"])
@pytest.mark.parametrize("family", [name for name in TINY])
def test_every_family(tmp_path: Path, family: str, recipe: str) -> None:
    """Whatever the anatomy allows is used, the rest skipped with a notice; the result loads and computes its codes."""
    model = save_model(family, tmp_path / "model")
    notices: list[str] = []
    result = quantize(model, save_text(tmp_path / "text.txt"), recipe, tmp_path / "out", notice=notices.append)
    ids = tokens()
    with torch.no_grad():
        logits = lowbit.load(result.path, dtype=torch.float32)(input_ids=ids, use_cache=False).logits
    assert (logits - oracle_logits(family, result.path, ids)).abs().max() <= 1e-5 * logits.abs().max()
    plan = json.loads((result.path / "plan.json").read_text())
    assert plan["recipe"]["name"] == recipe


def test_routers_stay_and_experts_are_counted(tmp_path: Path) -> None:
    model = save_model("mixtral", tmp_path / "model")
    result = quantize(model, save_text(tmp_path / "text.txt"), "gptq-w4a16-g16", tmp_path / "out")
    for block in result.blocks:
        seen = block["experts"]["tokens"]
        per_expert = [count for name, count in seen.items() if name.endswith("down_proj")]
        assert sum(per_expert) == 8 * 32 * 2  # every token takes two experts
        assert set(block["experts"]["rounded_to_nearest"]) == {n for n, count in seen.items() if count < 32}
    header = shard_header(result.path / "model-00002-of-00003.safetensors")
    routers = [name for name in header.tensors if name.endswith("mlp.gate.weight")]
    assert routers == ["model.layers.0.mlp.gate.weight"]


def test_overrides_and_ignored_linears(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = llama
    result = quantize(
        model, text, "gptq-w4a16-g32", tmp_path / "out", overrides=["*.down_proj=w8a16"], ignore=["*.0.self_attn.*"]
    )
    layers, rest = {}, {}
    for file in result.path.glob("*.safetensors"):
        found, others = native.unpack(shard_header(file).metadata, read_shard(file))
        layers |= found
        rest |= others
    assert layers["model.layers.1.mlp.down_proj"].weight.parts[0].grid.spec.bits == 8
    assert layers["model.layers.1.self_attn.q_proj"].weight.parts[0].grid.spec.bits == 4
    original = build("llama").state_dict()
    kept = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(rest[kept], original[kept])


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    model = save_model("qwen2", tmp_path / "model")
    result = quantize(model, save_text(tmp_path / "text.txt"), "awq-w4a16-g16", tmp_path / "out")
    assert json.loads((result.path / "config.json").read_text())["tie_word_embeddings"] is True
    loaded = lowbit.load(result.path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_awq_never_ends_above_plain_rounding_of_its_own_objective(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = llama
    for recipe in ("gptq-w3a16-g32", "awq-w3a16-g32-asym", "awq+gptq-w3a16-g32"):
        result = quantize(model, text, recipe, tmp_path / recipe)
        assert all(block["error_after"] < block["error_before"] for block in result.blocks), recipe
