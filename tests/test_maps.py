"""Hadamard matrices, maps and rotations against their definitions, written out densely; Cayley SGD against its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.numerics.cayley import CayleySGD, cayley_step, orthonormal
from lowbit.numerics.hadamard import hadamard, hadamard_factor, hadamard_factors, has_hadamard
from lowbit.numerics.maps import (
    Hadamard,
    Kronecker,
    Map,
    PermutedKronecker,
    Rescaled,
    SignedHadamard,
    around_mean,
    hadamard_or_orthogonal,
    incoherent,
    kronecker_sizes,
    map_from,
    mean_preserving,
    random_hadamard,
    random_orthogonal,
    signs,
)

ORDERS = [1, 2, 4, 12, 20, 24, 28, 36, 44, 52, 60, 76, 104, 108, 140, 148, 224, 344]
WIDTHS = [576, 688, 896, 1376, 1792, 4864, 11008, 13824, 14336, 18944, 29568]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_orthogonal(q: Tensor, tolerance: float = 1e-12) -> None:
    assert (q @ q.T - torch.eye(len(q), dtype=q.dtype)).abs().max() < tolerance


# --- Hadamard matrices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal_in_integers(n: int) -> None:
    h = hadamard(n)
    assert h.dtype == torch.int8 and h.shape == (n, n) and set(h.flatten().tolist()) <= {1, -1}
    assert torch.equal(h.int() @ h.int().T, n * torch.eye(n, dtype=torch.int32))


@pytest.mark.parametrize("n", WIDTHS)
def test_widths_of_real_models_are_products_of_hadamard_matrices(n: int) -> None:
    factors = hadamard_factors(n)
    assert factors is not None and math.prod(factors) == n and max(factors) <= 924
    for order in factors:
        h = hadamard_factor(order).int()
        assert set(h.flatten().tolist()) == {1, -1}
        assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.int32))


def test_the_power_of_two_is_as_large_as_can_be() -> None:
    odd = {n: next(iter(hadamard_factors(n) or ())) for n in (576, 1792, 4864, 11008, 13824, 14336, 1376)}
    assert odd == {576: 36, 1792: 28, 4864: 76, 11008: 344, 13824: 108, 14336: 28, 1376: 344}


def test_sylvester_and_jacobsthal_by_their_definitions() -> None:
    sylvester = [[(-1) ** (i & j).bit_count() for j in range(64)] for i in range(64)]
    assert hadamard(64).tolist() == sylvester

    def character(a: int, p: int) -> int:  # Euler's criterion
        power = pow(a % p, (p - 1) // 2, p)
        return -1 if power == p - 1 else power

    assert hadamard(12)[1:, 1:].tolist() == [[character(i - j, 11) + (i == j) for j in range(11)] for i in range(11)]
    expected = [[character(i - j, 17) or 1 for j in range(17)] for i in range(17)]  # top left of every 2 x 2 block
    assert hadamard(36)[2::2, 2::2].tolist() == expected


@pytest.mark.parametrize("n", [0, 3, 6, 9, 14, 92, 172, -4])
def test_orders_out_of_reach_are_refused(n: int) -> None:
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"order {n} "):
        hadamard(n)
    with pytest.raises(ValueError, match=f"order {n};"):
        Hadamard(n)


def test_products_of_paley_orders() -> None:
    """1904 = 16 · 119 and none of its divisors that 119 divides is a Paley order, but 28 and 68 are."""
    assert hadamard_factors(1904) == (28, 68)
    h = hadamard(1904).float()
    assert torch.equal(h @ h.T, 1904 * torch.eye(1904))


# --- maps -------------------------------------------------------------------------------------------------------------


def permuted_kronecker(first: int, second: int, seed: int) -> Tensor:
    """QuIP's map entry by entry, from the same draws."""
    n, generator = first * second, torch.Generator().manual_seed(seed)
    before, behind = torch.randperm(n, generator=generator).tolist(), torch.randperm(n, generator=generator).tolist()
    left, right = random_orthogonal(first, generator), random_orthogonal(second, generator)
    dense = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            (a, b), (c, d) = divmod(i, second), divmod(behind[j], second)
            dense[before[i], j] = left[a, c] * right[b, d]
    return dense


def signed_hadamard(n: int, seed: int) -> Tensor:
    return torch.diag(signs(n, seed).double()) @ hadamard(n).double() * n**-0.5


