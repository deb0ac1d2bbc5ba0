"""PASCAL VOC 2007: images that show several classes, or none for certain, streamed from the
challenge's own layout.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import Compose, Resize

from imsvd_core.data import sources
from imsvd_core.data.batch import Device, groups
from imsvd_core.data.sources import OnCorrupt, Root, Split
from imsvd_core.data.streamed import StreamedImages

# The challenge's words for what is trained and tested on.
LISTS: dict[Split, str] = {"train": "trainval", "test": "test"}

PART = 64  # images that a worker hands over at a time


@dataclass(frozen=True, eq=False)
class VOCImages(StreamedImages):
    """One split, as names and labels: nothing is decoded yet.

    With several labels each, no subset is even over the classes.
    """

    columns: ClassVar = ("stems", "labels")

    stems: np.ndarray = field(repr=False)  # (N,) names of the images, without .jpg: strings
    #: int8 (N, classes): 1 present, 0 only as a difficult object, -1 absent
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)

    @property
    def part(self) -> str:
        return LISTS["train" if self.split == "train" else "test"]

    def file(self, index: int) -> Path:
        return self.home / f"{self.stems[index]}.jpg"

    def images(
        self,
        resize: int,
        size: int,
        *,
        indices: Sequence[int] | None = None,
        workers: int | None = None,
        device: Device = "cpu",
    ) -> Generator[tuple[list[int], Tensor]]:
        """The images in order, whole: the shorter side to `resize`, then to size × size pixels,
        bilinear and antialiased.

        Args:
            indices: of the images wanted; all by default.
            workers: processes that decode; 0 decodes here; by default this rank's share of the
                cores.
            device: where the images are sent.

        Yields indices and their images, uint8 (up to 64, 3, size, size). Raises ValueError naming a
        file that cannot be read, unless `on_corrupt` is "skip": then that image is missing from
        what is yielded.
        """
        rows = range(len(self)) if indices is None else indices
        read = partial(self._read, resize, size)
        with closing(self.stream(read, groups(rows, PART), workers, device)) as results:
            for readable, images in results:
                if readable:
                    yield readable, images

    def _read(
        self, resize: int, size: int, part: Sequence[int]
    ) -> tuple[list[int], Tensor, list[int]]:
        shrink = Compose([self.decode, Resize(resize), Resize((size, size))])
        unreadable: list[int] = []
        images = dict(self.readable(shrink, part, unreadable))
        pixels = torch.stack([*images.values()]) if images else torch.empty(0)
        return list(images), pixels, unreadable


def open_voc(
    name: str,
    split: Split = "train",
    root: Root = None,
    *,
    on_corrupt: OnCorrupt = "error",
) -> VOCImages:
    """One split of the data set `voc:PATH`, PATH absolute or below the data root; opens no image.

    PATH holds JPEGImages and ImageSets/Main, or VOCdevkit/VOC2007 or VOC2007 that do. The lists
    ImageSets/Main/CLASS_{trainval,test}.txt give the labels: the challenge writes 0 where all
    objects of the class are marked difficult. Raises ValueError or FileNotFoundError, saying what
    is expected, where that is not so.
    """
    folder = sources.find_root(name, ("voc:",), split, on_corrupt, root)
    base, suffix = base_of(folder), f"_{LISTS[split]}.txt"
    home, lists = base / "JPEGImages", sorted(base.glob(f"ImageSets/Main/*{suffix}"))
    if not lists or not home.is_dir():
        raise FileNotFoundError(
            f"{base} lacks JPEGImages or ImageSets/Main/*{suffix}: unpack VOC 2007 there, both "
            "splits (`imsvd data check voc07` tells how)"
        )
    tables = {file.name.removesuffix(suffix): read_list(file) for file in lists}
    stems, *others = map(list, tables.values())
    for file, other in zip(lists[1:], others, strict=True):
        if other != stems:
            raise ValueError(
                f"{file} lists other images than {lists[0].name}: unpack VOC 2007 again"
            )
    labels = torch.tensor([list(table.values()) for table in tables.values()], dtype=torch.int8)
    return VOCImages(
        name,
        folder.name,
        split,
        home,
        np.array(stems, object),
        labels.T.contiguous(),
        tuple(tables),
        on_corrupt=on_corrupt,
    )


def base_of(folder: Path) -> Path:
    """The folder that holds JPEGImages and the like: below `folder` as unpacked, or itself."""
    nested = (folder / place for place in ("VOCdevkit/VOC2007", "VOC2007"))
    return next(filter(Path.is_dir, nested), folder)


def read_list(file: Path) -> dict[str, int]:
    """One class's list: the label of each image. Raises ValueError for what is none."""
    labels: dict[str, int] = {}
    for line in filter(str.strip, file.read_text("utf-8", "replace").splitlines()):
        stem, *words = line.split()
        if words not in (["-1"], ["0"], ["1"]) or stem in labels:
            raise ValueError(f"{file} says {line!r}: an image, once, and -1, 0 or 1 belong there")
        labels[stem] = int(words[0])
    if not labels:
        raise ValueError(f"{file} lists no image: unpack VOC 2007 again")
    return labels
