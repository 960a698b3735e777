"""QuIP against its formulas, written out densely with loops: maps, range, LDLQ, greedy passes, and whole runs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit.formats import native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods.base import Encoded
from lowbit.methods.gptq import GPTQ
from lowbit.methods.incoherence import Descent, damped, turned_gram
from lowbit.methods.mse import MSEClip
from lowbit.methods.quip import QuIP, RMSRange, levels
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.views import Stats
from lowbit.modules.linear import QLinear
from lowbit.numerics.maps import Kronecker, PermutedKronecker, Rescaled, SignedHadamard
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import Int, Spec, per_channel, per_tensor

ROWS, COLUMNS = 24, 60


def weights(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def observe(columns: int = COLUMNS, seed: int = 1, dead: int | None = None) -> Stats:
    """Statistics of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(6 * columns, columns, generator=generator) @ mix * torch.linspace(0.3, 3, columns)
    if dead is not None:
        x[:, dead] = 0
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x)
    return stats


def heavy(n: int = 256, seed: int = 0) -> tuple[Tensor, Stats]:
    """A matrix full of outliers, by row, by column and alone, behind inputs with channels of very unequal size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = draw(n, n) * torch.exp(0.8 * draw(n)) * torch.exp(0.5 * draw(n, 1))
    weight = torch.where(torch.rand(n, n, generator=generator) < 0.002, 8 * weight, weight)
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(draw(4096, n) * torch.exp(draw(n)) @ (torch.eye(n) + draw(n, n) / 16))
    return weight, stats


def encode(method: QuIP, weight: Tensor, stats: Stats | None, bits: int = 2, seed: int = 5) -> Encoded:
    return method.encode(weight, per_channel(Int(bits)), RTN(), MinMaxClip(), stats, scores=False, seed=seed)


def effective(encoded: Encoded) -> Tensor:
    """The weight [O, I] that the layer multiplies its inputs by, in fp64: Rᵀ Ŵ' Pᵀ."""
    weight = encoded.weight.dequantize(torch.float64)
    if encoded.input_map is not None:
        weight = weight @ encoded.input_map.matrix().T
    return weight if encoded.output_map is None else encoded.output_map.matrix().T @ weight


def proxy(error: Tensor, h: Tensor) -> float:
    """tr(E H Eᵀ)."""
    return float((error @ h * error).sum())


def relative_loss(weight: Tensor, rounded: Tensor, stats: Stats) -> float:
    h = stats.hessian().double()
    return proxy(rounded.double() - weight.double(), h) / proxy(weight.double(), h)


# --- the maps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("incoherence", ["kronecker", "hadamard", "none"])
def test_maps_cancel_and_keep_the_proxy_loss(incoherence: str, rescale: bool) -> None:
    """At 8 bits the layer is the linear that it was; whatever its error, W' and H' see the loss that W and H see."""
    weight, stats = weights(), observe()
    encoded = encode(QuIP(rescale=rescale, incoherence=incoherence, rho=6.0), weight, stats, bits=8)  # type: ignore[arg-type]
    x = torch.randn(7, COLUMNS)
    before, behind = encoded.input_map, encoded.output_map
    turned = encode(QuIP(rescale=rescale, incoherence=incoherence), weight, stats)  # type: ignore[arg-type]
    h = stats.hessian().double()
    if incoherence == "none":
        assert behind is None and (before is None) != rescale
    else:
        kind = SignedHadamard if incoherence == "hadamard" else PermutedKronecker
        assert isinstance(behind, kind) and isinstance(before.then if isinstance(before, Rescaled) else before, kind)
        back = behind.inverse.apply(behind.apply(torch.randn(3, ROWS, generator=torch.Generator().manual_seed(0))))
        assert (back - torch.randn(3, ROWS, generator=torch.Generator().manual_seed(0))).abs().max() < 1e-5
    mapped = x if before is None else before.apply(x)
    y = mapped @ encoded.weight.dequantize().T
    y = y if behind is None else behind.apply(y)
    assert (y - x @ weight.T).norm() < 0.05 * (x @ weight.T).norm()
    assert (effective(encoded) - weight).norm() < 0.05 * weight.norm()

    p = torch.eye(COLUMNS, dtype=torch.float64) if before is None else before.matrix()
    r = torch.eye(ROWS, dtype=torch.float64) if behind is None else behind.matrix()
    assert (r @ r.T - torch.eye(ROWS)).abs().max() < 1e-12
    inside = r @ weight.double() @ torch.linalg.inv(p).T  # W'
    error = turned.weight.dequantize(torch.float64) - inside
    h_inside = p.T @ h @ p
    assert proxy(error, h_inside) == pytest.approx(proxy(effective(turned) - weight, h), rel=1e-5)
    torch.testing.assert_close(turned_gram(h, before), h_inside * COLUMNS / h_inside.trace(), rtol=1e-9, atol=1e-9)


