"""IIC: the mutual information of two views' soft codes (Ji, Henriques and Vedaldi, 2019).

Many heads as IMSVD has them: V variables, no pairs of them. Loss: minus the mean over variables of
I(P_v), where P_v is a variable's joint table of both views, made symmetric, and the entropies of
its margins may weigh more. Trained: backbone, projector. The entropy of the margins prevents the
collapse of a variable; nothing keeps variables apart. Published: 61.7 % of CIFAR-10 clustered
rightly (ResNet-34, best of five heads).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.special import xlogy

from imsvd_core.discretization import Units, soft_discretize, split_variables, unit_counts
from imsvd_core.methods.base import Config, PeerMethod
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class IIC(Config):
    """Invariant information clustering (Ji et al., 2019) of V variables."""

    units: int | tuple[int, ...] = 32
    """Units of every variable (B), or one count per variable."""
    temperature: float = 1.0
    """Temperature of the softmax."""
    entropy_weight: float = 1.0
    """Weight of the margins' entropies; 1 for the mutual information itself."""
    name: Literal["iic"] = "iic"

    def __post_init__(self) -> None:
        checks.positive(self, "temperature")
        checks.finite(self, "entropy_weight")

    def check(self, network: NetworkConfig) -> None:
        unit_counts(self.units, network.dim)

    def build(self, network: NetworkConfig) -> PeerMethod:
        self.check(network)
        return PeerMethod(network, IICLoss(self.units, self.temperature, self.entropy_weight))


class IICLoss(nn.Module):
    """Minus the mean information in nats, of logits (N, D) of two views."""

    def __init__(self, units: Units, temperature: float, entropy_weight: float):
        super().__init__()
        self.units, self.temperature, self.entropy_weight = units, temperature, entropy_weight

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        codes = (soft_discretize(z, self.units, self.temperature) for z in (z1, z2))
        p1, p2 = (split_variables(p, self.units) for p in codes)
        joint = torch.einsum("nvb,nvc->vbc", p1, p2) / len(p1)
        joint = (joint + joint.mT) / 2
        margins = joint.sum(2)  # of either view
        tiny = torch.finfo(joint.dtype).tiny  # empty cells have no slope of -inf
        negentropy = xlogy(joint, joint.clamp_min(tiny)).sum()
        entropies = -2 * xlogy(margins, margins.clamp_min(tiny)).sum()
        information: Tensor = (negentropy + self.entropy_weight * entropies) / len(joint)
        return -information
