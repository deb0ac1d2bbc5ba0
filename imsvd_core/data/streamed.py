"""What data sets share whose images are decoded whenever they are needed."""

import hashlib
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from imsvd_core.data.batch import Device, balanced
from imsvd_core.data.decoding import decode
from imsvd_core.data.sources import OnCorrupt
from imsvd_core.data.workers import in_threads, stream

T = TypeVar("T")

PAGE = 4096  #: bytes, of which the first of a picture hold pixels too

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
    left_out: int = field(default=0, repr=False, kw_only=True)  # unreadable ones, by `sound`

    def __len__(self) -> int:
        return len(getattr(self, self.columns[0]))

    @property
    def part(self) -> str:
        """What the data set itself calls this split."""
        return self.home.name

    @property
    def skipped(self) -> int:
        """Unreadable files met so far, each left out or replaced by another of its class."""
        return self.left_out + len(self.unreadable)

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
        return self._at(balanced(self.strata(), n, seed, f"{self.title} ({self.split})"))

    def contents(self) -> bytes:
        """A digest that changes when a file does: of sizes, modification times and first pages."""
        files = in_threads(lambda index: _look(self.file(index)), range(len(self)), "files")
        digest = hashlib.sha256()
        for look in files:
            digest.update(look)
        return digest.digest()

    def unsound(self, progress: bool = False) -> list[int]:
        """The places of images that cannot be read, by reading all; none where they are errors."""
        if self.on_corrupt == "error":
            return []

        def is_lost(place: int) -> bool:
            with suppress(ValueError):
                self.decode(place)
                return False
            return True

        lost = in_threads(is_lost, range(len(self)), f"reading {self.split}", progress=progress)
        places = [place for place, is_so in enumerate(lost) if is_so]
        for place in places:
            log.warning("%s cannot be read and is left out", self.file(place))
        return places

    def without(self, places: list[int]) -> Self:
        """The other images; that one of them cannot be read is an error."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[places] = False
        if not kept.any():
            raise self._nothing()
        sound = self._at(kept.nonzero().flatten())
        return replace(sound, on_corrupt="error", left_out=self.left_out + len(places))

    def _at(self, rows: Tensor) -> Self:
        entries: dict[str, Any] = {name: getattr(self, name)[rows.numpy()] for name in self.columns}
        return replace(self, unreadable=set(), **entries)

    def _nothing(self) -> ValueError:
        return ValueError(f"{self.home} holds no image that can be read, of {len(self)} files")

    def readable(
        self, read: Callable[[int], T], indices: Iterable[int], unreadable: list[int]
    ) -> Iterator[tuple[int, T]]:
        """Place and content of every image that `read` can read, or of the next of its class that
        stands for it.

        Places that cannot be read are appended to `unreadable`. Raises ValueError for the first of
        them, unless `on_corrupt` is "skip", and where no image can stand for another.
        """
        for index in indices:
            for place in self._candidates(index):
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
                    raise self._nothing()

    def _candidates(self, index: int) -> Iterator[int]:
        """An image and those that may stand for it: of its class, so that labels stay true, from
        there on; of a class without a readable image, any.
        """
        yield index
        if self.replaced:
            others = torch.arange(index + 1, index + len(self)) % len(self)
            strata = self.strata()
            alike = strata[others] == strata[index]
            yield from torch.cat([others[alike], others[~alike]]).tolist()

    def stream(
        self,
        read: Callable[[Any], tuple],
        parts: Iterable,
        workers: int | None,
        device: Device,
        part_bytes: int = 0,
    ) -> Generator[list[Any]]:
        """What `read` makes of each part, but for its last item, unreadable images, which is noted.

        All else as in `workers.stream`.
        """
        with closing(stream(read, parts, workers, device, part_bytes)) as results:
            for *items, unreadable in results:
                self.note(unreadable)
                yield items

    def note(self, places: Iterable[int]) -> None:
        """Keep the places of unreadable images; warn of each that is new."""
        fate = "replaced by the next image of its class" if self.replaced else "left out"
        for place in set(places) - self.unreadable:
            self.unreadable.add(place)
            log.warning("%s cannot be read and is %s", self.file(place), fate)


def _look(file: Path) -> bytes:
    """Size, modification time and first page of a file; nothing of one that is not there."""
    with suppress(OSError), open(file, "rb") as content:
        stat = os.stat(content.fileno())
        return repr((stat.st_size, stat.st_mtime_ns)).encode() + content.read(PAGE)
    return b""