def test_columns_are_rescaled_by_the_formula() -> None:
    """D_j = (H_jj / ‖W_:j‖²)^¼, up to one factor and to fp16; inputs are divided by it."""
    weight, stats = weights() * torch.linspace(0.1, 5, COLUMNS), observe()
    scale = encode(QuIP(), weight, stats).input_map.tensors()["scale"]  # type: ignore[union-attr]
    h = stats.hessian().double()
    expected = [(float(h[j, j]) / float(weight[:, j].double().square().sum())) ** -0.25 for j in range(COLUMNS)]
    ratio = scale.double() / torch.tensor(expected, dtype=torch.float64)
    assert scale.dtype == torch.float16 and float(ratio.max() / ratio.min()) < 1 + 2**-9
    assert float(scale.double().log().mean().abs()) < 1e-3


def test_maps_come_from_the_seed_and_hold_no_matrix() -> None:
    weight, stats = weights(), observe()
    first, again, other = (encode(QuIP(), weight, stats, seed=seed) for seed in (5, 5, 2**62))
    assert torch.equal(first.weight.dequantize(), again.weight.dequantize())
    assert not torch.equal(first.weight.dequantize(), other.weight.dequantize())
    for encoded in (first, other):
        tensors = {**encoded.input_map.tensors(), **encoded.output_map.tensors()}  # type: ignore[union-attr]
        assert {name: t.shape for name, t in tensors.items()} == {"scale": torch.Size([COLUMNS])}
        json.dumps([encoded.input_map.describe(), encoded.output_map.describe()])  # type: ignore[union-attr]


def kurtosis(x: Tensor) -> float:
    return float(((x - x.mean()) / x.std(correction=0)).pow(4).mean())


@pytest.mark.parametrize("incoherence", ["kronecker", "hadamard"])
def test_outliers_disappear(incoherence: str) -> None:
    weight, stats = heavy()
    encoded = encode(QuIP(incoherence=incoherence), weight, stats)  # type: ignore[arg-type]
    assert kurtosis(weight) > 20
    assert encoded.input_map is not None and encoded.output_map is not None
    p, r = encoded.input_map.matrix(), encoded.output_map.matrix()
    assert abs(kurtosis(r @ weight.double() @ torch.linalg.inv(p).T) - 3) < 0.3


def test_dead_columns_are_set_right_before_anything_is_turned() -> None:
    """What an input that is always zero is multiplied by counts for nothing, however large."""
    weight, stats = weights(), observe(dead=7)
    other = weight.clone()
    other[:, 7] = 1000.0
    first, second = encode(QuIP(), weight, stats), encode(QuIP(), other, stats)
    assert torch.equal(first.weight.dequantize(), second.weight.dequantize())
    assert stats.hessian()[7, 7] == 0  # the statistic itself stays as it was
    keep = torch.arange(COLUMNS) != 7
    assert relative_loss(weight, effective(first), stats) < 0.1
    assert torch.isfinite(effective(first)[:, keep]).all()


