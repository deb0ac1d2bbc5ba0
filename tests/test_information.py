"""Entropies, total correlation and mutual information, against `dit` and values known in closed
form.
"""

import math
from itertools import combinations, product

import dit
import pytest
import torch
from dit.multivariate import coinformation
from dit.multivariate import total_correlation as dit_total_correlation
from dit.shannon import entropy as dit_entropy
from torch import Tensor
from torch.nn.functional import one_hot

from imsvd_core import information
from imsvd_core.discretization import soft_discretize
from imsvd_core.information import (
    entropy,
    joint_distribution,
    joint_entropy,
    mean_subset_entropy,
    mutual_information,
    total_correlation,
)

SHAPES = [(2, 2), (3, 3, 3), (2, 3), (4, 1, 2), (2, 3, 4, 2), (2,) * 5]
LOG2 = math.log(2)


def random_codes(units: tuple[int, ...], samples: int = 6, seed: int = 0) -> Tensor:
    """Soft codes (samples, D) in float64, neither nearly hard nor nearly uniform."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, sum(units), dtype=torch.float64, generator=generator)
    return soft_discretize(2 * logits, units)


def hard(rows: list[tuple[int, ...]], units: tuple[int, ...]) -> Tensor:
    """One-hot codes (samples, D) from one row of unit numbers per sample."""
    codes = torch.tensor(rows)
    return torch.cat([one_hot(codes[:, v], count) for v, count in enumerate(units)], 1).double()


def full_table(p: Tensor, units: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """P(X_1, …, X_V) of Eq. 3 by plain loops, every cell written out."""
    starts = [sum(units[:v]) for v in range(len(units))]
    rows = p.tolist()
    return {
        cell: sum(
            math.prod(row[start + b] for start, b in zip(starts, cell, strict=True)) for row in rows
        )
        / len(rows)
        for cell in product(*map(range, units))
    }


def oracle(p: Tensor, units: tuple[int, ...]) -> dit.Distribution:
    table = full_table(p, units)
    return dit.Distribution(list(table), list(table.values()))


@pytest.mark.parametrize("units", SHAPES)
def test_joint_distribution_is_equation_3(units: tuple[int, ...]) -> None:
    p = random_codes(units)
    table = joint_distribution(p, units, range(len(units)))
    assert table.shape == units
    for cell, probability in full_table(p, units).items():
        assert table[cell].item() == pytest.approx(probability, abs=1e-15)


@pytest.mark.parametrize("units", SHAPES)
def test_every_joint_entropy_equals_dit(units: tuple[int, ...]) -> None:
    p = random_codes(units)
    distribution = oracle(p, units)
    for k in range(1, len(units) + 1):
        for subset in combinations(range(len(units)), k):
            expected = LOG2 * dit_entropy(distribution, list(subset))
            assert joint_entropy(p, units, subset).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("units", SHAPES)
def test_total_correlation_equals_the_mean_of_dits_over_all_subsets(units: tuple[int, ...]) -> None:
    p = random_codes(units)
    distribution = oracle(p, units)
    for k in range(2, len(units) + 1):
        of_subsets = [
            LOG2 * dit_total_correlation(distribution, [[v] for v in subset])
            for subset in combinations(range(len(units)), k)
        ]
        mean = sum(of_subsets) / len(of_subsets)
        assert total_correlation(p, units, k).item() == pytest.approx(mean, abs=1e-12)
    assert torch.equal(total_correlation(p, units), total_correlation(p, units, len(units)))


@pytest.mark.parametrize("units", SHAPES)
def test_mutual_information_equals_dit_and_its_diagonal_is_the_entropy(
    units: tuple[int, ...],
) -> None:
    p = random_codes(units)
    distribution = oracle(p, units)
    found = mutual_information(p, units)
    for i, j in product(range(len(units)), repeat=2):
        expected = (
            dit_entropy(distribution, [i]) if i == j else coinformation(distribution, [[i], [j]])
        )
        assert found[i, j].item() == pytest.approx(LOG2 * expected, abs=1e-12)


def test_variables_may_come_in_any_order() -> None:
    p, units = random_codes((2, 3, 4)), (2, 3, 4)
    assert torch.allclose(
        joint_distribution(p, units, [2, 0]), joint_distribution(p, units, [0, 2]).T
    )


@pytest.mark.parametrize("units", SHAPES)
def test_mean_total_correlation_is_k_mean_entropies_less_mean_subset_entropy(
    units: tuple[int, ...],
) -> None:
    p = random_codes(units)
    for k in range(2, len(units) + 1):
        by_definition = torch.stack(
            [
                sum(joint_entropy(p, units, [v]) for v in subset) - joint_entropy(p, units, subset)
                for subset in combinations(range(len(units)), k)
            ]
        )
        assert (by_definition >= -1e-12).all()
        assert total_correlation(p, units, k).item() == pytest.approx(
            by_definition.mean().item(), abs=1e-12
        )


def test_xor_has_independent_pairs_and_one_bit_in_the_triple() -> None:
    p = hard([(a, b, a ^ b) for a in (0, 1) for b in (0, 1)], (2, 2, 2))
    assert total_correlation(p, 2, 2).item() == pytest.approx(0, abs=1e-15)
    assert total_correlation(p, 2, 3).item() == pytest.approx(LOG2, abs=1e-15)
    assert torch.allclose(mutual_information(p, 2), LOG2 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_the_whole_shares_at_least_v_minus_1_times_what_pairs_share(seed: int) -> None:
    units = (2, 3, 2, 3)
    p = random_codes(units, samples=4, seed=seed)
    assert total_correlation(p, units).item() >= 3 * total_correlation(p, units, 2).item()


def test_all_combinations_of_hard_codes_reach_every_maximum_exactly() -> None:
    units = (2, 3, 4)
    p = hard(list(product(*map(range, units))), units)
    assert mean_subset_entropy(p, units, 1).item() == pytest.approx(math.log(24) / 3)
    assert mean_subset_entropy(p, units, 2).item() == pytest.approx(2 * math.log(24) / 3)
    assert joint_entropy(p, units, (0, 1, 2)).item() == pytest.approx(math.log(24))
    assert total_correlation(p, units).item() == pytest.approx(0, abs=1e-14)


def test_one_sample_of_soft_codes_has_independent_variables() -> None:
    p = random_codes((3, 2, 4), samples=1)
    assert total_correlation(p, (3, 2, 4)).item() == pytest.approx(0, abs=1e-14)


def test_an_empty_cell_adds_nothing_to_value_or_gradient() -> None:
    table = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    rows = entropy(table, dim=1)
    assert rows.tolist() == [pytest.approx(LOG2), 0.0]
    assert entropy(table).item() == rows.sum().item()
    rows.sum().backward()
    assert table.grad[1, 1] == 0
    assert table.grad.isfinite().all()


@pytest.mark.parametrize(
    "measure",
    [
        lambda p, u: joint_entropy(p, u, (0, 2)),
        lambda p, u: total_correlation(p, u, 2),
        total_correlation,
        mutual_information,
    ],
)
def test_gradients_agree_with_finite_differences(measure) -> None:
    units = (2, 3, 2)
    p = random_codes(units, samples=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda table: measure(table, units), p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_codes_are_measured_in_float32(dtype: torch.dtype) -> None:
    p = torch.full((8, 12), 1 / 3, dtype=dtype)
    cell = (
        p[0, 0].double().item() ** 4
    )  # 1/3, rounded to `dtype`, to the fourth power: no further rounding
    with torch.autocast("cpu", dtype=dtype):
        table = joint_distribution(p, 3, range(4))
    assert table.dtype == torch.float32
    assert table.flatten().tolist() == pytest.approx([cell] * 81, rel=1e-6)
    assert entropy(p[0, :3]).item() == pytest.approx(entropy(p[0, :3].double()).item(), rel=1e-6)


def test_wrong_arguments_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    p = random_codes((2, 2, 2))
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"k={k} is out of range.*1 ≤ k ≤ 3"):
            mean_subset_entropy(p, 2, k)
    for subset in ([], [0, 0], [3], [-1]):
        with pytest.raises(ValueError, match="different variables, each from 0 to 2"):
            joint_entropy(p, 2, subset)
    for not_codes in (
        torch.randn(4, 6),
        torch.full((4, 6), torch.nan),
        torch.tensor([[1.5, -0.5] * 3]),
    ):
        with pytest.raises(ValueError, match="soft_discretize first"):
            mutual_information(not_codes, 2)
    with pytest.raises(ValueError, match=r"p has shape \(6,\)"):
        total_correlation(p[0], 2)
    with pytest.raises(ValueError, match="does not divide"):
        joint_entropy(p, 4, [0])
    monkeypatch.setattr(information, "MAX_CELLS", 7)
    with pytest.raises(ValueError, match="8 cells, more than 7: take fewer variables"):
        joint_distribution(p, 2, (0, 1, 2))
