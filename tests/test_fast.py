"""Layers on codes against the reference layer, and what `load` makes of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.kernels import dynamic
from lowbit.modules.linear import QLinear
from lowbit.numerics.grid import fit_range
from lowbit.numerics.maps import Hadamard, Kronecker, Map, random_orthogonal
from lowbit.numerics.qtensor import LowRank, QLayer, QTensor, QWeight
from lowbit.numerics.spec import E2M1, E4M3, Int, Spec, mx, nvfp4, per_channel, per_group, per_tensor, per_token
from lowbit.runtime import fast
from lowbit.runtime.fast import CodesLinear, FastLinear, ReferenceLinear, WeightOnlyLinear, build, refusal, slow
from lowbit.runtime.siblings import merge

GPU = torch.cuda.is_available() and fast.available(torch.cuda.current_device())
DEVICE = "cuda" if GPU else "cpu"
INT8 = per_channel(Int(8), scale="float32")
KRONECKER = Kronecker(random_orthogonal(12, 1).float(), random_orthogonal(16, 2).float(), (12, 16))
LAYERS: dict[str, tuple[Spec, Spec | None, Map | None]] = {
    "w4": (per_group(Int(4), 64), None, None),
    "w3 asymmetric": (per_group(Int(3, "asymmetric"), 32), None, None),
    "w4 behind a map": (per_group(Int(4), 64), None, Hadamard(12, 16)),
    "nvfp4": (nvfp4(), None, None),
    "mxfp4": (mx(E2M1), None, None),
    "w8a8": (INT8, per_token(Int(8)), None),
    "fp8": (per_channel(E4M3, scale="float32"), per_token(E4M3), None),
    "w4a4 behind a map": (per_channel(Int(4)), per_token(Int(4)), KRONECKER),
}


def layer_of(spec: Spec, inputs: Spec | None, map: Map | None, clip: bool = False, columns: int = 192) -> QLayer:
    weight = torch.randn(80, columns) * torch.rand(80, 1)
    grid = fit_range(weight, spec)
    cut = torch.tensor([0.9, 0.8]) if clip else None
    return QLayer(QWeight((QTensor(grid.encode(weight), grid),)), inputs, None, map, cut)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device passes for one that the kernels know; on a CPU, their definitions compute."""
    monkeypatch.setattr(fast, "available", lambda _device: True)
    original = torch.device
    if not GPU:
        monkeypatch.setattr(fast, "refusal", lambda layer, dtype, _device: refusal(layer, dtype, original("cuda")))


