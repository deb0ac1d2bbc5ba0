"""CorInfoMax: log-determinants of running covariances (Ozsoy et al., 2022).

Loss: minus the views' log det(R + ε) / D, where the covariance R is a running mean over steps that
this batch enters last; plus the weighted mean squared distance of the views, all of unit length.
Trained: backbone, projector. The log-determinant prevents collapse. Published: 93.18 % linear on
CIFAR-10 (ResNet-18, 1000 epochs), 69.08 % on ImageNet (ResNet-50, 100 epochs).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from imsvd_core.discretization import widen
from imsvd_core.methods.base import Config, TwinMethod, of_all_ranks
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class CorInfoMax(Config):
    """Correlative information maximisation (Ozsoy et al., 2022)."""

    invariance_weight: float = 250.0
    memory: float = 0.01
    """Share of what was before in the running means and covariances."""
    epsilon: float = 1e-8
    """Added to the covariances' diagonals."""
    name: Literal["corinfomax"] = "corinfomax"

    def __post_init__(self) -> None:
        checks.finite(self, "invariance_weight")
        checks.between(self, 0, 1, "memory")
        checks.positive(self, "epsilon")

    def build(self, network: NetworkConfig) -> "CorInfoMaxMethod":
        return CorInfoMaxMethod(network, self)


class CorInfoMaxMethod(TwinMethod):
    """A backbone, a projector, and the running statistics of both views' embeddings."""

    means: Tensor
    covariances: Tensor

    def __init__(self, network: NetworkConfig, config: CorInfoMax):
        super().__init__(network)
        self.config = config
        # float64 as in the authors' code: the determinants of 64 coordinates leave float32's range
        means = torch.zeros(2, network.dim, dtype=torch.float64)
        self.register_buffer("means", means)
        self.register_buffer("covariances", torch.eye(network.dim).repeat(2, 1, 1).to(means))
        self.seen = means, self.covariances.clone()  # with this step's batch

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        with torch.autocast(embeddings[0].device.type, enabled=False):
            z = torch.stack([normalize(of_all_ranks(widen(z)), dim=1) for z in embeddings])
            wide, memory = z.to(self.means.dtype), self.config.memory
            means = memory * self.means + (1 - memory) * wide.mean(1)
            centred = wide - means[:, None]
            batch = centred.mT @ centred / z.shape[1]
            covariances = memory * self.covariances + (1 - memory) * batch
            self.seen = means.detach(), covariances.detach()
            epsilon = self.config.epsilon * torch.eye(z.shape[2]).to(covariances)
            spread = torch.logdet(covariances + epsilon).sum() / z.shape[2]
            agreement = mse_loss(z[0], z[1])
            return {"loss": (self.config.invariance_weight * agreement - spread).to(z.dtype)}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        for running, seen in zip((self.means, self.covariances), self.seen, strict=True):
            running.copy_(seen)
