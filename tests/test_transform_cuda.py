"""The CUDA C++ of inputs to codes behind a map: its very source on a CPU (`emulated.cuh`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from test_dynamic import DEVICE, check, mixing, tokens
from test_kernels import GPU, compiled_ahead, needs_gcc
from torch import Tensor

from lowbit.kernels import dynamic, transform_cuda
from lowbit.kernels.compile import Constants
from lowbit.kernels.encoder import Encoder, encoder, reference
from lowbit.kernels.transform_cuda import Plan
from lowbit.numerics.maps import Hadamard, Kronecker, Map
from lowbit.numerics.spec import E4M3, Int, Number

Compile = Callable[..., Any]
on_a_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="runs where there is no GPU")


class Case(NamedTuple):
    """A kernel to compile, and how many tokens it is given."""

    map: Map
    number: Number
    tokens: tuple[int, ...]
    plan: Plan | None
    packed: bool = False
    clipped: bool = True
    processors: int = 1

    def encode(self, x: Tensor, how: Encoder, packed: bool) -> tuple[Tensor, Tensor]:
        """The kernel, of a case that it takes."""
        assert transform_cuda.shape_refusal(x, how) is None
        return transform_cuda.encode(x, how, packed, self.plan)

    def run(self, count: int) -> None:
        """One number of tokens, by the criteria of `test_dynamic`."""
        clip = torch.tensor([0.9, 0.8]) if self.clipped else None
        x = tokens(count, self.map.width, torch.bfloat16)
        check(x, self.number, self.map, clip, self.packed, self.encode)


CASES = {
    "both 64x64": Case(Hadamard(4096), Int(4), (3,), Plan(2, tiles=1), packed=True, clipped=False),
    "both 112x128": Case(mixing(112, 128), Int(8), (2, 4), Plan(3)),
    "both 128x128": Case(Hadamard(16384), E4M3, (1,), Plan(2, tiles=1)),
    "both 48x96": Case(mixing(48, 96), E4M3, (2, 4), Plan(3)),
    "both 64x80": Case(mixing(64, 80), Int(8), (2,), Plan(1, tiles=1)),
    "both 32x48": Case(mixing(32, 48), Int(4), (1, 4), Plan(3, tiles=1), packed=True),
    "both 16x32": Case(mixing(16, 32), Int(4), (1, 2, 7, 33), Plan(4), packed=True, processors=3),
    "left 32x192": Case(Hadamard(32, 192), Int(8, "symmetric-restricted"), (3,), Plan(2)),
    "left 112x128": Case(mixing(112, 128, right=False), Int(4), (2,), Plan(1, tiles=1), packed=True, clipped=False),
    "left 48x80": Case(mixing(48, 80, right=False), E4M3, (5,), Plan(3)),
    "right 64x128": Case(mixing(64, 128, left=False), Int(3, "symmetric-full"), (2,), Plan(1), clipped=False),
}
"""Every side, format and state of a plan, and the shapes of Llama 3."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compile]:
    """Emulated kernels, of which two are compiled at a time from the beginning."""

    def ask() -> None:
        for case in CASES.values():
            clip = torch.ones(2) if case.clipped else None
            x = torch.zeros(1, case.map.width).bfloat16()
            case.encode(x, encoder(case.number, case.map, clip, "cpu"), case.packed)

    with compiled_ahead(tmp_path_factory.mktemp("kernels"), transform_cuda, ask) as ready:
        yield ready


@pytest.fixture
def emulated(kernels: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real host code starts emulated kernels, and memory that nobody wrote is not what a code or a scale is."""
    new = torch.empty

    def empty(*shape: int, **options: Any) -> Tensor:
        made = new(*shape, **options)
        made.view(torch.uint8).fill_(0x55)
        return made if made.element_size() == 1 else made.fill_(float("nan"))

    monkeypatch.setattr(transform_cuda, "compiled", kernels)
    monkeypatch.setattr(transform_cuda, "processors", lambda _device: 1)
    monkeypatch.setattr(torch, "empty", empty)


@needs_gcc
@on_a_cpu
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", CASES)
def test_every_side_format_and_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than groups, fewer, and a number that leaves some groups out; one block and several."""
    monkeypatch.setattr(transform_cuda, "processors", lambda _device: CASES[name].processors)
    for count in CASES[name].tokens:
        CASES[name].run(count)


@needs_gcc
@on_a_cpu
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["both 112x128", "both 48x96", "both 64x80", "both 16x32", "left 48x80"])
def test_a_map_without_rounding_gives_the_very_codes_of_the_definition(name: str) -> None:
    """Signed permutations: nothing is added up, so quotients are the definition's, down to ties, at any size."""
    case = CASES[name]
    how = encoder(case.number, turned(case.map), torch.full((2,), 127.5 * 7 / 1024), "cpu")
    x = tokens(5, case.map.width, torch.bfloat16)
    x[0] = 3.5 * (2 * torch.randint(-18, 18, (case.map.width,)) + 1)  # halves of a scale of 7, if there are 8 bits
    x[0, 5] = 1024
    x[1] *= 2.0**100
    x[4] *= 2.0**-110
    same(case, x, how)


