"""Experts in parts of a stack: what a part is, what it takes, and AWQ's searches over many experts at once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY
from tiny import save_model, save_text
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit import graph
from lowbit.graph.anatomy import Anatomy
from lowbit.methods import awq
from lowbit.methods.awq import AWQ, AWQClip, candidate, mean_share
from lowbit.methods.base import StackingClip, StackingTransform
from lowbit.methods.gptq import GPTQ, Columns
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.stacked import _Columns
from lowbit.methods.views import EdgeStack, Stats
from lowbit.numerics.grid import fit_range
from lowbit.numerics.spec import E2M1, Int, Spec, per_group
from lowbit.numerics.stats import Gram
from lowbit.stream import edge_stack, plan, rounding, sweep
from lowbit.stream.memory import at_home, in_parts
from lowbit.stream.rounding import entry_bytes, stack_limit

GIB = 1 << 30
FORMATS = {
    "int4": per_group(Int(4), 32),
    "asymmetric": per_group(Int(3, "asymmetric"), 32),
    "least values": per_group(Int(4, "asymmetric"), 32, scale="float16-min"),
    "fp4": per_group(E2M1, 32),
    "by row": Spec(Int(4), (1, -1), "float32"),
}


def experts(count: int, rows: int, columns: int) -> tuple[list[Tensor], list[Stats]]:
    """Weights [O, I], and statistics of correlated inputs of different sizes and numbers."""
    stats = []
    for entry in range(count):
        x = torch.randn(columns + 50 * entry, columns) @ torch.randn(columns, columns) * torch.rand(columns)
        seen = Stats.observing(frozenset({"gram", "absmean"}))
        seen.update(x)
        seen.hessian()
        stats.append(seen)
    return [torch.randn(rows, columns) for _ in range(count)], stats


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("limit", [0, 9, 10, 25, 30, 79, 10_000])
@pytest.mark.parametrize("least", [1, 2, 5])
def test_parts_are_as_few_as_the_limit_allows_and_even(count: int, limit: int, least: int) -> None:
    parts = in_parts(range(count), 10, limit, least)
    assert [item for part in parts for item in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) == 1 or 10 * max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1 and len(parts) >= min(least, count)
    assert len(parts) <= least or 10 * -(-count // (len(parts) - 1)) > limit  # one part less would be too large


def test_mixtrals_experts_are_some_at_a_time_on_80_gib_and_fewer_under_a_budget() -> None:
    """Of its plan: a block of 2.7 GiB, work on it of 14.4, 2 GiB of states; weights [28672, 4096] and [4096, 14336]."""
    shapes = [(28672, 4096), (4096, 14336)]

    def at_once(gib: float) -> list[int]:
        limit = stack_limit(int(gib * GIB), int((2 * 2.7 + 14.4 + 2) * GIB))
        assert limit <= gib * GIB / 5 and (not limit or 2 * limit <= (gib - 21.1) * GIB)
        return [len(in_parts(range(8), entry_bytes(shape), limit)[0]) for shape in shapes]

    assert at_once(79.2) == [4, 4]
    assert at_once(40) == [2, 2] and at_once(24) == [1, 1] and at_once(6) == [1, 1]


def test_states_are_at_home_in_less_than_two_fifths() -> None:
    assert at_home(39, 100) and not at_home(40, 100)


@pytest.mark.parametrize("shape", [(256, 96), (96, 256)])
@pytest.mark.parametrize("name", ["int4", "asymmetric", "fp4"])
def test_a_part_takes_what_it_is_said_to_take(
    shape: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most memory that is held at a time, counted by the profiler, beside weights in 16 bits and Gram matrices."""
    monkeypatch.setitem(awq._AT_ONCE, "cpu", 1 << 25)
    weights, stats = experts(4, *shape)
    stored, bound = [weight.bfloat16() for weight in weights], 4 * entry_bytes(shape)

    def rounded() -> None:
        GPTQ().round_stack([each.float() for each in stored], FORMATS[name], AWQClip(), stats, scores=False)

    def searched() -> None:
        AWQ(grid=3).fold_stack(Stack([each.float() for each in stored], stats, FORMATS[name]))

    assert 0.6 * bound < most_held(rounded) <= bound
    assert most_held(searched) <= bound


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_a_stack_are_what_the_whole_is(size: int, act_order: bool) -> None:
    """Of eight, byte for byte, on a CPU, where a batch of products is one product after the other."""
    weights, stats = experts(8, 24, 160)
    method, clip = GPTQ(act_order=act_order, block=64), AWQClip()
    whole = method.round_stack(weights, FORMATS["asymmetric"], clip, stats, scores=False)
    for part in in_parts(range(8), 1, size):
        taken, seen = [weights[entry] for entry in part], [stats[entry] for entry in part]
        found = method.round_stack(taken, FORMATS["asymmetric"], clip, seen, scores=False)
        for entry, codes in zip(part, found, strict=True):
            assert torch.equal(codes.codes, whole[entry].codes)
            assert torch.equal(codes.grid.scale, whole[entry].grid.scale)


