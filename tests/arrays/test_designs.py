"""Finite fields, orthogonal arrays and packings."""

import math
from itertools import combinations

import pytest
import torch

from imsvd_core.arrays import (
    galois_field,
    hard_packing,
    one_hot_codes,
    orthogonal_array,
    population_bound,
    strength,
)
from imsvd_core.discretization import joint
from imsvd_core.information import mean_subset_entropy
from imsvd_core.loss import cross_joint_entropy

PRIME_POWERS = (2, 3, 4, 5, 7, 8, 9)


@pytest.mark.parametrize("order", [*PRIME_POWERS, 16, 25, 27])
def test_a_field_obeys_every_axiom(order):
    add, multiply = galois_field(order)
    x = torch.arange(order)
    a, b, c = torch.meshgrid(x, x, x, indexing="ij")
    for table in (add, multiply):
        assert (table == table.T).all()
        assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (multiply[a, add[b, c]] == add[multiply[a, b], multiply[a, c]]).all()
    assert (add[0] == x).all()
    assert (multiply[1] == x).all()
    assert all((row.sort().values == x).all() for row in [*add, *multiply[1:]]), (
        "each row but that of 0 is a permutation"
    )


@pytest.mark.parametrize("order", [0, 1, 6, 10, 12, 2.0, 1025])
def test_no_field_where_there_is_none(order):
    with pytest.raises(ValueError, match=f"order={order}.*prime power"):
        galois_field(order)


@pytest.mark.parametrize("units", PRIME_POWERS)
def test_lines_of_the_affine_plane_attain_the_bound(units):
    z = 1000 * one_hot_codes(orthogonal_array(units), units)
    assert abs(cross_joint_entropy(z, z, units).total.item() + 3 * math.log(units)) < 1e-12


@pytest.mark.parametrize(
    ("units", "k"), [(2, 3), (3, 3), (4, 3), (5, 3), (7, 3), (8, 3), (3, 4), (4, 5)]
)
def test_every_k_columns_show_every_tuple_once(units, k):
    values = orthogonal_array(units, k)
    for subset in combinations(range(values.shape[1]), k):
        assert len(values[:, subset].unique(dim=0)) == len(values) == units**k
    assert strength(values, units) == k


@pytest.mark.parametrize("units", [3, 4, 5])
def test_strength_three_attains_four_log_b(units):
    p = one_hot_codes(orthogonal_array(units, 3), units)
    loss = -mean_subset_entropy(p, units, 1) - mean_subset_entropy(p, units, 3)
    assert loss.item() == pytest.approx(population_bound(units, strength=3), abs=1e-12)
    assert loss.item() == pytest.approx(-4 * math.log(units), abs=1e-12)


@pytest.mark.parametrize(
    ("samples", "units", "variables"),
    [(6, 3, 3), (12, 4, 4), (20, 5, 5), (64, 8, 8), (80, 16, 4), (512, 32, 32)],
)
def test_packings_use_no_pair_twice_and_every_value_alike(samples, units, variables):
    values = hard_packing(samples, units, variables)
    assert values.shape == (samples, variables)
    assert set(values.flatten().tolist()) == set(range(units))
    p = one_hot_codes(values, units)
    cells = joint(p).reshape(variables, units, variables, units)
    for i, j in combinations(range(variables), 2):
        assert set((samples * cells[i, :, j]).round().int().flatten().tolist()) <= {0, 1}
    assert strength(values, units) >= 1
    z = 1000 * p
    assert cross_joint_entropy(z, z, units).total.item() == pytest.approx(
        -math.log(units) - math.log(samples), abs=1e-12
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 3), "samples=10"),
        ((20, 4, 3), "samples=20"),
        ((0, 4, 3), "samples=0"),
        ((8, 4, 5), "variables=5"),
        ((12, 6, 2), "order=6"),
    ],
)
def test_a_packing_that_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hard_packing(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 0), "strength=0"),
        ((3, 2, 5), "variables=5"),
        ((3, 3, 2), "strength=3"),
        ((31, 6), "rows"),
        ((6,), "order=6"),
    ],
)
def test_an_array_that_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        orthogonal_array(*arguments)


def test_strength_counts_tuples_not_appearances():
    values = orthogonal_array(3)
    assert strength(values, 3) == 2
    assert strength(values[:-1], 3) == 0, "eight samples cannot use three values alike"
    assert strength(torch.cat([values, values]), 3) == 2
    changed = values.clone()
    changed[0, 1] = (changed[0, 1] + 1) % 3
    assert strength(changed, 3) == 0
    copies = torch.arange(9)[:, None].expand(9, 2) % 3
    assert strength(copies, 3) == 1


@pytest.mark.parametrize(
    "values", [torch.tensor([[3]]), torch.tensor([[-1]]), torch.tensor([0]), torch.tensor([[0.0]])]
)
def test_what_is_no_table_of_values_is_refused(values):
    with pytest.raises(ValueError, match="from 0 to 2"):
        one_hot_codes(values, 3)
