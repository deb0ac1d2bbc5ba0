"""The order of a training: which samples every step sees, and where its chance comes from."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from imsvd_core.distributed import world


def stream_seed(seed: int, stream: str, number: int) -> int:
    """A seed for the `number`-th draw of a named stream: fixed by its arguments, unrelated to all
    others."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=7).digest()
    )


@dataclass(frozen=True)
class Order:
    """Iterating yields (step, int64 indices of one piece) for all that this rank has to do, from
    step `first` on.

    Every epoch visits each sample once, in an order of its own that (seed, epoch) fixes; what is
    left over after its last whole batch is dropped. The ranks share every batch equally. An order
    can be iterated any number of times, read ahead, and left early.

    Raises ValueError if a batch exceeds the samples or cannot be cut into equal pieces.
    """

    samples: int
    batch_size: int
    """Samples of one step, on all ranks together."""
    steps: int
    """Steps of the whole training."""
    pieces: int = 1
    """Pieces of a batch, on every rank."""
    seed: int = 0
    first: int = 0
    """The step to begin with, from 0."""
    rank: int = field(default_factory=lambda: world()[0])
    ranks: int = field(default_factory=lambda: world()[1])

    def __post_init__(self) -> None:
        if self.batch_size > self.samples:
            raise ValueError(
                f"batch_size={self.batch_size} exceeds the {self.samples} samples: "
                "take a smaller batch or more data"
            )
        pieces = self.ranks * self.pieces
        if self.batch_size % pieces:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be cut into equal pieces, "
                f"accumulate={self.pieces} on each of {self.ranks} ranks: "
                f"take a multiple of {pieces}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch_size

    def since(self, step: int) -> "Order":
        """The same order from `step` on."""
        return replace(self, first=step)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        share = self.batch_size // self.ranks
        for step in range(self.first, self.steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or step == self.first:
                generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
                shuffled = torch.randperm(self.samples, generator=generator)
            start = place * self.batch_size + self.rank * share
            for piece in shuffled[start : start + share].chunk(self.pieces):
                yield step, piece

    def seed_of(self, step: int) -> int:
        """The seed of all that this rank draws in `step`."""
        stream = f"step of rank {self.rank}" if self.rank else "step"
        return stream_seed(self.seed, stream, step)

    def generator(self, step: int, device: torch.device | str = "cpu") -> torch.Generator:
        """The generator of what this rank draws in `step`, anew at every call."""
        return torch.Generator(device).manual_seed(self.seed_of(step))
