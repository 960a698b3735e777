"""NormTweaking: its loss and steps written out, on a small net; that only norms change, on real blocks and in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Workbench
from families import TINY
from tiny import save_model, save_text
from torch import Tensor
from views import Linears

import lowbit
from lowbit.formats.files import read_shard
from lowbit.methods.normtweak import NormTweak, norms
from lowbit.numerics.qtensor import QLayer, QWeight
from lowbit.numerics.spec import Int, Spec, per_group
from lowbit.recipes import parse
from lowbit.stream.student import Student

QUICK = NormTweak(rates=(1e-2,), slopes=(0.0,))


class Net(Linears):
    """y = ((x·g + b) W₀ᵀ) with a bias of the linear's own, two micro-batches; W₀ is rounded to 2 bits."""

    def __init__(self, place: tuple[int, int] = (1, 4), **options: Any) -> None:
        x = torch.randn(2, 3, 7, 16)
        super().__init__([torch.randn(8, 16)], [per_group(Int(2), 8)], x, **options)
        self.place, self.set = place, dict[str, Tensor]()
        self.parameters = {
            "norm.weight": 1 + torch.randn(16) / 4,
            "norm.bias": torch.randn(16) / 4,
            "linear0.bias": torch.randn(8),
        }

    def rounded(self, site: Any) -> Tensor:
        return self.start(site).dequantize()

    def target(self, batch: int, stream: str = "float") -> Tensor:
        return self.compute(self.inputs(batch, stream), self.weights[0], self.parameters)

    def run(
        self, batch: int, hidden: Tensor, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        return self.compute(hidden, weights["linear0"], {**self.parameters, **(parameters or {})})

    def compute(self, x: Tensor, weight: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        return (x * others["norm.weight"] + others["norm.bias"]) @ weight.T + others["linear0.bias"]

    def set_parameter(self, name: str, value: Tensor) -> None:
        self.set[name] = value


def moments(output: Tensor, target: Tensor) -> float:
    """Mean over channels of |Δmean| + |Δvariance|, token by token."""
    found = []
    for c in range(output.shape[-1]):
        sides = []
        for side in (output, target):
            values = [float(v) for v in side[..., c].flatten()]
            mean = sum(values) / len(values)
            sides.append((mean, sum((v - mean) ** 2 for v in values) / len(values)))
        found.append(abs(sides[0][0] - sides[1][0]) + abs(sides[0][1] - sides[1][1]))
    return sum(found) / len(found)


def squared(output: Tensor, target: Tensor) -> float:
    return float((output - target).square().mean())


def loss_of(net: Net, method: NormTweak, parameters: Mapping[str, Tensor]) -> float:
    """The loss over the net's text."""
    measure = moments if method.loss == "moments" else squared
    rounded = {"linear0": net.rounded(net.anatomy.sites[0])}
    pairs = [
        (net.run(batch, net.x[batch], rounded, parameters), net.target(batch, method.targets))
        for batch in range(net.batches)
    ]
    return sum(measure(output, target) for output, target in pairs) / net.batches


VARIANTS = [QUICK, replace(QUICK, loss="mse", targets="float", epochs=5)]


@pytest.mark.parametrize("method", VARIANTS)
def test_the_loss_is_the_papers_and_falls(method: NormTweak) -> None:
    net = Net()
    net.floats = net.x + torch.randn_like(net.x) / 10
    before = loss_of(net, method, {})
    weights = {"linear0": net.rounded(net.anatomy.sites[0])}
    assert method._measure(net, weights, {}) == pytest.approx(before, rel=1e-5)
    method.train(net)
    assert {*net.set} == {"norm.weight", "norm.bias"}
    assert loss_of(net, method, net.set) < before
    assert method._measure(net, weights, net.set) == pytest.approx(loss_of(net, method, net.set), rel=1e-5)


@pytest.mark.parametrize(("slope", "index"), [(0.0, 3), (2.0, 0), (2.0, 3)])
def test_steps_are_adams_of_the_blocks_rate(slope: float, index: int) -> None:
    """m and v by their recurrences, one step per micro-batch, at rate (1 + s ℓ/L)."""
    net = Net(place=(index, 4))
    method = NormTweak(rates=(1e-3,), slopes=(slope,))
    rate = 1e-3 * (1 + slope * index / 4)
    values = {name: net.parameter(name) for name in ("norm.weight", "norm.bias")}
    first, second = ({name: torch.zeros(16) for name in values} for _ in range(2))
    rounded = {"linear0": net.rounded(net.anatomy.sites[0])}
    for step, batch in enumerate(range(net.batches), 1):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        output = net.run(batch, net.x[batch], rounded, leaves).flatten(0, 1)
        target = net.target(batch, "quantized").flatten(0, 1)
        centre, goal = output.mean(0), target.mean(0)
        spread, wanted = ((x - x.mean(0)).square().mean(0) for x in (output, target))
        ((centre - goal).abs() + (spread - wanted).abs()).mean().backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            first[name] = 0.9 * first[name] + 0.1 * leaf.grad
            second[name] = 0.999 * second[name] + 0.001 * leaf.grad**2
            m, v = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            values[name] = values[name] - rate * m / (v.sqrt() + 1e-8)
    method.train(net)
    for name, value in values.items():
        assert torch.allclose(net.set[name], value, atol=1e-6)


@pytest.mark.parametrize("method", [replace(QUICK, rates=(0.0,)), replace(QUICK, epochs=0)])
def test_without_steps_nothing_changes(method: NormTweak) -> None:
    net = Net()
    method.train(net)
    assert net.set == {}


def test_the_best_rate_and_slope_are_kept() -> None:
    """A rate that does harm is not taken; of several the one of least loss is, however they are listed."""
    net, again, alone = (Net(seed=0) for _ in range(3))
    for other in (again, alone):
        other.weights, other.x, other.parameters = net.weights, net.x, net.parameters
        other.starts = {net.anatomy.sites[0].name: net.start(net.anatomy.sites[0])}
    replace(QUICK, rates=(100.0,)).train(net)
    assert net.set == {}
    replace(QUICK, rates=(100.0, 1e-2), slopes=(0.0, 1e9)).train(again)
    QUICK.train(alone)
    assert all(torch.equal(again.set[name], alone.set[name]) for name in alone.set)


def test_what_is_judged_is_what_is_stored() -> None:
    """Where 16 bits swallow every step, norms stay as they are."""

    class Stored(Net):
        def stored(self, name: str, value: Tensor) -> Tensor:
            return value.bfloat16().float()

    net = Stored()
    net.parameters = {name: value.bfloat16().float() for name, value in net.parameters.items()}
    net.parameters["norm.weight"], net.parameters["norm.bias"] = torch.full((16,), 0.9), torch.full((16,), 0.9)
    net.parameters = {name: value.bfloat16().float() for name, value in net.parameters.items()}
    NormTweak(rates=(1e-5,)).train(net)
    assert net.set == {}
    NormTweak(rates=(1e-2,)).train(net)
    assert {*net.set} == {"norm.weight", "norm.bias"}


# --- real blocks ------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The first block of a tiny model behind Round, its quantized stream drifted from the float one."""

    family: str
    recipe: str = "rtn-w2a16-g16"

    def __post_init__(self) -> None:
        self.bench = Workbench(self.family, parse(self.recipe))
        text = self.bench.text(drift=0.05)
        stats = self.bench.observed(text).stats
        with torch.no_grad():
            text.fill_targets(self.bench.block)
        self.start = {name: tensor.clone() for name, tensor in self.bench.work.tensors.items()}
        layers = self.bench.work.plain_layers({})
        self.student = Student(self.bench.work, text, stats, layers, 0)
        self.text = text


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "mixtral"])
def test_only_norms_change(family: str) -> None:
    made = Bench(family)
    work, student = made.bench.work, made.student
    before = dict(student.layers)
    sites = {site.name for site in work.anatomy.sites}
    QUICK.train(student)
    assert student.layers == before
    changed = {name for name, tensor in work.rest().items() if not torch.equal(tensor, made.start[name])}
    assert changed == {*norms(student)} and len(changed) >= 2
    assert not any(name.rpartition(".")[0] in sites for name in changed)
    expected = {n for n in made.start if n not in {f"{s}.{leaf}" for s in sites for leaf in ("weight", "bias")}}
    assert changed == {name for name in expected if made.start[name].dim() == 1}


