"""What data give to a training: batches of views, with the labels and places of the images."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from imsvd_core.views import View, Views

T = TypeVar("T")

Device = torch.device | str


class Batch(NamedTuple):
    """One piece of a training step, on the training's device."""

    #: float32 (n, 3, height, width) each, normalised; as many as are drawn of an image
    views: tuple[Tensor, ...]
    #: int64 (n,); -1 where an image has none
    labels: Tensor
    #: int64 (n,), places in the training set
    indices: Tensor


class OrderLike(Protocol):
    """The order of a training: iterating it gives (step, indices (n,)) of one piece after the
    other.
    """

    @property
    def seed(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[int, Tensor]]: ...

    def generator(self, step: int, device: Device) -> torch.Generator:
        """A new generator on `device`, seeded for the draws of all pieces of `step`."""


#: (step, int64 (n,) indices of images) of each piece; consumed ahead of what is made of it
Plan = Iterable[tuple[int, Tensor]]


def members(views: Views | View) -> tuple[View, ...]:
    """The single views that `views` draws of every image, in the order of their draws."""
    return (views,) if isinstance(views, View) else views.views


def groups(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The rows in groups of `size`, the last of what is left."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def balanced(labels: Tensor, n: int, seed: int, owner: str) -> Tensor:
    """Sorted indices (n,) of images drawn at random, as evenly over the classes as possible.

    Raises ValueError, naming the `owner` of the labels (N,), unless 1 <= n <= N.
    """
    if not 1 <= n <= len(labels):
        raise ValueError(f"n is {n}: take 1 to {len(labels)}, as many as {owner} holds")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labels = labels[order]
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    turn = torch.empty_like(labels)  # an image's rank within its class
    turn[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return order[turn.argsort(stable=True)[:n]].sort().values
