"""What every method is: a module that embeds pieces of a batch, and gives the loss of the whole."""

import copy
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from imsvd_core.data.batch import Batch
from imsvd_core.discretization import widen
from imsvd_core.distributed import world
from imsvd_core.networks import NetworkConfig, TwinNetwork


class Config:
    """The settings of a method, a frozen dataclass; `build(network)` makes the method."""

    def check(self, network: NetworkConfig) -> None:
        """Raise ValueError if the network does not fit. By default every network will do."""


class Method(nn.Module):
    """All that a training trains and remembers, and its loss. The engine moves, averages, optimises
    and saves it whole.

    In a process group every rank embeds its own share. `loss` is that of the batch of all ranks, or
    of this rank's share where the mean over ranks is the same; the engine averages the gradients.
    """

    whole_batch: ClassVar[bool] = True
    """Whether the loss needs the whole batch; else the losses of its pieces may be averaged."""

    @property
    def backbone(self) -> nn.Module:
        """What evaluations take from it."""
        raise NotImplementedError

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """What `loss` needs of one piece of the batch: tensors with a row for each sample."""
        raise NotImplementedError

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        """Scalars to record, of the embeddings of a whole batch; "loss" is minimised."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """What follows an update of the weights: momentum, queues. `progress` of the training is in
        (0, 1]."""

    def before_epoch(self, embed_all: Callable[[], Tensor]) -> None:
        """What precedes an epoch: clusters of `embed_all()`, the training set's representations (N,
        features)."""

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        return self.embed(batch)


class TwinMethod(Method):
    """A method whose one network embeds both views."""

    def __init__(self, network: NetworkConfig):
        super().__init__()
        self.network = TwinNetwork.build(network)

    @property
    def backbone(self) -> nn.Module:
        backbone: nn.Module = self.network.backbone
        return backbone

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits z1, z2 of the two views, (n, D) each."""
        x1, x2 = batch.views
        z1, z2 = self.network(x1, x2)
        return z1, z2


class PeerMethod(TwinMethod):
    """A backbone and a projector under a loss of two tables, computed in float32 at least.

    `gathers`: the loss is given the samples of all ranks; else it looks at the other ranks itself.
    """

    def __init__(self, network: NetworkConfig, criterion: nn.Module, gathers: bool = True):
        super().__init__(network)
        self.criterion, self.gathers = criterion, gathers

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        with torch.autocast(embeddings[0].device.type, enabled=False):
            tables = [widen(z) for z in embeddings]
            if self.gathers:
                tables = [of_all_ranks(z) for z in tables]
            return {"loss": self.criterion(*tables)}


class MomentumMethod(TwinMethod):
    """A network, and a copy that follows it by momentum, which no gradient reaches."""

    def __init__(self, network: NetworkConfig, momentum: float):
        super().__init__(network)
        self.momentum = momentum
        self.target = copy.deepcopy(self.network).requires_grad_(False)

    def momentum_at(self, progress: float) -> float:
        """The momentum of the copy, from the progress of the training."""
        return self.momentum

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = self.momentum_at(progress)
        for slow, fast in zip(self.target.parameters(), self.network.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)


def of_all_ranks(z: Tensor) -> Tensor:
    """(n, D) → (W·n, D), the rows of every rank; the gradient comes back summed over the ranks'
    losses."""
    if world()[1] == 1:
        return z
    from lightly.utils.dist import gather  # slow to import

    return torch.cat(gather(z.contiguous()))
