"""Recipes with a quantized cache: what a run stores, loads, evaluates and generates with is what its scheme says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_model, save_text

import lowbit
from lowbit.methods.recipe import Recipe
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.scheme import Scheme
from lowbit.modules.attention import as_cache, attach, attached, attention_modules
from lowbit.numerics.kv import KV, kivi
from lowbit.recipes import from_dict, parse, to_dict
from lowbit.runtime.cache import quantized_cache

IDS = torch.arange(4, 40).reshape(2, 18)


@pytest.fixture(scope="module", params=["llama", "opt", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp("kv") / "model")


@pytest.mark.parametrize(
    ("name", "kv"),
    [
        ("w16a16kv4", KV(4, 4)),
        ("rtn-w16a16k4v2", KV(4, 2)),
        ("gptq-w4a8kv4-g128", KV(4, 4)),
        ("w8a8kv8-kvg32", KV(8, 8, "group", 32)),
        ("w16a16kv2-kivi", kivi(2, 2)),
        ("w4a16", None),
        ("w4a16kv16", None),
    ],
)
def test_names(name: str, kv: KV | None) -> None:
    recipe = parse(name)
    assert recipe.scheme.kv == kv
    assert from_dict(to_dict(recipe)).recipe == recipe


@pytest.mark.parametrize("name", ["w4a4kv4-kivi-kvg8", "w4a16-kivi", "w4a4kv9", "w16a16kv16"])
def test_refusals(name: str) -> None:
    with pytest.raises(ValueError, match=r"keep one|describes quantized keys|1 to 8 bits|leave nothing"):
        parse(name)


def test_only_the_cache(model: Path, tmp_path: Path) -> None:
    """The stored model is the original with quantizers on its attention: no text is needed, nothing else changes."""
    lowbit.quantize(model, "w16a16k4v2", tmp_path / "out")
    ours, original = (lowbit.load(path, dtype=torch.float32) for path in (tmp_path / "out", model))
    for _, module in attention_modules(original):
        attach(module, KV(4, 2))
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, original(IDS).logits)
        assert not torch.equal(ours(IDS).logits, lowbit.load(model, dtype=torch.float32)(IDS).logits)


def test_decoding_equals_prefill_and_generate_uses_codes(model: Path, tmp_path: Path) -> None:
    lowbit.quantize(model, "w8a16kv4", tmp_path / "out")
    ours = lowbit.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        whole = ours(IDS, use_cache=False).logits
        cache = quantized_cache(ours)
        steps = [ours(IDS[:, t : t + 1], **as_cache(ours, cache)).logits for t in range(IDS.shape[1])]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)
    assert lowbit.generate(tmp_path / "out", "w1 w2 w3", tokens=6, device="cpu")


@pytest.mark.parametrize("layout", ["head", "tensor"])
def test_static_ranges_are_calibrated_and_stored(model: Path, tmp_path: Path, layout: str) -> None:
    text = save_text(tmp_path / "text.txt")
    recipe = Recipe(Scheme(None, kv=KV(8, 8, layout)), RTN(), MinMaxClip())  # type: ignore[arg-type]
    lowbit.quantize(model, recipe, tmp_path / "out", calibration=str(text), samples=4, length=32)
    ours, original = (lowbit.load(path, dtype=torch.float32) for path in (tmp_path / "out", model))
    layers = attached(ours)
    assert layers and all(part is not None for layer in layers.values() for part in layer.affine)
    with torch.no_grad():
        a, b = ours(IDS).logits, original(IDS).logits
    assert 0 < float((a - b).norm() / b.norm()) < 0.05


def test_static_needs_text() -> None:
    assert Recipe(Scheme(None, kv=KV(8, 8, "head")), RTN(), MinMaxClip()).calibrated
    assert not Recipe(Scheme(None, kv=KV(8, 8)), RTN(), MinMaxClip()).calibrated


def test_training_and_rounding_see_the_cache(model: Path, tmp_path: Path) -> None:
    """A sweep's reported error of its last block is that of the loaded model's block, cache quantizers included."""
    text = save_text(tmp_path / "text.txt")
    options = {"calibration": str(text), "samples": 4, "length": 32}
    exact = lowbit.quantize(model, "gptq-w8a16-g16", tmp_path / "exact", **options)
    coarse = lowbit.quantize(model, "gptq-w8a16kv2-g16", tmp_path / "coarse", **options)
    assert coarse.blocks[0]["error_after"] > 2 * exact.blocks[0]["error_after"]


def test_kivi_is_measured_as_it_decodes(tmp_path: Path) -> None:
    """Perplexity of KIVI is that of decoding: at one bit it is far from the original's, which prefill would report."""
    lowbit.quantize("demo", "w16a16k2v1-kivi", tmp_path / "out")
    ours = lowbit.evaluate(tmp_path / "out", window=256, limit=2, device="cpu").perplexity["demo"].perplexity
    original = lowbit.evaluate("demo", window=256, limit=2, device="cpu").perplexity["demo"].perplexity
    assert ours > 1.02 * original


def test_groups_that_do_not_fit_are_refused_early(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not divide the head width"):
        lowbit.quantize(model, "w16a16kv4-kvg3", tmp_path / "out")
