"""SEM: BYOL on soft codes (Lavoie, Tsirigotis, Schwarzer et al., 2023).

The network's embedding, normalised over the batch, becomes soft codes as IMSVD's, D = V·B; a second
projector follows, then all is BYOL's: loss, predictor, momentum, which prevent collapse. No entropy
and no pair of variables is in the loss. Trained: backbone, both projectors, predictor. The paper
reports gains over BYOL on CIFAR-100 and ImageNet.
"""

import copy
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from imsvd_core.discretization import Units, soft_discretize, unit_counts
from imsvd_core.methods.base import Config
from imsvd_core.methods.byol import BYOL, BYOLMethod
from imsvd_core.networks import NetworkConfig, build_projector
from imsvd_core.system import checks


@dataclass(frozen=True)
class SEM(Config):
    """Simplicial embeddings (Lavoie et al., 2023) in BYOL."""

    units: int | tuple[int, ...] = 32
    """Units of every variable (B), or one count per variable."""
    temperature: float = 1.0
    """Temperature of the softmax."""
    projector: tuple[int, int] = (2048, 256)
    """Widths of the hidden layer and of the output of the projector behind the codes."""
    momentum: float = 0.99
    """Of the target at the start; it rises to 1 along a cosine."""
    predictor_hidden: int = 2048
    """Width of the predictor's hidden layer."""
    name: Literal["sem"] = "sem"

    def __post_init__(self) -> None:
        checks.positive(self, "temperature")
        checks.between(self, 0, 1, "momentum")
        checks.at_least(self, projector=1, predictor_hidden=1)

    def check(self, network: NetworkConfig) -> None:
        unit_counts(self.units, network.dim)

    def build(self, network: NetworkConfig) -> "SEMMethod":
        self.check(network)
        return SEMMethod(network, self)


class SoftCodes(nn.Module):
    """Logits (n, D) → soft codes (n, D)."""

    def __init__(self, units: Units, temperature: float):
        super().__init__()
        self.units, self.temperature = units, temperature

    def forward(self, z: Tensor) -> Tensor:
        return soft_discretize(z, self.units, self.temperature)


class SEMMethod(BYOLMethod):
    """BYOL whose embedding passes soft codes and a second projector."""

    def __init__(self, network: NetworkConfig, config: SEM):
        super().__init__(network, BYOL(config.momentum, config.predictor_hidden))
        hidden, dim = config.projector
        self.network.projector = nn.Sequential(
            self.network.projector,
            nn.BatchNorm1d(network.dim),
            SoftCodes(config.units, config.temperature),
            build_projector(network.dim, (hidden,), dim),
        )
        self.predictor = build_projector(dim, (config.predictor_hidden,), dim)
        self.target = copy.deepcopy(self.network).requires_grad_(False)
