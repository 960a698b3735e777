"""TesseraQ: soft rounding, hardening and scales against their formulas element by element, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import first_block_error, save_model, save_text
from torch import Tensor
from views import Linears

import lowbit
from lowbit.methods.gptq import GPTQ
from lowbit.methods.rtn import MinMaxClip
from lowbit.methods.tesseraq import SCHEDULE, TesseraQ, _Rounding, neighbours, rectified
from lowbit.methods.views import Stats
from lowbit.numerics.grid import fit_range, to_levels
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import E2M1, E4M3, NF4, Int, Number, Spec, mx, nvfp4, per_channel, per_group, per_tensor

QUICK = TesseraQ(schedule=(0.7, 0.4, 0.2, 0.05), iterations=20, rate=1e-2)


def correlated(batches: int = 3, sequences: int = 2, tokens: int = 16, width: int = 32) -> Tensor:
    mix = torch.randn(width, width) * torch.logspace(0, -1, width)
    return torch.randn(batches, sequences, tokens, width) @ mix


def rtn(w: Tensor, spec: Spec) -> QTensor:
    grid = fit_range(w, spec)
    return QTensor(grid.encode(w), grid)


def gptq(w: Tensor, spec: Spec, groups: Any = "static") -> QTensor:
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(torch.randn(200, w.shape[1]) @ torch.randn(w.shape[1], w.shape[1]))
    return GPTQ(groups=groups).round(w, spec, MinMaxClip(), stats, scores=False)


SPECS = [
    *(per_group(Int(2, "asymmetric"), 8), per_channel(Int(3)), per_group(Int(2, "symmetric-full"), 16)),
    *(per_tensor(Int(4, "asymmetric")), per_group(E2M1, 8), per_group(NF4, 8), nvfp4(), mx(E2M1)),
]


# --- formulas ---------------------------------------------------------------------------------------------------------


def levels_of(number: Number) -> list[float]:
    """Every level, by rounding a fine ruler."""
    ends = (number.low, number.high) if isinstance(number, Int) else (-number.largest, number.largest)
    ruler = torch.linspace(ends[0], ends[1], 20001)
    return sorted(set((to_levels(ruler, number) + 0.0).tolist()))


@pytest.mark.parametrize("number", [Int(3), Int(2, "asymmetric"), E2M1, NF4], ids=str)
def test_neighbours_are_the_next_levels(number: Number) -> None:
    table = levels_of(number)
    before, behind = neighbours(torch.tensor(table), number, None)
    assert before.tolist() == [table[0], *table[:-1]] and behind.tolist() == [*table[1:], table[-1]]


def test_neighbours_of_integers_end_where_the_zero_point_says() -> None:
    levels = torch.tensor([[-1.0, 0.0, 2.0], [-3.0, -1.0, 0.0]])
    before, behind = neighbours(levels, Int(2, "asymmetric"), torch.tensor([[1.0], [3.0]]))
    assert before.tolist() == [[-1, -1, 1], [-3, -2, -1]] and behind.tolist() == [[0, 1, 2], [-2, 0, 0]]


def test_the_sigmoid_is_stretched() -> None:
    nu = torch.tensor([-20.0, 0.0, 1.0, 20.0])
    sigmoid = 1 / (1 + torch.exp(-nu.double()))
    assert torch.allclose(rectified(nu).double(), (1.2 * sigmoid - 0.1).clamp(0, 1), atol=1e-6)
    assert rectified(nu)[0] == 0 and rectified(nu)[-1] == 1


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_soft_rounding_starts_at_the_weight_itself(spec: Spec) -> None:
    """Wherever W lies within the grid; outside it, at the grid's end. Ties in the middle move by a thousandth."""
    w = torch.randn(16, 32)
    rounding = _Rounding(w, rtn(w, spec), True)
    grid = rounding.start.grid
    reach = grid.decode(torch.where(w > 0, grid.encode(torch.full_like(w, 1e4)), grid.encode(torch.full_like(w, -1e4))))
    inside = torch.where(w > 0, torch.minimum(w, reach), torch.maximum(w, reach))
    gap = 4 * grid.scale.max() if isinstance(spec.number, Int) else 2 * grid.scale.max()
    assert torch.allclose(rounding.weight().detach(), inside, rtol=1e-5, atol=float(1.5e-3 * gap))


