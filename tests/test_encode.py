"""The slot for methods that choose what a weight is made of, held to a toy that uses every kind of term at once."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from families import tokens
from tiny import save_model, save_text

import lowbit
from lowbit.formats import native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods import ENCODES
from lowbit.methods.base import Encoded
from lowbit.numerics.grid import Grid, fit_range
from lowbit.numerics.maps import Kronecker, random_orthogonal
from lowbit.numerics.places import Regions, Sparse, sparse_bytes
from lowbit.numerics.qtensor import Outliers, QLayer, QTensor, QWeight
from lowbit.numerics.spec import Int, Spec, per_channel, per_token

BINARY = Spec(Int(1, "asymmetric"), (1, -1), "float16-min")


def random_regions(rows: int, columns: int, count: int, seed: int = 0) -> Regions:
    """Random regions; every third column lies in one of them."""
    generator = torch.Generator().manual_seed(seed)
    map = torch.randint(0, count, (rows, columns), generator=generator, dtype=torch.uint8)
    map[:, ::3] = map[:1, ::3]
    return Regions(map, count)


def two_level(weight: torch.Tensor, mask: torch.Tensor, region: int) -> QTensor:
    """mean ± mean |w - mean| of every row over `mask`, by loops."""
    scale, offset = torch.ones(len(weight), 1), torch.zeros(len(weight), 1)
    for row in range(len(weight)):
        values = weight[row][mask[row]]
        mean = values.mean() if len(values) else torch.tensor(0.0)
        spread = (values - mean).abs().mean() if len(values) else torch.tensor(1.0)
        scale[row], offset[row] = (2 * spread).half().float(), (spread - mean).half().float()
    grid = Grid(BINARY, scale, None, None, offset)
    return QTensor(grid.encode(weight).where(mask, 0), grid, region=region)


@dataclass(frozen=True)
class Toy:
    """One region binary, one at 8 bits, one dropped; some entries in 16 bits; maps on both sides; outlier channels."""

    part: float = 0.5
    name: ClassVar[str] = "toy"
    needs: ClassVar[frozenset] = frozenset({"minmax"})
    rounds: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[Spec | None] = BINARY
    maps: ClassVar[bool] = True
    sequential: ClassVar[bool] = False

    @staticmethod
    def named(argument: str) -> Toy:
        return Toy(float(argument))

    def check(self, shape, spec, activation):
        if shape[1] == 7:
            raise ValueError("seven is too few: take eight")

    def stored_bytes(self, shape, spec):
        return shape[0] * shape[1]

    def paper_bits(self, shape, spec):
        return 4.5

    def encode(self, weight, spec, round, clip, stats, *, scores, seed):
        rows, columns = weight.shape
        left, right = (Kronecker(random_orthogonal(n, seed % 1000).float(), None, (n, 1)) for n in (columns, rows))
        turned = right.inverse_weight(left.inverse_weight(weight).T).T.contiguous()
        regions = random_regions(rows, columns, 3, seed % 1000)
        grid = fit_range(turned, per_channel(Int(8)))
        eight = QTensor(grid.encode(turned).where(regions.mask(1), 0), grid, region=1)
        parts = (two_level(turned, regions.mask(0), 0), eight)
        sparse = Sparse.of(turned, turned.abs() > 2 * turned.std(), "index")
        return Encoded(QWeight(parts, regions=regions, sparse=sparse), left, right, Outliers(threshold=2.0))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODES, "toy", Toy)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    return save_model("llama", root / "model"), save_text(root / "text.txt")


def quantize(model: Path, text: Path, recipe: str, output: Path, **options: object) -> lowbit.api.Quantized:
    return lowbit.quantize(model, recipe, output, calibration=str(text), samples=8, length=32, **options)


@pytest.mark.parametrize("layout", ["bitmap", "columns", "index"])
@pytest.mark.parametrize("shape", [(5, 7), (8, 16), (1, 1), (3, 40)])
def test_sparse_entries_come_back_bit_for_bit(layout, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    mask = torch.rand(shape) < 0.3
    if layout == "columns":
        mask = mask[:1].expand(shape).contiguous()
    sparse = Sparse.of(weight, mask, layout)
    tensors = sparse.tensors()
    assert sum(t.nbytes for t in tensors.values()) == sparse_bytes(shape, int(mask.sum()), layout)
    back = Sparse.from_tensors(tensors, torch.Size(shape), layout)
    assert torch.equal(back.mask, mask) and torch.equal(back.values, sparse.values)
    assert torch.equal(back.over(torch.zeros(shape)), weight.half().float() * mask)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(5, 7), (16, 24), (2, 3)])
def test_regions_come_back_bit_for_bit(count, shape):
    regions = random_regions(*shape, count)
    back = Regions.of(regions.tensors(), torch.Size(shape), count)
    assert torch.equal(back.map, regions.map)


def test_codes_of_a_region_are_stored_for_its_entries_alone():
    torch.manual_seed(0)
    weight, regions = torch.randn(16, 64), random_regions(16, 64, 2)
    grid = fit_range(weight, per_channel(Int(4)))
    part = QTensor(grid.encode(weight).where(regions.mask(1), 0), grid, region=1)
    layer = QLayer(QWeight((part,), regions=regions), per_token(Int(8)))
    tensors = native.pack("x", layer)
    assert tensors["x.codes"].nbytes == -(-int(regions.mask(1).sum()) // 8) * 4
    layers, rest = native.unpack(native.describe({"x": layer}), tensors)
    assert not rest
    assert torch.equal(layers["x"].weight.dequantize(), layer.weight.dequantize())
    assert not layers["x"].weight.dequantize()[regions.mask(0)].any()


def test_every_term_survives_a_run(toy, llama, tmp_path):
    """The loaded model computes what its tensors say, and the report counts every byte stored for the sites."""
    model, text = llama
    result = quantize(model, text, "toy", tmp_path / "run")
    loaded = lowbit.load(tmp_path / "run")
    layer = loaded.model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features)
    held = layer.layer
    kept = (held.input_map.apply(x).abs() >= 2.0).any(0)
    assert kept.any() and not kept.all()
    expected = held.output_map.apply(held.input_map.apply(x) @ held.weight.dequantize().T)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    stored = total = 0
    for file in (tmp_path / "run").glob("*.safetensors"):
        layers, _ = native.unpack(shard_header(file).metadata, read_shard(file))
        stored += sum(t.nbytes for name, each in layers.items() for t in native.pack(name, each).values())
        total += sum(each.weight.shape.numel() for each in layers.values())
    assert result.bits_per_weight == pytest.approx(8 * stored / total)
    assert result.paper_bits == 4.5


def test_a_killed_run_ends_in_the_same_bytes(toy, llama, tmp_path):
    model, text = llama
    quantize(model, text, "toy", tmp_path / "whole")
    quantize(model, text, "toy", tmp_path / "again")
    names = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    assert names
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
    plan = json.loads((tmp_path / "whole" / "plan.json").read_text())
    assert plan["recipe"]["encode"] == {"toy": {"part": 0.5}}


def test_names_and_settings(toy):
    parse = lowbit.recipes.parse
    assert parse("toy").encode == Toy()
    assert parse("toy-0.25").encode == parse("toy0.25").encode == Toy(0.25)
    assert parse("toy0.25-w4a16-g32").scheme.weights.group == 32
    assert lowbit.recipes.resolve("toy", settings=["toy.part=0.75"]).recipe.encode == Toy(0.75)
    document = lowbit.recipes.to_dict(parse("toy-0.25"))
    assert lowbit.recipes.from_dict(document).recipe == parse("toy-0.25")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("toy+gptq-w4a16", "toy does not round by gptq: drop gptq"),
        ("toy+signround-w4a16", "signround trains plain codes, and toy makes others"),
        ("toy+lorc8-w4a16", "lorc corrects plain weights, and toy maps them"),
        ("flatquant+toy-w4a4", "toy and flatquant both map the inputs"),
        ("toy-w4a8-static", "toy maps the inputs, whose static range is not known"),
    ],
)
def test_unlawful_company_is_refused(toy, llama, tmp_path, recipe, message):
    model, text = llama
    with pytest.raises(ValueError, match=message):
        quantize(model, text, recipe, tmp_path / "run")
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_formats_refuse_what_they_cannot_hold(toy, llama, tmp_path):
    model, text = llama
    with pytest.raises(ValueError, match="gguf has no place for what toy makes"):
        quantize(model, text, "toy", tmp_path / "run", target="gguf")
    quantize(model, text, "toy", tmp_path / "run")
    for name in ("compressed-tensors", "gptq", "awq", "gguf", "mlx", "modelopt", "bitsandbytes"):
        with pytest.raises(ValueError, match="native"):
            lowbit.export(tmp_path / "run", tmp_path / name, format=name)


RECIPES = {
    "magnitude": "magnitude50",
    "wanda": "wanda2:4",
    "sparsegpt": "sparsegpt50-w4a16-g16",
    "pbllm": "pbllm-2",
    "billm": "billm-w1a16-g16",
    "dbllm": "dbllm-w2a16-g16",
    "spqr": "spqr-w3a16-g16",
    "quik": "quik-w4a4",
    "llmint8": "llmint8-w8a8",
    "owq": "owq-w3a16-g16",
    "quip": "quip-w2a16",
    "quipsharp": "quipsharp-w2a16",
}


BEFORE = ["smoothquant", "flatquant"]
AFTER = ["lorc4"]
QUICK = {"flatquant": "flatquant.epochs=1", "quipsharp": "quipsharp.sweeps=1", "billm": "billm.most=4"}
"""What takes long and is tested elsewhere."""


def test_every_encode_has_a_recipe_here():
    assert set(RECIPES) == set(ENCODES)


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_encode_on_every_kind_of_model(name, family, tmp_path):
    """GQA, experts (some of them starved), biases."""
    model = save_model(family, tmp_path / "model")
    settings = [QUICK[name]] if name in QUICK else []
    result = quantize(model, save_text(tmp_path / "text.txt"), RECIPES[name], tmp_path / "run", settings=settings)
    assert all(math.isfinite(block["error_after"]) for block in result.blocks)
    assert 0 < result.paper_bits <= 16 and result.bits_per_weight > 0
    loaded, again = (lowbit.load(tmp_path / "run") for _ in range(2))
    ids = tokens()
    with torch.no_grad():
        first, second = (m(input_ids=ids, use_cache=False).logits for m in (loaded, again))
    assert first.isfinite().all() and torch.equal(first, second)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("method", [*BEFORE, *AFTER])
def test_every_pairing_runs_or_is_refused_before_a_weight_is_read(name, method, llama, tmp_path):
    head, dash, tail = RECIPES[name].partition("-")
    words = f"{method}+{head}" if method in BEFORE else f"{head}+{method}"
    model, text = llama
    settings = [QUICK[word] for word in (method, name) if word in QUICK]
    try:
        result = quantize(model, text, f"{words}{dash}{tail}", tmp_path / "run", settings=settings)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        assert not list(tmp_path.glob("run/*.safetensors"))
        return
    assert all(math.isfinite(block["error_after"]) for block in result.blocks)
    with torch.no_grad():
        assert lowbit.load(tmp_path / "run")(input_ids=tokens(), use_cache=False).logits.isfinite().all()