def most_held(function: Callable[[], None]) -> int:
    """The largest sum of bytes that the function holds at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# --- limits of levels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        per_group(Int(4), 16),
        per_group(Int(3, "asymmetric"), 16),
        per_group(Int(4, "asymmetric"), 16, scale="integer"),
        per_group(Int(4, "asymmetric"), 16, scale="float16-min"),
    ],
    ids=str,
)
def test_limits_of_one_weight_and_of_a_stack_are_the_formulas(spec: Spec) -> None:
    weights = [torch.randn(6, 48) * torch.rand(6, 1).exp() for _ in range(3)]
    grids = [fit_range(weight, spec) for weight in weights]
    stack = _Columns(grids, weights[0].shape, [torch.arange(48)] * 3)
    assert isinstance(spec.number, Int)
    for entry, grid in enumerate(grids):
        own = Columns(grid, weights[0].shape, [column // 16 for column in range(48)])
        assert torch.equal(own.limits, stack.limits[entry])
        for row in range(6):
            for group in range(3):
                zero = 0.0 if grid.zero is None else float(grid.zero[row, group])
                ends = [spec.number.low - zero, spec.number.high - zero]
                if grid.reach is not None:
                    reach = float(grid.reach[row, group])
                    ends = [min(max(end, -reach), reach) for end in ends]
                assert own.limits[group, :, row].tolist() == ends


# --- searches over many at once ---------------------------------------------------------------------------------------


@dataclass
class Stack:
    """An `EdgeStack` of plain linears."""

    readers: Sequence[Tensor]
    stats: Sequence[Stats]
    spec: Spec

    @property
    def weights(self) -> Tensor:
        return torch.stack(list(self.readers))

    @property
    def absmean(self) -> Tensor:
        return torch.stack([seen.absmean.mean for seen in self.stats if seen.absmean is not None])

    def errors(self, weights: Tensor) -> Tensor:
        difference = weights - self.weights
        hessians = torch.stack([seen.hessian() for seen in self.stats])
        tokens = torch.tensor([seen.tokens for seen in self.stats], device=weights.device)
        return ((difference @ hessians) * difference).sum((1, 2)) / tokens


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_expert_gets_the_scale_of_its_own_search(name: str, duo: bool) -> None:
    """Against a search expert by expert, errors d H dᵀ in fp64; of two that are as good either may be taken."""
    weights, stats = experts(5, 24, 64)
    stack: EdgeStack = Stack(weights, stats, FORMATS[name])
    found = AWQ(duo=duo).fold_stack(stack)
    chosen = set()
    for weight, seen, fold in zip(weights, stats, found, strict=True):
        assert fold is not None and seen.absmean is not None
        share = mean_share([weight], [FORMATS[name]]) if duo else None
        errors = []
        for k in range(20):
            s = candidate(seen.absmean.mean, share, k / 20)
            d = (fit_range(weight * s, FORMATS[name]).quantize(weight * s) / s - weight).double()
            errors.append(float(((d @ seen.hessian().double()) * d).sum()))
        scales = [candidate(seen.absmean.mean, share, k / 20) for k in range(20)]
        taken = [k for k in range(20) if torch.allclose(fold.scale, scales[k], rtol=1e-5)]
        assert len(taken) == 1 and errors[taken[0]] <= (1 + 1e-4) * min(errors)
        chosen.add(taken[0])
    assert len(chosen) > 1


def test_an_edge_without_a_finite_error_is_left_alone_and_its_neighbours_are_not() -> None:
    weights, stats = experts(3, 8, 32)
    weights[1][2, 3] = torch.nan
    found = AWQ().fold_stack(Stack(weights, stats, FORMATS["int4"]))
    assert [fold is None for fold in found] == [False, True, False]


@pytest.mark.parametrize("together", [1, 2, 3, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_ranges_of_many_are_those_of_each(name: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five weights, so many of them at once."""
    weights, stats = experts(5, 24, 64)
    monkeypatch.setitem(awq._AT_ONCE, "cpu", together * 24 * 64)
    found = AWQClip().fit_stack(weights, FORMATS[name], stats, scores=False)
    clipped = 0.0
    for weight, seen, grid in zip(weights, stats, found, strict=True):
        single = AWQClip().fit(weight, FORMATS[name], seen, scores=False)
        for ours, theirs in ((grid.scale, single.scale), (grid.zero, single.zero), (grid.offset, single.offset)):
            assert ours is theirs is None or (ours is not None and theirs is not None and torch.equal(ours, theirs))
        clipped += float((grid.scale < fit_range(weight, FORMATS[name]).scale).float().mean()) / len(weights)
    assert clipped > 0.3