# --- the range and the levels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_levels_lie_symmetrically_on_one_range(bits: int) -> None:
    """(2q/(2^b - 1) - 1) s with s = ρ·RMS, as two fp16 numbers hold it."""
    weight = weights()
    method = QuIP(rescale=False, incoherence="none", rounding="nearest", rho=1.7)
    part = encode(method, weight, observe(), bits).weight.parts[0]
    s = 1.7 * float(weight.double().square().mean()) ** 0.5
    expected = torch.tensor([(2 * q / (2**bits - 1) - 1) * s for q in range(2**bits)])
    every = part.grid.decode(torch.arange(2**bits, dtype=torch.uint8)[None])[0]
    torch.testing.assert_close(every, expected, rtol=0, atol=2 * s * 2**-10)
    nearest = (weight[..., None] - every).abs().amin(-1)
    torch.testing.assert_close((part.dequantize() - weight).abs(), nearest, rtol=0, atol=1e-6)
    if bits > 1:
        assert part.codes.min() == 0 and part.codes.max() == 2**bits - 1  # it clips: 1.7 RMS are not the maximum


def test_a_clip_that_the_recipe_names_finds_the_range() -> None:
    weight, stats = weights(), observe()
    method = QuIP(rounding="nearest", incoherence="none", rescale=False)
    encoded = method.encode(weight, per_channel(Int(2)), RTN(), MSEClip(), stats, scores=False, seed=0)
    expected = MSEClip().fit(weight, levels(per_channel(Int(2))), stats, scores=False)
    assert torch.equal(encoded.weight.parts[0].grid.scale, expected.scale)
    own = RMSRange(2.4).fit(weight, levels(per_channel(Int(2))), None, scores=False)
    assert not torch.equal(own.scale, expected.scale)


# --- rounding ---------------------------------------------------------------------------------------------------------


def ldlq(weight: Tensor, h: Tensor, rounds: QTensor) -> Tensor:
    """The paper's LDLQ in fp64: H = (L + I) D (L + I)ᵀ, from the last column to the first."""
    factor = torch.linalg.cholesky(h)
    unit = factor / factor.diagonal()
    grid, rounded = rounds.grid, weight.double().clone()
    for i in reversed(range(weight.shape[1])):
        target = weight[:, i].double()
        for j in range(i + 1, weight.shape[1]):
            target = target + (weight[:, j].double() - rounded[:, j]) * unit[j, i]
        rounded[:, i] = grid.quantize(target.float()[None])[0].double()
    return rounded


def regular(h: Tensor, damp: float = 0.01) -> Tensor:
    """H with mean diagonal 1, damped once in front of the rotation and once in the sweep."""
    h = h * len(h) / h.trace() + damp * torch.eye(len(h), dtype=h.dtype)
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


@pytest.mark.parametrize(("bits", "rho"), [(8, 40.0), (2, 2.4), (3, 2.4)])
def test_mirrored_ldlq_is_gptq(bits: int, rho: float) -> None:
    """On an unbounded grid (8 bits that reach far) and, since both aim at the same value, on a bounded one."""
    weight, stats = weights(), observe()
    encoded = encode(QuIP(rescale=False, incoherence="none", rho=rho), weight, stats, bits)
    h = regular(stats.hessian().double())
    expected = ldlq(weight.flip(1), h.flip(0, 1), encoded.weight.parts[0]).flip(1)
    codes = encoded.weight.parts[0].codes
    assert (codes == encoded.weight.parts[0].grid.encode(expected.float())).float().mean() == 1.0
    if bits == 8:
        assert codes.min() > 0 and codes.max() < 255
        plain = GPTQ(damp=0.01, act_order=False).round(
            weight, levels(per_channel(Int(8))), RMSRange(rho), stats, scores=False
        )
        expected = ldlq(weight.flip(1), damped(stats.hessian().double(), 0.01).flip(0, 1), plain).flip(1)
        assert torch.equal(plain.codes, plain.grid.encode(expected.float()))


