"""Other objectives of the same codes, against their definitions."""

import itertools
import math

import pytest
import torch

from imsvd_core.arrays import orthogonal_array
from imsvd_core.discretization import joint, soft_discretize
from imsvd_core.information import joint_entropy
from imsvd_core.loss import cross_joint_entropy
from imsvd_core.variants import CollisionLoss, SubsetEntropyLoss, log_mean_collision

UNITS = (3, 2, 4)


def logits(samples=7, dim=9, seed=0):
    return 2 * torch.randn(
        2, samples, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def blocks(p1, p2):
    starts = [0, *itertools.accumulate(UNITS)]
    cells = joint(p1, p2)
    return [
        cells[starts[i] : starts[i + 1], starts[j] : starts[j + 1]]
        for i, j in itertools.permutations(range(3), 2)
    ]


def test_the_gram_matrices_give_the_mean_chance_of_a_collision():
    p1, p2 = soft_discretize(logits(), UNITS)
    direct = torch.stack([block.square().sum() for block in blocks(p1, p2)]).mean().log()
    torch.testing.assert_close(log_mean_collision(p1, p2, UNITS), direct)


def test_the_collision_bound_lies_above_oe_and_touches_it_at_an_orthogonal_array():
    for seed in range(5):
        z = logits(seed=seed)
        assert (
            CollisionLoss(UNITS)(*z).off_diagonal_entropy
            > cross_joint_entropy(*z, UNITS).off_diagonal_entropy
        )
    hard = torch.nn.functional.one_hot(orthogonal_array(3, 4)).flatten(1).double() * 60
    terms = CollisionLoss(3)(hard, hard)
    assert terms.off_diagonal_entropy.item() == pytest.approx(-2 * math.log(3), abs=1e-12)
    assert terms.total.item() == pytest.approx(-3 * math.log(3), abs=1e-12)


def test_all_but_oe_is_as_in_the_paper():
    z = logits()
    ours, paper = (
        CollisionLoss(UNITS, temperature=0.7)(*z),
        cross_joint_entropy(*z, UNITS, temperature=0.7),
    )
    torch.testing.assert_close(
        (ours.diagonal_entropy, ours.transform_invariance),
        (paper.diagonal_entropy, paper.transform_invariance),
    )


def test_triples_are_averaged_over_both_views_own_codes():
    z = logits()
    terms = SubsetEntropyLoss(UNITS, entropy_weight=0.7, subset_weight=1.3, invariance_weight=0.4)(
        *z
    )
    views = soft_discretize(z, UNITS)
    single = sum(joint_entropy(p, UNITS, [v]) for p in views for v in range(3)) / 6
    triple = sum(joint_entropy(p, UNITS, [0, 1, 2]) for p in views) / 2
    torch.testing.assert_close(
        terms.total, -0.7 * single - 1.3 * triple + 0.4 * terms.transform_invariance
    )
    torch.testing.assert_close(
        terms.transform_invariance, cross_joint_entropy(*z, UNITS).transform_invariance
    )


def test_only_an_array_of_strength_three_reaches_the_least_value_for_triples():
    cube = torch.tensor(list(itertools.product(range(2), repeat=3)))  # all 8 rows: strength 3
    parity = torch.stack(
        [cube[:, 0], cube[:, 1], cube[:, 0] ^ cube[:, 1]], 1
    )  # pairs uniform, the triple not
    values = []
    for rows in (cube, parity):
        z = torch.nn.functional.one_hot(rows).flatten(1).double() * 60
        values.append(SubsetEntropyLoss(2)(z, z).total.item())
    assert values == pytest.approx([-4 * math.log(2), -3 * math.log(2)], abs=1e-12)


def test_pairs_give_the_papers_loss_on_hard_codes():
    z = (
        torch.nn.functional.one_hot(
            torch.randint(3, (12, 4), generator=torch.Generator().manual_seed(1)), 3
        )
        .flatten(1)
        .double()
        * 60
    )
    torch.testing.assert_close(
        SubsetEntropyLoss(3, order=2)(z, z).total, cross_joint_entropy(z, z, 3).total
    )


def test_drawn_subsets_estimate_the_mean_without_bias(monkeypatch):
    z = logits(dim=8)
    whole = SubsetEntropyLoss(2)(*z)
    parts = []
    for order in itertools.permutations(range(4)):
        monkeypatch.setattr(torch, "randperm", lambda n, order=order: torch.tensor(order))
        parts.append(SubsetEntropyLoss(2, subsets=1)(*z).total)
    assert len({round(part.item(), 9) for part in parts}) == 4
    torch.testing.assert_close(torch.stack(parts).mean(), whole.total)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubsetEntropyLoss(2, order=1), "order=1"),
        (lambda: SubsetEntropyLoss(2, subsets=0), "subsets=0"),
        (lambda: SubsetEntropyLoss(3)(*logits(dim=6)), "order=3 exceeds the 2"),
        (lambda: CollisionLoss(4)(*logits()), "units=4"),
        (lambda: CollisionLoss(0), "units=0"),
        (lambda: SubsetEntropyLoss(2, order=2.5), "order=2.5"),
        (lambda: SubsetEntropyLoss(2, entropy_weight=math.nan), "entropy_weight=nan"),
        (lambda: CollisionLoss(2, diagonal_weight=-1), "diagonal_weight=-1"),
        (lambda: CollisionLoss(2, temperature=0), "temperature=0"),
        (
            lambda: CollisionLoss(3)(torch.zeros(2, 9), torch.zeros(3, 9)),
            r"z1 has shape \(2, 9\), z2 \(3, 9\)",
        ),
        (lambda: CollisionLoss(3)(torch.zeros(0, 9), torch.zeros(0, 9)), "non-empty"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("loss", [CollisionLoss(3), SubsetEntropyLoss(3, subsets=2)])
def test_half_precision_logits_are_computed_with_in_fp32(loss):
    z1, z2 = logits().to(torch.bfloat16).requires_grad_()
    terms = loss(z1, z2)
    assert terms.total.dtype is torch.float32
    assert torch.autograd.grad(terms.total, z1)[0].isfinite().all()