@pytest.mark.parametrize("groups", ["static", "fresh"])
@pytest.mark.parametrize("start", ["rtn", "gptq"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_hard_at_once_is_what_round_gave(spec: Spec, start: str, groups: str) -> None:
    w = torch.randn(16, 32)
    codes = (
        rtn(w, spec)
        if start == "rtn"
        else gptq(w, spec, groups if spec.block[0] == 1 and not spec.relative else "static")
    )
    rounding = _Rounding(w, codes, True)
    rounding.harden(0.0)
    assert torch.equal(rounding.weight().detach(), codes.dequantize())
    assert torch.equal(rounding.codes().codes, codes.codes)
    assert torch.equal(rounding.codes().grid.scale, codes.grid.scale)


@pytest.mark.parametrize("number", [Int(3), Int(2, "asymmetric"), E2M1, E4M3], ids=str)
def test_a_weight_chooses_between_its_level_and_the_next_towards_it(number: Number) -> None:
    """By counting: the two levels enclose w/s, unless it lies beyond the grid, and one of them is Round's."""
    w = torch.randn(8, 16)
    start = rtn(w, per_channel(number, scale="float32"))
    rounding = _Rounding(w, start, True)
    below, above = rounding.below.flatten(1), rounding.above.flatten(1)
    y, chosen = w / start.grid.scale, start.dequantize() / start.grid.scale
    assert (torch.isclose(below, chosen, atol=1e-4) | torch.isclose(above, chosen, atol=1e-4)).all()
    enclosed = (below <= y + 1e-5) & (y <= above + 1e-5)
    beyond = below == above
    assert (enclosed | beyond).all() and enclosed.double().mean() > 0.9


def test_the_surest_weights_are_hardened() -> None:
    """After harden(p) exactly the ⌈p n⌉ smallest |α - 1/2| are soft, and hard ones never soften."""
    w = torch.randn(8, 32)
    rounding = _Rounding(w, rtn(w, per_group(Int(3), 8)), True)
    score = (rectified(rounding.nu.detach()) - 0.5).abs().flatten()
    order, previous = score.argsort(), torch.ones(256, dtype=torch.bool)
    for part in (0.8, 0.5, 0.123, 0.01):
        rounding.harden(part)
        soft = rounding.soft.flatten()
        count = -(-int(part * 256_000) // 1000)
        assert int(soft.sum()) == count and set(soft.nonzero().flatten().tolist()) == set(order[:count].tolist())
        assert not (soft & ~previous).any()
        previous = soft.clone()
        hard = rounding.weight().detach()[~soft.view(8, 32)]
        assert torch.equal(hard, rounding.start.dequantize()[~soft.view(8, 32)])


def test_hard_weights_get_no_gradient_and_do_not_move() -> None:
    w, x = torch.randn(8, 32), correlated()
    view = Linears([w], [per_group(Int(3), 8)], x)
    rounding = _Rounding(w, view.start(view.anatomy.sites[0]), True)
    rounding.harden(0.3)
    before = rounding.nu.detach().clone()
    QUICK._stage(view, {"linear0": rounding})
    moved = rounding.nu.detach() != before
    assert not moved[~rounding.soft].any() and moved[rounding.soft].double().mean() > 0.9


@pytest.mark.parametrize("scale", ["half", "float32", "bfloat16"])
def test_the_scale_is_tuned_by_two_sigmas_and_stored(scale: Any) -> None:
    w = torch.randn(8, 32)
    rounding = _Rounding(w, rtn(w, per_group(Int(3), 8, scale=scale)), True)
    assert rounding.v is not None
    with torch.no_grad():
        rounding.v.copy_(torch.randn_like(rounding.v))
    rounding.harden(0.0)
    codes = rounding.codes()
    tuned = rounding.start.grid.scale.double() * 2 / (1 + torch.exp(-rounding.v.detach().double()))
    assert torch.allclose(codes.grid.scale.double(), tuned, rtol=1e-6 if scale == "float32" else 2**-8)
    if scale != "float32":
        assert torch.equal(codes.grid.scale, codes.grid.scale.bfloat16().float())
    assert torch.equal(codes.codes, rounding.start.codes)
    assert torch.equal(codes.dequantize(), rounding.weight().detach())


@pytest.mark.parametrize("spec", [nvfp4(), mx(E2M1)], ids=str)
def test_scales_that_are_no_plain_numbers_stay(spec: Spec) -> None:
    view = Linears([torch.randn(16, 32)], [spec], correlated())
    assert _Rounding(view.weights[0], view.start(view.anatomy.sites[0]), True).v is None
    QUICK.train(view)
    codes, start = view.codes["linear0"], view.starts["linear0"]
    assert torch.equal(codes.grid.scale, start.grid.scale) and not torch.equal(codes.codes, start.codes)


def test_gradients_are_those_of_the_formula() -> None:
    """∂L/∂ν = ∂L/∂Ŵ · s (above - below) h'(ν), and v's sums over its unit, in fp64 with ∂L/∂Ŵ = 2 (Ŵ - W) XᵀX."""
    w, x, spec = torch.randn(6, 16), correlated(1, 2, 16, 16), per_group(Int(3), 8, scale="float32")
    view = Linears([w], [spec], x)
    rounding = _Rounding(w, view.start(view.anatomy.sites[0]), True)
    with torch.no_grad():
        rounding.nu.add_(torch.randn_like(rounding.nu) / 4)
    loss = TesseraQ()._error(view, 0, {"linear0": rounding.weight()})
    loss.backward()
    flat = x.reshape(-1, 16).double()
    nu, hat = rounding.nu.detach().double().flatten(1), rounding.weight().detach().double()
    outer = 2 * (hat - w.double()) @ flat.T @ flat
    sigmoid = nu.sigmoid()
    slope = 1.2 * sigmoid * (1 - sigmoid)
    slope[(1.2 * sigmoid - 0.1 <= 0) | (1.2 * sigmoid - 0.1 >= 1)] = 0
    scale = rounding.start.grid.scale.double().repeat_interleave(8, 1)
    expected = outer * scale * (rounding.above - rounding.below).flatten(1).double() * slope
    assert rounding.nu.grad is not None and rounding.v is not None and rounding.v.grad is not None
    assert torch.allclose(
        rounding.nu.grad.flatten(1).double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
    tuned = (outer * hat).unflatten(1, (2, 8)).sum(-1) / 2  # d(2σ)/dv = 1/2 at v = 0
    assert torch.allclose(rounding.v.grad.double(), tuned, rtol=1e-3, atol=1e-4 * float(tuned.abs().max()))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["rtn", "gptq"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_error_falls_and_codes_stay_beside_the_weights(spec: Spec, start: str) -> None:
    w, x = torch.randn(16, 32), correlated()
    view = Linears([w, torch.randn(8, 32)], [spec, None], x)
    view.starts["linear0"] = rtn(w, spec) if start == "rtn" else gptq(w, spec)
    before = view.error({"linear0": view.starts["linear0"]})
    QUICK.train(view)
    assert list(view.codes) == ["linear0"]
    assert view.error(view.codes) < 0.9 * before
    rounding = _Rounding(w, view.starts["linear0"], True)
    codes = view.codes["linear0"].codes
    levels = QTensor(codes, view.starts["linear0"].grid).dequantize()
    scale = view.starts["linear0"].grid.scale[:, None, :, None]
    ends = [(rounding._natural(end * scale)) for end in (rounding.below, rounding.above)]
    assert ((levels == ends[0]) | (levels == ends[1])).all()


def test_scales_help() -> None:
    errors = []
    for scales in (False, True):
        torch.manual_seed(0)
        view = Linears([torch.randn(16, 32)], [per_group(Int(2), 8)], correlated())
        TesseraQ(schedule=(0.7, 0.4, 0.2, 0.05), iterations=20, rate=1e-2, scale_rate=1e-2, scales=scales).train(view)
        errors.append(view.error(view.codes))
        same = torch.equal(view.codes["linear0"].grid.scale, view.starts["linear0"].grid.scale)
        assert same == (not scales)
    assert errors[1] < errors[0]


def test_the_result_is_never_worse_than_round() -> None:
    """A scale rate that blows scales up: Round's codes are kept."""
    view = Linears([torch.randn(16, 32)], [per_channel(Int(4))], correlated())
    TesseraQ(schedule=(0.5, 0.1), iterations=5, scale_rate=10.0).train(view)
    assert not view.codes


def test_stages_take_turns_with_a_fresh_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[float] = []
    stages: list[int] = []
    monkeypatch.setattr(_Rounding, "harden", lambda self, part: parts.append(part))
    monkeypatch.setattr(TesseraQ, "_stage", lambda self, view, roundings: stages.append(len(parts)))
    TesseraQ().train(Linears([torch.randn(8, 16)], [per_channel(Int(3))], correlated(width=16)))
    assert parts == [*SCHEDULE, 0.0] and stages == list(range(1, 21))


def test_same_seed_same_codes() -> None:
    results = []
    w, x = torch.randn(16, 32), correlated(6)
    for _ in range(2):
        view = Linears([w], [SPECS[0]], x, seed=3)
        QUICK.train(view)
        results.append(view.codes["linear0"].codes)
    assert torch.equal(*results)


def test_each_stream_has_its_own_optimum() -> None:
    x = correlated()
    noise = x + torch.randn_like(x)
    codes = []
    for inputs in ("float", "quantized"):
        torch.manual_seed(0)
        view = Linears([torch.randn(16, 32)], [SPECS[0]], noise, floats=x)
        before = view.error({"linear0": view.start(view.anatomy.sites[0])})
        TesseraQ(schedule=QUICK.schedule, iterations=20, rate=1e-2, inputs=inputs).train(view)  # type: ignore[arg-type]
        codes.append(view.codes["linear0"])
    assert view.error({"linear0": codes[1]}) < min(before, view.error({"linear0": codes[0]}))


@pytest.mark.parametrize("wrong", [{"schedule": (0.5, 0.6)}, {"schedule": (1.2,)}, {"iterations": -1}, {"rate": 0.0}])
def test_settings_without_meaning_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"schedule falls|negative"):
        TesseraQ(**wrong)


@pytest.mark.parametrize("recipe", ["awq+tesseraq-w2a16-g16-asym", "gptq+tesseraq-w3a8-g16"])
def test_end_to_end(recipe: str, tmp_path: Path) -> None:
    model, text = save_model("llama", tmp_path / "model"), save_text(tmp_path / "text.txt")
    options: dict[str, Any] = {"calibration": str(text), "samples": 4, "length": 32}
    settings = ["tesseraq.schedule=[0.6, 0.3, 0.1]", "tesseraq.iterations=24", "tesseraq.rate=0.04"]
    settings += ["gptq.true_sequential=false"] if recipe.startswith("gptq") else []  # leaves few steps some room
    run = lowbit.quantize(model, recipe, tmp_path / "out", settings=settings, **options)
    base = lowbit.quantize(model, recipe.replace("+tesseraq", ""), tmp_path / "base", settings=settings[3:], **options)
    assert run.blocks[0]["error_after"] < base.blocks[0]["error_after"]
    assert run.bits_per_weight == base.bits_per_weight
    resumed = lowbit.quantize(model, recipe, tmp_path / "out", settings=settings, **options)  # tuples in plan.json
    assert resumed.blocks[1]["error_after"] == run.blocks[1]["error_after"]
    measured = first_block_error(model, tmp_path / "out", text, 4, 32)
    assert measured == pytest.approx(run.blocks[0]["error_after"], rel=1e-3)