def make(layer: QLayer, bias: torch.Tensor | None, dtype: torch.dtype) -> FastLinear:
    made = build(layer, bias, dtype, DEVICE)
    assert isinstance(made, FastLinear), made
    return made


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_what_the_reference_does(name: str, dtype: torch.dtype) -> None:
    """Outputs of unit size in fp32 sums, against the reference in fp32 on the same inputs."""
    layer = layer_of(*LAYERS[name], clip=LAYERS[name][1] is not None)
    bias = torch.randn(80)
    found = make(layer, bias, dtype)
    assert isinstance(found, WeightOnlyLinear if layer.activation is None else CodesLinear)
    reference = QLinear(replace(layer, input_map=None), bias.to(dtype).float(), torch.float32, DEVICE)
    map = None if layer.input_map is None else layer.input_map.to(DEVICE)
    for shape in ((1, 1, 192), (2, 37, 192), (0, 192), (192,)):
        x = torch.randn(shape, device=DEVICE).to(dtype)
        y, expected = found(x), reference((x if map is None else map.apply(x)).float())
        assert y.dtype == dtype and y.shape == expected.shape
        if isinstance(found, CodesLinear) and map is not None:  # whose last bit can move an input by a step
            codes, scale = dynamic.encode(x.reshape(-1, 192), found.encoder)
            inputs = codes.float() * scale[:, None]
            if len(codes):
                assert (inputs - reference.quantized(map.apply(x).float()).reshape(-1, 192)).std() < 0.1 * inputs.std()
            expected = (inputs @ reference.weight.T + reference.bias).reshape(expected.shape)
        assert ((y.float() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-2).all()
    torch.testing.assert_close(found.weight, reference.weight.to(dtype))


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", ["w4", "w8a8"])
def test_compilers_take_it_as_one_operator(name: str) -> None:
    found = make(layer_of(*LAYERS[name]), None, torch.bfloat16)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(3, 192, device=DEVICE).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(lambda x: found(x) * 2, backend=backend, fullgraph=True)
        assert torch.equal(compiled(x), found(x) * 2)
    assert any("fast_linear" in target for target in seen)
    shape = torch.ops.lowbit.fast_linear(x.to("meta"), found.number, 80)
    assert shape.shape == (3, 80) and shape.device.type == "meta"


@pytest.mark.usefixtures("known")
def test_what_no_kernel_takes_stays_dense_and_says_why() -> None:
    plain = layer_of(*LAYERS["w4"])
    eight = layer_of(*LAYERS["w8a8"])
    more = QWeight(plain.weight.parts, LowRank(torch.randn(80, 2), torch.randn(2, 192)))
    cases = {
        "more than one set of codes": replace(plain, weight=more),
        "neither integers of 2, 3, 4 or 8 bits": layer_of(per_group(Int(5), 64), None, None),
        "not dynamic per token": replace(eight, activation=per_tensor(Int(8), scale="float32")),
        "neither symmetric integers": replace(eight, activation=per_token(Int(8, "asymmetric"))),
        "not one per row": replace(plain, activation=per_token(Int(8))),
        "no multiple of 16": layer_of(INT8, per_token(Int(8)), None, columns=24),
    }
    for words, layer in cases.items():
        made = build(layer, None, torch.bfloat16, DEVICE)
        assert isinstance(made, ReferenceLinear)
        assert words in made.reason and f"dense since {made.reason}" in repr(made)
    model = torch.nn.Sequential(
        build(cases["not one per row"], None, torch.bfloat16, DEVICE), make(plain, None, torch.bfloat16)
    )
    assert slow(model) == {"its scales are not one per row": 1}
    assert refusal(plain, torch.float32, "cuda") == "the kernels compute in 16 bits only"


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("form", LAYERS)
def test_linears_of_one_input_are_joined(form: str) -> None:
    """And give what each gives alone, to the last bit, however they are called; not behind maps of 16-bit inputs."""
    codes = LAYERS[form][1] is not None

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q", "k", "v", "other"):
                setattr(self, name, make(layer_of(*LAYERS[form], clip=codes), torch.randn(80), torch.bfloat16))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.q(x), self.k(x), self.v(x), self.other(x + 1)]

    block, x = Block(), torch.randn(2, 3, 192, device=DEVICE).bfloat16()
    alone = block(x)
    first = merge(block, lambda: block(x))
    if form == "w4 behind a map":
        assert block.q.merged is None
        return
    assert block.q.merged is block.k.merged is block.v.merged and block.q.merged.sizes == [80, 80, 80]
    assert block.other.merged is None
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.no_grad():
        for outputs in (first, block(x), block(x), compiled(x), compiled(x)):
            assert all(torch.equal(found, expected) for found, expected in zip(outputs, alone, strict=True))
    y = torch.randn_like(x)
    expected = block(y)
    block.q(x)  # whose outputs nobody asks for: the next input is another one
    assert torch.equal(block.q(y), expected[0]) and torch.equal(block.v(x), alone[2])
    parts = [each.codes.low if isinstance(each, WeightOnlyLinear) else each.codes.codes for each in (block.q, block.k)]
    assert parts[0].data_ptr() < parts[1].data_ptr() < parts[0].data_ptr() + parts[0].untyped_storage().nbytes()
    assert torch.equal(block.k.compute(x), alone[1])


