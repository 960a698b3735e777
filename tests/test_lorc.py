"""LoRC against Eckart and Young: the best that any factors of a rank can do, plain and weighed by the inputs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import first_block_error, save_model, save_text
from torch import Tensor

import lowbit
from lowbit.api import Request, prepare
from lowbit.formats import compressed_tensors, native
from lowbit.methods.lorc import LoRC
from lowbit.methods.views import Stats
from lowbit.modules.linear import QLinear
from lowbit.numerics.grid import fit_range
from lowbit.numerics.qtensor import LowRank, QLayer, QTensor, QWeight
from lowbit.numerics.spec import Int, Spec, per_channel, per_group, per_token

F64 = torch.float64


def rounded(w: Tensor, spec: Spec | None = None) -> QWeight:
    grid = fit_range(w, spec or per_channel(Int(3)))
    return QWeight((QTensor(grid.encode(w), grid),))


def error(w: Tensor, weight: QWeight) -> Tensor:
    return w.double() - weight.dequantize().double()


def planted(rows: int = 96, columns: int = 64) -> Tensor:
    """Gaussian weights with two outlier columns and an outlier row."""
    w = torch.randn(rows, columns)
    w[:, 5] *= 12
    w[:, 40] *= 8
    w[17] *= 6
    return w


def tail(values: Tensor, rank: int) -> float:
    """√Σ_{i>r} σ_i²."""
    return float(torch.linalg.svdvals(values.double())[rank:].square().sum().sqrt())


# --- the factors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 64), (40, 72), (64, 64)])
@pytest.mark.parametrize("rank", [1, 4, 8, 31])
def test_what_is_left_is_the_tail_of_the_singular_values(rank: int, shape: tuple[int, int]) -> None:
    w = planted(*shape) if shape == (96, 64) else torch.randn(shape)
    e = (w - rounded(w).dequantize()).float()
    a, b = LoRC(rank)._factors(e)
    left = float((e.double() - a.double() @ b.double()).norm())
    assert left == pytest.approx(tail(e, rank), rel=1e-5)
    assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-5)


def test_every_rank_is_at_least_as_good_as_the_last_and_the_full_one_is_exact() -> None:
    w = planted()
    q = rounded(w)
    e = error(w, q)
    norms = []
    for rank in (*range(1, 10), 20, 40, 63, 64):
        a, b = LoRC(rank)._factors(e.float())
        norms.append(float((e - a.double() @ b.double()).norm()))
    assert all(after < before for before, after in pairwise(norms))
    assert norms[-1] < 1e-5 * float(e.norm())
    full = LoRC(rank=500).correct(w, q, None).low_rank
    assert full is not None and full.left.shape == (96, 64) and full.right.shape == (64, 64)


def test_rank_zero_does_nothing() -> None:
    w = torch.randn(8, 16)
    q = rounded(w)
    assert LoRC(rank=0).correct(w, q, None) is q
    assert LoRC(rank=0).stored_bytes((8, 16)) == LoRC(rank=0, bits=8).stored_bytes((8, 16)) == 0


@pytest.mark.parametrize("inputs", [None, per_token(Int(8))], ids=str)
@pytest.mark.parametrize("bits", [16, 8])
def test_two_steps_are_the_dense_sum(bits: Any, inputs: Spec | None) -> None:
    """y = x̂Ŵᵀ + (x̂Bᵀ)Aᵀ with the same quantized activation for both terms."""
    w, x = planted(), torch.randn(5, 64)
    weight = LoRC(8, bits).correct(w, rounded(w), None)
    seen = (x if inputs is None else fit_range(x, inputs).quantize(x)).double()
    assert weight.low_rank is not None
    a, b = (f.dequantize() if isinstance(f, QTensor) else f for f in (weight.low_rank.left, weight.low_rank.right))
    expected = seen @ weight.parts[0].dequantize().double().T + (seen @ b.double().T) @ a.double().T
    y = QLinear(QLayer(weight, inputs), None, torch.float32)(x)
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_errors_fall_at_every_width_and_most_at_two_bits_with_outliers() -> None:
    gains = {}
    for name, w in (("gaussian", torch.randn(96, 64)), ("planted", planted())):
        for bits in (4, 3, 2):
            q = rounded(w, per_channel(Int(bits)))
            before, after = (float(error(w, x).norm()) for x in (q, LoRC().correct(w, q, None)))
            assert after < before
            gains[name, bits] = (before**2 - after**2) / float(w.double().norm()) ** 2
    assert max(gains, key=lambda key: gains[key]) == ("planted", 2)
    assert gains["planted", 2] > gains["planted", 3] > gains["planted", 4]
    assert gains["planted", 2] > 2 * gains["gaussian", 2]


@pytest.mark.parametrize("kind", [planted, lambda: torch.randn(96, 64)])
def test_eight_bit_factors_change_little(kind: Any) -> None:
    w = kind()
    q = rounded(w)
    full, coded = (LoRC(8, bits).correct(w, q, None).dequantize() for bits in (16, 8))
    assert 0 < float((full - coded).norm() / full.norm()) < 0.01
    assert float((w - coded).norm()) < float((w - q.dequantize()).norm())


def test_stored_factors_are_sixteen_bits_or_codes_per_row() -> None:
    w = planted()
    halves, codes = (LoRC(8, bits).correct(w, rounded(w), None).low_rank for bits in (16, 8))
    assert halves is not None and codes is not None
    assert all(isinstance(f, Tensor) and f.dtype == torch.float16 for f in (halves.left, halves.right))
    assert isinstance(codes.left, QTensor) and codes.left.codes.dtype == torch.int8
    assert codes.left.grid.scale.shape == (96, 1)
    assert isinstance(codes.right, QTensor) and codes.right.grid.scale.shape == (8, 1)
    assert torch.allclose(codes.left.dequantize(), halves.left.float(), atol=float(codes.left.grid.scale.max()) / 1.9)


# --- weighed by the inputs --------------------------------------------------------------------------------------------


def observed(x: Tensor) -> Stats:
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x)
    return stats


def root(h: Tensor, damp: float) -> Tensor:
    """The symmetric square root of H + damp·mean(diag H), fp64."""
    values, vectors = torch.linalg.eigh(h.double() + damp * h.double().diagonal().mean() * torch.eye(len(h), dtype=F64))
    return vectors @ values.sqrt().diag() @ vectors.T


@pytest.mark.parametrize("damp", [0.01, 0.1])
@pytest.mark.parametrize("rank", [2, 8])
def test_the_aware_factors_are_the_best_there_are(rank: int, damp: float) -> None:
    """‖(E - AB) S‖ is the tail of E S's singular values, for another S with S Sᵀ = H than the one used inside."""
    w, x = torch.randn(48, 32), torch.randn(300, 32) @ torch.randn(32, 32)
    q, stats = rounded(w), observed(x)
    weight = LoRC(rank, aware=True, damp=damp).correct(w, q, stats)
    s, e = root(stats.hessian(), damp), error(w, q)
    assert float((error(w, weight) @ s).norm()) == pytest.approx(tail(e @ s, rank), rel=2e-3)  # factors have 16 bits
    plain = LoRC(rank).correct(w, q, None)
    assert float((error(w, weight) @ s).norm()) < 0.99 * float((error(w, plain) @ s).norm())
    assert float(error(w, weight).norm()) > float(error(w, plain).norm())


