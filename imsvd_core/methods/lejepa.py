"""LeJEPA: embeddings distributed as a normal law (Balestriero and LeCun, 2025).

Loss: (1 - λ) times the views' squared distance from their mean, plus λ times SIGReg, the distance
of the characteristic functions of random one-dimensional slices from a standard normal's (Epps and
Pulley). Trained: backbone, projector. SIGReg prevents collapse; there is no predictor and no
target. Published: 79 % linear on ImageNet (ViT-H/14).
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from imsvd_core.distributed import world
from imsvd_core.methods.base import Config, PeerMethod
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class LeJEPA(Config):
    """Sketched isotropic Gaussian regularisation (Balestriero and LeCun, 2025); from lightly."""

    normality_weight: float = 0.05
    """Weight of SIGReg (λ); that of the views' agreement is 1 - λ."""
    slices: int = 1024
    """Directions drawn at every step."""
    name: Literal["lejepa"] = "lejepa"

    def __post_init__(self) -> None:
        checks.between(self, 0, 1, "normality_weight")
        checks.at_least(self, slices=1)

    def build(self, network: NetworkConfig) -> PeerMethod:
        # SIGReg sums over the ranks itself, in rank 0's directions
        return PeerMethod(network, LeJEPALoss(self), gathers=False)


class LeJEPALoss(nn.Module):
    """Of two tables (n, D)."""

    def __init__(self, config: LeJEPA):
        from lightly.loss.lejepa_loss import SIGReg  # slow to import

        super().__init__()
        self.weight = config.normality_weight
        self.normality = SIGReg(num_vectors=config.slices, gather_distributed=world()[1] > 1)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        views = torch.stack([z1, z2])
        agreement = (views - views.mean(0)).square().mean()
        with warnings.catch_warnings():  # torch 2.14 deprecates the all_reduce that lightly calls
            warnings.simplefilter("ignore", FutureWarning)
            distance = self.normality(views)
        loss: Tensor = self.weight * distance + (1 - self.weight) * agreement
        return loss