@needs_gcc
@on_a_cpu
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["both 16x32", "left 48x80"])
def test_tokens_and_ranges_at_the_ends(name: str) -> None:
    """Tokens as large as they come and as small, of one sign, and of one number far from all others; ranges of nothing
    and of more than there is."""
    case = CASES[name]
    map = turned(case.map)
    sizes = torch.tensor([2.0**125, 2.0**-117, 0.0, 8.0, 300.0])
    z = torch.zeros(10, map.width)
    z[:5] = (torch.rand(5, map.width) * 2 - 1) * sizes[:, None]
    z[5] = 2.0**-130 * (torch.randint(0, 2, (map.width,)) * 2 - 1)  # no normal number
    z[6], z[7] = 8 + 8 * torch.rand(map.width), -8 - 8 * torch.rand(map.width)
    z[8:] = torch.randint(-64, 65, (2, map.width)) / 64  # fp16 has them beside 2^17
    left, right = (None if side is None else side.T for side in (map.left, map.right))
    x = Kronecker(left, right, map.sizes).apply(z).bfloat16()
    x[8, 14] = x[9, 15] = -(2.0**17)
    for clip in ((0.0, 0.0), (1.5, 0.25), (0.0, 2.0)):
        same(case, x, encoder(case.number, map, torch.tensor(clip).half(), "cpu"))


@needs_gcc
@on_a_cpu
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["both 16x32", "left 48x80"])
def test_tokens_that_are_no_numbers_stay_alone(name: str) -> None:
    """The token behind them in their group is encoded as if they had not been."""
    case = CASES[name]
    how = encoder(case.number, turned(case.map), torch.ones(2), "cpu")
    x = tokens(9, case.map.width, torch.bfloat16)
    x[0], x[1, 7] = float("nan"), float("inf")
    same(case, x, how, first=2)


@needs_gcc
@on_a_cpu
@pytest.mark.usefixtures("emulated")
def test_inputs_may_lie_anywhere() -> None:
    """Not where 16 bytes can be read at once, and every second row of a matrix."""
    case = CASES["both 16x32"]
    how = encoder(case.number, turned(case.map), torch.ones(2), "cpu")
    wide = tokens(6, case.map.width, torch.bfloat16)
    odd = torch.zeros(wide.numel() + 1).bfloat16()
    odd[1:] = wide.flatten()
    same(case, odd[1:].view(wide.shape), how)
    same(case, wide[::2], how)


def turned(map: Map) -> Kronecker:
    """Signed permutations in place of a map's factors."""
    assert isinstance(map, Kronecker)

    def factor(n: int) -> Tensor:
        return torch.eye(n)[torch.randperm(n)] * (torch.randint(0, 2, (n,)) * 2 - 1)

    left, right = (None if side is None else factor(len(side)) for side in (map.left, map.right))
    return Kronecker(left, right, map.sizes)


def same(case: Case, x: Tensor, how: Encoder, first: int = 0) -> None:
    """The kernel's bytes are the definition's, from the token `first` on."""
    expected = reference(x, how, packed=case.packed)
    for found, wanted in zip(case.encode(x, how, case.packed), expected, strict=True):
        assert torch.equal(found[first:].view(torch.uint8), wanted[first:].contiguous().view(torch.uint8))


SIZES = [
    (n1, n2, sides)
    for n1, n2, *sides in itertools.product(range(16, 129, 16), range(16, 513, 16), (False, True), (False, True))
    if any(sides) and n1 * n2 <= 1 << 15 and (n2 <= 128 or not sides[1])
]
"""Of every map that the kernel takes: its sides, and which of them have factors."""


