"""What data sets share whose images are decoded whenever they are needed."""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from imsvd_core.data.batch import Device, balanced
from imsvd_core.data.decoding import decode
from imsvd_core.data.sources import OnCorrupt
from imsvd_core.data.workers import stream

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """One split of a data set, as names: nothing is decoded yet."""

    columns: ClassVar[tuple[str, ...]]  # the fields that have an entry for every image

    name: str  # what `open_data` takes
    title: str  # what a page prints
    split: str  # "train" or "test"
    home: Path  # holds the images
    on_corrupt: OnCorrupt = field(default="error", kw_only=True)
    #: what the data set holds beside these images and does not use: (reason, how often)
    passed_over: tuple[tuple[str, int], ...] = field(default=(), repr=False, kw_only=True)
    #: the next image stands for one that cannot be read, which else is left out
    replaced: bool = field(default=False, kw_only=True)
    unreadable: set[int] = field(default_factory=set, repr=False, kw_only=True)  # images so far

    def __len__(self) -> int:
        return len(getattr(self, self.columns[0]))

    def file(self, index: int) -> Path:
        """Where an image is."""
        raise NotImplementedError

    def decode(self, index: int) -> Tensor:
        """An image, uint8 RGB (3, H, W)."""
        return decode(self.file(index))

    def strata(self) -> Tensor:
        """The classes (N,) over which a subset is even; one for all by default."""
        return torch.zeros(len(self), dtype=torch.int64)

    def subset(self, n: int, seed: int = 0) -> Self:
        """`n` images drawn at random, as evenly over the `strata` as these allow, in their order.

        The same `n` and `seed` give the same images. Raises ValueError unless 1 <= n <= len(self).
        """
        rows = balanced(self.strata(), n, seed, f"{self.title} ({self.split})")
        entries: dict[str, Any] = {name: getattr(self, name)[rows.numpy()] for name in self.columns}
        return replace(self, unreadable=set(), **entries)

    def readable(
        self, read: Callable[[int], T], indices: Iterable[int], unreadable: list[int]
    ) -> Iterator[tuple[int, T]]:
        """Place and content of every image that `read` can read, or of the next that stands for it.

        Places that cannot be read are appended to `unreadable`. Raises ValueError for the first of
        them, unless `on_corrupt` is "skip", and where no image can stand for another.
        """
        for index in indices:
            for place in range(index, index + (len(self) if self.replaced else 1)):
                place %= len(self)
                try:
                    content = read(place)
                except ValueError:
                    if self.on_corrupt == "error":
                        raise
                    unreadable.append(place)
                else:
                    yield place, content
                    break
            else:
                if self.replaced:
                    raise ValueError(
                        f"{self.home} holds no image that can be read, of {len(self)} files"
                    )

    def stream(
        self,
        read: Callable[[Any], tuple],
        parts: Iterable,
        workers: int | None,
        device: Device,
    ) -> Generator[list[Any]]:
        """What `read` makes of each part, but for its last item, unreadable images, which is noted.

        All else as in `workers.stream`.
        """
        with closing(stream(read, parts, workers, device)) as results:
            for *items, unreadable in results:
                self.note(unreadable)
                yield items

    def note(self, places: Iterable[int]) -> None:
        """Keep the places of unreadable images; warn of each that is new."""
        fate = "replaced by the next image" if self.replaced else "left out"
        for place in set(places) - self.unreadable:
            self.unreadable.add(place)
            log.warning("%s cannot be read and is %s", self.file(place), fate)
