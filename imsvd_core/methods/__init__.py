"""IMSVD and what it is compared with: one small configuration each, one interface.

A built method is a module: logits of two views, (N, D) each → a dict of scalars whose "loss" is minimised. In a process
group the batch is that of all ranks, and the gradient the one whose mean over ranks is the whole batch's.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from imsvd_core.discretization import unit_counts
from imsvd_core.distributed import world
from imsvd_core.loss import CrossJointEntropyLoss, Invariance, Products


@dataclass(frozen=True)
class IMSVD:
    """Cross-joint entropy loss (Eq. 11)."""

    units: int | tuple[int, ...] = 32
    """Units of every variable (B), or one count per variable."""
    temperature: float = 1.0
    """Temperature of the softmax (τ)."""
    diagonal_weight: float = 1.0
    """Weight of DE, the entropy on the diagonal."""
    off_diagonal_weight: float = 1.0
    """Weight of OE, the entropy of the off-diagonal blocks."""
    invariance_weight: float = 1.0
    """Weight of TI, the agreement of the views (λ)."""
    invariance: Invariance = "inner_product"
    products: Products = "fp32"
    """Type of the factors in OE's three matrix products; their sums are fp32."""
    sampled_variables: int | None = None
    """Block rows of OE drawn at every step; all by default."""
    name: Literal["imsvd"] = "imsvd"

    def build(self, dim: int) -> nn.Module:
        unit_counts(self.units, dim)
        return _CrossJoint(
            CrossJointEntropyLoss(
                self.units,
                diagonal_weight=self.diagonal_weight,
                off_diagonal_weight=self.off_diagonal_weight,
                invariance_weight=self.invariance_weight,
                invariance=self.invariance,
                temperature=self.temperature,
                products=self.products,
                sampled_variables=self.sampled_variables,
                gather_distributed=True,
            )
        )


class _CrossJoint(nn.Module):
    def __init__(self, loss: CrossJointEntropyLoss):
        super().__init__()
        self.loss = loss

    def forward(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        terms = self.loss(z1, z2)._asdict()
        return {"loss": terms.pop("total"), **terms}


@dataclass(frozen=True)
class VICReg:
    """Variance, invariance, covariance (Bardes et al., 2022); loss from lightly."""

    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0
    name: Literal["vicreg"] = "vicreg"

    def __post_init__(self) -> None:
        _check_weights(self)

    def build(self, dim: int) -> nn.Module:
        from lightly.loss import VICRegLoss  # slow to import

        return _Peer(
            VICRegLoss(
                lambda_param=self.invariance_weight,
                mu_param=self.variance_weight,
                nu_param=self.covariance_weight,
            )
        )


@dataclass(frozen=True)
class BarlowTwins:
    """Cross-correlation towards the identity (Zbontar et al., 2021); loss from lightly."""

    redundancy_weight: float = 5e-3
    name: Literal["barlow_twins"] = "barlow_twins"

    def __post_init__(self) -> None:
        _check_weights(self)

    def build(self, dim: int) -> nn.Module:
        from lightly.loss import BarlowTwinsLoss  # slow to import

        return _Peer(BarlowTwinsLoss(lambda_param=self.redundancy_weight))


def _check_weights(method: "VICReg | BarlowTwins") -> None:
    for field in fields(method):
        weight = getattr(method, field.name)
        if field.name.endswith("_weight") and not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(
                f"{field.name}={weight} must be a finite number ≥ 0 (default {field.default})"
            )


class _Peer(nn.Module):
    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        with torch.autocast(z1.device.type, enabled=False):  # float32 throughout, as for IMSVD
            return {"loss": self.loss(_of_all_ranks(z1.float()), _of_all_ranks(z2.float()))}


def _of_all_ranks(z: Tensor) -> Tensor:
    """(n, D) → (W·n, D), the rows of every rank; the gradient comes back summed over the ranks' losses."""
    if world()[1] == 1:
        return z
    from lightly.utils.dist import gather  # slow to import

    return torch.cat(gather(z.contiguous()))


Method = IMSVD | VICReg | BarlowTwins
