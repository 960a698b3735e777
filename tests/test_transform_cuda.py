"""The CUDA C++ of inputs to codes behind a map: its very source on a CPU (`emulated.cuh`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from test_dynamic import DEVICE, check, mixing, tokens
from test_kernels import GPU, compiled_ahead, needs_gcc
from torch import Tensor

from lowbit.kernels import dynamic, transform_cuda
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
    "both 16x32": Case(mixing(16, 32), Int(4), (1, 2, 7, 33), Plan(4), packed=True),
    "left 32x128": Case(Hadamard(32, 128), Int(8, "symmetric-restricted"), (3,), Plan(2)),
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
def test_every_side_format_and_plan(name: str) -> None:
    """More tokens than groups, fewer, and a number that leaves some groups out."""
    for count in CASES[name].tokens:
        CASES[name].run(count)


@needs_gcc
@on_a_cpu
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["both 112x128", "both 48x96", "both 64x80", "both 16x32", "left 48x80"])
def test_a_map_without_rounding_gives_the_very_codes_of_the_definition(name: str) -> None:
    """Signed permutations: nothing is added up, so quotients are the definition's, down to ties, at any size."""
    case = CASES[name]
    assert isinstance(case.map, Kronecker)

    def turned(n: int) -> Tensor:
        return torch.eye(n)[torch.randperm(n)] * (torch.randint(0, 2, (n,)) * 2 - 1)

    left, right = (None if side is None else turned(len(side)) for side in (case.map.left, case.map.right))
    how = encoder(case.number, Kronecker(left, right, case.map.sizes), torch.full((2,), 127.5 * 7 / 1024), "cpu")
    x = tokens(5, case.map.width, torch.bfloat16)
    x[0] = 3.5 * (2 * torch.randint(-18, 18, (case.map.width,)) + 1)  # halves of a scale of 7, if there are 8 bits
    x[0, 5] = 1024
    x[1] *= 2.0**100
    x[4] *= 2.0**-110
    expected = reference(x, how, packed=case.packed)
    for found, wanted in zip(case.encode(x, how, case.packed), expected, strict=True):
        assert torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8))


def test_a_plan_fills_a_processor_and_no_more() -> None:
    for n1 in range(16, 129, 16):
        for n2 in (*range(16, 129, 16), 224, 512):
            for sides, count in itertools.product((1, 2), (1, 132, 133, 2048)):
                plan = transform_cuda.plan(n1, n2, sides, count, 132)
                assert 1 <= plan.groups <= 15 and plan.groups * plan.threads(n2) <= 1024
                if n1 * n2 <= 1 << 15:
                    assert transform_cuda.shared_bytes(n1, n2, True, sides == 2 and n2 <= 128, plan) <= 227 * 1024
    assert transform_cuda.plan(112, 128, 2, 2048, 132) == Plan(2)
    assert transform_cuda.plan(64, 64, 2, 2048, 132) == Plan(4, tiles=1)  # five would take four rounds as well
    assert transform_cuda.plan(64, 64, 2, 1, 132) == Plan(1, tiles=1)


def test_what_is_left_to_triton() -> None:
    """Inputs in fp16, sides of other sizes, no map."""
    x = torch.zeros(2, 4096).bfloat16()
    square = encoder(Int(8), Hadamard(4096), None, "cpu")
    assert transform_cuda.shape_refusal(x, square) is None
    assert transform_cuda.refusal(x, square) == "the kernel is for Hopper"
    assert "two parts" in str(transform_cuda.shape_refusal(x.half(), square))
    assert "no map" in str(transform_cuda.shape_refusal(x, encoder(Int(8), None, None, "cpu")))
    for map, why in ((mixing(20, 32), "whole steps"), (mixing(256, 64, left=False), "too many")):
        assert why in str(transform_cuda.shape_refusal(x, encoder(Int(4), map, None, "cpu")))


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
