"""BYOL: predict what a slower copy of the network says of the other view (Grill et al., 2020).

Trained: backbone, projector, predictor; the target follows by momentum. Nothing in the loss forbids
collapse: predictor and momentum prevent it. Published: 74.3 % linear on ImageNet (ResNet-50, 1000
epochs).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from imsvd_core.data.batch import Batch
from imsvd_core.discretization import widen
from imsvd_core.methods.base import Config, MomentumMethod
from imsvd_core.networks import NetworkConfig, build_projector
from imsvd_core.system import checks


@dataclass(frozen=True)
class BYOL(Config):
    """Bootstrap your own latent (Grill et al., 2020)."""

    momentum: float = 0.996
    """Of the target at the start; it rises to 1 along a cosine."""
    predictor_hidden: int = 4096
    """Width of the predictor's hidden layer."""
    name: Literal["byol"] = "byol"

    def __post_init__(self) -> None:
        checks.between(self, 0, 1, "momentum")
        checks.at_least(self, predictor_hidden=1)

    def build(self, network: NetworkConfig) -> "BYOLMethod":
        return BYOLMethod(network, self)


class BYOLMethod(MomentumMethod):
    """An online network with a predictor, and its momentum copy, which no gradient reaches."""

    def __init__(self, network: NetworkConfig, config: BYOL):
        super().__init__(network, config.momentum)
        self.predictor = build_projector(network.dim, (config.predictor_hidden,), network.dim)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Predictions of both views, then the target's embeddings of both, (n, D) each."""
        x1, x2 = batch.views
        predictions = (self.predictor(z) for z in self.network(x1, x2))
        with torch.no_grad():
            targets = self.target(x1, x2)
        return *predictions, *targets

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        """Squared distance of normalised predictions and targets, of both directions."""
        p1, p2, t1, t2 = (widen(z) for z in embeddings)
        agreement = cosine_similarity(p1, t2.detach()) + cosine_similarity(p2, t1.detach())
        return {"loss": (4 - 2 * agreement).mean()}

    def momentum_at(self, progress: float) -> float:
        return 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2
