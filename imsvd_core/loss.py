"""The cross-joint entropy loss (Eq. 11), twice: as mathematics, and as a stream that trains.

`cross_joint_entropy` builds the D×D matrix and lets autograd do the rest: read it, test against it.
`CrossJointEntropyLoss` never holds more than a slab of that matrix and writes its gradient by hand:
train with it.
"""

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from imsvd_core.discretization import (
    Units,
    check_units,
    joint,
    soft_discretize,
    split_variables,
    unit_counts,
)
from imsvd_core.distributed import refuse_unlike
from imsvd_core.streaming import Invariance, Products, Settings, StreamedLoss


class LossTerms(NamedTuple):
    """The weighted total, and its three terms unweighted, in nats, each a scalar (Eq. 11)."""

    total: Tensor
    diagonal_entropy: Tensor  #: DE ≤ 0, Σ P log P over diagonals, mean over variables
    off_diagonal_entropy: Tensor  #: OE ≤ 0, Σ P log P over a block, mean over ordered pairs
    transform_invariance: Tensor  #: TI (or TIC) ≥ 0, mean over samples and variables


def cross_joint_entropy(
    z1: Tensor,
    z2: Tensor,
    units: Units,
    *,
    diagonal_weight: float = 1.0,
    off_diagonal_weight: float = 1.0,
    invariance_weight: float = 1.0,
    invariance: Invariance = "inner_product",
    temperature: float = 1.0,
) -> LossTerms:
    """Eq. 11 as it is written: logits (N, D) of two views → `LossTerms`, by autograd.

    Needs several D×D matrices, so D of a few thousand at most, and logits whose softmax does not
    underflow. Raises ValueError as `CrossJointEntropyLoss` does.
    """
    check_settings(
        units,
        temperature,
        invariance,
        diagonal_weight=diagonal_weight,
        off_diagonal_weight=off_diagonal_weight,
        invariance_weight=invariance_weight,
    )
    check_logits(z1, z2, units)
    p1, p2 = soft_discretize(z1, units, temperature), soft_discretize(z2, units, temperature)
    diagonal, off_diagonal, disagreement = three_terms(p1, p2, units, invariance)
    total = (
        diagonal_weight * diagonal
        + off_diagonal_weight * off_diagonal
        + invariance_weight * disagreement
    )
    return LossTerms(total, diagonal, off_diagonal, disagreement)


def three_terms(
    p1: Tensor, p2: Tensor, units: Units, invariance: Invariance = "inner_product"
) -> tuple[Tensor, Tensor, Tensor]:
    """DE, OE and TI (or TIC) of Eq. 11, from soft codes (N, D) of two views."""
    cells = joint(p1, p2)
    information = torch.special.xlogy(cells, cells)

    counts = unit_counts(units, p1.shape[1])
    variable = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(p1.device)
    pairs = len(counts) * (len(counts) - 1)
    diagonal = information.diagonal().sum() / len(counts)
    off_diagonal = information[variable[:, None] != variable].sum() / max(pairs, 1)
    if invariance == "inner_product":
        agreement = split_variables(p1 * p2, units).sum(-1).log()
    else:
        agreement = split_variables(torch.special.xlogy(p1, p2), units).sum(-1)
    return diagonal, off_diagonal, -agreement.mean()


