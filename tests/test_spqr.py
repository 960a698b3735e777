"""SpQR against a naive oracle in fp64, weight by weight, and bilevel scales against what a file holds of them.

As in test_gptq, decisions that came close to a tie may fall either way in fp32: what the oracle cannot vouch for, here
a band of 16 rows that share their scales' grids, is left out of the comparison, and most bands must be left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit import recipes
from lowbit.formats import native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods.gptq import GPTQ
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.spqr import SpQR, gains
from lowbit.methods.views import Stats
from lowbit.numerics import bilevel
from lowbit.numerics.grid import Grid, fit_range
from lowbit.numerics.qtensor import QLayer, QTensor, QWeight
from lowbit.numerics.sizes import stored_bytes
from lowbit.numerics.spec import Int, Spec, per_group, per_token

F64 = torch.float64
NEVER = 1e9
"""A τ that no weight reaches."""
TIE = 2e-5
"""Relative distance to a decision that fp32 noise cannot bridge."""


def spec_of(bits: int = 3, group: int = 16) -> Spec:
    return Spec(Int(bits, "asymmetric"), (1, group), "bilevel")


def example(rows: int = 56, columns: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(a weight with a heavy tail, correlated integer inputs)."""
    torch.manual_seed(seed)
    weight = 0.02 * torch.randn(rows, columns)
    weight[torch.rand(rows, columns) < 0.02] *= 6
    mix = torch.eye(columns) + 0.7 * torch.randn(columns, columns) / columns**0.5
    return weight, (6 * torch.randn(300, columns) @ mix * torch.linspace(0.5, 2, columns)).round()


def observe(x: Tensor) -> Stats:
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x)
    return stats


def encode(weight: Tensor, x: Tensor | None, spec: Spec, **settings: object) -> QWeight:
    stats = None if x is None else observe(x)
    encoded = SpQR(**settings).encode(weight, spec, RTN(), MinMaxClip(), stats, scores=False, seed=0)
    assert encoded.input_map is None and encoded.output_map is None and encoded.outliers is None
    return encoded.weight


# --- the oracle -------------------------------------------------------------------------------------------------------


def float_zero(values: list[float], bits: int) -> tuple[float, float]:
    """Scale and zero of a range that includes 0."""
    low, high = min(0.0, *values), max(0.0, *values)
    scale = (high - low) / (2**bits - 1) or 1.0
    return scale, -low / scale


def half_away(x: float) -> float:
    """Distance of x to where its rounding to fp16 changes, relative to x."""
    h = torch.tensor(x, dtype=F64).half()
    ends = [torch.nextafter(h, torch.tensor(sign * torch.inf, dtype=torch.float16)) for sign in (-1, 1)]
    return min(abs((float(h) + float(end)) / 2 - x) for end in ends) / max(x, 1e-12)


def on_grid(values: list[float], least_step: float) -> tuple[list[float], float]:
    """(values on the 3-bit grid of a band, how close a decision came to a tie)."""
    least = float(torch.tensor(min(values), dtype=F64).half())
    wanted = max((max(values) - least) / 7, least / 2048, least_step)
    step = float(torch.tensor(wanted, dtype=F64).half())
    places = [(value - least) / step for value in values]
    tie = min([abs(place % 1 - 0.5) for place in places] + [100 * half_away(min(values)), 100 * half_away(wanted)])
    return [least + step * min(7, max(0, round(place))) for place in places], tie


