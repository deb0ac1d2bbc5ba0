"""VICReg: variance, invariance and covariance (Bardes, Ponce and LeCun, 2022)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from imsvd_core.methods.base import Config, TwinMethod, of_all_ranks
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class VICReg(Config):
    """Variance, invariance, covariance (Bardes et al., 2022); loss from lightly."""

    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0
    name: Literal["vicreg"] = "vicreg"

    def __post_init__(self) -> None:
        checks.finite(self, "invariance_weight", "variance_weight", "covariance_weight")

    def build(self, network: NetworkConfig) -> "PeerMethod":
        from lightly.loss import VICRegLoss  # slow to import

        criterion = VICRegLoss(
            lambda_param=self.invariance_weight,
            mu_param=self.variance_weight,
            nu_param=self.covariance_weight,
        )
        return PeerMethod(network, criterion)


class PeerMethod(TwinMethod):
    """A backbone and a projector under a loss of two tables that is computed in float32, on all
    ranks' samples."""

    def __init__(self, network: NetworkConfig, criterion: nn.Module):
        super().__init__(network)
        self.criterion = criterion

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        with torch.autocast(embeddings[0].device.type, enabled=False):
            z1, z2 = (of_all_ranks(z.float()) for z in embeddings)
            return {"loss": self.criterion(z1, z2)}