@pytest.mark.parametrize(
    "spec", [per_group(E2M1, 16, scale="e4m3"), Spec(Int(4), (8, 8), "float32"), per_group(Int(4), 16)], ids=str
)
def test_what_cannot_be_searched_at_once_is_searched_singly(spec: Spec) -> None:
    """Scales relative to one of the whole weight, squares; of queries and keys no ranges are searched."""
    weights, stats = experts(3, 16, 32)
    for scores in (False, True):
        found = AWQClip().fit_stack(weights, spec, stats, scores=scores)
        for weight, seen, grid in zip(weights, stats, found, strict=True):
            assert torch.equal(grid.scale, AWQClip().fit(weight, spec, seen, scores=scores).scale)


@pytest.mark.parametrize("at_once", [1, 24 * 64, 3 * 24 * 64, 1 << 20])
def test_candidates_are_rounded_as_if_one_by_one(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: shapes, formats, and relative scales among them, in any order."""
    monkeypatch.setitem(awq._AT_ONCE, "cpu", at_once)
    shapes = [(24, 64), (24, 64), (8, 64), (24, 64), (24, 64), (24, 64), (24, 64), (24, 64), (24, 64)]
    weights, spread = [torch.randn(shape) for shape in shapes], torch.rand(64) + 0.5
    nvfp4, double = per_group(E2M1, 16, scale="e4m3"), per_group(Int(4), 16, scale="double")
    specs = [FORMATS["int4"], nvfp4, FORMATS["int4"], None, FORMATS["int4"], nvfp4, double, FORMATS["int4"], double]
    for weight, spec, made in zip(weights, specs, awq.rounded(weights, specs, spread), strict=True):
        if spec is None:
            assert made is weight
        else:
            assert torch.equal(made, fit_range(weight * spread, spec).quantize(weight * spread) / spread)


def test_rounding_to_nearest_takes_stacks_too() -> None:
    weights, stats = experts(4, 24, 64)
    for clip in (AWQClip(), MinMaxClip()):
        found = RTN().round_stack(weights, FORMATS["asymmetric"], clip, stats, scores=False)
        for weight, seen, codes in zip(weights, stats, found, strict=True):
            single = RTN().round(weight, FORMATS["asymmetric"], clip, seen, scores=False)
            assert torch.equal(codes.codes, single.codes) and torch.equal(codes.grid.scale, single.grid.scale)


def test_what_stacks_says_so() -> None:
    assert isinstance(AWQ(), StackingTransform) and isinstance(AWQClip(), StackingClip)
    assert not isinstance(MinMaxClip(), StackingClip)


# --- whole mixtures ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A text, and models with one block of experts, Mixtral with two; an anatomy, half of a run, is proved once."""
    path = tmp_path_factory.mktemp("mixtures")
    save_text(path / "text.txt")
    proved, discover = {}, graph.discover

    def discovered(config: Any, skeleton: Any) -> Anatomy:
        if config.model_type not in proved:
            proved[config.model_type] = discover(config, skeleton)
        return proved[config.model_type]

    with pytest.MonkeyPatch.context() as patch:
        for family, layers in (("mixtral", 2), ("deepseek_v3", 2), ("qwen3_moe", 1)):
            config = TINY[family]()
            config.num_hidden_layers = layers
            patch.setitem(TINY, family, lambda config=config: config)
            save_model(family, path / family)
        patch.setattr(graph, "discover", discovered)
        yield path


@pytest.fixture(scope="module")
def singly(root: Path) -> Callable[[str, str], tuple[Path, dict[str, str]]]:
    """What a recipe makes of a family without stacks, and where; made once."""

    @cache
    def made(family: str, recipe: str) -> tuple[Path, dict[str, str]]:
        output = root / f"{family}-{recipe}"
        return output, quantize(root, family, recipe, output)

    return made


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Called with a number, lets experts be stacked on the CPU too, so many at a time; returns the sizes of stacks."""
    sizes: list[int] = []

    def of(size: int) -> list[int]:
        monkeypatch.setattr(rounding, "STACKED", ("cpu",))
        monkeypatch.setattr(plan, "stack_bytes", lambda *_: size)
        for module in (rounding, edge_stack):
            monkeypatch.setattr(module, "entry_bytes", lambda _shape: 1)
        sizes.clear()
        return sizes

    for module, name in ((rounding, "_rounded_stack"), (AWQ, "fold_stack")):
        original = getattr(module, name)

        def noted(*arguments: Any, _original: Any = original) -> Any:
            first = arguments[1]
            sizes.append(len(first.views) if hasattr(first, "views") else len(first))
            return _original(*arguments)

        monkeypatch.setattr(module, name, noted)
    return of


def quantize(root: Path, family: str, recipe: str, output: Path, **options: Any) -> dict[str, str]:
    """Checksums of the shards."""
    options = {"calibration": str(root / "text.txt"), "samples": 12, "length": 16, **options}
    lowbit.quantize(root / family, recipe, output, **options)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in output.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "recipe", "size"),
    [
        ("mixtral", "awq-w4a16-g32", 2),
        ("qwen3_moe", "awq-w3a16-g32", 4),
        ("deepseek_v3", "awq-w4a16-g16-asym", 3),
    ],
)
def test_awq_makes_the_choices_that_it_makes_one_by_one(
    root: Path, tmp_path: Path, singly: Any, parts: Any, family: str, recipe: str, size: int
) -> None:
    """Scales, ranges and so codes: the same shards, byte for byte; of four experts, and of eight, three at most."""
    _, single = singly(family, recipe)
    sizes = parts(size)
    assert quantize(root, family, recipe, tmp_path / "stacked") == single and max(sizes) == size


def test_edges_whose_inputs_are_quantized_are_tried_by_replaying_them(root: Path, tmp_path: Path, parts: Any) -> None:
    """One by one, since the Gram matrix does not tell what becomes of them; ranges are searched for many."""

    def refused(*_: Any) -> None:
        raise AssertionError("these edges are no stack")

    single = quantize(root, "mixtral", "awq-w4a8-g32", tmp_path / "single", samples=8)
    sizes = parts(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AWQ, "fold_stack", refused)
        assert quantize(root, "mixtral", "awq-w4a8-g32", tmp_path / "stacked", samples=8) == single and sizes


def test_parts_of_one_are_no_stacks(root: Path, tmp_path: Path, singly: Any, parts: Any) -> None:
    """So an expert that is too large for two of it is rounded as it always was."""
    _, single = singly("mixtral", "gptq-w4a16-g32")
    sizes = parts(1)
    assert quantize(root, "mixtral", "gptq-w4a16-g32", tmp_path / "parts") == single and not sizes


def test_a_mixture_in_parts_is_what_it_is_in_whole_stacks(root: Path, tmp_path: Path, parts: Any) -> None:
    sizes = parts(4)
    whole = quantize(root, "mixtral", "awq+gptq-w4a16-g16", tmp_path / "whole")
    assert max(sizes) == 4
    sizes = parts(2)
    assert quantize(root, "mixtral", "awq+gptq-w4a16-g16", tmp_path / "parts") == whole and max(sizes) == 2


def test_a_run_goes_on_with_the_stacks_that_it_began_with(root: Path, tmp_path: Path, parts: Any) -> None:
    """Whatever the GPU leaves by then; a new run takes what there is."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sizes = parts(2)
    expected = quantize(root, "mixtral", "gptq-w4a16-g32", whole)
    shutil.copytree(whole, cut)
    for name in ("model-00003-of-00003.safetensors", "reports/block-00001.json", "model.safetensors.index.json"):
        (cut / name).unlink()
    sizes = parts(4)
    assert quantize(root, "mixtral", "gptq-w4a16-g32", cut) == expected and max(sizes) == 2
    assert json.loads((cut / "plan.json").read_text())["stack_bytes"] == 2
    quantize(root, "mixtral", "gptq-w4a16-g32", cut, restart=True)
    assert max(sizes) == 4


def test_every_lane_has_a_stack(root: Path, tmp_path: Path, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one GPU of two would have nothing to do. The number of GPUs itself decides nothing."""
    monkeypatch.setattr(sweep, "MICRO_BATCH", 64)
    sizes = parts(4)
    quantize(root, "mixtral", "gptq-w4a16-g32", tmp_path / "one")
    assert max(sizes) == 4
    sizes.clear()
    quantize(root, "mixtral", "gptq-w4a16-g32", tmp_path / "two", lanes=2)
    assert max(sizes) == 2


def test_nothing_is_said_of_stacks_where_there_are_none(singly: Any) -> None:
    output, _ = singly("mixtral", "gptq-w4a16-g32")
    assert "stack_bytes" not in json.loads((output / "plan.json").read_text())


class Counted(TorchDispatchMode):
    """How many operations were started."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_search_for_many_starts_few_operations() -> None:
    """They are what a GPU waits for: of 16 experts it is about as many as of one, but for their Gram matrices."""

    def operations(count: int, together: bool) -> int:
        weights, stats = experts(count, 8, 32)
        with Counted() as seen:
            if together:
                AWQClip().fit_stack(weights, FORMATS["int4"], stats, scores=False)
            else:
                for weight, each in zip(weights, stats, strict=True):
                    AWQClip().fit(weight, FORMATS["int4"], each, scores=False)
        return seen.count

    assert operations(16, together=True) < 2 * operations(1, together=False) < operations(16, together=False) / 6


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_a_gpu_searches_for_many_as_for_each(name: str) -> None:
    """Ranges and scales: the same but where the last bits of an error decide."""
    weights, stats = experts(6, 96, 256)
    weights = [weight.cuda() for weight in weights]
    for seen in stats:
        assert seen.gram is not None and seen.absmean is not None and seen.absmean._sum is not None
        seen.gram, seen.absmean._sum = Gram.of(seen.hessian().cuda(), seen.tokens), seen.absmean._sum.cuda()
    found = AWQClip().fit_stack(weights, FORMATS[name], stats, scores=False)
    for weight, seen, grid in zip(weights, stats, found, strict=True):
        single = AWQClip().fit(weight, FORMATS[name], seen, scores=False)
        assert (grid.scale == single.scale).float().mean() > 0.98
    together = AWQ().fold_stack(Stack(weights, stats, FORMATS[name]))
    singly = [AWQ().fold_stack(Stack([w], [s], FORMATS[name]))[0] for w, s in zip(weights, stats, strict=True)]
    assert sum(torch.allclose(a.scale, b.scale) for a, b in zip(together, singly, strict=True) if a and b) >= 5