@dataclass
class Oracle:
    """What SpQR makes of W [O, I]: values, outliers, and how close every band came to a tie."""

    weight: Tensor
    x: Tensor
    bits: int
    group: int
    tau: float = 0.2
    act_order: bool = True
    values: Tensor = field(init=False)
    outlier: Tensor = field(init=False)
    tie: Tensor = field(init=False)

    def __post_init__(self) -> None:
        h = self.x.T.double() @ self.x.double()
        order = h.diagonal().argsort(descending=True, stable=True) if self.act_order else torch.arange(len(h))
        h = h[order][:, order] + h.diagonal().mean() * torch.eye(len(h), dtype=F64)
        self.u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
        w = self.weight.double()[:, order].clone()
        spread = [float(((c - c.mean()) ** 2).mean() / self.u[j, j] ** 2) for j, c in enumerate(w.T)]
        self.threshold = self.tau * sum(spread) / len(spread)
        self.tie = torch.ones(-(-len(w) // 16), dtype=F64)
        done, outlier = torch.empty_like(w), torch.zeros_like(w, dtype=torch.bool)
        for j in range(w.shape[1]):
            if j % self.group == 0:
                scale, zero = self.fit(w, j)
            self.column(w, j, scale, zero, done, outlier)
        self.values, self.outlier = torch.empty_like(done), torch.empty_like(outlier)
        self.values[:, order], self.outlier[:, order] = done, outlier

    def note(self, row: int, distance: float) -> None:
        self.tie[row // 16] = min(float(self.tie[row // 16]), distance)

    def cost(self, values: list[float], first: int, skip: int | None) -> float:
        kept = [v for i, v in enumerate(values) if i != skip]
        scale, zero = float_zero(kept, self.bits)
        total = 0.0
        for i, value in enumerate(values):
            if i != skip:
                code = min(2**self.bits - 1, max(0, round(value / scale + zero)))
                total += (scale * (code - zero) - value) ** 2 / float(self.u[first + i, first + i]) ** 2
        return total

    def fit(self, w: Tensor, first: int) -> tuple[list[float], list[float]]:
        scales, zeros = [], []
        for row in range(len(w)):
            values = w[row, first : first + self.group].tolist()
            base = self.cost(values, first, None)
            gain = [base - self.cost(values, first, i) for i in range(len(values))]
            self.note(row, min(abs(g - self.threshold) for g in gain) / self.threshold)
            inliers = [v for v, g in zip(values, gain, strict=True) if g <= self.threshold]
            scale, zero = float_zero(inliers, self.bits) if inliers else (0.0, 0.0)
            scales.append(scale)
            zeros.append(zero)
        for start in range(0, len(w), 16):
            band = slice(start, start + 16)
            scales[band], scale_tie = on_grid(scales[band], 2.0**-24)
            zeros[band], zero_tie = on_grid(zeros[band], 2.0**-11)
            self.note(start, min(scale_tie, zero_tie))
        return scales, zeros

    def column(self, w: Tensor, j: int, scale: list[float], zero: list[float], done: Tensor, outlier: Tensor) -> None:
        for row in range(len(w)):
            place = float(w[row, j]) / scale[row] + zero[row]
            self.note(row, abs(place % 1 - 0.5))
            done[row, j] = scale[row] * (min(2**self.bits - 1, max(0, round(place))) - zero[row])
            cost = float((w[row, j] - done[row, j]) / self.u[j, j]) ** 2
            self.note(row, abs(cost - self.threshold) / self.threshold)
            if cost > self.threshold:
                self.note(row, 1e3 * half_away(abs(float(w[row, j]))))
                outlier[row, j], done[row, j] = True, float(w[row, j].half())
            error = (w[row, j] - done[row, j]) / self.u[j, j]
            w[row, j + 1 :] -= error * self.u[j, j + 1 :]


@pytest.mark.parametrize(("bits", "tau", "act_order"), [(3, 0.2, True), (4, 0.4, False), (2, NEVER, True)])
def test_codes_and_outliers_are_the_oracles(bits, tau, act_order):
    weight, x = example()
    oracle = Oracle(weight, x, bits, 16, tau, act_order)
    made = encode(weight, x, spec_of(bits), tau=tau, act_order=act_order)
    mask = torch.zeros_like(weight, dtype=torch.bool) if made.sparse is None else made.sparse.mask
    clear = (oracle.tie > TIE).repeat_interleave(16)[: len(weight)]
    assert clear.double().mean() >= 0.5
    assert torch.equal(mask[clear], oracle.outlier[clear])
    assert bool(mask.any()) == (tau < NEVER)
    values = made.dequantize().double()
    assert torch.allclose(values[clear], oracle.values[clear], rtol=2e-5, atol=1e-7)


# --- the checks -------------------------------------------------------------------------------------------------------


def naive_gains(values: Tensor, cost: Tensor, bits: int) -> Tensor:
    gain = torch.zeros(values.shape, dtype=F64)
    for row in range(len(values)):
        for left_out in range(values.shape[1]):
            for skip, sign in ((None, 1), (left_out, -1)):
                kept = [float(v) for i, v in enumerate(values[row]) if i != skip]
                scale, zero = float_zero(kept, bits)
                for i, value in enumerate(values[row].tolist()):
                    if i != skip:
                        code = min(2**bits - 1, max(0, round(value / scale + zero)))
                        gain[row, left_out] += sign * (scale * (code - zero) - value) ** 2 * float(cost[i])
    return gain


@pytest.mark.parametrize("group", [2, 5, 16])
def test_leaving_one_out_is_refitting_to_the_others(group):
    torch.manual_seed(1)
    values, cost = torch.randn(12, group), torch.rand(group) + 0.1
    values[0] = 0.5  # all equal
    values[1, :2] = values[1].max() + 1  # two carry the range
    values[2] = values[2].abs() + 1  # zero is an end
    values[3] = 0.0
    assert torch.allclose(gains(values, cost, spec_of(3, -1)).double(), naive_gains(values, cost, 3), atol=1e-5)


def test_without_outliers_it_is_gptq_on_bilevel_scales():
    weight, x = example()
    made = encode(weight, x, spec_of(), tau=NEVER, act_order=False)
    assert made.sparse is None

    @dataclass
    class Known:
        grid: Grid

        def fit(self, weight, spec, stats, *, scores):
            return self.grid

    gptq = GPTQ(damp=1.0, act_order=False).round(weight, spec_of(), Known(made.parts[0].grid), observe(x), scores=False)
    assert torch.equal(gptq.codes, made.parts[0].codes)


def test_fewer_outliers_the_larger_tau():
    weight, x = example()
    counts = []
    for tau in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        sparse = encode(weight, x, spec_of(), tau=tau).sparse
        counts.append(0 if sparse is None else len(sparse.values))
    assert counts == sorted(counts, reverse=True) and counts[0] > 4 * counts[3] > 0


def test_outliers_are_exact_and_less_is_lost():
    """Those of the sweep's first column, into which nothing was spread, are the weight's own numbers in fp16."""
    weight, x = example()
    first = observe(x).hessian().diagonal().argmax()
    weight[[3, 17], first] = 0.4
    made, plain = encode(weight, x, spec_of()), encode(weight, x, spec_of(), tau=NEVER)
    mask = made.sparse.mask[:, first]
    assert mask[3] and mask[17]
    assert torch.equal(made.dequantize()[mask, first], weight[mask, first].half().float())
    loss = [float(((q.dequantize() - weight) @ x.T).square().sum()) for q in (made, plain)]
    assert loss[0] < 0.5 * loss[1]


@pytest.mark.parametrize(("bits", "group"), [(3, 16), (4, 16), (2, 8)])
def test_bits_are_those_of_the_formula(bits, group):
    """b + (3 + 3)/g + 64/(16 g) + 32 r, and in the file the counts of rows and the order of columns."""
    weight, x = example(64)
    made = encode(weight, x, spec_of(bits, group))
    held = sum(t.nbytes for t in native.pack("x", QLayer(made)).values())
    rate = len(made.sparse.values) / weight.numel()
    rows, columns = weight.shape
    formula = bits + 6 / group + 64 / (16 * group) + 32 * rate
    assert 8 * held / weight.numel() == pytest.approx(formula + 32 / columns + 32 / rows)
    planned = SpQR().stored_bytes((rows, columns), spec_of(bits, group))
    assert planned - held == round(0.01 * weight.numel()) * 4 - len(made.sparse.values) * 4
    assert SpQR().paper_bits((4096, 4096), spec_of()) == pytest.approx(3.95, abs=0.01)


def test_inputs_never_seen_are_rounded_to_nearest():
    weight, _ = example()
    made = encode(weight, None, spec_of())
    assert torch.equal(made.parts[0].codes, fit_range(weight, spec_of()).encode(weight))
    assert made.sparse is None


@pytest.mark.parametrize("spec", [per_group(Int(3, "asymmetric"), 16), per_group(Int(4), 8), spec_of(3, -1)])
def test_other_formats_have_outliers_too(spec):
    weight, x = example()
    made = encode(weight, x, spec)
    loss = float((made.dequantize() - weight).square().mean() / weight.square().mean())
    plain = float((fit_range(weight, spec).quantize(weight) - weight).square().mean() / weight.square().mean())
    assert made.sparse.mask.any() and loss < plain


@pytest.mark.gpu
def test_a_gpu_makes_the_same():
    weight, x = example(256, 256)
    here, there = encode(weight, x, spec_of()), encode(weight.cuda(), x.cuda(), spec_of()).to("cpu")
    same = (here.dequantize() == there.dequantize()).all(1)
    loss = [float(((q.dequantize() - weight) @ x.T).square().sum()) for q in (here, there)]
    assert same.double().mean() > 0.8 and loss[1] == pytest.approx(loss[0], rel=0.02)
    assert len(there.sparse.values) == pytest.approx(len(here.sparse.values), rel=0.05)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (spec_of(3, 1), "groups of 1 are too small"),
        (Spec(Int(4), (1, 16), "m2"), "relates them"),
        (Spec(Int(4), (16, -1)), "one by one"),
    ],
)
def test_formats_that_groups_cannot_be_fitted_in_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        SpQR().check((64, 64), spec, None)


def test_settings_have_limits():
    for wrong in ({"tau": 0.0}, {"damp": 0.0}):
        with pytest.raises(ValueError, match="positive"):
            SpQR(**wrong)


# --- bilevel scales ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 32), (40, 48), (5, 16), (1, 16), (33, 160)])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_bilevel_scales_come_back_bit_for_bit(shape, bits):
    torch.manual_seed(0)
    weight = 10 ** (3 * torch.rand(shape[0], 1) - 4) * (torch.randn(shape) + 0.5)
    weight[0] = 0.0
    spec = spec_of(bits)
    grid = fit_range(weight, spec)
    layer = QLayer(QWeight((QTensor(grid.encode(weight), grid),)))
    tensors = native.pack("x", layer)
    assert sum(t.nbytes for t in tensors.values()) == stored_bytes(shape, spec)
    layers, rest = native.unpack(native.describe({"x": layer}), tensors)
    back = layers["x"].weight
    assert not rest and torch.equal(back.parts[0].grid.scale, grid.scale)
    assert torch.equal(back.dequantize(), layer.weight.dequantize())
    assert not back.dequantize()[0].any()
    again = native.pack("x", layers["x"])
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_bilevel_scales_are_packed_without_values():
    grid = fit_range(torch.empty(40, 48, device="meta"), spec_of())
    layer = QLayer(QWeight((QTensor(grid.encode(torch.empty(40, 48, device="meta")), grid),)))
    real = fit_range(torch.randn(40, 48), spec_of())
    packed = native.pack("x", QLayer(QWeight((QTensor(real.encode(torch.randn(40, 48)), real),))))
    assert {k: (t.shape, t.dtype) for k, t in native.pack("x", layer).items()} == {
        k: (t.shape, t.dtype) for k, t in packed.items()
    }


def test_a_band_has_eight_scales_and_eight_zeros_of_two_fp16_numbers_each():
    torch.manual_seed(0)
    grid = fit_range(torch.randn(48, 64), spec_of())
    assert torch.equal(grid.outer, grid.outer.half().float()) and grid.outer.shape == (3, 4, 4)
    zero = grid.offset / grid.scale
    for band in range(3):
        for group in range(4):
            step, least, zero_step, zero_least = grid.outer[band, group].tolist()
            for row in range(16 * band, 16 * band + 16):
                for value, d, e in ((grid.scale, step, least), (zero, zero_step, zero_least)):
                    place = (float(value[row, group]) - e) / d
                    assert abs(place - round(place)) < 1e-3 and 0 <= round(place) <= 7


def test_every_stored_scale_is_the_nearest_of_its_band():
    torch.manual_seed(0)
    scale, zero = torch.rand(37, 5) + 0.01, 7 * torch.rand(37, 5)
    scales, offsets, outer = bilevel.stored(scale, zero)
    wide = outer.repeat_interleave(16, 0)[:37]
    for held, ideal, part in ((scales, scale, wide[..., :2]), (offsets / scales, zero, wide[..., 2:])):
        levels = part[..., 1:] + part[..., :1] * torch.arange(8)
        assert torch.allclose((held - ideal).abs(), (levels - ideal[..., None]).abs().amin(-1), atol=1e-6)


def test_bilevel_needs_zeros_and_rows():
    for number, block in ((Int(3), (1, 16)), (Int(3, "asymmetric"), (16, -1))):
        with pytest.raises(ValueError, match="bilevel scales come with zeros"):
            Spec(number, block, "bilevel")
    with pytest.raises(ValueError, match="relate the groups of a weight"):
        Spec(Int(3, "asymmetric"), (1, 16), "bilevel", dynamic=True)


# --- whole models -----------------------------------------------------------------------------------------------------


def test_a_name_means_bilevel_scales():
    recipe = recipes.resolve("spqr-w3a16-g16", overrides=["*.down_proj=w4a16-g16"]).recipe
    assert recipe.scheme.weights == spec_of() and recipe.scheme.overrides[0].weights == spec_of(4)
    assert recipe.encode == SpQR() and recipe.clip == MinMaxClip()
    document = recipes.to_dict(recipe)
    assert recipes.from_dict(document).recipe == recipe
    assert recipes.parse("spqr-w3a8-g16").scheme.activations == per_token(Int(8))


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
def test_what_is_loaded_is_what_was_stored(tmp_path: Path, family):
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    result = lowbit.quantize(model, "spqr-w3a16-g16", tmp_path / "run", calibration=str(text), samples=8, length=32)
    assert all(block["error_after"] < block["error_before"] for block in result.blocks)
    loaded = dict(lowbit.load(tmp_path / "run", dtype=torch.float32).named_modules())
    outliers = seen = 0
    for file in (tmp_path / "run").glob("*.safetensors"):
        layers, _ = native.unpack(shard_header(file).metadata, read_shard(file))
        for name, layer in layers.items():
            assert torch.equal(loaded[name].weight, layer.weight.dequantize())
            outliers += 0 if layer.weight.sparse is None else len(layer.weight.sparse.values)
            seen += 1
    assert seen and outliers
