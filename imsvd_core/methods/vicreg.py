"""VICReg: variance, invariance and covariance (Bardes, Ponce and LeCun, 2022)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, relu

from imsvd_core.methods.base import Config, PeerMethod
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class VICReg(Config):
    """Variance, invariance, covariance (Bardes et al., 2022)."""

    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0
    name: Literal["vicreg"] = "vicreg"

    def __post_init__(self) -> None:
        checks.finite(self, "invariance_weight", "variance_weight", "covariance_weight")

    def build(self, network: NetworkConfig) -> PeerMethod:
        return PeerMethod(network, VICRegLoss(self))


class VICRegLoss(nn.Module):
    """The loss of two tables (N, D): lightly's to the last bit, without its mask of D×D entries,
    which takes more time and memory than the authors' code."""

    def __init__(self, config: VICReg):
        super().__init__()
        self.config = config

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        config, invariance = self.config, mse_loss(z1, z2)
        variance = 0.5 * (_narrowness(z1) + _narrowness(z2))
        covariance = _covariance(z1) + _covariance(z2)
        return (
            config.invariance_weight * invariance
            + config.variance_weight * variance
            + config.covariance_weight * covariance
        )


def _narrowness(z: Tensor) -> Tensor:
    """How far the standard deviations stay below 1."""
    return relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()


def _covariance(z: Tensor) -> Tensor:
    """The squared covariances of different coordinates, over D."""
    (n, d), z = z.shape, z - z.mean(dim=0)
    covariances = torch.einsum("nc,nd->cd", z, z) / (n - 1)
    # without its first entry, a row of d + 1 has all others and then one of the diagonal
    off_diagonal = covariances.flatten()[1:].view(d - 1, d + 1)[:, :-1].flatten()
    return off_diagonal.pow(2).sum() / d