def test_the_aware_optimum_by_alternating_least_squares() -> None:
    """No singular values: A and B in turns solve their own normal equations of Σ |(E - AB) x|², from a random place."""
    w, x = torch.randn(12, 16), torch.randn(200, 16) @ torch.randn(16, 16)
    q = rounded(w)
    e, h, b = error(w, q), x.double().T @ x.double(), torch.randn(3, 16, dtype=F64)
    for _ in range(2000):
        a = torch.linalg.solve(b @ h @ b.T, b @ h @ e.T).T
        b = torch.linalg.solve(a.T @ a, a.T @ e)
    least = float((x.double() @ (e - a @ b).T).square().sum())
    found = LoRC(3, aware=True, damp=1e-6).correct(w, q, observed(x))
    assert float((x.double() @ error(w, found).T).square().sum()) == pytest.approx(least, rel=1e-3)


def test_inputs_never_seen_count_all_alike() -> None:
    w = torch.randn(24, 16)
    q = rounded(w)
    plain, aware = LoRC(4).correct(w, q, None), LoRC(4, aware=True).correct(w, q, None)
    assert torch.equal(plain.dequantize(), aware.dequantize())
    assert LoRC().needs == frozenset() and LoRC(aware=True).needs == frozenset({"gram"})


@pytest.mark.parametrize("wrong", [{"rank": -1}, {"damp": 0.0}])
def test_settings_without_meaning_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="the rank is not negative"):
        LoRC(**wrong)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 8, 13])
