"""The cross-joint entropy loss (Eq. 11), twice: as a page of mathematics, and as a stream that trains.

`cross_joint_entropy` builds the D×D matrix and lets autograd do the rest: read it, test against it.
`CrossJointEntropyLoss` never holds more than a slab of that matrix and writes its gradient by hand: train with it.
"""

import itertools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from imsvd_core.distributed import Exchange
from imsvd_core.discretization import (Units, check_units, joint, merge_variables, soft_discretize, split_variables,
                                       unit_counts)

Invariance = Literal["inner_product", "cross_entropy"]


class LossTerms(NamedTuple):
    """The weighted total, and its three terms unweighted, in nats, each a scalar (Eq. 11)."""

    total: Tensor
    diagonal_entropy: Tensor  #: DE ≤ 0, Σ P log P over diagonals, mean over variables
    off_diagonal_entropy: Tensor  #: OE ≤ 0, Σ P log P over a block, mean over ordered pairs
    transform_invariance: Tensor  #: TI (or TIC) ≥ 0, mean over samples and variables


def cross_joint_entropy(z1: Tensor, z2: Tensor, units: Units, *,
                        diagonal_weight: float = 1.0, off_diagonal_weight: float = 1.0,
                        invariance_weight: float = 1.0, invariance: Invariance = "inner_product",
                        temperature: float = 1.0) -> LossTerms:
    """Eq. 11 as it is written: logits (N, D) of two views → `LossTerms`, by autograd.

    Needs several D×D matrices, so D of a few thousand at most, and logits whose softmax does not
    underflow. Raises ValueError as `CrossJointEntropyLoss` does.
    """
    _check_settings(units, diagonal_weight, off_diagonal_weight, invariance_weight,
                    invariance, temperature)
    counts = _check_logits(z1, z2, units)
    p1, p2 = soft_discretize(z1, units, temperature), soft_discretize(z2, units, temperature)
    cells = joint(p1, p2)
    information = torch.special.xlogy(cells, cells)

    variable = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(z1.device)
    pairs = len(counts) * (len(counts) - 1)
    diagonal = information.diagonal().sum() / len(counts)
    off_diagonal = information[variable[:, None] != variable].sum() / max(pairs, 1)
    if invariance == "inner_product":
        agreement = split_variables(p1 * p2, units).sum(-1).log()
    else:
        agreement = split_variables(torch.special.xlogy(p1, p2), units).sum(-1)
    disagreement = -agreement.mean()
    total = (diagonal_weight * diagonal + off_diagonal_weight * off_diagonal
             + invariance_weight * disagreement)
    return LossTerms(total, diagonal, off_diagonal, disagreement)


class CrossJointEntropyLoss(nn.Module):
    """Eq. 11 without its matrix: DE + OE + λ·TI by block rows, with the gradient computed on the way.

    Args:
        units: units of every variable, an int or one count per variable (B, or B_v).
        diagonal_weight, off_diagonal_weight, invariance_weight: weights of DE, OE and TI (all 1 in the paper), ≥ 0.
        invariance: "inner_product" (TI, the paper's default) or "cross_entropy" (TIC).
        temperature: τ of Eq. 1, > 0.
        gather_distributed: take the batch to be that of all ranks together, N = W·n. Value and terms are those of
            the joined batch, on every rank; each rank owns D/W rows of the matrix. The gradient is W times its share,
            so that the average over ranks that DDP takes is the gradient of the joined batch.

    Calling it with logits z1, z2 of shape (N, D) returns `LossTerms`. Only `total` carries a gradient (once
    differentiable); the terms are for reading. Arithmetic is float32 under any autocast and for half-precision
    logits (float64 for float64 logits); value and gradient are finite for any finite logits. Memory beyond the
    inputs is about four N×D tables and two slabs of the matrix (an eighth of it at most); time is that of three products of 2ND² operations.

    Raises ValueError for impossible settings at construction, for shapes that do not fit at the call.
    """

    def __init__(self, units: Units, *, diagonal_weight: float = 1.0, off_diagonal_weight: float = 1.0,
                 invariance_weight: float = 1.0, invariance: Invariance = "inner_product", temperature: float = 1.0,
                 gather_distributed: bool = False):
        super().__init__()
        _check_settings(units, diagonal_weight, off_diagonal_weight, invariance_weight, invariance, temperature)
        self.units = units if isinstance(units, int) else tuple(units)
        self.weights = (float(diagonal_weight), float(off_diagonal_weight), float(invariance_weight))
        self.invariance = invariance
        self.temperature = float(temperature)
        self.gather_distributed = gather_distributed

    def forward(self, z1: Tensor, z2: Tensor) -> LossTerms:
        _check_logits(z1, z2, self.units)
        with torch.autocast(z1.device.type, enabled=False):
            return LossTerms(*_StreamedLoss.apply(z1, z2, self.units, self.weights, self.invariance, self.temperature,
                                                   self.gather_distributed))

    def extra_repr(self) -> str:
        return f"units={self.units}, weights={self.weights}, invariance={self.invariance!r}, temperature={self.temperature}" + \
            (", gather_distributed=True" if self.gather_distributed else "")


