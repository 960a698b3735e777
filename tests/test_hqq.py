"""HQQ against its iteration written out in fp64 in the paper's variables, and what its spec promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit.formats import gguf, gguf_blocks, mlx, native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods import hqq
from lowbit.methods.gptq import GPTQ
from lowbit.methods.hqq import HQQ
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.views import Stats
from lowbit.numerics.grid import Grid, to_units, unit_range
from lowbit.numerics.qtensor import QLayer, QWeight
from lowbit.numerics.spec import NF4, Int, Spec, per_channel, per_group
from lowbit.recipes import parse, resolve
from lowbit.stream.plan import stored_bytes


def form(bits: int = 4, block: tuple[int, int] = (1, 16)) -> Spec:
    return Spec(Int(bits, "asymmetric"), block, "float16-min")


def heavy(rows: int = 12, columns: int = 64) -> Tensor:
    """Weights of the usual size with a few large ones."""
    weight = torch.randn(rows, columns) * 0.03
    return torch.where(torch.rand_like(weight) < 0.02, 6 * weight, weight)


def fit(weight: Tensor, spec: Spec, **settings: float) -> Grid:
    return HQQ(**settings).fit(weight, spec, None, scores=False)


def by_unit(grid: Grid, weight: Tensor) -> Tensor:
    """Mean |w - ŵ| of every unit."""
    return to_units(grid.quantize(weight) - weight, grid.spec.block).abs().mean((-3, -1))


def oracle(units: list[list[float]], bits: int, beta: float) -> tuple[list[float], list[float], float]:
    """(s and z s of every unit, mean |d|): the iteration of the paper over c = 1/s and z, both as 16 bits hold s and
    z s, until the mean |d| of all stops falling.
    """
    top, c, z = 2**bits - 1, [], []
    for values in units:
        spread = max(values) - min(values)
        s = float(torch.tensor(1 / min(top / spread if spread else float("inf"), 2e4)).half())
        c.append(1 / s)
        z.append(-min(values) / s)
    best, least = [0.0], float("inf")
    for _ in range(21):
        total, found = 0.0, []
        for i, values in enumerate(units):
            z[i] = float(torch.tensor(z[i] / c[i], dtype=torch.float64).float().half()) * c[i]
            q = [min(max(round(w * c[i] + z[i]), 0), top) for w in values]
            d = [w - (k - z[i]) / c[i] for w, k in zip(values, q, strict=True)]
            total += sum(map(abs, d)) / len(d) / len(units)
            e = [0.0 if x == 0 else max(abs(x) - abs(x) ** -0.3 / beta, 0.0) * (1 if x > 0 else -1) for x in d]
            found.append(sum(k - (w - y) * c[i] for k, w, y in zip(q, values, e, strict=True)) / len(values))
        if total >= least:
            break
        best, least = [y / x for x, y in zip(c, z, strict=True)], total
        z, beta = found, beta * 1.01
    return [1 / x for x in c], best, least


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("beta", [10.0, 1e3])
def test_offsets_are_what_the_iteration_gives(bits: int, beta: float) -> None:
    for _ in range(3):
        weight = heavy(4, 64)
        grid = fit(weight, form(bits), beta=beta)
        assert grid.offset is not None
        scale, offset, loss = oracle([unit.tolist() for unit in weight.double().view(16, 16)], bits, beta)
        assert grid.scale.flatten().tolist() == pytest.approx(scale, rel=1e-12)
        assert grid.offset.flatten().tolist() == pytest.approx(offset, rel=1e-3, abs=1e-7)
        assert float(by_unit(grid, weight).mean()) == pytest.approx(loss, rel=1e-5)


def test_errors_that_are_let_stand_matter() -> None:
    """With β = 10 and weights of this size |d|^(p-1)/β exceeds every |d|; with a larger one it does not."""
    weight = heavy()
    assert not torch.equal(fit(weight, form()).offset, fit(weight, form(), beta=1e3).offset)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", [(1, 16), (1, -1), (4, 1), (-1, -1)])
def test_never_worse_than_rounding_to_nearest_and_only_the_offset_differs(bits: int, block: tuple[int, int]) -> None:
    weight = heavy()
    plain, found = fit(weight, form(bits, block), iterations=0), fit(weight, form(bits, block))
    low, high = unit_range(weight, block)
    assert torch.equal(plain.scale, ((high - low) / (2**bits - 1)).half().float())
    assert torch.equal(plain.offset, (-low).half().float())
    assert torch.equal(found.scale, plain.scale) and found.zero is None
    before, after = (float(by_unit(grid, weight).mean()) for grid in (plain, found))
    assert after <= before and (after < before or block == (4, 1))  # four weights leave an offset little to do


def test_runs_agree() -> None:
    weight = heavy()
    assert torch.equal(fit(weight, form()).offset, fit(weight.clone(), form()).offset)


def test_chunks_are_parts_of_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy(12, 64)
    whole = fit(weight, form())
    monkeypatch.setattr(hqq, "_CHUNK", 3 * 64)
    assert torch.equal(fit(weight, form()).offset, whole.offset)


@pytest.mark.parametrize("bits", [1, 4])
def test_constant_units_are_reproduced(bits: int) -> None:
    exact = torch.tensor([0.5, 0.0, -0.25, 3.0, -17.0, 2**-12]).repeat_interleave(16).view(2, 48)
    assert torch.equal(fit(exact, form(bits)).quantize(exact), exact)
    others = torch.randn(6, 1).expand(6, 32).contiguous()
    assert torch.allclose(fit(others, form(bits)).quantize(others), others, rtol=2**-11, atol=0)


def test_offsets_have_any_sign() -> None:
    """A unit that lies to one side keeps its own range, which a zero-point among the codes could not give it."""
    weight = 1 + torch.rand(4, 32) / 100
    for sign in (1, -1):
        grid = fit(sign * weight, form())
        assert (grid.offset * -sign > 0).all()
        assert (grid.quantize(sign * weight) - sign * weight).abs().max() < 1e-3  # one rounding of a 16-bit offset of 1


def test_gptq_on_its_grid() -> None:
    weight, x = heavy(), torch.randn(200, 64)
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x)
    rounded = GPTQ().round(weight, form(), HQQ(), stats, scores=False)
    plain = RTN().round(weight, form(), HQQ(), stats, scores=False)
    assert torch.equal(rounded.grid.offset, plain.grid.offset)
    errors = [float((x @ (each.dequantize() - weight).T).square().sum()) for each in (rounded, plain)]
    assert errors[0] < errors[1]


# --- recipes and files ------------------------------------------------------------------------------------------------


def test_names_mean_stored_least_values() -> None:
    for bits in (2, 3, 4):
        recipe = parse(f"hqq-w{bits}a16-g64")
        assert recipe.scheme.weights == form(bits, (1, 64)) and not recipe.calibrated
        assert recipe.clip == HQQ() and recipe.round == RTN()
        assert parse(f"hqq-w{bits}a16-g64-asym").scheme == recipe.scheme
    assert parse("hqq+gptq-w4a16-g64").scheme.weights == form(4, (1, 64))
    changed = resolve("hqq-w4a16-g64", overrides=["*.down_proj=w8a16-g32", "*.o_proj=w16"]).recipe.scheme.overrides
    assert [each.weights for each in changed] == [form(8, (1, 32)), None]


@pytest.mark.parametrize("spec", [per_group(Int(4), 64), per_group(Int(4, "asymmetric"), 64), per_channel(NF4)])
def test_other_formats_are_refused(spec: Spec) -> None:
    with pytest.raises(ValueError, match="write rule: asymmetric, scale: float16-min"):
        HQQ().outcomes(spec)


def test_a_scheme_without_offsets_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model")
    with pytest.raises(ValueError, match=r"q_proj: hqq moves the least value of a unit, and nf4.*stores none"):
        lowbit.quantize(model, "hqq-nf4-g32", tmp_path / "out")
    text = str(save_text(tmp_path / "text.txt"))
    with pytest.raises(ValueError, match="signround trains through plain scales"):
        lowbit.quantize(model, "hqq+signround-w4a16-g32", tmp_path / "out", calibration=text, samples=4, length=32)


def test_bits_of_a_weight_and_of_a_file(tmp_path: Path) -> None:
    assert 8 * stored_bytes((64, 256), form(4, (1, 64))) == 4.5 * 64 * 256
    result = lowbit.quantize(save_model("llama", tmp_path / "model"), "hqq-w4a16-g32", tmp_path / "out")
    assert result.bits_per_weight == 5.0
    model = lowbit.load(tmp_path / "model", dtype=torch.float32)
    for file in result.path.glob("*.safetensors"):
        for name, layer in native.unpack(shard_header(file).metadata, read_shard(file))[0].items():
            weight = model.get_submodule(name).weight.detach()
            assert torch.equal(layer.weight.dequantize(), fit(weight, form(4, (1, 32))).quantize(weight))


def test_files_of_others_hold_the_same_values() -> None:
    """GGUF's blocks of 32 and MLX's groups have a least value of any sign, too."""
    weight = torch.cat([heavy(4, 128), 1 + torch.rand(4, 128)])
    part = RTN().round(weight, form(4, (1, 32)), HQQ(), None, scores=False)
    assert gguf.refuse(part.grid.spec, None, shape=(8, 128)) is None
    assert torch.equal(gguf_blocks.unpack(*gguf_blocks.pack(part), 128).dequantize(), part.dequantize())
    assert mlx.refuse(part.grid.spec, None, shape=(8, 128)) is None
    layer = QLayer(QWeight((part,)))
    back = mlx.unpack("x", mlx.pack("x", layer, torch.float16), mlx.settings_of(layer))
    assert torch.equal(back.weight.dequantize(), part.dequantize())


@pytest.mark.parametrize("settings", [{"iterations": -1}, {"norm": 1.0}, {"beta": 0.0}, {"cap": -1.0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="norm lies between 0 and 1"):
        HQQ(**settings)


def test_min_max_of_the_same_format_stays_below_it() -> None:
    """What `rtn` makes of this format starts at a least value of at most 0, HQQ at that of the unit."""
    weight = 1 + torch.rand(2, 32)
    plain = MinMaxClip().fit(weight, form(4, (1, 32)), None, scores=False)
    assert float(by_unit(fit(weight, form(4, (1, 32))), weight).mean()) < float(by_unit(plain, weight).mean()) / 1.5
