"""Magnitude pruning and what all pruning shares: exact counts, 16-bit values bit for bit, codes for kept entries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_model, save_text
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import lowbit
import lowbit.recipes
from lowbit.formats import native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods import ENCODES
from lowbit.methods.base import Encoded
from lowbit.methods.magnitude import Magnitude
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.sparsity import Pruning, count, dropped, storage_dtype
from lowbit.methods.wanda import Wanda
from lowbit.numerics.qtensor import QLayer
from lowbit.numerics.spec import BF16, E4M3, NF4, Int, Spec, mx, nvfp4, per_channel, per_group

PLAIN = Spec(BF16)


def encoded(method: Pruning, weight: Tensor, spec: Spec = PLAIN) -> Encoded:
    return method.encode(weight, spec, RTN(), MinMaxClip(), None, scores=False, seed=0)


def smallest(values: list[float], number: int) -> set[int]:
    """The places of the smallest values; of equals those that come first."""
    return set(sorted(range(len(values)), key=lambda place: values[place])[:number])


# --- which entries go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.9, 1.0])
def test_the_smallest_of_the_matrix_go(sparsity: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 50).bfloat16().float()
    found = encoded(Magnitude(sparsity), weight).weight.dequantize()
    gone = smallest(weight.abs().flatten().tolist(), round(sparsity * 400))
    expected = weight.flatten().clone()
    expected[list(gone)] = 0
    assert torch.equal(found, expected.view(8, 50))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5"])
def test_n_of_every_m_go(pattern: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 40).half().float()
    zeros, among = map(int, pattern.split(":"))
    found = encoded(Magnitude.named(pattern), weight).weight.dequantize()
    for row in range(6):
        for start in range(0, 40, among):
            group = weight[row, start : start + among]
            gone = smallest(group.abs().tolist(), zeros)
            kept = [0.0 if place in gone else value for place, value in enumerate(group.tolist())]
            assert found[row, start : start + among].tolist() == kept


def test_equal_weights_are_counted_exactly() -> None:
    """A threshold would take all of them, or one too many."""
    ones = torch.ones(64, 128)
    assert int((encoded(Magnitude(0.5), ones).weight.dequantize() == 0).sum()) == 64 * 128 // 2
    assert (encoded(Magnitude(0.5, 4), ones).weight.dequantize().view(-1, 4) == 0).sum(1).eq(2).all()


def test_percentages_mean_what_they_say() -> None:
    assert [count(0.29, 100), count(0.57, 100), count(1 / 3, 3), count(0.07, 100)] == [29, 57, 1, 7]
    assert [count(0.5, 7), count(0.999, 10)] == [3, 9]


def test_scores_of_nan_free_ties_keep_their_order() -> None:
    mask = dropped(torch.tensor([[1.0, 1.0, 0.0, 1.0]]), 0.5, 4)
    assert mask.tolist() == [[True, False, True, False]]


# --- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_values_are_the_checkpoints_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64).to(dtype)
    sparse = encoded(Magnitude(0.5), weight.float()).weight.sparse
    assert sparse is not None and sparse.values.dtype == dtype
    assert torch.equal(sparse.values.view(torch.int16), weight[sparse.mask].view(torch.int16))


def test_weights_beyond_fp16_keep_bf16() -> None:
    assert storage_dtype(torch.tensor([1e38, 1.1])) == torch.bfloat16
    assert storage_dtype(torch.tensor([1.0001, 0.1234])) == torch.float16


@pytest.mark.parametrize(
    "spec",
    [PLAIN, per_group(Int(4), 16), per_group(Int(3, "asymmetric"), 16), per_channel(Int(8)), per_channel(E4M3)]
    + [per_group(NF4, 16), mx(E4M3), nvfp4(), Spec(Int(4, "asymmetric"), (1, 16), "float16-min")],
    ids=str,
)
@pytest.mark.parametrize("pattern", ["50", "25", "75", "2:4"])
def test_files_hold_kept_entries_alone_and_zeros_are_exact(spec: Spec, pattern: str) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(48, 64) + 0.3).bfloat16().float()
    method = Magnitude.named(pattern)
    layer = QLayer(encoded(method, weight, spec).weight)
    tensors = native.pack("x", layer)
    layers, rest = native.unpack(native.describe({"x": layer}), tensors)
    held = layers["x"]
    assert isinstance(held, QLayer) and not rest
    found = held.weight.dequantize()
    assert torch.equal(found, layer.weight.dequantize())
    mask = dropped(weight.abs(), method.sparsity, method.among or weight.numel())
    assert not found[mask].any()
    assert sum(tensor.nbytes for tensor in tensors.values()) == method.stored_bytes((48, 64), spec)
    if spec != PLAIN:
        kept = weight.masked_fill(mask, 0.0)
        plain = RTN().round(kept, spec, MinMaxClip(), None, scores=False).dequantize()
        assert torch.equal(found, plain.masked_fill(mask, 0.0))


def test_nothing_dropped_is_the_weight_and_everything_dropped_is_zero() -> None:
    weight = torch.randn(8, 32).bfloat16().float()
    for method in (Magnitude, Wanda):
        assert torch.equal(encoded(method(0.0), weight).weight.dequantize(), weight)
        assert not encoded(method(1.0), weight).weight.dequantize().any()
        for part in (0.0, 1.0):
            layer = QLayer(encoded(method(part), weight, per_group(Int(4), 16)).weight)
            layers, _ = native.unpack(native.describe({"x": layer}), native.pack("x", layer))
            assert torch.equal(layers["x"].weight.dequantize(), layer.weight.dequantize())


def test_bits_as_the_paper_counts() -> None:
    """Half the entries with 4 bits and a bit mask are as large as 3 bits (SparseGPT)."""
    assert Magnitude(0.5).paper_bits((8, 8), per_channel(Int(4))) == 3
    assert Magnitude(0.5).paper_bits((8, 8), PLAIN) == 9


def test_two_of_four_fit_torchs_own_layout() -> None:
    """The layout behind `to_sparse_semi_structured`, which itself takes a GPU, gives the same matrix back."""
    weight = torch.randn(64, 128).bfloat16().float()
    dense = encoded(Magnitude(0.5, 4), weight).weight.dequantize(torch.bfloat16)
    values, places = sparse_semi_structured_from_dense_cutlass(dense)
    assert values.shape == (64, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), dense)
    loose = encoded(Magnitude(0.5), weight).weight.dequantize(torch.bfloat16)
    values, places = sparse_semi_structured_from_dense_cutlass(loose)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), loose)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor is in prototype:UserWarning")
def test_torch_multiplies_by_two_of_four() -> None:
    weight = torch.randn(64, 128).half().float()
    dense = encoded(Magnitude(0.5, 4), weight.cuda()).weight.dequantize(torch.float16)
    sparse = torch.sparse.to_sparse_semi_structured(dense)
    assert torch.equal(sparse.to_dense(), dense)
    x = torch.randn(32, 128, dtype=torch.float16, device="cuda")
    assert torch.allclose(torch.nn.functional.linear(x, sparse), torch.nn.functional.linear(x, dense), atol=1e-2)


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_words() -> None:
    parse = lowbit.recipes.parse
    assert parse("magnitude50").encode == Magnitude(0.5)
    assert parse("magnitude62.5").encode == Magnitude(0.625)
    assert parse("magnitude2:4").encode == Magnitude(0.5, 4)
    assert parse("magnitude1:4-w4a16-g32").encode == Magnitude(0.25, 4)
    assert parse("magnitude50").scheme.weights == PLAIN
    mixed = parse("magnitude50-w16a8kv4").scheme
    assert mixed.weights == PLAIN and mixed.activations is not None and mixed.kv is not None
    assert not parse("magnitude50").calibrated
    document = lowbit.recipes.to_dict(parse("magnitude2:4"))
    assert lowbit.recipes.from_dict(document).recipe == parse("magnitude2:4")
    assert lowbit.recipes.resolve("magnitude50", settings=["magnitude.sparsity=0.3"]).recipe.encode == Magnitude(0.3)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("magnitude120", "sparsity is the part that is dropped, from 0 to 1, not 1.2"),
        ("magnitude2:0", "cannot read '2:0'"),
        ("magnitude5:4", "sparsity is the part"),
        ("magnitude2:4:8", "write per cent as in 50, or N:M zeros as in 2:4"),
        ("magnitude50+gptq", "gptq makes codes, and bf16 weights have none: drop gptq, or add for instance -w4a16"),
        ("magnitude50+gptaq-w4a16", "magnitude does not round by gptaq"),
        ("magnitude50+signround-w4a16", "signround trains plain codes"),
        ("magnitude50+wanda50", "both choose what a weight is made of"),
    ],
)
def test_unlawful_words_are_refused(recipe: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.recipes.parse(recipe)


def test_settings_that_make_no_whole_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0.5 of 5 inputs is no whole number"):
        Magnitude(0.5, 5)


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_rows_that_m_does_not_divide_are_refused_before_a_weight_is_read(tmp_path: Path, text: Path) -> None:
    model = save_model("llama", tmp_path / "model")
    with pytest.raises(ValueError, match=r"q_proj: 3:7 does not divide 64 inputs: choose a divisor"):
        lowbit.quantize(model, "magnitude3:7", tmp_path / "run")
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", "sparsegpt50"),
        ("opt", "wanda50+gptq-w4a16-g16"),
        ("opt", "sparsegpt2:4"),
        ("gpt2", "wanda2:4"),
        ("gpt2", "sparsegpt2:4-w4a16-g16"),
        ("mixtral", "wanda50"),
        ("mixtral", "sparsegpt2:4+gptq-w4a16-g16"),
    ],
)
def test_every_family_is_pruned_and_read_back(family: str, recipe: str, tmp_path: Path, text: Path) -> None:
    """Half of every linear is zero in the loaded model, nothing else is, and the plan told the bytes."""
    model = save_model(family, tmp_path / "model", dtype=torch.bfloat16)
    options = {"calibration": str(text), "samples": 8, "length": 32}
    result = lowbit.quantize(model, recipe, tmp_path / "run", **options)
    loaded, weights = lowbit.load(tmp_path / "run"), 0
    for module in loaded.modules():
        if hasattr(module, "layer"):
            values = module.layer.weight.dequantize()
            if ":" in recipe:
                assert (values.view(-1, 4) == 0).sum(1).ge(2).all()
            else:
                assert int((values == 0).sum()) >= values.numel() // 2 - len(values)
            weights += values.numel()
    stored = 0
    for file in (tmp_path / "run").glob("*.safetensors"):
        layers, _ = native.unpack(shard_header(file).metadata, read_shard(file))
        stored += sum(t.nbytes for name, each in layers.items() for t in native.pack(name, each).values())
    assert weights and result.bits_per_weight == pytest.approx(8 * stored / weights)
    ids = torch.randint(6, 100, (1, 12))
    assert loaded(ids).logits.isfinite().all()


def test_all_pruning_is_registered() -> None:
    assert {name for name, kind in ENCODES.items() if issubclass(kind, Pruning)} == {"magnitude", "wanda", "sparsegpt"}