class _StreamedLoss(torch.autograd.Function):
    """Value and both gradients in one sweep; backward only scales what forward has found.

    Everything per sample runs over chunks of rows, everything per pair over slabs of the matrix, so that four
    N×D tables (p1, p2 and their gradients) are all that is ever held whole.
    """

    @staticmethod
    def forward(ctx, z1, z2, units, weights, invariance, temperature, gather_distributed):
        diagonal_weight, off_diagonal_weight, invariance_weight = weights
        counts = unit_counts(units, z1.shape[1])
        rows = _row_chunks(len(z1), len(counts) * max(counts))
        ranks = Exchange(z1, gather_distributed)
        wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
        p1, p2 = (torch.empty(z.shape, dtype=wide, device=z.device) for z in (z1, z2))
        agreement = INVARIANCES[invariance]

        disagreement, occupancy = p1.new_zeros(()), p1.new_zeros(z1.shape[1])
        for chunk in rows:
            log_p1, log_p2 = (_log_codes(z[chunk], wide, units, temperature) for z in (z1, z2))
            p1[chunk], p2[chunk] = log_p1.exp(), log_p2.exp()
            value, *_ = agreement(log_p1, log_p2, p1[chunk], p2[chunk], units, gradient=False)
            disagreement += value.mean() * (len(value) / ranks.samples)
            occupancy += (p1[chunk] * p2[chunk]).sum(0) / ranks.samples
        ranks.sum(occupancy)
        ranks.sum(disagreement)
        log_occupancy = occupancy.clamp_min(torch.finfo(wide).tiny).log()
        diagonal = occupancy.dot(log_occupancy) / len(counts)

        wants_gradient = any(ctx.needs_input_grad[:2])
        off_diagonal, g1, g2 = _off_diagonal_sweep(ranks.to_columns(p1), ranks.gather(p2), ranks.own, counts,
                                                   wants_gradient and off_diagonal_weight != 0)
        ranks.sum(off_diagonal)

        if wants_gradient:
            g1, g2 = ranks.to_samples(g1), ranks.scatter_sum(g2)
            scale = ranks.size / (len(counts) * ranks.samples * temperature)
            slope = diagonal_weight * (1 + log_occupancy)
            for chunk in rows:
                log_p1, log_p2 = (_log_codes(z[chunk], wide, units, temperature) for z in (z1, z2))
                _, d1, d2 = agreement(log_p1, log_p2, p1[chunk], p2[chunk], units)
                for p, other, g, d in ((p1, p2, g1, d1), (p2, p1, g2, d2)):
                    of_p = g[chunk].mul_(off_diagonal_weight).addcmul_(other[chunk], slope)
                    g[chunk] = _through_softmax(p[chunk], of_p, units).add_(d, alpha=invariance_weight).mul_(scale)
            if z1.dtype == torch.float16:  # TIC's gradient at extreme logits; what a GradScaler makes of it is its own
                g1, g2 = (g.clamp_(-FP16_LARGEST, FP16_LARGEST) for g in (g1, g2))
            ctx.save_for_backward(g1, g2)
            ctx.dtype = z1.dtype

        total = diagonal_weight * diagonal + off_diagonal_weight * off_diagonal + invariance_weight * disagreement
        ctx.mark_non_differentiable(diagonal, off_diagonal, disagreement)
        return total, diagonal, off_diagonal, disagreement

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *_):
        # The saved tables stay wide until the upstream factor (a GradScaler's, say) has lifted them out of fp16's dust.
        return *((g * grad_total).to(ctx.dtype) for g in ctx.saved_tensors), None, None, None, None, None


