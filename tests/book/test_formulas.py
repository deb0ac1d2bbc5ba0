"""Formulas and theorems of the chapters, each by another route than its function: loops, exact
values, autograd.

book/ledger.toml names these tests. A test of an inequality has its case of equality too, else a
factor would escape it.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, pairwise, product

import pytest
import torch
from ledger import of_chapter
from torch import Tensor

from imsvd_core import information, streaming
from imsvd_core.arrays import orthogonal_array
from imsvd_core.discretization import joint, soft_discretize
from imsvd_core.information import joint_entropy, mean_subset_entropy, total_correlation
from imsvd_core.loss import cross_joint_entropy

UNITS = (2, 3, 4)


def codes(
    units: tuple[int, ...] = UNITS, samples: int = 5, seed: int = 0, sharpness: float = 2.0
) -> Tensor:
    """Soft codes (samples, D) in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, sum(units), dtype=torch.float64, generator=generator)
    return soft_discretize(sharpness * logits, units)


def hard(rows: list[tuple[int, ...]], units: tuple[int, ...]) -> Tensor:
    """One-hot codes (samples, D) from one row of unit numbers per sample."""
    p = torch.zeros(len(rows), sum(units), dtype=torch.float64)
    for n, row in enumerate(rows):
        for v, b in enumerate(row):
            p[n, sum(units[:v]) + b] = 1
    return p


def variables(p: Tensor, units: tuple[int, ...]) -> list[list[list[float]]]:
    """Probabilities as plain numbers: [n][v][b]."""
    return [
        [row[sum(units[:v]) : sum(units[: v + 1])] for v in range(len(units))] for row in p.tolist()
    ]


def table(
    p: Tensor, units: tuple[int, ...], subset: tuple[int, ...]
) -> dict[tuple[int, ...], float]:
    """The joint table of a subset by the definition, cell by cell."""
    rows = variables(p, units)
    return {
        cell: sum(math.prod(row[v][b] for v, b in zip(subset, cell, strict=False)) for row in rows)
        / len(rows)
        for cell in product(*(range(units[v]) for v in subset))
    }


def surprise(cells) -> float:
    return -sum(x * math.log(x) for x in cells if x > 0)


def close(value: float, abs: float = 1e-12):
    return pytest.approx(value, rel=0, abs=abs)


# --- chapter 02
# -------------------------------------------------------------------------------------------------


def test_soft_bins_share_a_measurement_as_gaussians_of_one_width_do() -> None:
    soft_bins = of_chapter("02-soft-variables", "soft_bins")
    f, centres, width = [0.1, 0.35, 0.8], [0.0, 0.3, 0.4, 0.9], 0.2
    p = soft_bins(
        torch.tensor(f, dtype=torch.float64), torch.tensor(centres, dtype=torch.float64), width
    ).softmax(-1)
    for n, b in product(range(3), range(4)):
        density = [math.exp(-(((f[n] - c) / width) ** 2) / 2) for c in centres]
        assert p[n, b].item() == close(density[b] / sum(density))


@pytest.mark.parametrize("units", [(4,), (3, 5)])
def test_heating_lowers_the_top_probability_and_raises_the_entropy_between_their_limits(
    units: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, sum(units), dtype=torch.float64, generator=generator)
    for v, count in enumerate(units):

        def of(temperature: float, v: int = v) -> list[float]:
            return variables(soft_discretize(z, units, temperature), units)[0][v]

        path = [of(temperature) for temperature in (0.1, 0.3, 1.0, 3.0, 10.0)]
        winner = max(range(count), key=variables(z, units)[0][v].__getitem__)
        assert all(max(range(count), key=p.__getitem__) == winner for p in path)
        assert all(
            cold[winner] > warm[winner] and surprise(cold) < surprise(warm)
            for cold, warm in pairwise(path)
        )
        coldest, hottest = of(1e-4), of(1e8)
        assert coldest == pytest.approx([float(b == winner) for b in range(count)], abs=1e-12)
        assert hottest == pytest.approx([1 / count] * count, abs=1e-6)
        assert (surprise(coldest), surprise(hottest)) == (close(0), close(math.log(count)))


@pytest.mark.parametrize("subset", [(0, 1), (1, 0), (0, 2, 1)])
def test_the_soft_table_is_the_mean_of_the_tables_of_all_draws(subset: tuple[int, ...]) -> None:
    units, samples = (2, 3, 2), 2
    p = codes(units, samples)
    rows = variables(p, units)
    mean: Counter[tuple[int, ...]] = Counter()
    for draw in product(*(range(units[v]) for _ in range(samples) for v in subset)):
        drawn = [draw[n * len(subset) : (n + 1) * len(subset)] for n in range(samples)]
        chance = math.prod(
            rows[n][v][b] for n in range(samples) for v, b in zip(subset, drawn[n], strict=False)
        )
        for cell in drawn:
            mean[cell] += chance / samples
    found = information.joint_distribution(p, units, subset)
    for cell, expected in mean.items():
        assert found[cell].item() == close(expected, 1e-14)