def test_a_plan_fills_a_processor_and_no_more() -> None:
    """Threads, their registers, barriers and shared memory, of which a block has what it holds and 15 bytes at most."""
    for (n1, n2, (left, right)), count in itertools.product(SIZES, (1, 132, 133, 2048, 132 * 840)):
        plan = transform_cuda.plan(n1, n2, left + right, count, 132)
        threads = plan.groups * plan.threads(n2)
        assert 1 <= plan.groups <= 15 and threads <= 1024
        numbers = plan.tiles * n1 // 2 + (left and right) * n1 // 4
        assert count <= 132 or threads * (numbers + 40) <= 1 << 16
        columns, rows = plan.threads(n2) // 2 * plan.tiles, -(-n1 // 64) * 64
        held = 2 * (left * rows * n1 + right * columns * n2 + plan.groups * columns * n1) + 3 * 4 * threads // 32
        assert held <= transform_cuda.shared_bytes(n1, n2, left, right, plan) <= min(held + 15, 227 * 1024)


def test_a_plan_leaves_few_places_empty() -> None:
    """No other number of groups, down to two thirds of the most that there may be, takes fewer places."""
    for (n1, n2, sides), count in itertools.product(SIZES, (133, 300, 1000, 2048)):
        plan = transform_cuda.plan(n1, n2, sum(sides), count, 132)
        whole = 132 * 840  # tokens that fill all rounds, however many places there are
        most = transform_cuda.plan(n1, n2, sum(sides), whole, 132).groups
        taken = {groups: math.ceil(count / (132 * groups)) * groups for groups in range(-(-2 * most // 3), most + 1)}
        assert taken[plan.groups] == min(taken.values())
    assert transform_cuda.plan(112, 128, 2, 2048, 132) == Plan(2)
    assert transform_cuda.plan(64, 64, 2, 2048, 132) == Plan(4, tiles=1)  # five would take four rounds as well
    assert transform_cuda.plan(64, 64, 2, 1, 132) == transform_cuda.plan(64, 64, 2, 132, 132) == Plan(1, tiles=1)


def test_a_start_follows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a map's own sizes and factors, on as many processors as there are tokens, and no more than there are."""
    asked: list[tuple[Any, ...]] = []

    def compiled(_name: str, constants: Constants, _device: object, shared: int) -> Callable[..., None]:
        known = dict(constants)
        return lambda grid, threads, arguments: asked.append((known["GROUPS"], known["TILES"], grid, threads, shared))

    monkeypatch.setattr(transform_cuda, "compiled", compiled)
    monkeypatch.setattr(transform_cuda, "processors", lambda _device: 3)
    for (n1, n2, (left, right)), count in itertools.product(
        [(112, 128, (True, True)), (16, 128, (False, True)), (128, 48, (True, False))], (2, 3, 40)
    ):
        map = mixing(n1, n2, left, right)
        transform_cuda.encode(torch.zeros(count, n1 * n2).bfloat16(), encoder(Int(8), map, None, "cpu"), False)
        plan = transform_cuda.plan(n1, n2, left + right, count, 3)
        shared = transform_cuda.shared_bytes(n1, n2, left, right, plan)
        assert asked.pop() == (*plan, (min(count, 3), 1), plan.groups * plan.threads(n2), shared)


def test_what_is_left_to_triton() -> None:
    """Inputs in fp16, sides of other sizes, no map."""
    x = torch.zeros(2, 4096).bfloat16()
    square = encoder(Int(8), Hadamard(4096), None, "cpu")
    assert transform_cuda.shape_refusal(x, square) is None
    assert transform_cuda.refusal(x, square) == "the kernel is for Hopper"
    assert "two parts" in str(transform_cuda.shape_refusal(x.half(), square))
    assert "no map" in str(transform_cuda.shape_refusal(x, encoder(Int(8), None, None, "cpu")))
    steps, many = "whole steps", "too many"
    for n1, n2, why in (
        (24, 32, steps), (32, 24, steps), (144, 64, many), (16, 528, many), (128, 64, ""), (16, 512, ""),
    ):  # fmt: skip
        map = mixing(n1, n2, left=n1 < 128, right=n2 < 128)
        found = transform_cuda.shape_refusal(x, encoder(Int(4), map, None, "cpu"))
        assert why in str(found) if why else found is None


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a Hopper")
@pytest.mark.parametrize("name", CASES)
def test_the_gpu_encodes_every_side_format_and_plan(name: str) -> None:
    """Under the plan of the case and, of many tokens, the rule's; and this is what `dynamic.encode` takes."""
    case = CASES[name]
    for count in case.tokens:
        case.run(count)
    case._replace(plan=None).run(300)
    how = encoder(case.number, case.map, torch.tensor([0.9, 0.8]) if case.clipped else None, "cuda")
    x = tokens(300, case.map.width, torch.bfloat16)
    found, direct = dynamic.encode(x, how, packed=case.packed), transform_cuda.encode(x, how, case.packed)
    assert all(torch.equal(*(part.view(torch.uint8) for part in pair)) for pair in zip(found, direct, strict=True))
