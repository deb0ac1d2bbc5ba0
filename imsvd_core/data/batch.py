"""What data give to a training: batches of views, with the labels and places of the images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from imsvd_core.views import View, Views


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

    def generator(self, step: int, device: torch.device | str) -> torch.Generator:
        """A new generator on `device`, seeded for the draws of all pieces of `step`."""


def members(views: Views | View) -> tuple[View, ...]:
    """The single views that `views` draws of every image, in the order of their draws."""
    if isinstance(views, View):
        return (views,)
    return views.views
