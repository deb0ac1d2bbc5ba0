"""Soft codes, marginals and joint matrices, against loops that read Eq. 1–3 and 10 aloud."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from imsvd_core.discretization import (
    Units,
    hard_codes,
    hardness,
    joint,
    marginals,
    merge_variables,
    soft_discretize,
    split_variables,
    unit_counts,
)

UNITS = [(3, 3), (2, 3, 4), (1, 5), (4,)]


def logits(units: tuple[int, ...], samples: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, sum(units), dtype=torch.float64, generator=generator)


def columns(units: tuple[int, ...]) -> list[range]:
    """The columns that each variable owns."""
    return [range(sum(units[:v]), sum(units[: v + 1])) for v in range(len(units))]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("temperature", [1.0, 0.25, 3.0])
def test_soft_codes_are_equation_1(units: tuple[int, ...], temperature: float) -> None:
    z = logits(units)
    p = soft_discretize(z, units, temperature)
    for n, row in enumerate(z.tolist()):
        for own in columns(units):
            total = sum(math.exp(row[c] / temperature) for c in own)
            for c in own:
                assert p[n, c].item() == pytest.approx(
                    math.exp(row[c] / temperature) / total, abs=1e-14
                )


@pytest.mark.parametrize("units", UNITS)
def test_marginals_are_equation_2(units: tuple[int, ...]) -> None:
    p = soft_discretize(logits(units), units)
    for c, found in enumerate(marginals(p).tolist()):
        assert found == pytest.approx(sum(row[c] for row in p.tolist()) / len(p), abs=1e-15)


@pytest.mark.parametrize("units", UNITS)
def test_the_cross_joint_is_equation_10_and_the_self_joint_equation_3(
    units: tuple[int, ...],
) -> None:
    p1, p2 = (soft_discretize(logits(units, seed=seed), units) for seed in (1, 2))
    for found, other in ((joint(p1, p2), p2), (joint(p1), p1)):
        for a, b in product(range(sum(units)), repeat=2):
            expected = sum(
                x[a] * y[b] for x, y in zip(p1.tolist(), other.tolist(), strict=True)
            ) / len(p1)
            assert found[a, b].item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("units", UNITS)
def test_every_block_sums_to_one_and_its_margins_are_the_marginals(units: tuple[int, ...]) -> None:
    p1, p2 = (soft_discretize(logits(units, seed=seed), units) for seed in (1, 2))
    found = joint(p1, p2)
    for i, j in product(columns(units), repeat=2):
        block = found[i.start : i.stop, j.start : j.stop]
        assert torch.allclose(block.sum(1), marginals(p1)[i.start : i.stop])
        assert torch.allclose(block.sum(0), marginals(p2)[j.start : j.stop])
        assert block.sum().item() == pytest.approx(1)


def test_views_of_different_width_have_a_rectangular_joint() -> None:
    assert joint(torch.full((3, 4), 0.5), torch.full((3, 2), 0.5)).shape == (4, 2)


def test_one_sample_gives_the_outer_product_of_its_codes() -> None:
    p = soft_discretize(logits((2, 3), samples=1), (2, 3))
    assert torch.equal(marginals(p), p[0])
    assert torch.equal(joint(p), torch.outer(p[0], p[0]))


def test_leading_dimensions_are_kept() -> None:
    z = logits((2, 3), samples=6)
    batched = soft_discretize(z.reshape(2, 3, 5), (2, 3))
    assert torch.equal(batched.reshape(6, 5), soft_discretize(z, (2, 3)))
    assert hard_codes(batched, (2, 3)).shape == (2, 3, 2)


@pytest.mark.parametrize("units", UNITS)
def test_merging_undoes_splitting(units: tuple[int, ...]) -> None:
    z = logits(units)
    rows = split_variables(z, units, fill=7.0)
    assert rows.shape == (5, len(units), max(units))
    assert torch.equal(merge_variables(rows, units), z)


def test_one_count_per_variable_and_a_single_int_mean_the_same() -> None:
    z = logits((3, 3))
    assert unit_counts(3, 6) == unit_counts([3, 3], 6) == (3, 3)
    assert torch.equal(soft_discretize(z, 3), soft_discretize(z, [3, 3]))


def test_huge_logits_stay_finite() -> None:
    for units in (2, [1, 3]):
        p = soft_discretize(torch.tensor([[1e30, -1e30, 3e38, 0.0]]), units)
        assert p.isfinite().all()


def test_the_largest_half_precision_logits_stay_finite_at_a_low_temperature() -> None:
    logits = torch.tensor([[65504.0, -65504.0, 60000.0]], dtype=torch.float16)
    p = soft_discretize(logits, 3, temperature=0.25)
    assert p.dtype == torch.float16
    assert p.tolist() == [[1.0, 0.0, 0.0]]


def test_unequal_units_pass_gradcheck() -> None:
    z = logits((2, 1, 3), samples=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: joint(soft_discretize(x, (2, 1, 3), 0.7)), z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_codes_are_accumulated_in_float32(
    dtype: torch.dtype, autocast: bool
) -> None:
    # 4096 samples put 2⁻¹² into each cell of a 64 × 64 block, in steps of 2⁻²⁶: too small for
    # float16.
    p = torch.full((4096, 64), 1 / 64, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = joint(p, p), marginals(p)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.equal(found[0], torch.full((64, 64), 1 / 4096))
    assert torch.equal(found[1], torch.full((64,), 1 / 64))


def test_float32_codes_are_accumulated_in_float32_under_autocast() -> None:
    p = soft_discretize(logits((8, 8), samples=500).float(), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = joint(p)
    assert found.dtype == torch.float32
    assert torch.allclose(found, joint(p.double()).float(), rtol=1e-5)


def test_hard_codes_name_the_most_probable_unit() -> None:
    p = torch.tensor([[0.1, 0.9, 0.2, 0.5, 0.3], [0.6, 0.4, 0.1, 0.1, 0.8]])
    assert hard_codes(p, (2, 3)).tolist() == [[1, 1], [0, 2]]
    assert hard_codes(torch.zeros(1, 4), (1, 3)).tolist() == [[0, 0]]


def test_hardness_counts_variables_whose_top_probability_passes_a_threshold() -> None:
    p = torch.tensor([[0.95, 0.05, 1.0, 0.0, 0.0], [0.5, 0.5, 0.1, 0.85, 0.05]])
    found = hardness(p, (2, 3))
    assert (found.above_90, found.above_99) == (0.5, 0.25)
    assert found.mean_top == pytest.approx((0.95 + 1.0 + 0.5 + 0.85) / 4)


def test_hardness_tells_a_top_probability_just_below_99_percent_from_one_just_above() -> None:
    counted = hardness(torch.tensor([[0.98, 0.02], [0.992, 0.008], [0.89, 0.11], [0.91, 0.09]]), 2)
    assert (counted.above_90, counted.above_99) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (4, "units=4 does not divide the embedding dimension 6: take a divisor"),
        ((2, 3), r"units=\(2, 3\) sum to 5, but the embedding has 6"),
        (0, "units=0: need an integer ≥ 1"),
        ((6, 0), "need an integer ≥ 1"),
        ((3.0, 3.0), "need an integer ≥ 1"),
        (True, "need an integer ≥ 1"),
        ((), "non-empty sequence"),
    ],
)
def test_impossible_units_are_named(units: Units, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_discretize(torch.zeros(2, 6), units)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_named(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature={temperature} must be positive"):
        soft_discretize(torch.zeros(2, 4), 2, temperature)


def test_wrong_tables_are_named() -> None:
    with pytest.raises(ValueError, match="p_a has 3 samples, p_b has 2"):
        joint(torch.zeros(3, 4), torch.zeros(2, 4))
    for table in (torch.zeros(0, 4), torch.zeros(4), torch.zeros(2, 2, 4)):
        with pytest.raises(ValueError, match="need a non-empty table"):
            marginals(table)
        with pytest.raises(ValueError, match="p_b has shape"):
            joint(torch.zeros(2, 4), table)
        with pytest.raises(ValueError, match="p has shape"):
            hardness(table, 2)