def _off_diagonal_sweep(p1: Tensor, p2: Tensor, own: range, counts: tuple[int, ...],
                        wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The `own` rows of the matrix: their part of OE, and (V·N) ∂OE/∂p for both views, zeros where not wanted.

    p1 holds the own columns alone, p2 all of them. Gradients are up to constants that the softmax cannot feel:
    ∂(P log P)/∂P = 1 + log P; the 1 adds the same to every unit of a variable, so log P alone is carried.
    """
    samples, dim = p2.shape
    g1, g2, value = torch.zeros_like(p1), torch.zeros_like(p2), p1.new_zeros(())
    if len(counts) == 1:
        return value, g1, g2
    tiny, others = torch.finfo(p1.dtype).tiny, len(counts) - 1
    edges = [0, *itertools.accumulate(counts)]
    step = max(1, min(SLAB_CELLS // dim, dim // 8))
    for first in range(own.start, own.stop, step):
        last = min(first + step, own.stop)
        mine = slice(first - own.start, last - own.start)
        codes = p1[:, mine]
        cells = torch.mm(codes.T, p2).div_(samples)
        logs = cells.clamp_min(tiny).log_()
        for start, stop in itertools.pairwise(edges):  # what the slab holds of the diagonal blocks
            if start < last and first < stop:
                logs[max(start - first, 0):stop - first, start:stop] = 0
        if wants_gradient:
            torch.mm(p2, logs.T, out=g1[:, mine])
            g2.addmm_(codes, logs)
        value += cells.mul_(logs).sum() / (len(counts) * others)
    return value, g1.div_(others), g2.div_(others)


Agreement = tuple[Tensor, Tensor | None, Tensor | None]  # per sample and variable (N, V); gradients in both logits (N, D)


def _inner_product(log_p1: Tensor, log_p2: Tensor, p1: Tensor, p2: Tensor, units: Units, gradient: bool = True) -> Agreement:
    """−log⟨p¹, p²⟩, in logarithms throughout."""
    both = split_variables(log_p1 + log_p2, units, fill=-torch.inf)
    log_inner = both.logsumexp(-1, keepdim=True)
    value = -log_inner.squeeze(-1)
    if not gradient:
        return value, None, None
    shared = merge_variables((both - log_inner).exp_(), units)
    return value, p1 - shared, p2 - shared


def _cross_entropy(log_p1: Tensor, log_p2: Tensor, p1: Tensor, p2: Tensor, units: Units, gradient: bool = True) -> Agreement:
    """−Σ p¹ log p²."""
    value = split_variables(-p1 * log_p2, units).sum(-1)
    if not gradient:
        return value, None, None
    return value, _through_softmax(p1, -log_p2, units), p2 - p1


INVARIANCES = {"inner_product": _inner_product, "cross_entropy": _cross_entropy}


def _through_softmax(p: Tensor, g: Tensor, units: Units) -> Tensor:
    """∂/∂z from ∂/∂p, at temperature 1: p (g − ⟨p, g⟩) within every variable."""
    p, g = split_variables(p, units), split_variables(g, units)
    return merge_variables(p * (g - (p * g).sum(-1, keepdim=True)), units)


def _log_codes(z: Tensor, dtype: torch.dtype, units: Units, temperature: float) -> Tensor:
    """log p of Eq. 1 in `dtype`. Logits beyond ±1e30 are cut there, so that differences and sums of them stay finite."""
    scaled = (z.to(dtype) / temperature).clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)
    return merge_variables(split_variables(scaled, units, fill=-torch.inf).log_softmax(-1), units)


LARGEST_LOGIT = 1e30
FP16_LARGEST = torch.finfo(torch.float16).max
SLAB_CELLS = 4_000_000  # cells of the matrix held at once, at most: 16 MB in float32, enough for full-speed products
CHUNK_ENTRIES = 1_000_000  # entries of an N×D table worked on at once


def _row_chunks(samples: int, width: int) -> list[slice]:
    step = max(1, CHUNK_ENTRIES // width)
    return [slice(start, start + step) for start in range(0, samples, step)]


def _check_logits(z1: Tensor, z2: Tensor, units: Units) -> tuple[int, ...]:
    if z1.ndim != 2 or z1.shape != z2.shape or not z1.numel():
        raise ValueError(f"z1 has shape {tuple(z1.shape)}, z2 {tuple(z2.shape)}: need two non-empty (N, D) tables alike")
    if z1.dtype != z2.dtype or not z1.is_floating_point():
        raise ValueError(f"z1 is {z1.dtype}, z2 {z2.dtype}: need one floating-point type for both")
    return unit_counts(units, z1.shape[1])


def _check_settings(units: Units, diagonal_weight: float, off_diagonal_weight: float, invariance_weight: float,
                    invariance: str, temperature: float) -> None:
    check_units(units)
    for name, weight in (("diagonal_weight", diagonal_weight), ("off_diagonal_weight", off_diagonal_weight),
                         ("invariance_weight", invariance_weight)):
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"{name}={weight} must be a finite number ≥ 0 (the paper's is 1)")
    if invariance not in ("inner_product", "cross_entropy"):
        raise ValueError(f"invariance={invariance!r} must be 'inner_product' (TI) or 'cross_entropy' (TIC)")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be a positive number (the paper's is 1)")
