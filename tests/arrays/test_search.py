"""Searches among free tables and hard codes."""

import math
import random

import pytest
import torch

from imsvd_core.arrays import (
    fano_bound,
    hard_bound,
    hard_packing,
    one_hot_codes,
    optimise_tables,
    orthogonal_array,
    search_hard_codes,
)
from imsvd_core.arrays.search import _CountedCodes
from imsvd_core.loss import cross_joint_entropy


@pytest.mark.slow  # sixteen descents of 800 steps
def test_soft_tables_beat_the_best_hard_codes():
    found = optimise_tables(20, 6, 3, restarts=16, steps=800)
    hard, _ = search_hard_codes(20, 6, 3, target=hard_bound(20, 6))
    assert hard == pytest.approx(hard_bound(20, 6), abs=1e-12)
    assert hard == pytest.approx(-4.7778, abs=5e-5)
    assert fano_bound(20, 6) < found.loss < -4.90
    assert 0.9 < found.mean_top < 0.98


def test_the_loss_found_is_that_of_the_codes_given_back():
    found = optimise_tables(6, 3, 2, restarts=4, steps=100, invariance_weight=0.5)
    again = cross_joint_entropy(
        found.p1.log(), found.p2.log(), 3, invariance_weight=0.5
    ).total.item()
    assert found.loss == pytest.approx(again, abs=1e-10)
    assert found.loss == pytest.approx(found.restarts.min().item(), abs=1e-12)
    tops = [p.reshape(6, 2, 3).amax(-1).mean().item() for p in (found.p1, found.p2)]
    assert found.mean_top == pytest.approx(sum(tops) / 2, abs=1e-12)


def test_a_search_is_repeatable():
    first, second = (optimise_tables(4, 2, 2, restarts=3, steps=20, seed=5) for _ in range(2))
    assert torch.equal(first.p1, second.p1)
    assert not torch.equal(first.p1, optimise_tables(4, 2, 2, restarts=3, steps=20, seed=6).p1)


@pytest.mark.parametrize(
    ("samples", "units", "variables"), [(9, 3, 4), (12, 4, 3), (10, 3, 3), (30, 6, 3)]
)
def test_annealing_finds_hard_codes_that_attain_their_bound(samples, units, variables):
    loss, values = search_hard_codes(samples, units, variables, target=hard_bound(samples, units))
    z = 1000 * one_hot_codes(values, units)
    assert loss == pytest.approx(cross_joint_entropy(z, z, units).total.item(), abs=1e-12)
    assert loss == pytest.approx(hard_bound(samples, units), abs=1e-12)


def test_the_change_that_annealing_judges_a_move_by_is_the_difference_of_the_loss():
    samples, units, variables = 11, 3, 4
    generator = random.Random(0)
    counted = _CountedCodes(samples, units, variables, generator)
    for _ in range(40):
        n, v, b = map(generator.randrange, (samples, variables, units))
        change, before = counted.change(n, v, b), counted.loss()
        counted.make(n, v, b)
        difference = samples * variables * (counted.loss() - before)
        assert change == pytest.approx(difference, abs=1e-10)


@pytest.mark.parametrize(("samples", "units"), [(12, 4), (20, 5)])
def test_every_small_step_out_of_a_hard_code_towards_an_empty_cell_pays(samples, units):
    values = hard_packing(samples, units, 3)
    p = one_hot_codes(values, units)
    start = -math.log(units) - math.log(samples)
    for b in range(units):
        if ((values[:, 0] == b) & (values[:, 1] == values[0, 1])).any():
            continue  # not an empty cell
        epsilon = 1e-6
        moved = p.clone()
        moved[0, values[0, 0]] -= epsilon
        moved[0, b] += epsilon
        loss = cross_joint_entropy(_logits(moved), _logits(p), units).total.item()
        assert loss < start - 1e-9


def test_no_step_out_of_a_full_array_pays():
    values = orthogonal_array(4)
    p = one_hot_codes(values, 4)
    for epsilon in (1e-6, 1e-3, 0.1):
        moved = p.clone()
        moved[0, values[0, 0]] -= epsilon
        moved[0, (values[0, 0] + 1) % 4] += epsilon
        assert cross_joint_entropy(_logits(moved), _logits(p), 4).total.item() > -3 * math.log(4)


def _logits(p):
    return p.log().clamp_min(-1e4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimise_tables(0, 3, 2), "samples=0"),
        (lambda: optimise_tables(4, 1, 2), "units=1"),
        (lambda: optimise_tables(4, 2, 1), "variables=1"),
        (lambda: optimise_tables(4, 2, 2, steps=0), "steps=0"),
        (lambda: optimise_tables(4, 2, 2, restarts=0), "restarts=0"),
        (lambda: search_hard_codes(4, 2, 1), "variables=1"),
        (lambda: search_hard_codes(4, 2, 2, restarts=0), "restarts=0"),
    ],
)
def test_searches_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
