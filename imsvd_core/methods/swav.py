"""SwAV: predict the cluster of one view from another (Caron et al., 2020).

Trained: backbone, projector, prototypes. Equal use of the prototypes (Sinkhorn and Knopp) prevents
collapse. Published: 75.3 % linear on ImageNet (ResNet-50, 800 epochs, 2 large and 6 small crops).
Left out: the queue of small batches, and the first epoch's frozen prototypes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from imsvd_core.data.batch import Batch
from imsvd_core.distributed import world
from imsvd_core.methods.base import Config, TwinMethod
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class SwAV(Config):
    """Swapped assignments between views (Caron et al., 2020); loss from lightly."""

    prototypes: int = 3000
    temperature: float = 0.1
    epsilon: float = 0.05
    """Softness of the assignments."""
    sinkhorn_iterations: int = 3
    name: Literal["swav"] = "swav"

    def __post_init__(self) -> None:
        checks.at_least(self, prototypes=1, sinkhorn_iterations=1)
        checks.positive(self, "temperature", "epsilon")

    def build(self, network: NetworkConfig) -> "SwAVMethod":
        return SwAVMethod(network, self)


class SwAVMethod(TwinMethod):
    """A backbone, a projector, and prototypes of unit length to compare embeddings with."""

    def __init__(self, network: NetworkConfig, config: SwAV):
        from lightly.loss import SwaVLoss  # slow to import

        super().__init__(network)
        self.prototypes = nn.Linear(network.dim, config.prototypes, bias=False)
        self.criterion = SwaVLoss(
            config.temperature,
            config.sinkhorn_iterations,
            config.epsilon,
            sinkhorn_gather_distributed=world()[1] > 1,
        )
        self.after_step(0.0)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Similarities to the prototypes, (n, prototypes), of every view: two large ones, then
        small ones."""
        embeddings = (self.network.embed(x) for x in batch.views)
        return tuple(self.prototypes(normalize(z, dim=1)) for z in embeddings)

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        with torch.autocast(embeddings[0].device.type, enabled=False):
            scores = [similarities.float() for similarities in embeddings]
            return {"loss": self.criterion(scores[:2], scores[2:]).squeeze()}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.prototypes.weight.copy_(normalize(self.prototypes.weight, dim=1))
