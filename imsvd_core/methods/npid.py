"""NPID: every image a class of its own (Wu, Xiong, Yu and Lin, 2018).

Loss: cross-entropy of the cosine with the image's own entry in a memory bank, among those with all
images', by temperature: the paper's non-parametric softmax itself, without its estimate by noise
samples. One view. Trained: backbone, projector; an entry moves towards its image's embedding. The
other images prevent collapse. Published: 200-NN 80.8 % on CIFAR-10 (ResNet-18).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from imsvd_core.data.batch import Batch
from imsvd_core.discretization import widen
from imsvd_core.methods.base import Config, TwinMethod, of_all_ranks
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class NPID(Config):
    """Non-parametric instance discrimination (Wu et al., 2018)."""

    samples: int = 50_000
    """Images of the training set, each with an entry in the bank."""
    temperature: float = 0.1
    memory: float = 0.5
    """Share of what an entry was before."""
    name: Literal["npid"] = "npid"

    def __post_init__(self) -> None:
        checks.at_least(self, samples=1)
        checks.positive(self, "temperature")
        checks.between(self, 0, 1, "memory")

    def build(self, network: NetworkConfig) -> "NPIDMethod":
        return NPIDMethod(network, self)


class NPIDMethod(TwinMethod):
    """A network, and a bank (samples, D) of embeddings of unit length."""

    whole_batch: ClassVar[bool] = False
    bank: Tensor

    def __init__(self, network: NetworkConfig, config: NPID):
        super().__init__(network)
        self.config = config
        self.register_buffer("bank", normalize(torch.randn(config.samples, network.dim), dim=1))
        self.seen: list[tuple[Tensor, Tensor]] = []  # places and embeddings of this step's pieces

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Embeddings (n, D) of the first view, of unit length, and the images' places (n,)."""
        last = int(batch.indices.max())
        if last >= len(self.bank):
            raise ValueError(
                f"samples={len(self.bank)} entries are too few for image {last}: "
                "give as many as there are training images"
            )
        return normalize(widen(self.network.embed(batch.views[0])), dim=1), batch.indices

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        z, places = embeddings
        self.seen.append((of_all_ranks(places), of_all_ranks(z.detach())))
        with torch.autocast(z.device.type, enabled=False):
            return {"loss": cross_entropy(z @ self.bank.T / self.config.temperature, places)}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        for places, z in self.seen:
            self.bank[places] = normalize(self.bank[places].lerp(z, 1 - self.config.memory), dim=1)
        self.seen.clear()
