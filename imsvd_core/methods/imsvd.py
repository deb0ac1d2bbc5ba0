"""IMSVD: entropies of soft discrete variables (Niu, Xia, Shan and Wang, 2025)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from imsvd_core.discretization import unit_counts
from imsvd_core.loss import CrossJointEntropyLoss
from imsvd_core.methods.base import Config, TwinMethod
from imsvd_core.networks import NetworkConfig
from imsvd_core.streaming import Invariance, Products


@dataclass(frozen=True)
class IMSVD(Config):
    """Cross-joint entropy loss (Eq. 11)."""

    units: int | tuple[int, ...] = 32
    """Units of every variable (B), or one count per variable."""
    temperature: float = 1.0
    """Temperature of the softmax (τ)."""
    diagonal_weight: float = 1.0
    """Weight of DE, the entropy on the diagonal."""
    off_diagonal_weight: float = 1.0
    """Weight of OE, the entropy of the off-diagonal blocks."""
    invariance_weight: float = 1.0
    """Weight of TI, the agreement of the views (λ)."""
    invariance: Invariance = "inner_product"
    products: Products = "fp32"
    """Type of the factors in OE's three matrix products; their sums are fp32."""
    sampled_variables: int | None = None
    """Block rows of OE drawn at every step; all by default."""
    name: Literal["imsvd"] = "imsvd"

    def check(self, network: NetworkConfig) -> None:
        """Raise ValueError if the units do not divide the embedding, or a setting is impossible."""
        unit_counts(self.units, network.dim)
        self._criterion()

    def build(self, network: NetworkConfig) -> "IMSVDMethod":
        self.check(network)
        return IMSVDMethod(network, self._criterion())

    def _criterion(self) -> CrossJointEntropyLoss:
        settings = dict(vars(self))
        del settings["name"]
        return CrossJointEntropyLoss(**settings, gather_distributed=True)


class IMSVDMethod(TwinMethod):
    """A backbone and a projector, whose logits the cross-joint loss discretises."""

    def __init__(self, network: NetworkConfig, criterion: CrossJointEntropyLoss):
        super().__init__(network)
        self.criterion = criterion

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        terms = self.criterion(*embeddings)._asdict()
        return {"loss": terms.pop("total"), **terms}
