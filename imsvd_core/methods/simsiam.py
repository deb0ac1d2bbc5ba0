"""SimSiam: predict the other view's embedding, held still (Chen and He, 2021).

Loss: the negative cosine of prediction and embedding, of both directions. Trained: backbone,
projector (whose output is normalised over the batch), predictor. Nothing in the loss forbids
collapse: the predictor and the stopped gradient prevent it. Published: 71.3 % linear on ImageNet
(ResNet-50, 800 epochs).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from imsvd_core.data.batch import Batch
from imsvd_core.discretization import widen
from imsvd_core.methods.base import Config, TwinMethod
from imsvd_core.networks import NetworkConfig, build_projector
from imsvd_core.system import checks


@dataclass(frozen=True)
class SimSiam(Config):
    """Simple siamese networks (Chen and He, 2021)."""

    predictor_hidden: int = 512
    """Width of the predictor's hidden layer, a bottleneck."""
    name: Literal["simsiam"] = "simsiam"

    def __post_init__(self) -> None:
        checks.at_least(self, predictor_hidden=1)

    def build(self, network: NetworkConfig) -> "SimSiamMethod":
        return SimSiamMethod(network, self)


class SimSiamMethod(TwinMethod):
    """A network with a predictor."""

    whole_batch: ClassVar[bool] = False

    def __init__(self, network: NetworkConfig, config: SimSiam):
        super().__init__(network)
        norm = nn.BatchNorm1d(network.dim)
        self.network.projector = nn.Sequential(self.network.projector, norm)
        self.predictor = build_projector(network.dim, (config.predictor_hidden,), network.dim)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Predictions of both views, then their embeddings, (n, D) each."""
        z1, z2 = super().embed(batch)
        return self.predictor(z1), self.predictor(z2), z1, z2

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        p1, p2, z1, z2 = (widen(z) for z in embeddings)
        agreement = cosine_similarity(p1, z2.detach()) + cosine_similarity(p2, z1.detach())
        return {"loss": -agreement.mean() / 2}
