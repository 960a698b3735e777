"""LKD, ZQ-Global and ZQ-Local: what the spec promises of any run, against oracles written out in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import first_block_error, save_model, save_text
from torch import Tensor
from views import Linears

import lowbit
from lowbit.graph.anatomy import BlockAnatomy, Tap
from lowbit.methods.gptq import GPTQ
from lowbit.methods.lkd import LKD, ZQGlobal, ZQLocal, _Distillation
from lowbit.methods.mse import MSEClip
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.views import BlockView, Stats
from lowbit.numerics.grid import fit_range
from lowbit.numerics.latent import Latent
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import E2M1, E4M3, NF4, Int, Spec, mx, nvfp4, per_channel, per_group, per_tensor, per_token
from lowbit.numerics.ste import quantize_range

F64 = torch.float64


def correlated(batches: int = 3, sequences: int = 2, tokens: int = 16, width: int = 32) -> Tensor:
    mix = torch.randn(width, width) * torch.logspace(0, -1, width)
    return torch.randn(batches, sequences, tokens, width) @ mix


class Net(Linears):
    """Two linears in a row behind a gain: y = relu(Q(x·g) W₀ᵀ) W₁ᵀ + b."""

    def __init__(self, specs: tuple[Spec | None, Spec | None], x: Tensor, **options: Any) -> None:
        super().__init__([torch.randn(32, 32) / 6, torch.randn(16, 32) / 5], specs, x, **options)
        self.parameters = {"norm.weight": 1 + torch.randn(32) / 4, "linear1.bias": torch.randn(16) / 4}
        self.original = dict(self.parameters)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.anatomy = BlockAnatomy(tuple(Tap((site,)) for site in self.anatomy.sites), ())

    def site_inputs(self, batch: int, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        flat, spec = (hidden * self.original["norm.weight"]).reshape(-1, 32), self.activations
        both = {"linear0": flat, "linear1": torch.relu(flat @ self.weights[0].T)}
        return {name: (x, x if spec is None else fit_range(x, spec).quantize(x)) for name, x in both.items()}

    def forward(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return self.compute(x, weights, self.original)

    def compute(self, x: Tensor, weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Tensor:
        hidden = torch.relu((x * others["norm.weight"]) @ weights["linear0"].T)
        return hidden @ weights["linear1"].T + others["linear1.bias"]

    def run(self, batch: int, hidden: Tensor, weights: Any, parameters: Any = None, quantizers: Any = None) -> Tensor:
        own = {site.name: self.weight(site) for site in self.anatomy.sites}
        return self.compute(hidden, own | dict(weights), self.original | dict(parameters or {}))

    def error(self, codes: Mapping[str, QTensor], stream: str = "quantized") -> float:
        weights = {
            s.name: codes[s.name].dequantize() if s.name in codes else self.weight(s) for s in self.anatomy.sites
        }
        outputs = [self.compute(self.inputs(b, stream), weights, self.parameters) for b in range(self.batches)]
        return sum(float((y - self.target(b)).square().mean()) for b, y in enumerate(outputs)) / self.batches


def rounded(view: Linears) -> dict[str, QTensor]:
    return {s.name: view.start(s) for s in view.anatomy.sites if view.formats[s.name][0] is not None}


def gptq(view: Linears, method: GPTQ | None = None) -> None:
    """Let GPTQ have chosen the codes."""
    for site in view.anatomy.sites:
        stats = Stats.observing(frozenset({"gram"}))
        stats.update(torch.randn(200, site.shape[1]) @ torch.randn(site.shape[1], site.shape[1]))
        spec = view.formats[site.name][0]
        assert spec is not None
        view.starts[site.name] = (method or GPTQ()).round(view.weight(site), spec, MinMaxClip(), stats, scores=False)


SPECS = [
    *(per_group(Int(2, "asymmetric"), 8), per_channel(Int(3)), per_group(Int(4, "symmetric-full"), 8)),
    *(per_tensor(Int(4, "asymmetric")), per_group(E2M1, 8), per_group(NF4, 8), nvfp4(), mx(E2M1)),
]
STARTS: list[Callable[[Linears], None]] = [lambda view: None, gptq]


# --- the latent weight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_latent_weight_is_w_where_codes_are_the_nearest(spec: Spec) -> None:
    w = torch.randn(16, 32)
    grid = fit_range(w, spec)
    latent = Latent(w, QTensor(grid.encode(w), grid))
    assert torch.equal(latent.value.detach(), w)
    assert torch.equal(latent.weight().detach(), grid.quantize(w))
    assert torch.equal(latent.codes().codes, grid.encode(w)) and torch.equal(latent.codes().grid.scale, grid.scale)


@pytest.mark.parametrize("number", [Int(2), Int(3, "asymmetric"), Int(4, "symmetric-restricted"), E2M1], ids=str)
def test_what_a_clip_cut_off_stays_cut_off(number: Any) -> None:
    """The grid of the clip is that of parts of W's range; when W grows by a half, so does the grid."""
    w, spec = torch.randn(16, 32), per_group(number, 16, scale="float32")
    start = RTN().round(w, spec, MSEClip(norm=2.0), None, scores=False)
    assert not torch.equal(start.grid.scale, fit_range(w, spec).scale)
    latent = Latent(w, start)
    assert torch.allclose(latent.codes().grid.scale, start.grid.scale, rtol=1e-6, atol=0)
    assert torch.equal(latent.codes().codes, start.codes)
    with torch.no_grad():
        latent.value.mul_(1.5)
    assert torch.allclose(latent.codes().grid.scale, 1.5 * start.grid.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("groups", ["static", "fresh"])
@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_codes_of_error_feedback_are_where_training_starts(spec: Spec, groups: Any) -> None:
    """Also under act-order with groups fitted on the way, whose columns lie in another order."""
    w = torch.randn(24, 32)
    view = Linears([w], [spec], correlated())
    gptq(view, GPTQ(groups=groups))
    start = view.starts["linear0"]
    assert (start.order is None) == (groups == "static" or spec.group == -1)
    latent = Latent(w, start)
    assert torch.allclose(latent.weight().detach(), start.dequantize(), rtol=1e-2, atol=1e-2)
    assert torch.equal(latent.codes().dequantize(), latent.weight().detach())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_what_was_trained_after_any_movement(spec: Spec) -> None:
    w = torch.randn(16, 32)
    latent = Latent(w, QTensor(fit_range(w, spec).encode(w), fit_range(w, spec)))
    with torch.no_grad():
        latent.value.add_(0.3 * torch.randn(16, 32))
    assert torch.equal(latent.codes().dequantize(), latent.weight().detach())
    assert torch.equal(latent.weight().detach(), fit_range(latent.value.detach(), spec).quantize(latent.value.detach()))


# --- the distillation -------------------------------------------------------------------------------------------------

METHODS: list[_Distillation] = [
    LKD(steps=5, rates=(1e-2,), batch=4),
    LKD(steps=5, rates=(1e-2,), others=False, inputs="quantized"),
    ZQGlobal(steps=5, rates=(1e-3, 1e-2), batch=8),
    ZQLocal(steps=5, rates=(1e-2,)),
]


def train(method: _Distillation, view: BlockView) -> None:
    method.train(view)  # type: ignore[attr-defined]


@pytest.mark.parametrize("start", STARTS, ids=["rtn", "gptq"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.inputs}")
def test_no_steps_give_rounds_codes_exactly(method: _Distillation, start: Callable[[Linears], None]) -> None:
    view = Net((SPECS[0], SPECS[1]), correlated())
    start(view)
    before = rounded(view)
    train(type(method)(**{**vars(method), "steps": 0}), view)
    after = before | view.codes
    assert all(torch.equal(after[name].codes, before[name].codes) for name in before)
    assert view.parameters == view.original


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_block_error_falls(spec: Spec) -> None:
    view = Net((spec, spec), correlated())
    if spec.block == (1, 8) or spec.block == (-1, -1):
        gptq(view)
    before = view.error(rounded(view))
    LKD(steps=15, rates=(1e-3, 1e-2) if spec.bits < 4 else (3e-4, 3e-3), batch=4).train(view)
    assert view.error(rounded(view) | view.codes) < 0.98 * before


@pytest.mark.parametrize("rate", [1e-7, 1e-3, 10.0])
@pytest.mark.parametrize("kind", [LKD, ZQGlobal, ZQLocal])
def test_the_kept_snapshot_is_never_worse_than_the_start(kind: Any, rate: float) -> None:
    """Whatever the rate does to training: nothing at 1e-7, destruction at 10."""
    view = Net((SPECS[1], SPECS[1]), correlated())
    before = view.error(rounded(view))
    kind(steps=15, rates=(rate,)).train(view)
    if kind is ZQLocal:
        for site in view.anatomy.sites:
            if site.name in view.codes:
                assert local_error(view, site.name, view.codes) < local_error(view, site.name, rounded(view))
    else:
        assert view.error(rounded(view) | view.codes) <= before
    if rate == 10.0:
        assert not view.codes


def test_the_sweep_keeps_the_best_rate() -> None:
    rates = (1e-6, 5e-3)
    errors = []
    for chosen in (*((rate,) for rate in rates), rates):
        torch.manual_seed(0)
        view = Net((SPECS[1], SPECS[1]), correlated())
        LKD(steps=8, rates=chosen, batch=8).train(view)  # the batch is the whole text, so draws do not matter
        errors.append(view.error(rounded(view) | view.codes))
    assert errors[2] == pytest.approx(min(errors[:2]), rel=1e-4) and errors[1] < errors[0]


def test_rates_follow_the_bits_where_none_is_given() -> None:
    """A step of the grid at b bits is 2^(8-b) times that at 8."""
    assert ZQGlobal()._swept(8) == [5e-6]
    assert ZQLocal()._swept(4) == [5e-6, 8e-5]
    assert ZQGlobal()._swept(2) == [5e-6, 3.2e-4]
    assert LKD()._swept(2) == (5e-6,)


def test_norms_and_biases_are_trained_where_set() -> None:
    view = Net((SPECS[1], None), correlated())
    LKD(steps=20, rates=(1e-3,)).train(view)
    moved = {name: float((view.parameters[name] - view.original[name]).abs().max()) for name in view.original}
    assert all(0 < distance < 0.1 for distance in moved.values()), moved
    view = Net((SPECS[1], None), correlated())
    LKD(steps=20, rates=(1e-3,), others=False).train(view)
    assert view.parameters == view.original and view.codes


def test_decay_is_that_of_adamw() -> None:
    """With gradients of zero a step multiplies a weight by 1 - rate·decay and leaves the others alone."""
    w, gain = torch.randn(8, 16), torch.randn(16, requires_grad=True)
    grid = fit_range(w, SPECS[1])
    latent = Latent(w, QTensor(grid.encode(w), grid))
    before = gain.detach().clone()

    def gradients() -> None:
        latent.value.grad, gain.grad = torch.zeros_like(w), torch.zeros_like(gain)

    measured = iter([3.0, 2.0, 1.0])
    assert LKD(steps=3, rates=(0.1,), decay=0.5)._fit([latent], [gain], gradients, lambda: next(measured), 4.0)
    assert torch.allclose(latent.value, w * 0.95**3, rtol=1e-6)
    assert torch.equal(gain, before)


def test_stored_parameters_are_what_was_measured() -> None:
    """Training at 1e-4 with gains kept in 16 bits: the student must compute with 16-bit gains."""
    seen: list[Tensor] = []

    class Half(Net):
        def stored(self, name: str, value: Tensor) -> Tensor:
            return value.bfloat16().float()

        def run(
            self, batch: int, hidden: Tensor, weights: Any, parameters: Any = None, quantizers: Any = None
        ) -> Tensor:
            seen.extend(parameters.values())
            return super().run(batch, hidden, weights, parameters)

    view = Half((SPECS[1], SPECS[1]), correlated())
    LKD(steps=10, rates=(1e-4,)).train(view)
    assert seen and all(torch.equal(x, x.bfloat16().float()) for x in seen)


def test_the_float_stream_is_the_input_unless_asked() -> None:
    """Each setting wins on its own stream, over the same target."""
    x = correlated()
    noise = x + 0.5 * torch.randn_like(x)
    results = {}
    for stream in ("float", "quantized"):
        torch.manual_seed(0)
        view = Net((SPECS[0], SPECS[0]), noise, floats=x)
        LKD(steps=25, rates=(1e-2,), batch=8, inputs=stream).train(view)
        results[stream] = {on: view.error(rounded(view) | view.codes, on) for on in ("float", "quantized")}
    assert results["float"]["float"] < results["quantized"]["float"]
    assert results["quantized"]["quantized"] < results["float"]["quantized"]


def test_a_block_kept_in_16_bits_is_its_own_teacher() -> None:
    view = Net((None, None), correlated())
    assert all(torch.equal(view.run(b, view.inputs(b, "float"), {}), view.target(b)) for b in range(3))
    for method in METHODS:
        train(method, view)
    assert not view.codes and view.parameters == view.original


def test_eight_bits_start_close() -> None:
    """At the widest format there is the zero-step loss is 1e-4 of the output, and falls by 4 with every bit."""
    errors = []
    for bits in (8, 7, 6):
        torch.manual_seed(0)
        view = Net((per_channel(Int(bits)), per_channel(Int(bits))), correlated())
        errors.append(view.error(rounded(view)) / sum(float(view.target(b).square().mean()) for b in range(3)) * 3)
    assert errors[0] < 1e-4
    assert all(2.5 < wide / narrow < 6 for narrow, wide in pairwise(errors))


@pytest.mark.parametrize("field", ["steps", "decay", "rates", "batch"])
def test_settings_without_meaning_are_refused(field: str) -> None:
    wrong: Any = {"steps": -1, "decay": -0.1, "rates": (0.0,), "batch": 0}[field]
    with pytest.raises(ValueError, match=r"negative|positive|at least"):
        LKD(**{field: wrong})


# --- local ------------------------------------------------------------------------------------------------------------


def local_error(view: Net, name: str, codes: Mapping[str, QTensor]) -> float:
    """‖Wx - ŴQ(x)‖² of a linear on its own inputs in the original block, mean over tokens and rows, fp64."""
    x = view.x.reshape(-1, 32)
    inputs = {"linear0": x * view.original["norm.weight"]}
    inputs["linear1"] = torch.relu(inputs["linear0"] @ view.weights[0].T)
    spec = view.activations
    seen = inputs[name] if spec is None else fit_range(inputs[name], spec).quantize(inputs[name])
    w = view.weights[int(name[-1])].double()
    difference = inputs[name].double() @ w.T - seen.double() @ codes[name].dequantize().double().T
    return float(difference.square().mean())


@pytest.mark.parametrize("inputs", [None, per_token(Int(4)), per_token(E4M3)], ids=str)
def test_every_linears_own_error_falls(inputs: Spec | None) -> None:
    view = Net((SPECS[0], SPECS[1]), correlated(), activations=inputs)
    if inputs is None:
        gptq(view)
    before = {name: local_error(view, name, rounded(view)) for name in ("linear0", "linear1")}
    ZQLocal(steps=30, rates=(1e-3, 1e-2)).train(view)
    for name, error in before.items():
        assert local_error(view, name, view.codes) < 0.95 * error


@pytest.mark.parametrize("inputs", [None, per_token(Int(4))], ids=str)
def test_the_local_gradient_is_that_of_all_tokens(inputs: Spec | None) -> None:
    """∂/∂Ŵ of the mean over tokens and rows, by autograd in fp64 through the products themselves."""
    view = Net((SPECS[1], None), correlated(), activations=inputs)
    w = view.weights[0]
    seen: list[Tensor] = []

    class Caught(ZQLocal):
        def _fit(self, latents: Any, others: Any, gradients: Any, measure: Any, least: float) -> bool:
            gradients()
            seen.append(latents[0].value.grad)
            return False

    Caught().train(view)
    x, q = view.site_inputs(0, view.x.flatten(0, 1))["linear0"]
    free = w.clone().requires_grad_()
    hat = quantize_range(free, SPECS[1])
    (x @ w.T - q @ hat.T).square().mean().backward()
    assert free.grad is not None and len(seen) == 1
    assert torch.allclose(seen[0], free.grad, rtol=1e-3, atol=1e-4 * float(free.grad.abs().max()))


def test_linears_without_tokens_keep_their_codes() -> None:
    class Starved(Net):
        def site_inputs(self, batch: int, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            return {"linear0": super().site_inputs(batch, hidden)["linear0"]}

    view = Starved((SPECS[1], SPECS[1]), correlated())
    ZQLocal(steps=30, rates=(1e-2,)).train(view)
    assert list(view.codes) == ["linear0"]


# --- the pipeline -----------------------------------------------------------------------------------------------------

RECIPES = ["lkd-w4a8-g16", "gptq+zqglobal-w3a16-g16", "smoothquant+gptq+zqlocal-w4a8-g16", "zqlocal-w2a16-g16-asym"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_end_to_end(recipe: str, tmp_path: Path) -> None:
    """A block's error is below that of the same recipe without training, and what is saved is what is loaded."""
    model, text = save_model("llama", tmp_path / "model"), save_text(tmp_path / "text.txt")
    options: dict[str, Any] = {"calibration": str(text), "samples": 4, "length": 32}
    words, scheme = recipe.split("-", 1)
    *untrained, method = words.split("+")
    settings = [f"{method}.steps=10", f"{method}.rates=[5e-4]"]
    run = lowbit.quantize(model, recipe, tmp_path / "out", settings=settings, **options)
    least = run.blocks[0]["error_before"]
    if untrained:
        base = lowbit.quantize(model, f"{'+'.join(untrained)}-{scheme}", tmp_path / "base", **options)
        least = base.blocks[0]["error_after"]
        assert run.bits_per_weight == base.bits_per_weight
    assert run.blocks[0]["error_after"] < least
    measured = first_block_error(model, tmp_path / "out", text, 4, 32)
    assert measured == pytest.approx(run.blocks[0]["error_after"], rel=1e-3)
    if not untrained:
        again = lowbit.quantize(model, recipe, tmp_path / "again", settings=settings, **options)
        assert [block["error_after"] for block in again.blocks] == [block["error_after"] for block in run.blocks]


def shard(path: Path, index: int) -> dict[str, Tensor]:
    return load_file(sorted(path.glob("model-*.safetensors"))[index])


def test_no_steps_give_rounds_files(tmp_path: Path) -> None:
    """Byte for byte the codes, scales and norms of ZeroQuant without LKD, in a model with 16-bit norms."""
    model, text = save_model("llama", tmp_path / "model", dtype=torch.bfloat16), save_text(tmp_path / "text.txt")
    options: dict[str, Any] = {"calibration": str(text), "samples": 4, "length": 32}
    lowbit.quantize(model, "lkd-w4a8-g16", tmp_path / "lkd", settings=["lkd.steps=0"], **options)
    lowbit.quantize(model, "rtn-w4a8-g16", tmp_path / "rtn", **options)
    for index in (0, 1, 2):
        ours, theirs = shard(tmp_path / "lkd", index), shard(tmp_path / "rtn", index)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_norms_are_stored_as_trained_and_other_blocks_are_untouched(tmp_path: Path) -> None:
    model, text = save_model("llama", tmp_path / "model", dtype=torch.bfloat16), save_text(tmp_path / "text.txt")
    options: dict[str, Any] = {"calibration": str(text), "samples": 4, "length": 32}
    settings = ["lkd.steps=20", "lkd.rates=[1e-2]"]
    run = lowbit.quantize(model, "lkd-w2a16-g16", tmp_path / "lkd", settings=settings, ignore=["*.1.*"], **options)
    before, ours = (
        load_file(model / "model.safetensors"),
        {k: v for i in range(3) for k, v in shard(run.path, i).items()},
    )
    kept = [name for name in before if name in ours and not torch.equal(ours[name], before[name])]
    assert kept and all("layers.0." in name and "norm" in name for name in kept)
    assert all(ours[name].dtype == torch.bfloat16 for name in kept)


# --- the granularities that ZeroQuant starts from ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [Int(4), Int(4, "symmetric-full"), Int(3, "asymmetric"), E2M1], ids=str)
def test_granularities_meet_where_they_are_the_same(number: Any) -> None:
    """G row chunks of 48: G = 48 is per row, G = 1 per tensor; blocks as wide as the row are per row."""
    w = torch.randn(48, 64)

    def values(block: tuple[int, int]) -> Tensor:
        return fit_range(w, Spec(number, block)).quantize(w)

    assert torch.equal(values((1, -1)), values((1, 64)))
    assert torch.equal(values((48, -1)), values((-1, -1)))
    assert torch.equal(values((12, -1)), torch.cat([fit_range(c, per_tensor(number)).quantize(c) for c in w.split(12)]))
    assert not torch.equal(values((12, -1)), values((1, -1)))


def test_token_wise_steps_are_at_most_the_tensors() -> None:
    """Tokens whose ranges differ by 4 and more: no step is larger, errors are within half a step, their mean falls."""
    x = torch.randn(32, 64) * torch.logspace(-1, 1, 32)[:, None]
    number = Int(8, "symmetric-restricted")
    token, whole = (fit_range(x, make(number, scale="float32", dynamic=True)) for make in (per_token, per_tensor))
    assert (token.scale <= whole.scale).all()
    error = (token.quantize(x) - x).abs()
    assert (error <= token.scale * 0.5001).all()
    assert float(error.square().mean()) < 0.5 * float((whole.quantize(x) - x).square().mean())