@pytest.mark.parametrize(("samples", "rank"), [(3, 3), (40, 2 + 3 + 4 - 3 + 1)])
def test_a_joint_matrix_is_symmetric_positive_and_of_low_rank_with_the_marginals_as_margins(
    samples: int, rank: int
) -> None:
    p = codes(samples=samples)
    matrix = joint(p)
    assert torch.allclose(matrix, matrix.T, rtol=0, atol=1e-15)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-14
    assert torch.linalg.matrix_rank(matrix).item() == rank
    mean = torch.tensor(
        [sum(column) / samples for column in zip(*p.tolist(), strict=False)], dtype=torch.float64
    )
    for rows in matrix.split(UNITS, dim=1):
        assert torch.allclose(rows.sum(1), mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("units", [(4,), (2, 4)])
def test_the_derivative_of_a_softmax_is_that_of_autograd(
    units: tuple[int, ...], temperature: float
) -> None:
    z = torch.randn(
        3, sum(units), dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()
    p = soft_discretize(z, units, temperature)
    for column in range(sum(units)):
        g = torch.zeros_like(p)
        g[:, column] = 1
        (expected,) = torch.autograd.grad(p, z, g, retain_graph=True)
        found = streaming._through_softmax(p.detach(), g, units) / temperature
        assert torch.allclose(found, expected, rtol=0, atol=1e-14)


# --- chapter 03
# -------------------------------------------------------------------------------------------------


def test_surprise_is_minus_p_log_p_in_every_cell_and_zero_in_empty_ones() -> None:
    cells = [[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.6, 0.0, 0.4]]
    found = information._surprise(torch.tensor(cells, dtype=torch.float64))
    for row, expected in zip(found.tolist(), cells, strict=False):
        assert row == pytest.approx([surprise([x]) for x in expected], abs=1e-15)


def test_the_entropy_of_each_row_is_minus_the_sum_of_p_log_p() -> None:
    p = codes((4,), samples=3)
    assert information.entropy(p, dim=-1).tolist() == pytest.approx(
        [surprise(row) for row in p.tolist()], abs=1e-14
    )
    assert information.entropy(p[0]).item() == close(surprise(p[0].tolist()))


@pytest.mark.parametrize("cells", [2, 5])
def test_an_entropy_lies_between_zero_for_one_cell_and_log_m_for_even_cells(cells: int) -> None:
    one, even = (
        torch.eye(cells, dtype=torch.float64)[:1],
        torch.full((1, cells), 1 / cells, dtype=torch.float64),
    )
    between = codes((cells,), samples=20)
    found = information.entropy(torch.cat([one, even, between]), dim=-1).tolist()
    assert found[:2] == [close(0), close(math.log(cells))]
    assert all(0 < value < math.log(cells) for value in found[2:])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_mean_entropy_of_subsets_is_that_of_their_tables(k: int) -> None:
    p = codes()
    subsets = list(combinations(range(3), k))
    expected = sum(surprise(table(p, UNITS, subset).values()) for subset in subsets) / len(subsets)
    assert mean_subset_entropy(p, UNITS, k).item() == close(expected)


def test_the_shared_information_of_a_subset_is_its_divergence_from_independence() -> None:
    shared = of_chapter("03-information", "shared")
    p = codes()
    for subset in ((0, 1), (2, 0), (0, 1, 2)):
        assert shared(p, UNITS, subset).item() == close(divergence(p, UNITS, subset))


def divergence(p: Tensor, units: tuple[int, ...], subset: tuple[int, ...]) -> float:
    """Σ P log(P/Q) between a table P and the product Q of its margins."""
    margins = [table(p, units, (v,)) for v in subset]
    return sum(
        x * math.log(x / math.prod(margin[b,] for margin, b in zip(margins, cell, strict=False)))
        for cell, x in table(p, units, subset).items()
        if x > 0
    )


def test_total_correlation_is_positive_unless_the_variables_are_independent() -> None:
    for seed in range(5):
        p = codes(seed=seed)
        assert total_correlation(p, UNITS).item() > 1e-4
        assert total_correlation(p, UNITS).item() == close(divergence(p, UNITS, (0, 1, 2)))
    independent = [codes(samples=1), hard(list(product(*map(range, UNITS))), UNITS)]
    assert [total_correlation(p, UNITS).item() for p in independent] == [close(0)] * 2


def test_without_a_size_the_whole_is_the_one_subset() -> None:
    coins = hard([(a, b, a ^ b) for a in (0, 1) for b in (0, 1)], (2, 2, 2))
    assert total_correlation(coins, 2).item() == close(math.log(2))  # and pairs share nothing


def test_an_entropy_is_information_about_the_sample_plus_noise() -> None:
    p, samples = codes(samples=6), 6
    rows = variables(p, UNITS)
    for v, count in enumerate(UNITS):
        mean = [sum(row[v][b] for row in rows) / samples for b in range(count)]
        about = sum(
            row[v][b] / samples * math.log(row[v][b] / mean[b])
            for row in rows
            for b in range(count)
        )
        noise = sum(surprise(row[v]) for row in rows) / samples
        assert about >= 0
        assert joint_entropy(p, UNITS, [v]).item() == close(about + noise)
    alike = p[:1].repeat(6, 1)
    assert joint_entropy(alike, UNITS, [1]).item() == close(surprise(rows[0][1]))


@pytest.mark.parametrize("seed", range(3))
def test_the_whole_shares_v_minus_1_times_what_pairs_share_or_more_and_copies_just_that(
    seed: int,
) -> None:
    units = (3, 3, 3, 3)
    p = codes(units, samples=4, seed=seed)
    assert total_correlation(p, units).item() == close(divergence(p, units, (0, 1, 2, 3)))
    assert total_correlation(p, units).item() > 3 * total_correlation(p, units, 2).item()
    copies = hard([(b,) * 4 for b in range(3)], units)
    assert total_correlation(copies, units, 2).item() == close(math.log(3))
    assert total_correlation(copies, units).item() == close(3 * math.log(3))


@pytest.mark.parametrize(
    ("B", "t"), [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3), (3, 4), (5, 2)]
)
def test_polynomial_codes_share_nothing_up_to_t_variables_and_log_b_for_each_further_one(
    B: int, t: int
) -> None:
    p = of_chapter("03-information", "polynomial_codes")(B, t)
    assert p.shape == (B**t, B * (B + 1))
    assert all(
        sorted(part) == [0] * (B - 1) + [1] for row in variables(p, (B,) * (B + 1)) for part in row
    )
    rows = [tuple(part.index(1) for part in row) for row in variables(p, (B,) * (B + 1))]
    polynomials = set()  # each row is one polynomial's values and its leading coefficient
    for digits in product(range(B), repeat=t):
        polynomials.add(
            (*(sum(a * x**k for k, a in enumerate(digits)) % B for x in range(B)), digits[-1])
        )
    assert set(rows) == polynomials
    for size in range(1, B + 2):
        for subset in combinations(range(B + 1), size):
            counts = Counter(tuple(row[v] for v in subset) for row in rows)
            entropy = surprise(count / len(rows) for count in counts.values())
            assert size * math.log(B) - entropy == close(max(0, size - t) * math.log(B), 1e-11)


def test_a_batch_shares_at_least_what_its_variables_say_beyond_log_n_and_arrays_just_that() -> None:
    for seed in range(4):
        p, samples = codes((3, 4, 3), samples=4, seed=seed, sharpness=6), 4
        about = sum(
            surprise(table(p, (3, 4, 3), (v,)).values())
            - sum(surprise(row[v]) for row in variables(p, (3, 4, 3))) / samples
            for v in range(3)
        )
        assert total_correlation(p, (3, 4, 3)).item() > about - math.log(samples)
    lines = hard(
        [(a, b, (a + b) % 3, (a + 2 * b) % 3) for a in range(3) for b in range(3)], (3,) * 4
    )
    assert total_correlation(lines, 3).item() == close(4 * math.log(3) - math.log(9))


def test_the_plug_in_entropy_of_counts_is_log_n_less_the_mean_of_n_log_n() -> None:
    rows = [(0, 1), (0, 1), (1, 2), (0, 0), (0, 1), (1, 2), (1, 0)]
    counts = Counter(rows).values()
    expected = math.log(7) - sum(n * math.log(n) for n in counts) / 7
    assert joint_entropy(hard(rows, (2, 3)), (2, 3), (0, 1)).item() == close(expected)


@pytest.mark.parametrize(("N", "M"), [(2, 2), (3, 2), (5, 3), (4, 5), (6, 4)])
def test_the_exact_bias_is_the_mean_over_all_outcomes_negative_and_below_its_bound(
    N: int, M: int
) -> None:
    found = of_chapter("03-information", "expected_plug_in_entropy")(N, M)
    outcomes = [
        surprise(n / N for n in Counter(outcome).values())
        for outcome in product(range(M), repeat=N)
    ]
    assert found == close(sum(outcomes) / M**N)
    assert found < math.log(M)
    assert found <= math.log(N)


@pytest.mark.parametrize("seed", range(4))
def test_smoothing_never_lowers_the_entropy_of_a_pair(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = codes((4, 4), samples=3, seed=seed, sharpness=4)
    T = torch.zeros(4, 4, dtype=torch.float64)
    for weight in torch.rand(3, generator=generator).softmax(0):  # symmetric, and its rows sum to 1
        shuffled = torch.eye(4, dtype=torch.float64)[torch.randperm(4, generator=generator)]
        T += weight * (shuffled + shuffled.T) / 2
    smooth = torch.cat([part @ T for part in p.split(4, dim=1)], dim=1)
    smoothed = (
        T
        @ torch.tensor(
            [[table(p, (4, 4), (0, 1))[b, c] for c in range(4)] for b in range(4)]
        ).double()
        @ T.T
    )
    before, after = (joint_entropy(q, 4, (0, 1)).item() for q in (p, smooth))
    assert after >= before
    assert before == close(surprise(table(p, (4, 4), (0, 1)).values()))
    assert after == close(surprise(smoothed.flatten().tolist()), 1e-6)


# --- chapter 04
# -------------------------------------------------------------------------------------------------


def hard_views(seed: int, units: int = 3) -> tuple[list[tuple[int, ...]], Tensor]:
    """Random hard codes that agree: their values, and logits so far apart that the softmax is
    one-hot."""
    generator = torch.Generator().manual_seed(seed)
    rows = [tuple(row) for row in torch.randint(units, (7, 4), generator=generator).tolist()]
    return rows, 900 * hard(rows, (units,) * 4)


def counted(rows: list[tuple[int, ...]], *subset: int) -> float:
    return surprise(
        n / len(rows) for n in Counter(tuple(row[v] for v in subset) for row in rows).values()
    )


@pytest.mark.parametrize("seed", range(3))
def test_on_hard_codes_that_agree_the_loss_is_minus_the_objective_with_alpha_3_and_beta_1(
    seed: int,
) -> None:
    rows, z = hard_views(seed)
    alone = sum(counted(rows, v) for v in range(4)) / 4
    shared = [
        counted(rows, i) + counted(rows, j) - counted(rows, i, j)
        for i, j in combinations(range(4), 2)
    ]
    similarity, alpha, beta = 0, 3, 1
    objective = similarity + alpha * alone - beta * sum(shared) / len(shared)
    assert cross_joint_entropy(z, z, 3).total.item() == close(-objective)


@pytest.mark.parametrize("seed", range(3))
def test_on_hard_codes_that_agree_the_loss_is_minus_the_sum_of_both_mean_entropies(
    seed: int,
) -> None:
    rows, z = hard_views(seed)
    alone = sum(counted(rows, v) for v in range(4)) / 4
    pairs = [counted(rows, i, j) for i, j in combinations(range(4), 2)]
    terms = cross_joint_entropy(z, z, 3)
    assert terms.diagonal_entropy.item() == close(-alone)
    assert terms.off_diagonal_entropy.item() == close(-sum(pairs) / len(pairs))
    assert terms.total.item() == close(-(alone + sum(pairs) / len(pairs)))


@pytest.mark.parametrize(
    "units", [(3, 3), (5, 3, 4, 7, 5)]
)  # a slab of rows may reach from one variable into the next
def test_oe_is_minus_both_views_entropies_plus_the_information_between_them(
    units: tuple[int, ...],
) -> None:
    p1, p2 = codes(units, seed=1), codes(units, seed=2)
    rows1, rows2, V = variables(p1, units), variables(p2, units), len(units)
    entropies = [
        sum(surprise(table(p, units, (v,)).values()) for v in range(V)) / V for p in (p1, p2)
    ]
    information_of_pairs = []
    for i, j in product(range(V), repeat=2):
        if i != j:
            cells = {
                (b, c): sum(x[i][b] * y[j][c] for x, y in zip(rows1, rows2, strict=False))
                / len(rows1)
                for b in range(units[i])
                for c in range(units[j])
            }
            row, column = table(p1, units, (i,)), table(p2, units, (j,))
            information_of_pairs.append(
                sum(x * math.log(x / row[b,] / column[c,]) for (b, c), x in cells.items())
            )
    # unequal units weigh nothing here: the means run over variables and over pairs
    expected = -sum(entropies) + sum(information_of_pairs) / len(information_of_pairs)
    assert streaming._off_diagonal_sweep(p1, p2, units, range(sum(units)))[0].item() == close(
        expected
    )


@pytest.mark.parametrize("units", [(3, 3), (5, 3, 4, 7, 5)])
def test_the_sweeps_slope_is_the_mean_log_occupancy_that_a_sample_would_meet(
    units: tuple[int, ...],
) -> None:
    p1, p2 = codes(units, seed=1), codes(units, seed=2)
    V, starts = len(units), [sum(units[:v]) for v in range(len(units))]
    for view, (own, other) in enumerate(((p1, p2), (p2, p1))):
        found = streaming._off_diagonal_sweep(p1, p2, units, range(sum(units)))[1 + view] / (V - 1)
        rows, others = variables(own, units), variables(other, units)
        for n, v in product(range(len(rows)), range(V)):
            for b in range(units[v]):
                a = 0.0
                cells = [(j, c) for j in range(V) if j != v for c in range(units[j])]
                for j, c in cells:
                    cell = sum(x[v][b] * y[j][c] for x, y in zip(rows, others, strict=False)) / len(
                        rows
                    )
                    a += others[n][j][c] * math.log(cell) / (V - 1)
                assert found[n, starts[v] + b].item() == close(a)


@pytest.mark.parametrize("form", ["inner_product", "cross_entropy"])
@pytest.mark.parametrize("units", [(3, 3), UNITS])
def test_disagreement_and_its_slope_in_the_logits_are_those_of_its_formula(
    form: str, units: tuple[int, ...]
) -> None:
    z = [codes(units, seed=seed).log().requires_grad_() for seed in (1, 2)]
    p1, p2 = (soft_discretize(x, units) for x in z)
    logs, tables = (p1.detach().log(), p2.detach().log()), (p1.detach(), p2.detach())
    if form == "inner_product":
        found = streaming._inner_product(*logs, tables[0], units)
        slopes = streaming._inner_product_slopes(*logs, *tables, found, units)
    else:
        found = streaming._cross_entropy(*logs, tables[0], units)
        slopes = streaming._cross_entropy_slopes(logs[1], *tables, units)
    rows1, rows2 = variables(p1, units), variables(p2, units)
    assert found.shape == (len(p1), len(units))
    for n, v in product(range(len(p1)), range(len(units))):
        p, q = rows1[n][v], rows2[n][v]
        expected = (
            -math.log(sum(x * y for x, y in zip(p, q, strict=False)))
            if form == "inner_product"
            else -sum(x * math.log(y) for x, y in zip(p, q, strict=False))
        )
        assert found[n, v].item() == close(expected)
    columns = list(zip(p1.split(units, dim=1), p2.split(units, dim=1), strict=False))
    total = sum(
        -((x * y).sum(1).log() if form == "inner_product" else (x * y.log()).sum(1)).sum()
        for x, y in columns
    )
    for slope, expected in zip(slopes, torch.autograd.grad(total, z), strict=False):
        assert torch.allclose(slope, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_gradient_by_hand_is_that_of_autograd(temperature: float, weight: float) -> None:
    by_hand = of_chapter("04-the-loss", "gradient_by_hand")
    generator = torch.Generator().manual_seed(3)
    z1, z2 = torch.randn(2, 6, 12, dtype=torch.float64, generator=generator)
    z1.requires_grad_()
    total = cross_joint_entropy(z1, z2, 4, temperature=temperature, invariance_weight=weight).total
    (expected,) = torch.autograd.grad(total, z1)
    p1, p2 = (soft_discretize(z.detach(), 4, temperature) for z in (z1, z2))
    assert torch.allclose(by_hand(p1, p2, 4, temperature, weight), expected, rtol=0, atol=1e-15)


# --- chapter 05
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "K"), [(2, 2), (3, 2), (3, 3), (4, 3)])
def test_arrays_of_strength_k_show_every_tuple_of_values_once_and_reach_the_bound(
    B: int, K: int
) -> None:
    rows = [tuple(row) for row in orthogonal_array(B, K).tolist()]
    assert {len(row) for row in rows} == {B + 1}
    for subset in combinations(range(B + 1), K):
        assert sorted(tuple(row[v] for v in subset) for row in rows) == list(
            product(range(B), repeat=K)
        )
    single = sum(counted(rows, v) for v in range(B + 1)) / (B + 1)
    together = [counted(rows, *subset) for subset in combinations(range(B + 1), K)]
    assert -single - sum(together) / len(together) == close(-(1 + K) * math.log(B))
