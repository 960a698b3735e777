"""E8P against its definition and brute force; QuIP#'s block LDLQ and tuning against dense formulas; whole runs."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit.evaluation.size import on_meta, stored_for
from lowbit.formats import native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods.base import Encoded
from lowbit.methods.incoherence import damped, turned_gram
from lowbit.methods.quipsharp import QuIPSharp, block_factor
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.views import Stats
from lowbit.modules.linear import QLinear
from lowbit.numerics import lattice
from lowbit.numerics.feedback import inverse_factor
from lowbit.numerics.lattice import Book, Lattice, lattice_bytes, magnitudes, nearest, points
from lowbit.numerics.maps import PermutedKronecker, Rescaled, SignedHadamard
from lowbit.numerics.qtensor import QLayer, QWeight
from lowbit.numerics.spec import Int, per_channel

ROWS, COLUMNS = 24, 64


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observe(columns: int = COLUMNS, seed: int = 1) -> Stats:
    mix = torch.eye(columns) + gaussian(columns, columns, seed=seed) / columns**0.5
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(gaussian(6 * columns, columns, seed=seed + 1) @ mix * torch.linspace(0.3, 3, columns))
    return stats


def encode(method: QuIPSharp, weight: Tensor, stats: Stats | None, bits: int = 2, seed: int = 5) -> Encoded:
    return method.encode(weight, per_channel(Int(bits)), RTN(), MinMaxClip(), stats, scores=False, seed=seed)


def effective(encoded: Encoded) -> Tensor:
    """The weight that the layer multiplies its inputs by, in fp64: Rᵀ Ŵ' Pᵀ."""
    assert encoded.input_map is not None and encoded.output_map is not None
    inside = encoded.weight.dequantize(torch.float64) @ encoded.input_map.matrix().T
    return encoded.output_map.matrix().T @ inside


def inside(encoded: Encoded, weight: Tensor, stats: Stats) -> tuple[Tensor, Tensor]:
    """(W', H') in fp64: R W P⁻ᵀ and PᵀHP, its mean diagonal one."""
    assert encoded.input_map is not None and encoded.output_map is not None
    p, r = encoded.input_map.matrix(), encoded.output_map.matrix()
    h = p.T @ stats.hessian().double() @ p
    return r @ weight.double() @ torch.linalg.inv(p).T, h * len(h) / h.trace()


def proxy(error: Tensor, h: Tensor) -> float:
    return float((error @ h * error).sum())


# --- the codebook -----------------------------------------------------------------------------------------------------


def test_e8p_is_what_the_paper_says() -> None:
    """256 patterns of half-integers, all signs of even sum, a quarter to either side: 65 536 points."""
    size = magnitudes()
    short = [v for v in product((0.5, 1.5, 2.5, 3.5), repeat=8) if sum(x * x for x in v) <= 10]
    assert len(short) == 227 and torch.equal(size[:227], torch.tensor(short))
    assert all(sorted(row) == [0.5] * 3 + [1.5] * 5 for row in size[227:].tolist())
    assert len(torch.unique(size, dim=0)) == 256
    every = points("e8p")
    assert every.shape == (65536, 8) and len(torch.unique(every, dim=0)) == 65536
    for side, half in ((0.25, every[: 1 << 15]), (-0.25, every[1 << 15 :])):
        even = half - side
        assert torch.equal(even.sum(-1) % 2, torch.zeros(1 << 15))
        assert torch.equal(even.abs(), size.repeat(128, 1))
    assert 8 * lattice_bytes((512, 512), "e8p") / 512**2 == pytest.approx(2, abs=2e-4)


def test_e8_begins_with_its_shortest_vectors() -> None:
    every = points("e8")
    lengths = every.square().sum(-1).tolist()
    assert len(torch.unique(every, dim=0)) == 256
    assert [lengths.count(n) for n in (0, 2, 4)] == [1, 240, 15]
    doubled = (2 * every).long()
    assert torch.equal(doubled.float(), 2 * every) and not (every.sum(-1) % 2).any()
    assert ((doubled % 2 == 0).all(-1) | (doubled % 2 == 1).all(-1)).all()


