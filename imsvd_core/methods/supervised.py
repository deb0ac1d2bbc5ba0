"""Supervised: the labels themselves, the upper bound that others are compared with.

Loss: cross-entropy of the classes, the mean over views. Trained: backbone, and the projector as the
classifier, with a coordinate for each class. The labels prevent collapse. Published: 93.02 % on
CIFAR-10 (ResNet-18, 350 epochs, kuangliu/pytorch-cifar).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from imsvd_core.data.batch import Batch
from imsvd_core.discretization import widen
from imsvd_core.methods.base import Config, TwinMethod
from imsvd_core.networks import NetworkConfig


@dataclass(frozen=True)
class Supervised(Config):
    """Classification of every view."""

    name: Literal["supervised"] = "supervised"

    def build(self, network: NetworkConfig) -> "SupervisedMethod":
        return SupervisedMethod(network)


class SupervisedMethod(TwinMethod):
    """A backbone, and a projector that classifies."""

    whole_batch: ClassVar[bool] = False

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits of both views, (n, classes) each, and the labels (n,)."""
        tables, labels = super().embed(batch), batch.labels
        low, high = (int(edge) for edge in torch.stack([labels.min(), labels.max()]).cpu())
        classes = tables[0].shape[1]
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels of {low} to {high} do not fit dim={classes}: supervised training needs a "
                "label of every image (-1 is none), and network.dim of as many as there are classes"
            )
        return *tables, labels

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        *tables, labels = embeddings
        losses = [cross_entropy(widen(logits), labels) for logits in tables]
        return {"loss": torch.stack(losses).mean()}
