"""OWQ: its choice of columns against loops, its codes against the sweep written out in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from beside_oracle import TIE, Beside, example, observe
from stored import loaded_as_stored
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit import recipes
from lowbit.formats import native
from lowbit.methods.awq import AWQClip
from lowbit.methods.gptq import GPTQ
from lowbit.methods.owq import OWQ, sensitivity
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.numerics.grid import fit_range
from lowbit.numerics.qtensor import QLayer, QWeight
from lowbit.numerics.spec import Int, Spec, per_channel, per_group

THREE = per_channel(Int(3), scale="float32")


def encode(weight: Tensor, x: Tensor | None, spec: Spec = THREE, **settings: object) -> QWeight:
    stats = None if x is None else observe(x)
    made = OWQ(**settings).encode(weight, spec, RTN(), MinMaxClip(), stats, scores=False, seed=0)
    assert made.outliers is None
    return made.weight


def naive_sensitivity(weight: Tensor, rounded: Tensor, x: Tensor) -> list[float]:
    return [
        sum(float(v) ** 2 for v in x[:, j]) * sum(float(d) ** 2 for d in weight[:, j] - rounded[:, j])
        for j in range(weight.shape[1])
    ]


def weakest(weight: Tensor, x: Tensor, spec: Spec, count: int) -> list[int]:
    costs = naive_sensitivity(weight, fit_range(weight, spec).quantize(weight), x)
    return sorted(sorted(range(len(costs)), key=lambda j: -costs[j])[:count])


def test_sensitivity_is_the_formula():
    _, x = example(6, 16, (3,))
    change = torch.randn(6, 16)
    expected = naive_sensitivity(change, torch.zeros(6, 16), x)
    assert torch.allclose(sensitivity(change, x.T @ x), torch.tensor(expected), rtol=1e-4)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("spec", [THREE, per_group(Int(4, "asymmetric"), 16, scale="float32")])
def test_weak_columns_stay_and_the_others_are_the_oracles(spec, act_order):
    weight, x = example()
    made = encode(weight, x, spec, columns=4, act_order=act_order)
    stays = weakest(weight, x, spec, 4)
    assert made.sparse.mask[0].nonzero().flatten().tolist() == stays
    assert {5, 17, 40} <= set(stays)  # the large channels of the example
    group = weight.shape[1] if spec.group == -1 else spec.group
    oracle = Beside(weight, x.T @ x, stays, spec.number, group, act_order)
    clear = oracle.tie > TIE
    assert clear.double().mean() > 0.5
    assert torch.allclose(made.dequantize().double()[clear], oracle.values[clear], rtol=1.1e-3, atol=1e-7)


def test_without_weak_columns_it_is_gptq():
    weight, x = example()
    made = encode(weight, x, columns=0)
    gptq = GPTQ().round(weight, THREE, MinMaxClip(), observe(x), scores=False)
    assert made.plain and torch.equal(made.parts[0].codes, gptq.codes)


def test_each_weak_column_lowers_the_error():
    weight, x = example()
    loss = [
        float(((encode(weight, x, columns=count).dequantize() - weight) @ x.T).square().sum()) for count in (0, 1, 3, 9)
    ]
    assert loss == sorted(loss, reverse=True) and loss[2] < 0.5 * loss[0]


def test_the_budget_is_kept():
    """Codes and 16-bit columns are no more than `bits`, and one column more would be: but one stays at least."""
    for bits, width in ((3.01, 4096), (3.1, 14336), (3.5, 512)):
        count = OWQ(bits=bits).count(width, THREE)
        assert OWQ(bits=bits).paper_bits((8, width), THREE) <= bits + 1e-9
        assert OWQ(columns=count + 1).paper_bits((8, width), THREE) > bits
    assert OWQ().count(4096, THREE) == OWQ(bits=3.01).count(4096, THREE) == 3
    assert OWQ().count(64, THREE) == 1 and OWQ(columns=0).count(64, THREE) == 0


@pytest.mark.parametrize("settings", [{"columns": 0}, {"columns": 5}, {"bits": 4.0}])
def test_every_byte_is_planned(settings):
    weight, x = example()
    made = encode(weight, x, **settings)
    layer = QLayer(made)
    tensors = native.pack("x", layer)
    layers, rest = native.unpack(native.describe({"x": layer}), tensors)
    assert not rest and torch.equal(layers["x"].weight.dequantize(), made.dequantize())
    assert sum(t.nbytes for t in tensors.values()) == OWQ(**settings).stored_bytes((24, 64), THREE)


def test_inputs_never_seen_are_rounded_to_nearest():
    weight, _ = example()
    made = encode(weight, None)
    assert made.plain and torch.equal(made.parts[0].codes, fit_range(weight, THREE).encode(weight))


@pytest.mark.gpu
def test_a_gpu_makes_the_same():
    weight, x = example(64, 256)
    here, there = encode(weight, x, columns=3), encode(weight.cuda(), x.cuda(), columns=3).to("cpu")
    assert torch.equal(here.sparse.mask, there.sparse.mask)
    assert (here.parts[0].codes == there.parts[0].codes).all(1).double().mean() > 0.8


def test_a_name_means_searched_ranges():
    recipe = recipes.resolve("owq-w3a16", settings=["owq.bits=3.1"]).recipe
    assert recipe.encode == OWQ(bits=3.1) and recipe.clip == AWQClip() and recipe.scheme.weights.number == Int(3)
    assert recipes.from_dict(recipes.to_dict(recipe)).recipe == recipe


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="keep one of them"):
        OWQ(bits=3.01, columns=2)
    with pytest.raises(ValueError, match="not negative"):
        OWQ(columns=-1)
    with pytest.raises(ValueError, match="more than owq"):
        OWQ(bits=3.0).check((8, 64), per_channel(Int(4)), None)
    with pytest.raises(ValueError, match="would keep all 64 columns"):
        OWQ(columns=64).check((8, 64), THREE, None)


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
def test_what_is_loaded_is_what_was_stored(tmp_path: Path, family):
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    result = lowbit.quantize(model, "owq-w3a16", tmp_path / "run", calibration=str(text), samples=8, length=32)
    layers = loaded_as_stored(tmp_path / "run")
    assert any(layer.weight.sparse is not None for layer in layers)
    assert all(block["error_after"] < block["error_before"] for block in result.blocks)
