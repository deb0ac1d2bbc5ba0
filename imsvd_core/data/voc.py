"""PASCAL VOC 2007: images that show several classes, or none for certain, streamed from the
challenge's own layout.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from imsvd_core.data import sources
from imsvd_core.data.batch import balanced
from imsvd_core.data.decoding import decode
from imsvd_core.data.sources import OnCorrupt, Split
from imsvd_core.data.workers import Unreadable, stream

PREFIX = "voc:"
LISTS = {
    "train": "trainval",
    "test": "test",
}  # the challenge's words for what is trained and tested on
LABELS = {"-1": -1, "0": 0, "1": 1}

PART = 64  # images that a worker hands over at a time


@dataclass(frozen=True, eq=False)
class VOCImages:
    """One split, as names and labels: nothing is decoded yet."""

    name: str  # "voc:PATH"
    title: str  # what a page prints
    split: str  # "train" (VOC's trainval) or "test"
    home: Path  # holds the images
    stems: tuple[str, ...] = field(repr=False)  # names of the images, without .jpg
    labels: Tensor = field(
        repr=False
    )  # int8 (N, classes): 1 present, 0 only as a difficult object, -1 absent
    classes: tuple[str, ...] = field(repr=False)
    on_corrupt: OnCorrupt = "error"
    unreadable: Unreadable = field(default_factory=Unreadable, repr=False)  # images so far

    def __len__(self) -> int:
        return len(self.stems)

    def file(self, index: int) -> Path:
        return self.home / f"{self.stems[index]}.jpg"

    def subset(self, n: int, seed: int = 0) -> VOCImages:
        """`n` images drawn at random, in their present order; with several labels each, no draw is
        even over classes.

        The same `n` and `seed` give the same images. Raises ValueError unless 1 <= n <= len(self).
        """
        as_one_class = torch.zeros(len(self), dtype=torch.int64)
        rows = balanced(as_one_class, n, seed, f"{self.title} ({self.split})")
        return replace(
            self,
            stems=tuple(self.stems[row] for row in rows),
            labels=self.labels[rows],
            unreadable=Unreadable(),
        )

    def images(
        self,
        resize: int,
        size: int,
        *,
        indices: Sequence[int] | None = None,
        workers: int | None = None,
        device: torch.device | str = "cpu",
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
        parts = (rows[start : start + PART] for start in range(0, len(rows), PART))
        read = partial(self._read, resize, size)
        with closing(stream(read, parts, workers, device)) as results:
            for readable, images, unreadable in results:
                self.unreadable.note(unreadable, self.file, "left out")
                if readable:
                    yield readable, images

    def _read(
        self, resize: int, size: int, part: Sequence[int]
    ) -> tuple[list[int], Tensor, list[int]]:
        images, unreadable = {}, []
        for index in part:
            try:
                image = decode(str(self.file(index)))
            except ValueError:
                if self.on_corrupt == "error":
                    raise
                unreadable.append(index)
            else:
                images[index] = TF.resize(
                    TF.resize(image, [resize], antialias=True), [size, size], antialias=True
                )
        return (
            list(images),
            torch.stack([*images.values()]) if images else torch.empty(0),
            unreadable,
        )


def open_voc(
    name: str,
    split: Split = "train",
    root: Path | str | None = None,
    *,
    on_corrupt: OnCorrupt = "error",
) -> VOCImages:
    """One split of the data set `voc:PATH`, PATH absolute or below the data root; opens no image.

    PATH holds JPEGImages and ImageSets/Main, or VOCdevkit/VOC2007 or VOC2007 that do. The lists
    ImageSets/Main/CLASS_{trainval,test}.txt give the labels: the challenge writes 0 where all
    objects of the class are marked difficult. Raises ValueError or FileNotFoundError, saying what
    is expected, where that is not so.
    """
    if not name.startswith(PREFIX):
        raise ValueError(f"data set {name!r} is not in VOC's layout: give {PREFIX}PATH")
    sources.check_choices(split, on_corrupt)
    folder = sources.find_folder(name, root)
    base = base_of(folder)
    suffix = f"_{LISTS[split]}.txt"
    lists = sorted((base / "ImageSets/Main").glob(f"*{suffix}"))
    if not lists or not (base / "JPEGImages").is_dir():
        raise FileNotFoundError(
            f"{base} lacks JPEGImages or ImageSets/Main/*{suffix}: unpack VOC 2007 there, both "
            "splits (`imsvd data check voc07` tells how)"
        )
    tables = [_read_list(file) for file in lists]
    stems = tuple(tables[0])
    for file, table in zip(lists, tables, strict=True):
        if tuple(table) != stems:
            raise ValueError(
                f"{file} lists other images than {lists[0].name}: unpack VOC 2007 again"
            )
    labels = torch.tensor([list(table.values()) for table in tables], dtype=torch.int8).T
    classes = tuple(file.name.removesuffix(suffix) for file in lists)
    home = base / "JPEGImages"
    return VOCImages(
        name, folder.name, split, home, stems, labels.contiguous(), classes, on_corrupt
    )


def base_of(folder: Path) -> Path:
    """The folder that holds JPEGImages and the like: below `folder` as unpacked, or itself."""
    nested = (folder / place for place in ("VOCdevkit/VOC2007", "VOC2007"))
    return next(filter(Path.is_dir, nested), folder)


def _read_list(file: Path) -> dict[str, int]:
    """One class's list: the label of each image. Raises ValueError for what is none."""
    try:
        lines = [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no text in UTF-8 ({error.reason} at byte {error.start}): unpack VOC 2007 "
            "again"
        ) from None
    for line in lines:
        if len(line) != 2 or line[1] not in LABELS:
            raise ValueError(f"{file} says {' '.join(line)!r}: a name and -1, 0 or 1 belong there")
    labels = {stem: LABELS[label] for stem, label in lines}
    if len(labels) < len(lines) or not lines:
        problem = "an image twice" if lines else "no image"
        raise ValueError(f"{file} lists {problem}: unpack VOC 2007 again")
    return labels
