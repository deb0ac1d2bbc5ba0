"""Entropy, total correlation and mutual information of soft codes, exactly and by brute force.

Soft codes p (N, D) hold V variables; given a sample its variables are independent (Eq. 3).
Everything here enumerates every cell of every joint table, so it is for small tables and for
checking faster code, in any floating-point type (float64 for the checks) and through autograd.
Natural logarithms: entropies are in nats.
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from imsvd_core.discretization import Units, joint, marginals, split_variables, unit_counts, widen

MAX_CELLS = 10_000_000  #: largest joint table that is built: 80 MB in float64


def entropy(probabilities: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """−Σ P log P in nats over `dim` (None: over every cell), with 0 log 0 = 0.

    At an empty cell the slope is infinite; autograd gets 0 there, to keep gradients finite.
    """
    return _surprise(probabilities).sum(dim)


def _surprise(probabilities: Tensor) -> Tensor:
    """−P log P cell by cell, in float32 at least."""
    occupied = widen(probabilities).masked_fill(probabilities == 0, 1.0)
    return -occupied * occupied.log()


def joint_distribution(p: Tensor, units: Units, subset: Sequence[int]) -> Tensor:
    """P(X_v1, …, X_vK) of the variables in `subset`: codes (N, D) → (B_v1, …, B_vK) (Eq. 3).

    Raises ValueError if p is no table of soft codes, if `subset` is empty, repeats a variable or
    names one that is not there, or if the table would have more than `MAX_CELLS` cells.
    """
    return _joint_distribution(_variables(p, units), subset)


def joint_entropy(p: Tensor, units: Units, subset: Sequence[int]) -> Tensor:
    """H(X_S) in nats, the entropy of the joint distribution of the variables in `subset` (Eq. 6).

    Raises ValueError as `joint_distribution` does.
    """
    return entropy(joint_distribution(p, units, subset))


def mean_subset_entropy(p: Tensor, units: Units, k: int) -> Tensor:
    """Mean of H(X_S) in nats over all subsets S of `k` variables (Eq. 5; Eq. 7 for k = 1).

    The cost is that of C(V, k) joint tables.
    Raises ValueError unless 1 ≤ k ≤ V, and as `joint_distribution` does.
    """
    variables = _variables(p, units)
    if not 1 <= k <= len(variables):
        raise ValueError(
            f"k={k} is out of range: these codes have {len(variables)} variables, "
            f"so take 1 ≤ k ≤ {len(variables)}"
        )
    subsets = combinations(range(len(variables)), k)
    return torch.stack([entropy(_joint_distribution(variables, s)) for s in subsets]).mean()


def total_correlation(p: Tensor, units: Units, k: int | None = None) -> Tensor:
    """Mean total correlation in nats over all subsets of `k` variables: k H̄_1 − H̄_k ≥ 0 (Eq. 8).

    Without `k` all V variables form the one subset, and this is Watanabe's total correlation.
    Raises ValueError as `mean_subset_entropy` does.
    """
    k = len(unit_counts(units, p.shape[-1])) if k is None else k
    return k * mean_subset_entropy(p, units, 1) - mean_subset_entropy(p, units, k)


def mutual_information(p: Tensor, units: Units) -> Tensor:
    """I(X_i; X_j) = H(X_i) + H(X_j) − H(X_i, X_j) in nats for every pair: codes (N, D) → (V, V).

    The diagonal holds H(X_v), which is what a variable tells about itself. (The self-joint's own
    diagonal blocks would say less of soft codes: there two draws from one sample may disagree.)
    Raises ValueError if p is no table of soft codes.
    """
    variables = _variables(p, units)
    table = torch.cat(variables, dim=1)
    single = entropy(split_variables(marginals(table), units), dim=-1)
    rows = (split_variables(_surprise(joint(v, table)), units).sum((0, 2)) for v in variables)
    information = single[:, None] + single - torch.stack(list(rows))
    diagonal = torch.eye(len(single), dtype=torch.bool, device=p.device)
    return torch.where(diagonal, single, information)


def _joint_distribution(variables: Sequence[Tensor], subset: Sequence[int]) -> Tensor:
    """Eq. 3: products within two halves of the subset, then one matrix product."""
    shape = _table_shape(variables, subset)
    ones, middle = variables[0].new_ones(len(variables[0]), 1), len(subset) // 2
    left = reduce(_row_products, (variables[v] for v in subset[:middle]), ones)
    right = reduce(_row_products, (variables[v] for v in subset[middle:]), ones)
    return joint(left, right).reshape(shape)


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """All products of an entry of a and an entry of b, by sample: (N, A), (N, B) → (N, AB)."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)


def _table_shape(variables: Sequence[Tensor], subset: Sequence[int]) -> tuple[int, ...]:
    """(B_v1, …, B_vK); raises ValueError if `subset` is wrong or the table too large."""
    different = len(set(subset)) == len(subset)
    if not subset or not different or not set(subset) <= set(range(len(variables))):
        raise ValueError(
            f"subset={tuple(subset)}: need one or more different variables, "
            f"each from 0 to {len(variables) - 1}"
        )
    shape = tuple(variables[v].shape[1] for v in subset)
    if math.prod(shape) > MAX_CELLS:
        raise ValueError(
            f"subset={tuple(subset)}: its joint table would have {math.prod(shape):,} cells, "
            f"more than {MAX_CELLS:,}: take fewer variables, or variables with fewer units"
        )
    return shape


def _variables(p: Tensor, units: Units) -> tuple[Tensor, ...]:
    """Codes (N, D) → one table (N, B_v) per variable, in float32 at least.

    Raises ValueError unless they hold probabilities.
    """
    if p.ndim != 2 or len(p) == 0:
        raise ValueError(
            f"p has shape {tuple(p.shape)}: need a non-empty table (samples, dimensions)"
        )
    counts = unit_counts(units, p.shape[1])
    variables = torch.split_with_sizes(widen(p), counts, dim=1)
    errors = ((variable.sum(1) - 1).abs().max() for variable in variables)
    if not (p.min() >= -0.01 and all(error <= 0.01 for error in errors)):
        raise ValueError(
            f"p holds no soft codes of units={units}: every variable of every sample needs "
            "probabilities that sum to 1; pass logits through soft_discretize first"
        )
    return variables