class CrossJointEntropyLoss(nn.Module):
    """Eq. 11 without its matrix: DE + OE + λ·TI by block rows, and the gradient on the way.

    Args:
        units: units of every variable, an int or one count per variable (B, or B_v).
        diagonal_weight, off_diagonal_weight, invariance_weight: weights of DE, OE and TI, ≥ 0
            (all 1 in the paper).
        invariance: "inner_product" (TI, the paper's default) or "cross_entropy" (TIC).
        temperature: τ of Eq. 1, > 0.
        gather_distributed: take the batch to be that of all ranks together, N = W·n. Value and
            terms are those of the joined batch, on every rank; each rank owns D/W rows of the
            matrix. The gradient is W times its share, so that the average over ranks that DDP
            takes is the gradient of the joined batch.
        sampled_variables: draw so many of the V block rows of OE anew at every call, from torch's
            generator: an unbiased estimate of OE and of its gradient, at that share of the cost.
            None for all.
        products: "fp32"; or "bf16" for the three products of OE (its sums stay fp32; DE and TI are
            as exact as ever); or "auto" for bf16 where the processor or GPU has units for it, else
            fp32. Measured at N = 512, D = 1024, B = 32, random logits: bf16 moves the value by
            4e-5 to 2e-4 and the gradient by 0.01 to 0.04 % (by 9e-4 and 0.1 % at uniform codes).
        fused: compile the elementwise work into few kernels; None for that on CUDA alone.

    Calling it with logits z1, z2 of shape (N, D) returns `LossTerms`. Only `total` carries a
    gradient (once differentiable); the terms are for reading. Arithmetic is float32 under any
    autocast and for half-precision logits (float64 for float64 logits); value and gradient are
    finite for any finite logits. Memory beyond the inputs is about four N×D tables and two slabs
    of the matrix (an eighth of it at most), W ranks need less each; time is that of three products
    of 2ND² operations, shared by the ranks.

    Raises ValueError for impossible settings at construction, for shapes that do not fit at the
    call; on every rank, if shapes, types or the wish for a gradient differ among ranks. An infinite
    logit gives NaN, as it should.
    """

    def __init__(
        self,
        units: Units,
        *,
        diagonal_weight: float = 1.0,
        off_diagonal_weight: float = 1.0,
        invariance_weight: float = 1.0,
        invariance: Invariance = "inner_product",
        temperature: float = 1.0,
        gather_distributed: bool = False,
        sampled_variables: int | None = None,
        products: Products = "fp32",
        fused: bool | None = None,
    ):
        super().__init__()
        check_settings(
            units,
            temperature,
            invariance,
            diagonal_weight=diagonal_weight,
            off_diagonal_weight=off_diagonal_weight,
            invariance_weight=invariance_weight,
        )
        check_number_drawn("sampled_variables", sampled_variables)
        if products not in get_args(Products):
            raise ValueError(f"products={products!r} must be 'fp32', 'bf16' or 'auto'")
        self.settings = Settings(
            units if isinstance(units, int) else tuple(units),
            float(diagonal_weight),
            float(off_diagonal_weight),
            float(invariance_weight),
            invariance,
            float(temperature),
            gather_distributed,
            sampled_variables,
            products,
            fused,
        )

    def forward(self, z1: Tensor, z2: Tensor) -> LossTerms:
        if self.settings.gather_distributed:
            tracked = torch.is_grad_enabled() and (z1.requires_grad or z2.requires_grad)
            facts = {"gradient wanted": int(tracked)}
            for name, z in (("z1", z1), ("z2", z2)):
                facts |= {
                    f"samples of {name}": len(z),
                    f"entries of {name}": z.numel(),
                    f"bytes an entry of {name}": z.element_size(),
                }
            refuse_unlike(z1.device, facts)
        variables = len(check_logits(z1, z2, self.settings.units))
        drawn = self.settings.sampled_variables
        if drawn is not None and drawn > variables:
            raise ValueError(f"sampled_variables={drawn}: the codes have {variables} variables")
        with torch.autocast(z1.device.type, enabled=False):
            return LossTerms(*StreamedLoss.apply(z1, z2, self.settings))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings._asdict().items())


def check_logits(z1: Tensor, z2: Tensor, units: Units) -> tuple[int, ...]:
    """Units of every variable of two tables of one shape and type.

    Raises ValueError where the tables or the units do not fit.
    """
    shape1, shape2 = tuple(z1.shape), tuple(z2.shape)
    if z1.ndim != 2 or shape1 != shape2 or not z1.numel():
        raise ValueError(
            f"z1 has shape {shape1}, z2 {shape2}: need two non-empty (N, D) tables alike"
        )
    if z1.dtype != z2.dtype or not z1.is_floating_point():
        raise ValueError(f"z1 is {z1.dtype}, z2 {z2.dtype}: need one floating-point type for both")
    return unit_counts(units, z1.shape[1])


def check_settings(
    units: Units, temperature: float, invariance: str = "inner_product", **weights: float
) -> None:
    """Raise ValueError unless all are possible, and the weights finite numbers ≥ 0."""
    check_units(units)
    if invariance not in get_args(Invariance):
        raise ValueError(
            f"invariance={invariance!r} must be 'inner_product' (TI) or 'cross_entropy' (TIC)"
        )
    for name, weight in weights.items():
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"{name}={weight} must be a finite number ≥ 0 (the paper's is 1)")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be a positive number (the paper's is 1)")


def check_number_drawn(name: str, number: int | None) -> None:
    """Raise ValueError unless it is None (for all) or a whole number ≥ 1."""
    if number is not None and (type(number) is not int or number < 1):
        raise ValueError(f"{name}={number!r} must be a whole number ≥ 1, or None for all")
