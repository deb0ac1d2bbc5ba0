"""SimCLR: tell an image's other view from all other images (Chen, Kornblith et al., 2020).

Loss: cross-entropy of the other view's cosine among those of all 2N - 1 other views, by temperature
(NT-Xent). Trained: backbone, projector. The other images, as negatives, prevent collapse.
Published: 69.3 % linear on ImageNet (ResNet-50, 1000 epochs).
"""

from dataclasses import dataclass
from typing import Literal

from imsvd_core.distributed import world
from imsvd_core.methods.base import Config, PeerMethod
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class SimCLR(Config):
    """Contrast with the rest of the batch (Chen et al., 2020); loss from lightly."""

    temperature: float = 0.5
    name: Literal["simclr"] = "simclr"

    def __post_init__(self) -> None:
        checks.positive(self, "temperature")

    def build(self, network: NetworkConfig) -> PeerMethod:
        from lightly.loss import NTXentLoss  # slow to import

        # Each rank compares its own samples with those of all
        criterion = NTXentLoss(self.temperature, gather_distributed=world()[1] > 1)
        return PeerMethod(network, criterion, gathers=False)
