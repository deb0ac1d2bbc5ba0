"""Bounds, biases and the suggested number of units."""

import math
from itertools import pairwise, product

import pytest
import torch

from imsvd_core.arrays import (
    agreement_cost,
    balanced_entropy,
    expected_entropy,
    fano_bound,
    fano_entropy,
    hard_bound,
    hard_packing,
    one_hot_codes,
    orthogonal_array,
    plotkin_bound,
    population_bound,
    rao_bound,
    simulated_entropy,
    smoothed_packing_loss,
    smoothed_packing_optimum,
    suggest_units,
    visible_share,
)
from imsvd_core.discretization import soft_discretize, split_variables
from imsvd_core.information import entropy
from imsvd_core.loss import cross_joint_entropy


@pytest.mark.parametrize(
    ("units", "weight"), [(3, 0.0), (80, 0.0), (80, 1.0), (2, 1.0), (2, 1 - math.log(2))]
)
def test_the_bound_is_three_logarithms_under_its_condition(units, weight):
    assert population_bound(units, weight) == pytest.approx(-3 * math.log(units), abs=1e-12)


@pytest.mark.parametrize(("units", "weight"), [(2, 0.0), (3, 1.0), (5, 0.4)])
def test_disagreement_costs_what_the_formula_says_and_never_less(units, weight):
    def diagonal_terms(p1, p2):
        terms = cross_joint_entropy(p1.log(), p2.log(), units)
        agreement = (p1 * p2).sum(1).mean().item() / 2  # two copies of one variable
        return terms.diagonal_entropy.item() + weight * terms.transform_invariance.item(), agreement

    torch.manual_seed(0)
    for scale in (0.3, 1.0, 3.0):
        p1, p2 = (
            soft_discretize(scale * torch.randn(7, units, dtype=torch.float64), units).repeat(1, 2)
            for _ in range(2)
        )
        value, agreement = diagonal_terms(p1, p2)
        assert value > agreement_cost(agreement, units, weight)
    even = (
        torch.eye(units, dtype=torch.float64) * 0.7 + 0.3 / units
    )  # every value once, equally soft
    value, agreement = diagonal_terms(even.repeat(1, 2), even.repeat(1, 2))
    assert value == pytest.approx(agreement_cost(agreement, units, weight), abs=1e-12)


def test_below_the_condition_softer_codes_win():
    assert population_bound(2, 0.0) == pytest.approx(-2 / math.e - 2 * math.log(2), abs=1e-12)
    for weight in (0.0, 0.1, 0.3):
        bound = population_bound(2, weight)
        assert bound < -3 * math.log(2)
        attained = _smoothed_array_loss(weight)
        assert attained == pytest.approx(bound, abs=1e-6), "a smoothed orthogonal array attains it"


def _smoothed_array_loss(weight: float) -> float:
    hard = one_hot_codes(orthogonal_array(2), 2)
    tops = torch.linspace(0.5, 1, 20_001, dtype=torch.float64)[:-1]
    agreement = tops**2 + (1 - tops) ** 2
    best = tops[(agreement * (agreement / 2).log() - weight * agreement.log()).argmin()]
    p = best * hard + (1 - best) * (1 - hard)
    return cross_joint_entropy(p.log(), p.log(), 2, invariance_weight=weight).total.item()


def test_random_codes_stay_above_every_bound():
    torch.manual_seed(0)
    for samples, units in ((5, 2), (9, 3), (20, 6), (40, 4)):
        for scale in (0.1, 1.0, 5.0, 20.0):
            z1, z2 = scale * torch.randn(2, samples, 3 * units, dtype=torch.float64)
            for pair in ((z1, z2), (z1, z1 + 0.1 * z2)):
                value = cross_joint_entropy(*pair, units).total.item()
                assert value > fano_bound(samples, units) >= population_bound(units) - 1e-12


