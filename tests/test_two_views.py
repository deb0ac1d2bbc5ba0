"""Chapter 01: its ten-line losses against lightly's and against sums written out, and what a loss
of zero means."""

import itertools
import math

import numpy as np
import pytest
import torch
from ledger import of_chapter
from lightly.loss import BarlowTwinsLoss, VICRegLoss
from torch import Tensor

CHAPTER = "01-two-views"
NAMES = (
    "best_guess",
    "invariance",
    "effective_rank",
    "vicreg",
    "standardise",
    "cross_correlation",
    "barlow_twins",
    "circle",
    "indicator_covariance",
)
(
    best_guess,
    invariance,
    effective_rank,
    vicreg,
    standardise,
    cross_correlation,
    barlow_twins,
    circle,
    indicator_covariance,
) = (of_chapter(CHAPTER, name) for name in NAMES)


def pair(samples: int = 20, dim: int = 6, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two correlated views in float64, with means other than zero."""
    generator = torch.Generator().manual_seed(7)
    z1, noise = torch.randn(2, samples, dim, dtype=torch.float64, generator=generator)
    mixed = z1 @ torch.randn(dim, dim, dtype=torch.float64, generator=generator) + 1
    return scale * mixed, scale * (mixed + 0.4 * noise)


def close(value: float, abs: float = 1e-12):
    return pytest.approx(value, rel=0, abs=abs)


def whitened(samples: int, dim: int) -> Tensor:
    """Random embeddings with means of zero and the identity as covariance, N in the denominator."""
    x = pair(samples, dim)[0]
    q, _ = torch.linalg.qr(x - x.mean(0))
    return q * samples**0.5


def test_one_view_is_as_good_as_two_if_the_views_share_all_they_know():
    shape = torch.tensor([[0.1, 0.2, 0.3], [0.2, 0.15, 0.05]], dtype=torch.float64)  # P(t, shape)
    first, second = (
        torch.softmax(torch.randn(3, 2, dtype=torch.float64), 1) for _ in range(2)
    )  # P(colour | shape)
    table = torch.zeros(2, 6, 6, dtype=torch.float64)
    for t, s, c, d in itertools.product(range(2), range(3), range(2), range(2)):
        table[t, 2 * s + c, 2 * s + d] = shape[t, s] * first[s, c] * second[s, d]
    both, one = best_guess(table)
    assert both.item() == close(0.2 + 0.2 + 0.3)
    assert one.item() == close(0.2 + 0.2 + 0.3)


def test_the_best_guess_is_right_as_often_as_the_best_of_all_rules():
    table = torch.tensor([[[5, 1, 1], [2, 4, 1]], [[1, 2, 6], [3, 1, 3]]], dtype=torch.float64) / 30
    P = table.tolist()
    rules = itertools.product(range(2), repeat=6)  # a guess for every pair of views
    together = max(
        sum(P[rule[3 * x + y]][x][y] for x in range(2) for y in range(3)) for rule in rules
    )
    alone = max(
        sum(P[rule[x]][x][y] for x in range(2) for y in range(3))
        for rule in itertools.product(range(2), repeat=2)
    )
    both, one = best_guess(table)
    assert both.item() == close(together)
    assert one.item() == close(alone)
    assert together > alone + 1e-3


def test_the_invariance_term_is_the_mean_squared_difference():
    z1, z2 = pair()
    total = sum(
        (a - b) ** 2
        for row, other in zip(z1.tolist(), z2.tolist(), strict=False)
        for a, b in zip(row, other, strict=False)
    )
    assert invariance(z1, z2).item() == close(total / (20 * 6), abs=1e-10)
    assert invariance(torch.ones(4, 3), torch.ones(4, 3)) == 0


def test_descent_on_the_invariance_term_shrinks_the_last_layer_by_four_times_the_loss():
    u1, u2 = pair(dim=5)
    W = torch.randn(
        3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    (slope,) = torch.autograd.grad(invariance(u1 @ W.T, u2 @ W.T), W)
    value = np.square((u1 - u2).numpy() @ W.detach().numpy().T).sum() / (20 * 3)
    assert -2 * (W * slope).sum().item() == close(-4 * value, abs=1e-10)


def test_the_effective_rank_counts_axes_of_equal_variance_and_ignores_scale():
    for axes in (1, 2, 5):
        z = torch.zeros(60, 7, dtype=torch.float64)
        z[:, :axes] = whitened(60, axes)
        turn, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
        assert effective_rank(3 * z @ turn + 1).item() == close(axes, abs=1e-6)


def test_the_effective_rank_is_the_exponential_of_the_entropy_of_the_shares():
    z = pair()[0]
    singular = np.linalg.svd((z - z.mean(0)).numpy(), compute_uv=False)
    shares = singular**2 / (singular**2).sum()
    assert effective_rank(z).item() == close(
        math.exp(-sum(s * math.log(s) for s in shares)), abs=1e-9
    )


def value_and_gradient(loss, z1: Tensor, z2: Tensor) -> Tensor:
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = loss(z1, z2)
    return torch.cat(
        [part.detach().flatten() for part in (value, *torch.autograd.grad(value, (z1, z2)))]
    )


@pytest.mark.parametrize("scale", [1.0, 0.05])  # where the guards do not matter, and where they do
def test_ten_lines_of_vicreg_give_the_value_and_gradient_of_lightly(scale):
    z1, z2 = pair(scale=scale)
    torch.testing.assert_close(
        value_and_gradient(vicreg, z1, z2),
        value_and_gradient(VICRegLoss(), z1, z2),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_ten_lines_of_barlow_twins_give_the_value_and_gradient_of_lightly(scale):
    z1, z2 = pair(scale=scale)
    torch.testing.assert_close(
        value_and_gradient(barlow_twins, z1, z2),
        value_and_gradient(BarlowTwinsLoss(), z1, z2),
        rtol=1e-8,
        atol=1e-10,
    )


def test_equal_coordinates_satisfy_invariance_and_variance_and_are_seen_by_covariance_alone():
    samples, dim = 30, 8
    g = whitened(samples, 1) * ((samples - 1) / samples) ** 0.5  # a variance of exactly 1
    z = g.expand(samples, dim)
    assert vicreg(z, z, (25, 25, 0)).item() == close(0)
    assert vicreg(z, z, (0, 0, 1)).item() == close(2 * (dim - 1), abs=1e-9)
    assert vicreg(z / 2, z / 2, (0, 1, 0)).item() == close(1 - math.sqrt(1 / 4 + 1e-4))
    assert vicreg(z, -z, (1, 0, 0)).item() == close(4 * (samples - 1) / samples)


def test_without_covariance_vicreg_is_a_mean_over_coordinates_blind_to_signs_and_constants():
    z1, z2 = pair(scale=0.4)  # where some coordinates vary enough and some do not

    def alone(g1: Tensor, g2: Tensor) -> float:
        spread = (
            sum(max(0.0, 1 - math.sqrt(np.var(g.numpy(), ddof=1) + 1e-4)) for g in (g1, g2)) / 2
        )
        return 25 * np.square((g1 - g2).numpy()).mean() + 25 * spread

    each = [alone(*coordinates) for coordinates in zip(z1.T, z2.T, strict=False)]
    whole = vicreg(z1, z2, (25, 25, 0)).item()
    assert whole == close(sum(each) / 6, abs=1e-10)
    assert z1.std(0).min() < 0.9 < 1.1 < z1.std(0).max()
    signs, shift = torch.tensor([1.0, -1, 1, -1, -1, 1]), torch.arange(6)
    assert vicreg(signs * z1 + shift, signs * z2 + shift, (25, 25, 0)).item() == close(
        whole, abs=1e-10
    )
    least = each.index(min(each))
    repeated = [signs * z[:, [least]] + shift for z in (z1, z2)]
    assert vicreg(*repeated, (25, 25, 0)).item() == close(min(each), abs=1e-10)
    assert torch.linalg.matrix_rank(repeated[0].T.cov()) == 1


def test_standardised_coordinates_have_the_mean_zero_and_the_variance_one():
    z = pair(scale=0.01)[0]  # where the guard matters
    x = z.numpy()
    np.testing.assert_allclose(
        standardise(z).numpy(), (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(
        standardise(1e6 * z).square().mean(0), np.ones(6), rtol=0, atol=1e-10
    )


def test_the_cross_correlation_is_its_sum():
    z1, z2 = pair()
    R = cross_correlation(z1, z2)
    a, b = (((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)) for z in (z1.numpy(), z2.numpy()))
    for i, j in itertools.product(range(6), repeat=2):
        assert R[i, j].item() == close(sum(a[n, i] * b[n, j] for n in range(20)) / 20)


def test_the_diagonal_of_the_cross_correlation_is_the_disagreement_of_standardised_views():
    z1, z2 = pair(scale=1e4)  # where the guard does not matter
    a, b = (((z - z.mean(0)) / z.std(0)) for z in (z1.numpy(), z2.numpy()))
    np.testing.assert_allclose(
        2 * (1 - cross_correlation(z1, z2).diag().numpy()),
        ((a - b) ** 2).mean(0),
        rtol=0,
        atol=1e-9,
    )


def test_barlow_twins_is_zero_for_rising_affine_views_of_uncorrelated_coordinates_alone():
    z1 = 1e3 * whitened(12, 4)
    z2 = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64) * z1 + 5
    assert barlow_twins(z1, z2, 1.0).item() == close(0)
    falling = z1 * torch.tensor([1.0, 1, 1, -1], dtype=torch.float64)
    assert barlow_twins(z1, falling, 1.0).item() == close(4, abs=1e-6)  # (1 + 1)²
    mixed = z1.clone()
    mixed[:, 0] = 0.6 * z1[:, 0] + 0.8 * z1[:, 1]  # its correlation with the second is 0.8
    assert barlow_twins(mixed, mixed, 0.5).item() == close(0.5 * 2 * 0.8**2, abs=1e-6)


def test_vicreg_is_zero_for_equal_views_of_uncorrelated_coordinates_of_enough_spread_alone():
    z = whitened(12, 4) * (11 / 12) ** 0.5  # standard deviations of 1
    assert vicreg(2 * z, 2 * z).item() == close(0)
    assert vicreg(2 * z, 2 * z + 1).item() == close(25)
    assert vicreg(0.5 * z, 0.5 * z).item() == close(25 * (1 - math.sqrt(0.25 + 1e-4)))
    mixed = z.clone()
    mixed[:, 0] = 0.6 * z[:, 0] + 0.8 * z[:, 1]
    assert vicreg(mixed, mixed).item() == close(2 * 2 * 0.8**2 / 4)


# as few samples as can be, and more
@pytest.mark.parametrize(("samples", "dim"), [(9, 8), (10, 4)])
def test_both_losses_are_zero_for_functions_of_one_angle(samples, dim):
    z = circle(samples, dim)
    assert vicreg(z, z).item() == close(0)
    assert barlow_twins(1e3 * z, 1e3 * z).item() == close(0)
    for n, k in itertools.product(range(samples), range(1, dim // 2 + 1)):
        first = complex(*z[n, :2].tolist()) / math.sqrt(2)
        assert first == close(
            complex(
                math.cos(2 * math.pi * (n + 1) / samples), math.sin(2 * math.pi * (n + 1) / samples)
            )
        )
        assert complex(*z[n, 2 * k - 2 : 2 * k].tolist()) == close(math.sqrt(2) * first**k)
    assert z.shape == (samples, dim)
    assert torch.linalg.matrix_rank(z - z.mean(0)) == dim


def test_no_batch_of_fewer_than_d_plus_1_attains_zero():
    z1, z2 = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert barlow_twins(1e3 * z1, 1e3 * z2, 1.0) >= 8 - 5 + 1
    twice = 1e3 * circle(5, 4).repeat(1, 2)
    assert barlow_twins(twice, twice, 1.0).item() == close(8 * (8 - 5 + 1) / (5 - 1), abs=1e-6)


def test_indicators_are_uncorrelated_if_and_only_if_the_variables_are_independent():
    x, y = (
        torch.tensor(column)
        for column in zip(*itertools.product((0, 0, 1), (0, 1, 2, 2)), strict=False)
    )
    assert indicator_covariance(x, y, (2, 3)).abs().max().item() == close(0)
    y = (x + y) % 3
    found = indicator_covariance(x, y, (2, 3))
    assert found.shape == (2, 3)
    pairs = list(zip(x.tolist(), y.tolist(), strict=False))
    for b, c in itertools.product(range(2), range(3)):
        both = pairs.count((b, c)) / 12
        alone = [x_value for x_value, _ in pairs].count(b) / 12
        other = [y_value for _, y_value in pairs].count(c) / 12
        assert found[b, c].item() == close(both - alone * other)
    assert found.abs().max() > 0.05