def test_rg_takes_columns_of_large_diagonal_first() -> None:
    """Sorted by rising diagonal and then from the last to the first."""
    weight, stats = weights(), observe()
    encoded = encode(QuIP(rescale=False, incoherence="none", rounding="rg"), weight, stats)
    order = stats.hessian().diagonal().argsort(stable=True)
    h = regular(stats.hessian().double())[order][:, order]
    expected = torch.empty(ROWS, COLUMNS)
    expected[:, order] = ldlq(weight[:, order], h, encoded.weight.parts[0]).float()
    assert torch.equal(encoded.weight.parts[0].codes, encoded.weight.parts[0].grid.encode(expected))


def greedy(weight: Tensor, h: Tensor, rounded: Tensor, quantize: object, width: int) -> Tensor:
    """One pass of cyclic coordinate descent by loops in fp64, `width` columns at a time."""
    weight, rounded = weight.double(), rounded.double().clone()
    for start in range(0, weight.shape[1], width):
        own = slice(start, start + width)
        error = rounded - weight
        error[:, own] = 0
        target = weight[:, own] - error @ h[:, own] @ torch.linalg.inv(h[own, own])
        rounded[:, own] = quantize(target.float()).double()  # type: ignore[operator]
    return rounded


@pytest.mark.parametrize("rounding", ["nearest", "ldlq"])
def test_greedy_passes_follow_the_formula_and_never_lose(rounding: str) -> None:
    weight, stats = weights(), observe()
    h, made = regular(stats.hessian().double()), []
    for passes in range(4):
        method = QuIP(rescale=False, incoherence="none", rounding=rounding, passes=passes)  # type: ignore[arg-type]
        made.append(encode(method, weight, stats).weight.parts[0])
    for old, new in pairwise(made):
        expected = greedy(weight, h, old.dequantize(), old.grid.quantize, 1)
        assert torch.equal(new.codes, new.grid.encode(expected.float()))
    losses = [proxy(part.dequantize(torch.float64) - weight, h) for part in made]
    assert losses[0] > losses[1] >= losses[2] >= losses[3]


def test_descent_in_blocks_follows_the_formula() -> None:
    weight, h = weights(columns=64), damped(observe(64).hessian().double(), 0.01)
    rounded = weight.round()
    values = rounded.T.clone()

    def open_block(start: int, remaining: Tensor) -> None:
        values[start : start + 8] = remaining[:8].round()

    found = Descent.towards(weight, h, 8).step(rounded, lambda column, _: values[column], open_block)
    assert torch.equal(found.double(), greedy(weight, h, rounded, torch.round, 8))


def test_two_bits_of_an_outlier_heavy_matrix() -> None:
    """The order of the specification's synthetic losses (RTN .48, GPTQ .35, QuIP .02) and their rough size."""
    weight, stats = heavy()
    spec = per_channel(Int(2))
    rtn = relative_loss(weight, RTN().round(weight, spec, MinMaxClip(), stats, scores=False).dequantize(), stats)
    gptq = relative_loss(weight, GPTQ().round(weight, spec, MinMaxClip(), stats, scores=False).dequantize(), stats)
    quip, fast, unturned, unscaled, nearest, passes = (
        relative_loss(weight, effective(encode(method, weight, stats)), stats)
        for method in (
            QuIP(),
            QuIP(incoherence="hadamard"),
            QuIP(incoherence="none"),
            QuIP(rescale=False),
            QuIP(rounding="nearest"),
            QuIP(passes=5),
        )
    )
    assert 0.35 < rtn < 0.65 and 0.1 < gptq < 0.45
    assert quip < 0.03 and fast < 0.03 and passes < quip
    assert quip < min(unscaled, nearest) and unturned > 3 * quip


def test_inputs_never_seen_are_rounded_behind_the_rotations() -> None:
    weight, _ = heavy()
    encoded = encode(QuIP(), weight, None, bits=4)
    assert isinstance(encoded.input_map, PermutedKronecker) and encoded.output_map is not None
    assert float((effective(encoded) - weight).norm() / weight.norm()) < 0.15


# --- whole runs -------------------------------------------------------------------------------------------------------


def quantize(model: Path, text: Path, recipe: str, output: Path, **options: object) -> lowbit.api.Quantized:
    return lowbit.quantize(model, recipe, output, calibration=str(text), samples=8, length=32, **options)