@pytest.mark.parametrize(("samples", "cells"), [(1, 5), (5, 5), (7, 3), (20, 36), (30, 4)])
def test_balanced_counts_have_the_largest_entropy(samples, cells):
    counts = torch.full((cells,), samples // cells)
    counts[: samples % cells] += 1
    largest = balanced_entropy(samples, cells)
    assert largest == pytest.approx(entropy(counts.double() / samples).item(), abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        drawn = torch.randint(cells, (samples,), generator=generator).bincount(minlength=cells)
        assert entropy(drawn.double() / samples).item() <= largest + 1e-12


def test_hard_bounds_of_known_sizes():
    known = {
        (2, 2): -1.3863,
        (6, 3): -2.8904,
        (12, 4): -3.8712,
        (20, 6): -4.7778,
        (30, 6): -5.1930,
        (80, 16): -7.1546,
        (10, 3): -3.2529,
    }
    for sizes, value in known.items():
        assert hard_bound(*sizes) == pytest.approx(value, abs=5e-5)
    assert hard_bound(36, 6) == pytest.approx(population_bound(6), abs=1e-12)


def test_counting_bounds_of_known_sizes():
    assert rao_bound(9, 3) == 4
    assert rao_bound(8, 3) == 3
    assert rao_bound(12_800, 80) == 162
    assert plotkin_bound(512, 32) == pytest.approx(32 * 511 / 480, abs=1e-12)
    assert plotkin_bound(2048, 80) == pytest.approx(83.18, abs=0.005)
    assert plotkin_bound(3, 3) == math.inf
    assert hard_packing(12, 4, 4).shape[1] <= plotkin_bound(12, 4) < 6


@pytest.mark.parametrize("units", [2, 5, 80])
def test_fano_entropy_is_the_largest_for_its_agreement(units):
    torch.manual_seed(0)
    codes = soft_discretize(4 * torch.randn(200, 2 * units, dtype=torch.float64), units)
    p, q = split_variables(codes, units).unbind(1)
    for one, other in zip(p, q, strict=True):
        assert entropy(one).item() <= fano_entropy((one * other).sum().item(), units) + 1e-9
    s = (
        1 + 1 / units
    ) / 2  # attained: the top probability s, the rest spread evenly, against the sure code
    spread = torch.tensor([s] + [(1 - s) / (units - 1)] * (units - 1), dtype=torch.float64)
    assert fano_entropy(s, units) == pytest.approx(entropy(spread).item(), abs=1e-12)
    assert fano_entropy(1.0, units) == 0
    assert fano_entropy(0.0, units) == pytest.approx(math.log(units), abs=1e-12)


def test_fano_bound_at_the_defaults():
    assert fano_bound(2048, 80) == pytest.approx(-12.8276, abs=5e-4)
    assert fano_bound(10**6, 4) == pytest.approx(population_bound(4), abs=1e-9), (
        "many samples hide nothing"
    )
    assert population_bound(4) < fano_bound(1, 4) < fano_bound(1, 4, 2.0), (
        "one sample shows noise alone, and agreement forbids that"
    )


@pytest.mark.parametrize(("samples", "units"), [(6, 3), (20, 5), (24, 8)])
@pytest.mark.parametrize("theta", [0.0, 0.3, 0.9])
def test_smoothing_a_packing_has_the_loss_that_the_formula_says(samples, units, theta):
    a = math.sqrt(theta)
    p = a * one_hot_codes(hard_packing(samples, units, 3), units) + (1 - a) / units
    for weight in (1.0, 0.5):
        brute = cross_joint_entropy(p.log(), p.log(), units, invariance_weight=weight).total.item()
        assert smoothed_packing_loss(theta, samples, units, weight) == pytest.approx(
            brute, abs=1e-12
        )


@pytest.mark.parametrize(("samples", "units"), [(6, 3), (20, 5), (512, 32), (2048, 64)])
def test_the_best_smoothing_is_inside(samples, units):
    theta, loss = smoothed_packing_optimum(samples, units)
    assert 0.8 < theta < 1
    assert loss < hard_bound(samples, units)
    for nearby in (theta - 1e-4, min(theta + 1e-4, 1.0)):
        assert smoothed_packing_loss(nearby, samples, units) > loss


def test_a_full_array_is_best_hard():
    assert smoothed_packing_optimum(25, 5) == (1.0, pytest.approx(population_bound(5), abs=1e-12))


@pytest.mark.parametrize(("samples", "units", "bias"), [(2048, 80, -1.347), (512, 32, -1.007)])
def test_the_bias_of_a_pair_is_exact(samples, units, bias):
    exact = expected_entropy(samples, units**2)
    assert exact - 2 * math.log(units) == pytest.approx(bias, abs=6e-4)
    mean, error = simulated_entropy(samples, units**2, draws=200)
    assert error < 2e-3
    assert abs(mean - exact) < 4 * error


def test_expected_entropy_of_three_samples_in_two_cells_by_enumeration():
    outcomes = [(3, 0), (2, 1), (1, 2), (0, 3)]
    ways = [1, 3, 3, 1]
    mean = sum(
        way / 8 * entropy(torch.tensor(counts).double() / 3).item()
        for way, counts in zip(ways, outcomes, strict=True)
    )
    assert expected_entropy(3, 2) == pytest.approx(mean, abs=1e-12)
    assert expected_entropy(1, 7) == pytest.approx(0.0, abs=1e-12)
    assert expected_entropy(7, 1) == 0


def test_the_mean_entropy_of_a_batch_rises_with_every_sample_towards_the_truth():
    def by_enumeration(samples, cells):
        outcomes = [
            torch.tensor(draw).bincount(minlength=cells).double() / samples
            for draw in product(range(cells), repeat=samples)
        ]
        return torch.stack([entropy(outcome) for outcome in outcomes]).mean().item()

    for cells in (2, 4):
        means = [expected_entropy(samples, cells) for samples in range(1, 6)]
        assert means == pytest.approx(
            [by_enumeration(samples, cells) for samples in range(1, 6)], abs=1e-12
        )
        assert all(later > earlier for earlier, later in pairwise(means))
        assert expected_entropy(3, 1) == 0
        assert expected_entropy(20_000, cells) == pytest.approx(math.log(cells), abs=1e-4)


@pytest.mark.parametrize(("samples", "units"), [(2, 2), (3, 3), (5, 2)])
def test_the_visible_share_by_enumeration_of_all_batches(samples, units):
    def mean_entropy(cells):
        draws = [
            torch.tensor(draw).bincount(minlength=cells).double() / samples
            for draw in product(range(cells), repeat=samples)
        ]
        return torch.stack([entropy(draw) for draw in draws]).mean().item()

    added = mean_entropy(units**2) - mean_entropy((units - 1) ** 2)
    assert visible_share(samples, units) == pytest.approx(
        added / (2 * math.log(units / (units - 1))), abs=1e-12
    )


def test_the_visible_share_falls_from_one_to_nothing():
    shares = [visible_share(2048, units) for units in range(2, 300)]
    assert all(later < earlier for earlier, later in pairwise(shares))
    assert shares[0] > 0.99
    assert shares[-1] < 0.02


def test_the_suggestion_is_the_last_unit_that_still_shows():
    for samples in (16, 128, 512, 2048):
        for visible in (0.5, 0.25, 0.1):
            units = suggest_units(samples, visible=visible)
            assert visible_share(samples, units) >= visible > visible_share(samples, units + 1)


def test_the_suggestion_follows_the_rule_of_thumb_of_its_docstring():
    for visible, occupancy in ((0.5, 1.0864), (0.25, 0.4279), (0.1, 0.1536)):
        units = suggest_units(20_000, visible=visible)
        assert 20_000 / units**2 == pytest.approx(occupancy, rel=0.02)


def test_the_suggestion_divides_the_embedding():
    assert suggest_units(512, dim=1024) == 32
    assert suggest_units(2048, dim=8160) == 68
    assert suggest_units(10**5, dim=8) == 4
    with pytest.raises(ValueError, match="dim=7 has no divisor"):
        suggest_units(512, dim=7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: suggest_units(1), "batch_size=1"),
        (lambda: suggest_units(64.0), "batch_size=64.0"),
        (lambda: suggest_units(64, visible=1.0), "visible=1.0"),
        (lambda: suggest_units(64, visible=0), "visible=0"),
        (lambda: population_bound(1), "units=1"),
        (lambda: population_bound(3, -1.0), "invariance_weight=-1.0"),
        (lambda: population_bound(3, strength=1), "strength=1"),
        (lambda: balanced_entropy(0, 3), "samples=0"),
        (lambda: expected_entropy(3, 0), "cells=0"),
        (lambda: simulated_entropy(3, 3, draws=1), "draws=1"),
        (lambda: smoothed_packing_loss(1.2, 6, 3), "theta=1.2"),
        (lambda: smoothed_packing_loss(0.5, 10, 3), "samples=10"),
        (lambda: agreement_cost(0.0, 3), "s=0.0"),
        (lambda: fano_entropy(1.5, 3), "agreement=1.5"),
        (lambda: rao_bound(9, 1), "units=1"),
        (lambda: plotkin_bound(9, True), "units=True"),
        (lambda: visible_share(9, 1), "units=1"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
