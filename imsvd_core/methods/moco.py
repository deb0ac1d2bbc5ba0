"""MoCo v2: tell an image's other view from a queue of images seen before (Chen, Fan et al., 2020).

Loss: cross-entropy of the cosine with the other view's key, among those with the queue's, by
temperature; of both directions. Trained: backbone, projector; the network of the keys follows by
momentum. The queue, as negatives, prevents collapse. Published: 71.1 % linear on ImageNet
(ResNet-50, 800 epochs). Left out: shuffled batch-norm, for on GPUs ours spans all ranks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from imsvd_core.data.batch import Batch
from imsvd_core.discretization import widen
from imsvd_core.methods.base import Config, MomentumMethod, of_all_ranks
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class MoCo(Config):
    """Momentum contrast (He et al., 2020; Chen, Fan et al., 2020), in both directions."""

    queue: int = 65_536
    """Keys to compare with, of the steps before."""
    temperature: float = 0.2
    momentum: float = 0.999
    """Of the network of the keys."""
    name: Literal["moco"] = "moco"

    def __post_init__(self) -> None:
        checks.at_least(self, queue=1)
        checks.positive(self, "temperature")
        checks.between(self, 0, 1, "momentum")

    def build(self, network: NetworkConfig) -> "MoCoMethod":
        return MoCoMethod(network, self)


class MoCoMethod(MomentumMethod):
    """A network of queries, its momentum copy of keys, and a queue of keys, the oldest replaced."""

    queue: Tensor
    oldest: Tensor

    def __init__(self, network: NetworkConfig, config: MoCo):
        super().__init__(network, config.momentum)
        self.temperature = config.temperature
        self.register_buffer("queue", normalize(torch.randn(config.queue, network.dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self.new_keys = torch.empty(0, network.dim)  # of this step, on their way into the queue

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Queries of both views, then keys of both, (n, D) each, of unit length."""
        x1, x2 = batch.views
        with torch.no_grad():
            keys = self.target(x1, x2)
        return tuple(normalize(widen(z), dim=1) for z in (*self.network(x1, x2), *keys))

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        with torch.autocast(embeddings[0].device.type, enabled=False):
            q1, q2, k1, k2 = embeddings
            self.new_keys = torch.cat([of_all_ranks(k.detach()) for k in (k1, k2)])
            if len(self.new_keys) > len(self.queue):
                raise ValueError(
                    f"queue={len(self.queue)} is too short for the {len(self.new_keys)} keys of "
                    "one step, two for each sample: take a longer queue or a smaller batch"
                )
            return {"loss": (self._contrast(q1, k2) + self._contrast(q2, k1)) / 2}

    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        same = (queries * keys.detach()).sum(1, keepdim=True)
        cosines = torch.cat([same, queries @ self.queue.T], dim=1)
        places = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        return cross_entropy(cosines / self.temperature, places)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        places = torch.arange(len(self.new_keys), device=self.queue.device) + self.oldest
        self.queue[places % len(self.queue)] = self.new_keys.to(self.queue.dtype)
        self.oldest.copy_((self.oldest + len(self.new_keys)) % len(self.queue))
