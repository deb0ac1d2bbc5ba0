"""TWIST: twin class distributions (Wang, Kong et al., 2021).

Loss: the symmetric Kullback-Leibler divergence of both views' softmax, plus the mean entropy of a
sample (sharpness), minus the entropy of the mean (diversity), which prevents collapse. Before the
softmax logits are normalised over the batch. Trained: backbone, projector. Published: 72.6 % linear
on ImageNet (ResNet-50, 800 epochs). Left out: multi-crop and self-labelling, which gave 75.5 %.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, log_softmax

from imsvd_core.methods.base import Config, PeerMethod
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class TWIST(Config):
    """Twin class distribution estimation (Wang et al., 2021)."""

    sharpness_weight: float = 1.0
    diversity_weight: float = 1.0
    name: Literal["twist"] = "twist"

    def __post_init__(self) -> None:
        checks.finite(self, "sharpness_weight", "diversity_weight")

    def build(self, network: NetworkConfig) -> PeerMethod:
        return PeerMethod(network, TWISTLoss(self.sharpness_weight, self.diversity_weight))


class TWISTLoss(nn.Module):
    """Of the logits (N, D) of two views."""

    def __init__(self, sharpness_weight: float, diversity_weight: float):
        super().__init__()
        self.sharpness_weight, self.diversity_weight = sharpness_weight, diversity_weight

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        logs = [log_softmax(batch_norm(z, None, None, training=True), dim=1) for z in (z1, z2)]
        log1, log2 = logs
        p1, p2 = log1.exp(), log2.exp()
        divergence = ((p1 - p2) * (log1 - log2)).sum(1).mean() / 2
        sharpness = -((p1 * log1).sum(1) + (p2 * log2).sum(1)).mean() / 2
        diversity: Tensor = sum(torch.special.entr(p.mean(0)).sum() for p in (p1, p2)) / 2
        return divergence + self.sharpness_weight * sharpness - self.diversity_weight * diversity
