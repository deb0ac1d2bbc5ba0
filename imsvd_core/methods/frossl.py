"""FroSSL: Frobenius norms of normalised covariances (Skean et al., 2024).

Loss: of each view log ‖C‖², where C is the second-moment matrix of coordinates of unit length over
the batch, divided by its trace (minus Rényi's entropy of order 2 of its spectrum); and the views'
squared distance from their mean. Trained: backbone, projector. The spectrum's entropy prevents
collapse. Published: linear probes of ResNet-18 on CIFAR-10 to ImageNet-100.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from imsvd_core.methods.base import Config, PeerMethod
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class FroSSL(Config):
    """Frobenius norm minimisation (Skean et al., 2024); loss from lightly."""

    invariance_weight: float = 1.4
    name: Literal["frossl"] = "frossl"

    def __post_init__(self) -> None:
        checks.finite(self, "invariance_weight")

    def build(self, network: NetworkConfig) -> PeerMethod:
        from lightly.loss.frossl_loss import FroSSLLoss  # slow to import

        return PeerMethod(network, OfPair(FroSSLLoss(self.invariance_weight)))


class OfPair(nn.Module):
    """A loss of a list of views, given two."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        loss: Tensor = self.criterion([z1, z2])
        return loss