@pytest.mark.parametrize("bits", [16, 8])
def test_files_give_the_same_factors_back(bits: Any, rank: int) -> None:
    w = planted()
    layer = QLayer(LoRC(rank, bits).correct(w, rounded(w, per_group(Int(4, "asymmetric"), 32)), None))
    packed = native.pack("a.b", layer)
    layers, rest = native.unpack(native.describe({"a.b": layer}), packed)
    assert not rest and torch.equal(layers["a.b"].weight.dequantize(), layer.weight.dequantize())
    low = layers["a.b"].weight.low_rank
    assert isinstance(low, LowRank) and isinstance(low.left, QTensor) == (bits == 8)
    added = sum(x.numel() * x.element_size() for name, x in packed.items() if ".low_rank." in name)
    assert added == LoRC(rank, bits).stored_bytes((96, 64))


def test_the_papers_overhead() -> None:
    """4096², r = 8: 0.39 % more parameters, 1.6 % more bits than 4-bit codes have."""
    extra = LoRC(8).stored_bytes((4096, 4096))
    assert extra / 2 / 4096**2 == pytest.approx(0.0039, abs=5e-5)
    assert extra / (4096**2 / 2) == pytest.approx(0.0156, abs=5e-5)


def test_exports_that_have_no_place_for_factors_refuse() -> None:
    w = planted()
    layer = QLayer(LoRC().correct(w, rounded(w, per_group(Int(4), 32)), None))
    with pytest.raises(ValueError, match="use native"):
        compressed_tensors.scheme_of(layer)


RECIPES = {
    "rtn+lorc-w2a16-g16": [],
    "gptq+lorc4-w3a16-g16-asym": ["lorc.bits=8"],
    "smoothquant+gptq+lorc-w4a8": ["lorc.aware=true", "lorc.bits=8"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_end_to_end(recipe: str, tmp_path: Path) -> None:
    """Errors fall, the plan foretells the bytes in the files, and what is loaded is what was saved."""
    model, text = save_model("llama", tmp_path / "model"), save_text(tmp_path / "text.txt")
    options: dict[str, Any] = {"calibration": str(text), "samples": 4, "length": 32}
    request = Request(str(model), recipe, settings=RECIPES[recipe], **options)
    plan = prepare(request).plan
    run = lowbit.quantize(model, recipe, tmp_path / "out", settings=RECIPES[recipe], **options)
    head, _, scheme = recipe.partition("-")
    base = lowbit.quantize(model, f"{head.rpartition('+')[0]}-{scheme}", tmp_path / "base", **options)
    assert run.blocks[0]["error_after"] < base.blocks[0]["error_after"]
    assert plan.stored_bytes == native.sizes(tmp_path / "out").stored_bytes
    assert run.bits_per_weight == plan.bits_per_weight > base.bits_per_weight
    measured = first_block_error(model, tmp_path / "out", text, 4, 32)
    if run.blocks[0]["error_of"] == "output":
        assert measured == pytest.approx(run.blocks[0]["error_after"], rel=1e-3)
    loaded = lowbit.load(tmp_path / "out", dtype=torch.float32)
    file = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    layers, _ = native.unpack(metadata(file), load_file(file))
    for name, layer in layers.items():
        assert layer.weight.low_rank is not None
        assert torch.equal(loaded.get_submodule(name).weight, layer.weight.dequantize())


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_a_file_by_hand(tmp_path: Path) -> None:
    """At 8 bits codes are plain bytes: Ŵ + A B read with nothing of ours is what the model computes with."""
    model = save_model("llama", tmp_path / "model")
    lowbit.quantize(model, "rtn+lorc-w8a16-g16", tmp_path / "out", settings=["lorc.rank=3"])
    file = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    tensors, loaded = load_file(file), lowbit.load(tmp_path / "out", dtype=torch.float32)
    sites = json.loads(metadata(file)["lowbit"])["sites"]
    assert len(sites) == 7
    for name in sites:
        codes = tensors[f"{name}.codes"].view(torch.int8).float()
        scale = tensors[f"{name}.scale"].float().repeat_interleave(16, 1)
        a, b = (tensors[f"{name}.low_rank.{side}"] for side in ("left", "right"))
        assert a.shape[1] == b.shape[0] == 3 and a.dtype == b.dtype == torch.float16
        expected = (codes * scale).double() + a.double() @ b.double()
        assert torch.allclose(loaded.get_submodule(name).weight.double(), expected, rtol=1e-6, atol=1e-7)
