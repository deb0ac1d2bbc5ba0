"""Barlow Twins: cross-correlation towards the identity (Zbontar et al., 2021)."""

from dataclasses import dataclass
from typing import Literal

from imsvd_core.methods.base import Config, PeerMethod
from imsvd_core.networks import NetworkConfig
from imsvd_core.system import checks


@dataclass(frozen=True)
class BarlowTwins(Config):
    """Cross-correlation towards the identity (Zbontar et al., 2021); loss from lightly."""

    redundancy_weight: float = 5e-3
    name: Literal["barlow_twins"] = "barlow_twins"

    def __post_init__(self) -> None:
        checks.finite(self, "redundancy_weight")

    def build(self, network: NetworkConfig) -> PeerMethod:
        from lightly.loss import BarlowTwinsLoss  # slow to import

        return PeerMethod(network, BarlowTwinsLoss(lambda_param=self.redundancy_weight))