def test_targets_are_the_original_block_on_the_quantized_stream() -> None:
    made = Bench("llama")
    reference = Workbench("llama", parse("rtn-w2a16-g16"))
    for batch in range(made.text.batches):
        hidden = made.text.inputs[batch]
        with torch.no_grad():
            expected = made.text.call(reference.block, batch, hidden)
            found = made.student.target(batch, "quantized")
            assert torch.allclose(found, expected, atol=1e-5)
            assert not torch.allclose(made.student.target(batch), expected, atol=1e-3)


def test_inputs_are_quantized_in_the_student_alone() -> None:
    """With quantized inputs the target is still the block in 16 bits, folds and all."""
    made = Bench("llama", "smoothquant-w4a4-g16")
    reference = Workbench("llama", parse("rtn-w2a16-g16"))
    with torch.no_grad():
        expected = made.text.call(reference.block, 0, made.text.inputs[0])
        assert torch.allclose(made.student.target(0, "quantized"), expected, atol=1e-5)
        exact = {site.name: made.student.weight(site) for site in made.student.anatomy.sites}
        assert not torch.allclose(made.student.run(0, made.text.inputs[0], exact), expected, atol=1e-3)


def test_what_sites_hold_is_the_whole_sum() -> None:
    made = Bench("llama")
    site = made.student.anatomy.sites[0]
    layer = made.student.layers[site.name]
    added = QWeight(layer.weight.parts, dense=torch.full(site.shape, 0.5))
    made.student.layers = {**made.student.layers, site.name: QLayer(added)}
    assert torch.equal(made.student.rounded(site), layer.weight.dequantize() + 0.5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_end_to_end(tmp_path: Path, family: str) -> None:
    """Codes of the first block are Round's own, its norms are not; the same bytes twice."""
    model, text = save_model(family, tmp_path / "model"), str(save_text(tmp_path / "text.txt"))
    runs = {}
    for name, recipe in {"plain": "rtn-w2a16-g16", "a": "rtn+normtweak-w2a16-g16", "b": "normtweak-w2a16-g16"}.items():
        settings = [] if name == "plain" else ["normtweak.rates=[1e-3, 1e-2]"]
        runs[name] = lowbit.quantize(
            model, recipe, tmp_path / name, calibration=text, samples=8, length=32, settings=settings
        ).path
    shard = "model-00002-of-00003.safetensors"
    plain, tweaked = (read_shard(runs[name] / shard) for name in ("plain", "a"))
    changed = {name for name in plain if not torch.equal(plain[name], tweaked[name])}
    assert changed and all("norm" in name for name in changed)
    for file in sorted(runs["a"].glob("*.safetensors")):
        assert file.read_bytes() == (runs["b"] / file.name).read_bytes()
    with torch.no_grad():
        ids = torch.randint(3, TINY[family]().vocab_size, (1, 16))
        assert lowbit.load(runs["a"], dtype=torch.float32)(input_ids=ids, use_cache=False).logits.isfinite().all()


def test_generated_text_and_other_formats(tmp_path: Path) -> None:
    """On text of the model's own, behind zero-points among the codes and least values beside them, and corrections."""
    model = save_model("llama", tmp_path / "model")
    for recipe in ("hqq+normtweak-w3a8-g16", "gptq+normtweak+lorc2-w3a16-g16-asym"):
        result = lowbit.quantize(
            model,
            recipe,
            tmp_path / recipe,
            calibration="generated",
            samples=4,
            length=16,
            settings=["normtweak.rates=[1e-3]"],
        )
        assert all(block["error_after"] < 1 for block in result.blocks)


def test_the_toolkits_variant_is_a_matter_of_settings() -> None:
    settings = {"loss": "mse", "targets": "float", "rates": (1e-6,), "slopes": (1e-3,), "epochs": 50}
    method = NormTweak(**settings)  # type: ignore[arg-type]
    net = Net()
    before = loss_of(net, method, {})
    method.train(net)
    assert loss_of(net, method, net.set) < before


@pytest.mark.parametrize("settings", [{"rates": (-1.0,)}, {"rates": ()}, {"slopes": ()}, {"epochs": -1}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rates, slopes and epochs are not negative"):
        NormTweak(**settings)


def test_sites_of_16_bits_alone_leave_it_nothing_to_do() -> None:
    net = Net()
    net.formats = {"linear0": (None, Spec(Int(8), (1, -1), "float32", True))}
    QUICK.train(net)
    assert net.set == {}