@pytest.mark.parametrize("book", ["e8p", "e8"])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 1.6, 5.0])
def test_the_nearest_point_is_the_nearest(book: Book, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lattice._CHUNK, "cpu", 100)  # several chunks, and a ragged one
    x = spread * gaussian(250, 8)
    found = points(book)[nearest(x, book).long()]
    distances = torch.cdist(x.double(), points(book).double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.allclose((x - found).double().norm(dim=-1), distances.amin(-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("book", ["e8p", "e8"])
def test_points_are_nearest_to_themselves(book: Book) -> None:
    codes = torch.arange(len(points(book)), dtype=torch.int32)
    assert torch.equal(nearest(points(book), book), codes)
    assert nearest(torch.empty(0, 8), book).shape == (0,)


def test_ties_cost_nothing() -> None:
    """On the borders of cells any of the nearest points will do, but it must be one."""
    x = torch.randint(-6, 7, (400, 8), generator=torch.Generator().manual_seed(0)) / 4
    distances = torch.cdist(x, points("e8p"), compute_mode="donot_use_mm_for_euclid_dist")
    found = points("e8p")[nearest(x, "e8p").long()]
    assert torch.allclose((x - found).norm(dim=-1), distances.amin(-1), rtol=0, atol=1e-6)


def test_a_gaussian_loses_what_was_published() -> None:
    """0.092 of its variance at 2 bits, where the best four scalar levels lose 0.119; the residual codes lose less."""
    x = gaussian(40_000, 8)
    first = points("e8p")[nearest(x * 1.03, "e8p").long()] / 1.03
    assert float((x - first).square().mean()) == pytest.approx(0.092, abs=1.5e-3)
    levels = torch.tensor([-1.51, -0.4528, 0.4528, 1.51])
    assert float((x[..., None] - levels).square().amin(-1).mean()) == pytest.approx(0.1175, abs=2e-3)
    losses = {}
    for bits in (2, 3, 4):
        encoded = encode(QuIPSharp(), x[:500].reshape(500, 8), None, bits)
        wanted, _ = inside(encoded, x[:500], observe(8))
        losses[bits] = float((encoded.weight.dequantize() - wanted).square().mean() / wanted.square().mean())
    assert losses[2] == pytest.approx(0.092, abs=0.008)
    assert losses[3] < 0.035 and losses[4] < 0.0105  # below the Gaussian optima of 8 and 16 scalar levels or near them


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("books", [("e8p",), ("e8p", "e8"), ("e8p", "e8p")])
def test_codes_come_back_bit_for_bit(books: tuple[Book, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    lattices = tuple(
        Lattice(
            torch.randint(0, len(points(book)), (37, 5), generator=generator, dtype=torch.int32),
            torch.rand(1, generator=generator),
            book,
        )
        for book in books
    )
    layer = QLayer(QWeight((), lattices=lattices), input_map=SignedHadamard(40, 3), output_map=PermutedKronecker(37, 4))
    assert layer.weight.shape == (37, 40) and not layer.plain
    expected = torch.zeros(37, 40)
    for each in lattices:
        for row, block in product(range(37), range(5)):
            expected[row, 8 * block : 8 * block + 8] += each.scale * points(each.book)[each.codes[row, block]]
    torch.testing.assert_close(layer.weight.dequantize(), expected, rtol=0, atol=1e-6)
    tensors = native.pack("a.b", layer)
    assert sum(t.nbytes for t in tensors.values()) == sum(lattice_bytes((37, 40), book) for book in books)
    assert {native.owner_of(name) for name in tensors} == {"a.b"}
    layers, rest = native.unpack(native.describe({"a.b": layer}), tensors)
    back = layers["a.b"]
    assert not rest and isinstance(back, QLayer)
    assert (back.input_map, back.output_map) == (layer.input_map, layer.output_map)
    for ours, theirs in zip(lattices, back.weight.lattices, strict=True):
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale, theirs.scale)
        assert ours.book == theirs.book and theirs.codes.dtype == torch.int32
    sizes = {name: (t.shape, t.dtype) for name, t in native.pack("a.b", on_meta(layer)).items()}
    assert sizes == {name: (t.shape, t.dtype) for name, t in tensors.items()}


# --- rounding ---------------------------------------------------------------------------------------------------------


def near(x: Tensor) -> Tensor:
    return points("e8p")[nearest(x.float(), "e8p").long()].double()


def block_ldlq(weight: Tensor, h: Tensor) -> Tensor:
    """From the first block to the last: each is the nearest point to what is best for it given those before, when all
    behind it may still be anything. Dense solves in fp64.
    """
    rounded = weight.clone()
    for start in range(0, weight.shape[1], 8):
        done, left = slice(0, start), slice(start, None)
        error = rounded[:, done] - weight[:, done]
        best = weight[:, left] - error @ h[done, left] @ torch.linalg.inv(h[left, left])
        rounded[:, start : start + 8] = near(best[:, :8])
    return rounded


def tuned(weight: Tensor, h: Tensor, rounded: Tensor) -> Tensor:
    """One pass: every block is the nearest point to what is best for it, all others being what they are."""
    rounded = rounded.clone()
    for start in range(0, weight.shape[1], 8):
        own = slice(start, start + 8)
        error = rounded - weight
        error[:, own] = 0
        rounded[:, own] = near(weight[:, own] - error @ h[:, own] @ torch.linalg.inv(h[own, own]))
    return rounded


def test_block_ldlq_and_tuning_follow_their_formulas() -> None:
    weight, stats = gaussian(ROWS, COLUMNS), observe()
    plain = encode(QuIPSharp(sweeps=0), weight, stats)
    turned, h = inside(plain, weight, stats)
    target, h = turned / float(turned.square().mean().sqrt() / 1.03), damped(h, 0.01)
    expected = block_ldlq(target, h)
    for sweeps in range(4):
        made = encode(QuIPSharp(sweeps=sweeps), weight, stats).weight.lattices[0]
        assert torch.equal(points("e8p")[made.codes.long()].reshape(ROWS, COLUMNS).double(), expected)
        expected = tuned(target, h, expected)


def test_the_block_factor_is_that_of_a_block_ldl() -> None:
    """H⁻¹ = UᵀU = VᵀDV with V block-unit upper triangular and D block-diagonal."""
    h = damped(turned_gram(observe().hessian().double(), None), 0.01)
    unit = block_factor(inverse_factor(h.float(), 1e-9).double())
    block = torch.arange(COLUMNS) // 8
    assert torch.allclose(unit.where(block[:, None] >= block, 0.0), torch.eye(COLUMNS, dtype=torch.float64), atol=1e-6)
    middle = torch.linalg.inv(unit).T @ torch.linalg.inv(h) @ torch.linalg.inv(unit)
    outside = middle.where(block[:, None] != block, 0.0)
    assert outside.abs().max() < 1e-4 * middle.diagonal().max()


def test_the_scale_brings_weights_to_the_codebook() -> None:
    weight, stats = gaussian(ROWS, COLUMNS) * 0.02, observe()
    for bits, spread, steps in ((2, 1.03, (1,)), (3, 0.98, (1, 2.04)), (4, 1.03, (1, 3.45))):
        encoded = encode(QuIPSharp(), weight, stats, bits)
        root = float(weight.double().square().mean().sqrt())  # rotations keep it
        found = [float(each.scale) for each in encoded.weight.lattices]
        assert found == pytest.approx([root / spread / step for step in steps], rel=1e-5)


def test_every_part_of_the_method_helps() -> None:
    weight = gaussian(128, 128) * torch.exp(0.8 * gaussian(128, seed=3))
    stats, h = observe(128), observe(128).hessian().double()

    def loss(method: QuIPSharp, bits: int = 2) -> float:
        error = effective(encode(method, weight, stats, bits)) - weight
        return proxy(error, h) / proxy(weight.double(), h)

    whole, untuned, unfed = (loss(QuIPSharp(sweeps=n, feedback=fed)) for n, fed in ((10, True), (0, True), (0, False)))
    assert whole < untuned < 0.6 * unfed
    assert loss(QuIPSharp(rescale=True)) < whole
    assert loss(QuIPSharp(), 3) < 0.45 * whole and loss(QuIPSharp(), 4) < 0.45 * loss(QuIPSharp(), 3)


def test_maps_are_hadamard_transforms_where_there_are_any() -> None:
    encoded = encode(QuIPSharp(), gaussian(18, 64), observe())
    assert isinstance(encoded.input_map, SignedHadamard) and isinstance(encoded.output_map, PermutedKronecker)
    encoded = encode(QuIPSharp(incoherence="kronecker", rescale=True), gaussian(16, 64), observe())
    assert isinstance(encoded.input_map, Rescaled) and isinstance(encoded.input_map.then, PermutedKronecker)


def test_zeros_come_back_as_zeros() -> None:
    """E8P has no zero: the scale has to be one."""
    assert not encode(QuIPSharp(), torch.zeros(8, 16), observe(16)).weight.dequantize().any()


# --- whole runs -------------------------------------------------------------------------------------------------------


def quantize(model: Path, text: Path, recipe: str, output: Path, **options: object) -> lowbit.api.Quantized:
    return lowbit.quantize(model, recipe, output, calibration=str(text), samples=8, length=32, **options)


@pytest.mark.parametrize(("family", "bits"), [("llama", 2), ("opt", 3), ("mixtral", 4)])
def test_a_run_stores_what_it_computes(family: str, bits: int, tmp_path: Path) -> None:
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    recipe = f"quipsharp-w{bits}a16"
    result = quantize(model, text, recipe, tmp_path / "run", settings=["quipsharp.sweeps=1"])
    planned = stored = total = 0
    loaded = lowbit.load(tmp_path / "run")
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, QLinear)}
    for file in (tmp_path / "run").glob("*.safetensors"):
        held, _ = native.unpack(shard_header(file).metadata, read_shard(file))
        for name, layer in held.items():
            stored += sum(t.nbytes for t in native.pack(name, layer).values())
            planned += QuIPSharp().stored_bytes(tuple(layer.weight.shape), per_channel(Int(bits)))
            total += layer.weight.shape.numel()
            x = gaussian(3, layer.weight.shape[1])
            expected = layer.output_map.apply(layer.input_map.apply(x) @ layer.weight.dequantize().T)
            module = layers[name]
            plain = module(x) if module.bias is None else module(x) - module.bias
            torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    assert stored == planned and stored_for(loaded) == (stored, total)
    assert result.bits_per_weight == pytest.approx(8 * stored / total)
    with pytest.raises(ValueError, match="native"):
        lowbit.export(tmp_path / "run", tmp_path / "out", format="gptq")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quipsharp-w5a16", "codebooks of 2, 3 and 4 bits, not 5"),
        ("quipsharp-nf4", "one scale for a whole weight"),
        ("quipsharp-w2a16-g32", "one scale for a whole weight"),
        ("quipsharp+gptq-w2a16", "drop gptq"),
        ("mse+quipsharp-w2a16", "drop mse"),
    ],
)
def test_other_formats_are_refused(recipe: str, message: str, tmp_path: Path) -> None:
    model, text = save_model("llama", tmp_path / "model"), save_text(tmp_path / "text.txt")
    with pytest.raises(ValueError, match=message):
        quantize(model, text, recipe, tmp_path / "run")


def test_settings_and_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="60 is no multiple"):
        QuIPSharp().check((64, 60), per_channel(Int(2)), None)
    for settings in ({"damp": 0.0}, {"sweeps": -1}):
        with pytest.raises(ValueError, match="positive"):
            QuIPSharp(**settings)  # type: ignore[arg-type]
    assert QuIPSharp().paper_bits((512, 512), per_channel(Int(3))) == 3.0
    recipe = lowbit.recipes.resolve("quipsharp-w2a16", settings=["quipsharp.rescale=true"]).recipe
    assert recipe.encode == QuIPSharp(rescale=True)
    assert lowbit.recipes.from_dict(lowbit.recipes.to_dict(recipe)).recipe == recipe