@pytest.mark.parametrize("family", ["opt", "mixtral", "gpt2"])
def test_a_run_stores_what_it_computes(family: str, tmp_path: Path) -> None:
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    result = quantize(model, text, "quip-w4a16", tmp_path / "run")
    planned = stored = total = 0
    spec = per_channel(Int(4))
    layers: dict[str, QLinear] = {
        name: module for name, module in lowbit.load(tmp_path / "run").named_modules() if isinstance(module, QLinear)
    }
    for file in (tmp_path / "run").glob("*.safetensors"):
        held, _ = native.unpack(shard_header(file).metadata, read_shard(file))
        for name, layer in held.items():
            stored += sum(t.nbytes for t in native.pack(name, layer).values())
            planned += QuIP(rescale=isinstance(layer.input_map, Rescaled)).stored_bytes(tuple(layer.weight.shape), spec)
            total += layer.weight.shape.numel()
            x = torch.randn(3, layer.weight.shape[1])
            expected = layer.output_map.apply(layer.input_map.apply(x) @ layer.weight.dequantize().T)
            loaded = layers[name]
            plain = loaded(x) if loaded.bias is None else loaded(x) - loaded.bias
            torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    assert stored == planned and result.bits_per_weight == pytest.approx(8 * stored / total)
    assert all(0 < block["error_after"] < 0.5 for block in result.blocks)


def test_a_run_can_be_repeated_and_exported_nowhere(tmp_path: Path) -> None:
    model, text = save_model("llama", tmp_path / "model"), save_text(tmp_path / "text.txt")
    for name in ("first", "second"):
        quantize(model, text, "quip-w2a16", tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "first").glob("*.safetensors"))
    assert files and all((tmp_path / "first" / n).read_bytes() == (tmp_path / "second" / n).read_bytes() for n in files)
    with pytest.raises(ValueError, match="native"):
        lowbit.export(tmp_path / "first", tmp_path / "out", format="compressed-tensors")
    with pytest.raises(ValueError, match="quip"):
        quantize(model, text, "quip-w4a16", tmp_path / "gguf", target="gguf")


@pytest.mark.parametrize("recipe", ["quip-w2a16-g32", "quip-w2a16-asym", "quip-nf4", "quip-w2a16-pow2"])
def test_formats_of_more_than_one_range_are_refused(recipe: str, tmp_path: Path) -> None:
    model, text = save_model("llama", tmp_path / "model"), save_text(tmp_path / "text.txt")
    with pytest.raises(ValueError, match="quip has one range for a whole weight"):
        quantize(model, text, recipe, tmp_path / "run")


def test_recipes() -> None:
    recipe = lowbit.recipes.parse("quip-w2a16")
    assert recipe.encode == QuIP() and recipe.scheme.weights == per_channel(Int(2)) and not recipe.sequential
    changed = lowbit.recipes.resolve("quip-w3a16", settings=["quip.rounding=rg", "quip.passes=5"]).recipe
    assert changed.encode == QuIP(rounding="rg", passes=5)
    assert lowbit.recipes.from_dict(lowbit.recipes.to_dict(changed)).recipe == changed
    for name, clip in (("quip", "minmax"), ("awq+quip", "minmax"), ("mse+quip", "mse")):
        assert lowbit.recipes.parse(f"{name}-w2a16").clip.name == clip
    with pytest.raises(ValueError, match="drop gptq"):
        lowbit.recipes.parse("quip+gptq-w2a16")
    for settings in ({"damp": 0.0}, {"rho": -1.0}, {"passes": -1}):
        with pytest.raises(ValueError, match="positive"):
            QuIP(**settings)  # type: ignore[arg-type]
    assert QuIP().paper_bits((512, 512), per_channel(Int(2))) == 2.0
    assert levels(per_channel(Int(2))) == per_tensor(Int(2, "asymmetric"), scale="float16-min")
    assert isinstance(levels(per_channel(Int(2))), Spec) and Kronecker(None, None, (3, 1)).tensors() == {}
