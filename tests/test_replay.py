"""Replayed steps: on a CPU the step itself; on a GPU, the same numbers from a recorded graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.numerics.replay import EAGER, Replayed, index

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_step_gives_what_it_gives_eagerly_while_its_parameters_move() -> None:
    weight = torch.randn(8, 8, device=DEVICE, requires_grad=True)

    def step(kind: int, x: Tensor) -> list[Tensor]:
        loss = (kind * torch.tanh(x @ weight)).square().sum()
        return [loss.detach(), torch.autograd.grad(loss, weight)[0]]

    replayed = Replayed(step, DEVICE)
    for call in range(3 * EAGER):
        x, kind = torch.randn(4, 8, device=DEVICE), 1 + call % 2
        found, expected = replayed(kind, x), step(kind, x)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        with torch.no_grad():
            weight -= 0.01 * found[1]
    assert len(replayed._graphs) == (2 if DEVICE.type == "cuda" else 0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    def step(_kind: int, x: Tensor) -> list[Tensor]:
        return [x * float(x.sum())]  # waits for the device

    replayed = Replayed(step, DEVICE)
    for _ in range(EAGER + 3):
        x = torch.randn(4, device=DEVICE)
        torch.testing.assert_close(replayed(0, x)[0], x * x.sum())
    assert not replayed._graphs


def test_index_tensors_are_made_once() -> None:
    assert index((2, 0), DEVICE) is index((2, 0), DEVICE)
    assert index((2, 0), DEVICE).tolist() == [2, 0]