SCALE = gaussian(24, seed=5).exp().half()
LEFT, RIGHT, EYE = gaussian(6, 6), gaussian(8, 8, seed=1), torch.eye(4, dtype=torch.float64)
MAPS: dict[str, tuple[Map, Tensor]] = {
    "H12": (Hadamard(12), hadamard(12).double() * 12**-0.5),
    "H64": (Hadamard(64), hadamard(64).double() / 8),
    "H1792": (Hadamard(1792), hadamard(1792).double() * 1792**-0.5),
    "H512": (Hadamard(512), hadamard(512).double() * 512**-0.5),
    "H28xI5": (Hadamard(28, 5), torch.kron(hadamard(28).double() * 28**-0.5, torch.eye(5, dtype=torch.float64))),
    "kron": (Kronecker(LEFT, RIGHT, (6, 8)), torch.kron(LEFT, RIGHT)),
    "left": (Kronecker(LEFT, None, (6, 4)), torch.kron(LEFT, EYE)),
    "right": (Kronecker(None, RIGHT, (4, 8)), torch.kron(EYE, RIGHT)),
    "permuted": (PermutedKronecker(24, 7), permuted_kronecker(4, 6, 7)),
    "permuted back": (PermutedKronecker(24, 7, back=True), permuted_kronecker(4, 6, 7).T),
    "permuted prime": (PermutedKronecker(13, 7), permuted_kronecker(1, 13, 7)),
    "signed": (SignedHadamard(24, 2**40), signed_hadamard(24, 2**40)),
    "signed back": (SignedHadamard(24, 3).inverse, signed_hadamard(24, 3).T),
    "signed 1792": (SignedHadamard(1792, 1, back=True), signed_hadamard(1792, 1).T),
    "rescaled": (Rescaled(SCALE, SignedHadamard(24, 3)), torch.diag(SCALE.double()) @ signed_hadamard(24, 3)),
    "rescaled kron": (
        Rescaled(SCALE, Kronecker(LEFT, None, (6, 4))),
        torch.diag(SCALE.double()) @ torch.kron(LEFT, EYE),
    ),
    "identity": (Kronecker(None, None, (3, 4)), torch.eye(12, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", MAPS)
def test_fast_is_dense(name: str) -> None:
    fast, dense = MAPS[name]
    x = gaussian(2, 3, len(dense))
    assert fast.width == len(dense)
    torch.testing.assert_close(fast.matrix(), dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(fast.apply(x), x @ dense, rtol=0, atol=1e-11)
    single = fast.apply(x.float())
    torch.testing.assert_close(single.double(), x.float().double() @ dense, rtol=0, atol=2e-5)
    assert torch.equal(fast.apply(x.bfloat16()), fast.apply(x.bfloat16().float()).bfloat16())
    assert fast.apply(x[:, :0]).shape == (2, 0, len(dense))


@pytest.mark.parametrize("name", MAPS)
def test_inverse_weight_undoes_the_map(name: str) -> None:
    fast, dense = MAPS[name]
    x, weight = gaussian(3, len(dense)), gaussian(5, len(dense), seed=2)
    moved = fast.inverse_weight(weight)
    torch.testing.assert_close(moved @ dense.T, weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast.apply(x) @ moved.T, x @ weight.T, rtol=0, atol=1e-10)
    assert torch.equal(fast.inverse_weight(weight.float()), fast.inverse_weight(weight.float().double()).float())


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_written_and_read(name: str) -> None:
    fast, _ = MAPS[name]
    again = map_from(json.loads(json.dumps(fast.describe())), fast.tensors())
    x = gaussian(3, fast.width)
    assert type(again) is type(fast) and torch.equal(again.apply(x), fast.apply(x))
    assert torch.equal(fast.to("cpu").apply(x), fast.apply(x))


@pytest.mark.parametrize("width", [1, 13, 24, 60, 96])
@pytest.mark.parametrize("fast", [False, True])
def test_incoherent_maps_are_orthogonal_and_come_from_a_seed(width: int, fast: bool) -> None:
    drawn = incoherent(width, 5, fast=fast)
    assert isinstance(drawn, SignedHadamard if fast and has_hadamard(width) else PermutedKronecker)
    assert drawn.tensors() == {} and drawn == incoherent(width, 5, fast=fast)
    assert_orthogonal(drawn.matrix())
    x = gaussian(3, width, dtype=torch.float32)
    assert (drawn.inverse.apply(drawn.apply(x)) - x).abs().max() < 1e-5
    assert width == 1 or not torch.equal(drawn.matrix(), incoherent(width, 6, fast=fast).matrix())


@pytest.mark.parametrize("fast", [False, True])
def test_incoherent_maps_spread_every_feature(fast: bool) -> None:
    """No entry stands out: the largest of n² is a few times the 1/√n of a Hadamard matrix."""
    entries = incoherent(576, 0, fast=fast).matrix().abs() * 24
    assert entries.max() < (1.0001 if fast else 15) and abs(float(entries.square().mean()) - 1) < 1e-9


def test_an_unknown_map_is_refused() -> None:
    with pytest.raises(ValueError, match="order 6;"):
        SignedHadamard(6, 0)
    with pytest.raises(ValueError, match="'spiral' is no map"):
        map_from({"kind": "spiral"}, {})


def test_gradients_pass_through_kronecker_factors() -> None:
    left, right, x = (gaussian(3, 3).requires_grad_(), gaussian(4, 4).requires_grad_(), gaussian(2, 12))

    def both(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        learned = Kronecker(left, right, (3, 4))
        return learned.apply(x), learned.inverse_weight(x)

    assert torch.autograd.gradcheck(both, (left, right))


def test_across_heads_and_within_heads_is_the_whole_transform() -> None:
    within = Kronecker(None, hadamard(16).double() / 4, (8, 16))
    x = gaussian(5, 128)
    torch.testing.assert_close(Hadamard(8, 16).apply(within.apply(x)), Hadamard(128).apply(x), rtol=0, atol=1e-13)


def test_counts_without_a_hadamard_matrix_get_an_orthogonal_one() -> None:
    for heads in (9, 14):
        stand_in = hadamard_or_orthogonal(heads, 4, seed=3)
        assert isinstance(stand_in, Kronecker) and stand_in.width == 4 * heads and set(stand_in.tensors()) == {"left"}
        assert_orthogonal(stand_in.matrix(), 1e-6)
        x = gaussian(2, stand_in.width)
        assert torch.equal(stand_in.apply(x), hadamard_or_orthogonal(heads, 4, seed=3).apply(x))
        assert not torch.equal(stand_in.apply(x), hadamard_or_orthogonal(heads, 4, seed=4).apply(x))
    assert hadamard_or_orthogonal(32, 128) == Hadamard(32, 128)


def test_kronecker_sizes_are_nearest_the_root() -> None:
    known = {4096: (64, 64), 11008: (86, 128), 14336: (112, 128), 5120: (64, 80), 576: (24, 24), 4864: (64, 76)}
    assert {n: kronecker_sizes(n) for n in known} == known
    for n in (1, 2, 6, 7, 10, 97):
        best = min(((a, n // a) for a in range(1, n + 1) if n % a == 0 and a <= n // a), key=sum)
        assert kronecker_sizes(n) == best


# --- rotations --------------------------------------------------------------------------------------------------------


def test_random_hadamard_is_orthogonal_flat_and_seeded() -> None:
    q = random_hadamard(60, seed=1)
    assert_orthogonal(q)
    assert torch.equal(q.abs(), torch.full_like(q, 1 / math.sqrt(60))) and q.dtype == torch.float64
    assert torch.equal(q, random_hadamard(60, seed=1)) and not torch.equal(q, random_hadamard(60, seed=2))
    signs = q * 60**0.5 * hadamard(60)  # D H has one sign per row
    assert torch.equal(signs.round(), signs[:, :1].round().expand(60, 60))
    assert set(signs[:, 0].round().tolist()) == {1, -1}
    assert torch.equal(random_hadamard(6, seed=1), random_orthogonal(6, seed=1))


def test_random_orthogonal_is_haar() -> None:
    """QR alone is not: LAPACK's signs put the first entry's mean at about -0.4."""
    corners = torch.stack([random_orthogonal(4, seed) for seed in range(400)])
    assert_orthogonal(corners[0])
    assert corners.mean(0).abs().max() < 0.1 and (corners.square().mean(0) - 0.25).abs().max() < 0.06


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_mean_preserving_rotations_commute_with_layer_norm(n: int) -> None:
    q = mean_preserving(n, seed=1)
    ones = torch.ones(n, dtype=torch.float64)
    assert_orthogonal(q)
    assert (ones @ q - ones).abs().max() < 1e-12 and (q @ ones - ones).abs().max() < 1e-12
    x = gaussian(7, n) + 5
    torch.testing.assert_close(F.layer_norm(x @ q, (n,)), F.layer_norm(x, (n,)) @ q, rtol=0, atol=1e-9)


def test_only_mean_preserving_rotations_commute_with_layer_norm() -> None:
    x, q = gaussian(7, 64) + 1, random_hadamard(64, seed=1)
    torch.testing.assert_close(F.rms_norm(x @ q, (64,)), F.rms_norm(x, (64,)) @ q, rtol=0, atol=1e-12)
    assert (F.layer_norm(x @ q, (64,)) - F.layer_norm(x, (64,)) @ q).abs().max() > 0.1


def test_mean_preserving_rotations_are_random_elsewhere() -> None:
    q = mean_preserving(64, seed=1)
    assert q.diagonal().abs().mean() < 0.2 and not torch.equal(q, mean_preserving(64, seed=2))
    assert torch.autograd.gradcheck(around_mean, (gaussian(3, 3).requires_grad_(),))


def kurtosis(x: Tensor) -> float:
    return float(((x - x.mean()) / x.std(correction=0)).pow(4).mean())


@pytest.mark.parametrize("turn", [random_hadamard, mean_preserving])
def test_kurtosis_of_a_heavy_tailed_layer_moves_toward_three(turn: Callable[[int, int], Tensor]) -> None:
    weight = gaussian(256, 576) * torch.exp(1.2 * gaussian(576, seed=1))  # a few channels are far larger
    assert kurtosis(weight) > 20
    assert abs(kurtosis(weight @ turn(576, 0)) - 3) < 0.3


# --- Cayley SGD -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "mu"), [(1e-3, 0.0), (1.5, 0.0), (1.5, 0.9)])
def test_a_step_is_the_cayley_transform(rate: float, mu: float) -> None:
    n = 24
    rotation, gradient, momentum = random_orthogonal(n, 0), gaussian(n, n, seed=1), gaussian(n, n, seed=2)
    turned, carried = cayley_step(rotation, gradient, momentum, rate, mu)
    moved = (mu * momentum - gradient.T) @ rotation
    half = moved - rotation.T @ rotation @ moved / 2
    skew = half - half.T
    step = min(rate, 1 / float(skew.abs().sum(0).max()))
    unit = torch.eye(n, dtype=torch.float64)
    exact = (torch.linalg.inv(unit - step / 2 * skew) @ (unit + step / 2 * skew) @ rotation.T).T
    assert (turned - rotation).abs().max() > 1e-3
    torch.testing.assert_close(turned, exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(carried, skew @ rotation.T, rtol=0, atol=1e-12)


def test_rotations_stay_orthogonal_and_reach_their_target() -> None:
    target = random_orthogonal(32, 5).float()
    rotation = torch.nn.Parameter(random_orthogonal(32, 6).float())
    if torch.linalg.det(rotation) * torch.linalg.det(target) < 0:
        rotation.data[0] *= -1
    optimizer = CayleySGD([rotation], lr=1.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (rotation - target).square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert_orthogonal(rotation.detach(), 1e-3)
    assert float(loss.detach()) < 1e-3


def test_a_step_goes_downhill_and_is_seeded() -> None:
    def run(seed: int, momentum: float) -> tuple[list[float], Tensor]:
        rotation = torch.nn.Parameter(random_hadamard(16, 0).float())
        optimizer = CayleySGD([rotation], lr=0.05, momentum=momentum, seed=seed)
        weight, losses = gaussian(16, 16, dtype=torch.float32), []

        def closure() -> float:
            optimizer.zero_grad()
            loss = (rotation @ weight).pow(4).sum()
            loss.backward()
            return float(loss.detach())

        for _ in range(30):
            losses.append(optimizer.step(closure))
        return losses, rotation.detach()

    losses, rotation = run(0, 0.9)
    assert losses[-1] < 0.9 * losses[0] and torch.equal(rotation, run(0, 0.9)[1])


def test_renewal_removes_drift_and_leaves_rotations_alone() -> None:
    exact = random_orthogonal(12, 0)
    torch.testing.assert_close(orthonormal(exact), exact, rtol=0, atol=1e-12)
    drifted = exact + 1e-4 * gaussian(12, 12)
    assert_orthogonal(orthonormal(drifted))
    assert (orthonormal(drifted) - exact).abs().max() < 1e-2
