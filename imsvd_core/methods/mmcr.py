"""MMCR: views' means that span as much as they can (Yerxa, Kuang, Simoncelli and Chung, 2023).

Loss: minus the nuclear norm of the matrix of mean embeddings, each the mean of an image's two
views of unit length; plus, if weighted, the mean nuclear norm of an image's views. Long means ask
for views that agree, a large norm for means in all directions, which prevents collapse. Trained:
backbone, projector. Published with up to forty views; here two.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from imsvd_core.methods.base import Config, PeerMethod
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class MMCR(Config):
    """Maximum manifold capacity representations (Yerxa et al., 2023)."""

    local_weight: float = 0.0
    """Weight of the views' own nuclear norm (λ); 0 in the authors' code."""
    name: Literal["mmcr"] = "mmcr"

    def __post_init__(self) -> None:
        checks.finite(self, "local_weight")

    def build(self, network: NetworkConfig) -> PeerMethod:
        return PeerMethod(network, MMCRLoss(self.local_weight))


class MMCRLoss(nn.Module):
    """Of two tables (N, D). lightly's does not normalise, and computes singular vectors too."""

    def __init__(self, local_weight: float):
        super().__init__()
        self.local_weight = local_weight

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        views = torch.stack([normalize(z1, dim=1), normalize(z2, dim=1)], dim=1)
        loss: Tensor = -torch.linalg.svdvals(views.mean(1)).sum()
        if self.local_weight:
            loss = loss + self.local_weight * torch.linalg.svdvals(views).sum(1).mean()
        return loss
