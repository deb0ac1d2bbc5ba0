"""Two other objectives of the same codes: one that needs no D×D matrix, and one that sees triples.

Both are plain autograd on one process's batch, for studies; `loss.CrossJointEntropyLoss` is what
trains.
"""

from functools import reduce

import torch
from torch import Tensor, nn

from imsvd_core.discretization import Units, soft_discretize, split_variables, unit_counts
from imsvd_core.information import joint_entropy, mean_subset_entropy
from imsvd_core.loss import LossTerms, check_logits, check_number_drawn, check_settings


class _Objective(nn.Module):
    """Weights and terms, of codes in float32 under any autocast; a subclass has its `terms`."""

    def __init__(self, units: Units, temperature: float, **weights: float):
        super().__init__()
        check_settings(units, temperature, "inner_product", **weights)
        self.units, self.temperature, self.weights = units, temperature, tuple(weights.values())

    def forward(self, z1: Tensor, z2: Tensor) -> LossTerms:
        check_logits(z1, z2, self.units)
        wide = torch.promote_types(z1.dtype, torch.float32)
        with torch.autocast(z1.device.type, enabled=False):
            p1, p2 = (soft_discretize(z.to(wide), self.units, self.temperature) for z in (z1, z2))
            terms = self.terms(p1, p2)
            weighted = [weight * term for weight, term in zip(self.weights, terms, strict=True)]
            return LossTerms(weighted[0] + weighted[1] + weighted[2], *terms)

    def terms(self, p1: Tensor, p2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three terms of the loss, from the codes (N, D) of both views."""
        raise NotImplementedError


class CollisionLoss(_Objective):
    """Eq. 11 with OE bounded from above, by N×N Gram matrices only (Rényi's entropy of order 2).

    Σ P log P ≤ log Σ P², the logarithm of the chance that two samples collide in both variables.
    Its mean over pairs is at most the logarithm of the mean, and that mean is Σ_nm K¹_nm K²_nm / N²
    less the diagonal blocks' part, with K = P Pᵀ of each view: 4N²D operations in place of 2ND², so
    less work where N < D/2.

    Args: as of `CrossJointEntropyLoss`. The term called off_diagonal_entropy is the bound, in nats;
    with one variable it is 0. Needs logits whose softmax does not underflow. Raises ValueError for
    shapes or units that do not fit.
    """

    def __init__(
        self,
        units: Units,
        *,
        diagonal_weight: float = 1.0,
        off_diagonal_weight: float = 1.0,
        invariance_weight: float = 1.0,
        temperature: float = 1.0,
    ):
        super().__init__(
            units,
            temperature,
            diagonal_weight=diagonal_weight,
            off_diagonal_weight=off_diagonal_weight,
            invariance_weight=invariance_weight,
        )

    def terms(self, p1: Tensor, p2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        diagonal, disagreement = _diagonal_terms(p1, p2, self.units)
        return diagonal, log_mean_collision(p1, p2, self.units), disagreement


def log_mean_collision(p1: Tensor, p2: Tensor, units: Units) -> Tensor:
    """log of the mean over pairs i ≠ j of Σ_bc P̂_(i,b),(j,c)², from codes (N, D) each.

    0 for one variable.
    """
    samples, variables = len(p1), len(unit_counts(units, p1.shape[1]))
    if variables == 1:
        return p1.new_zeros(())
    every_pair = ((p1 @ p1.T) * (p2 @ p2.T)).sum() / samples**2
    first, second = (split_variables(p, units).transpose(0, 1) for p in (p1, p2))
    same_variable = (first.mT @ second / samples).square().sum()
    return ((every_pair - same_variable) / (variables * (variables - 1))).log()


class SubsetEntropyLoss(_Objective):
    """The general objective (Eq. 9) as a loss: λ·TI − (α − βK) H̄_1 − β H̄_K.

    H̄ is averaged over both views' own codes.
    On hard codes its least value is −(1 + K) log B at the default weights α = 1 + K, β = 1, which
    only arrays of strength K attain; for K = 2 it equals Eq. 11 there.

    Args:
        units: units of every variable, B or B_v; the joint table of a subset has the product of K
            of them as cells.
        order: K ≥ 2, variables to a subset.
        subsets: how many subsets to draw anew at every call, from torch's generator: an unbiased
            estimate of H̄_K. None for all V-choose-K.
        entropy_weight, subset_weight: α − βK and β.

    Calling it with logits (N, D) of two views returns `LossTerms`, whose diagonal_entropy is −H̄_1
    and whose off_diagonal_entropy is −H̄_K. Raises ValueError for impossible settings, and for
    tables above `information.MAX_CELLS` cells.
    """

    def __init__(
        self,
        units: Units,
        *,
        order: int = 3,
        subsets: int | None = None,
        entropy_weight: float = 1.0,
        subset_weight: float = 1.0,
        invariance_weight: float = 1.0,
        temperature: float = 1.0,
    ):
        super().__init__(
            units,
            temperature,
            entropy_weight=entropy_weight,
            subset_weight=subset_weight,
            invariance_weight=invariance_weight,
        )
        if type(order) is not int or order < 2:
            raise ValueError(
                f"order={order!r} must be a whole number ≥ 2: subsets of one variable are H̄_1"
            )
        check_number_drawn("subsets", subsets)
        self.order, self.subsets = order, subsets

    def terms(self, p1: Tensor, p2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        views, variables = (p1, p2), len(unit_counts(self.units, p1.shape[1]))
        if self.order > variables:
            raise ValueError(f"order={self.order} exceeds the {variables} variables of the codes")
        single = [mean_subset_entropy(p, self.units, 1) for p in views]
        if self.subsets is None:
            several = [mean_subset_entropy(p, self.units, self.order) for p in views]
        else:
            drawn = [torch.randperm(variables)[: self.order].tolist() for _ in range(self.subsets)]
            several = [joint_entropy(p, self.units, subset) for p in views for subset in drawn]
        disagreement = _diagonal_terms(p1, p2, self.units)[1]
        return -_mean(single), -_mean(several), disagreement


def _mean(values: list[Tensor]) -> Tensor:
    return reduce(torch.add, values) / len(values)


def _diagonal_terms(p1: Tensor, p2: Tensor, units: Units) -> tuple[Tensor, Tensor]:
    """DE and TI of Eq. 11, from codes."""
    both = split_variables(p1 * p2, units)
    occupancy = both.mean(0)
    diagonal = torch.special.xlogy(occupancy, occupancy).sum() / len(occupancy)
    return diagonal, -both.sum(-1).log().mean()