@pytest.mark.usefixtures("known")
def test_linears_whose_inputs_become_other_codes_are_not_joined() -> None:
    """Other formats, maps, clips, or no bias: each on the same input keeps to itself."""
    eight, mapped = layer_of(*LAYERS["w8a8"]), layer_of(*LAYERS["w4a4 behind a map"], clip=True)
    assert mapped.input_clip is not None
    other_map = Kronecker(KRONECKER.left, random_orthogonal(16, 3).float(), (12, 16))
    other_form = replace(eight, activation=per_token(Int(8, "symmetric-restricted")))
    pairs = [
        (eight, layer_of(*LAYERS["fp8"])),
        (eight, layer_of(*LAYERS["w4"])),
        (eight, other_form),
        (eight, replace(eight, input_clip=torch.tensor([0.9, 0.8]))),
        (eight, replace(eight, input_map=KRONECKER)),
        (mapped, replace(mapped, input_map=other_map)),
        (mapped, replace(mapped, input_map=Hadamard(12, 16))),
        (mapped, replace(mapped, input_clip=mapped.input_clip / 2)),
        (layer_of(*LAYERS["nvfp4"]), layer_of(*LAYERS["mxfp4"])),
        (layer_of(*LAYERS["nvfp4"]), layer_of(*LAYERS["w4"])),
    ]
    x = torch.randn(2, 192, device=DEVICE).bfloat16()
    for layers in pairs:
        model = torch.nn.ModuleList(make(layer, None, torch.bfloat16) for layer in layers)
        merge(model, lambda model=model: [linear(x) for linear in model])  # type: ignore[misc]
        assert all(linear.merged is None for linear in model)
    model = torch.nn.ModuleList(make(eight, bias, torch.bfloat16) for bias in (None, torch.randn(80)))
    merge(model, lambda: [linear(x) for linear in model])
    assert all(linear.merged is None for linear in model)


@pytest.mark.usefixtures("known")
def test_gradients_are_right_or_refused() -> None:
    x = torch.randn(3, 192, device=DEVICE).bfloat16().requires_grad_()
    layer = layer_of(*LAYERS["w4"])
    make(layer, None, torch.bfloat16)(x).float().sum().backward()
    assert x.grad is not None
    expected = layer.weight.dequantize().sum(0).expand(3, -1).to(DEVICE)
    torch.testing.assert_close(x.grad.float(), expected, rtol=2**-7, atol=2**-7)
    with pytest.raises(ValueError, match="load the model with fast=False"):
        make(layer_of(*LAYERS["w8a8"]), None, torch.bfloat16)(x)


def test_fields_that_no_kernel_knows_are_never_dropped() -> None:
    """A layer with anything else set, whatever will be added to QLayer, is not computed without it."""
    import dataclasses

    plain = layer_of(*LAYERS["w4"])
    for field in dataclasses.fields(QLayer):
        if field.name in fast._KNOWN:
            continue
        strange = replace(plain, **{field.name: object()})
        assert field.name.replace("_", " ") in str(fast._unknown(strange))
    assert fast._unknown(plain) is None


def test_other_devices_are_left_to_the_reference(tmp_path: Path) -> None:
    assert refusal(layer_of(*LAYERS["w4"]), torch.bfloat16, "cpu") == "the kernels know Hopper GPUs only"
    lowbit.quantize("demo", "rtn-w4a16-g64", tmp_path / "out")
    loaded = lowbit.load(tmp_path / "out", dtype=torch.bfloat16)
    kinds = {type(module) for module in loaded.modules() if isinstance(module, QLinear | FastLinear)}
    assert kinds == {QLinear}


RECIPES = [
    *("rtn-w4a16-g64", "rtn-nvfp4a16", "rtn-mxfp4a16"),
    *("rtn-w8a8", "rtn-fp8", "quarot-w4a4", "rtn-w4a8-g64"),
]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU that the kernels know")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loaded_model_takes_fast_layers(recipe: str, tmp_path: Path) -> None:
    lowbit.quantize("demo", recipe, tmp_path / "out", device="cpu")
    exact = lowbit.load(tmp_path / "out", dtype=torch.float32, device="cuda", fast=False)
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    dense, model = lowbit.load(tmp_path / "out", fast=False, **options), lowbit.load(tmp_path / "out", **options)
    linears = [module for module in model.modules() if isinstance(module, FastLinear | QLinear)]
    held = [isinstance(module, ReferenceLinear) for module in linears]
    assert all(held) if recipe == "rtn-w4a8-g64" else not any(held), slow(model)
    ids = torch.randint(4, model.config.vocab_size, (2, 64), device="cuda")
    with torch.no_grad():
        expected, reference, found = (each(ids).logits.float().log_softmax(-1) for each in (exact, dense, model))
    loss, allowed = ((expected.exp() * (expected - other)).sum(-1).mean() for other in (found, reference))
    assert float(loss) < 1.3 * float(allowed) + 1e-4  # no further from fp32 than the reference in 16 bits
    assert lowbit.generate(tmp_path / "out", "Once upon a time", tokens=24, device="cuda")
