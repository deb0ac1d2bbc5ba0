"""PASCAL VOC 2007: images that show several classes, or none for certain, streamed from the
challenge's own layout."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from imsvd_core.data import memory as datasets
from imsvd_core.data import sources
from imsvd_core.data import tree as folders
from imsvd_core.data.sources import OnCorrupt, Split

PREFIX = "voc:"
LISTS = {
    "train": "trainval",
    "test": "test",
}  # the challenge's words for what is trained and tested on
LABELS = {"-1": -1, "0": 0, "1": 1}

log = logging.getLogger(__name__)


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
    unreadable: set[int] = field(
        default_factory=set, repr=False
    )  # images met so far that had to be left out

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
        rows = datasets.balanced(as_one_class, n, seed, f"{self.title} ({self.split})")
        return replace(
            self,
            stems=tuple(self.stems[row] for row in rows),
            labels=self.labels[rows],
            unreadable=set(),
        )

    def images(
        self,
        resize: int,
        size: int,
        *,
        indices: Sequence[int] | None = None,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[list[int], Tensor]]:
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
        wanted = range(len(self)) if indices is None else indices
        parts = (
            wanted[start : start + folders.PART] for start in range(0, len(wanted), folders.PART)
        )
        with closing(
            folders.stream(partial(self._read, resize, size), parts, workers, device)
        ) as stream:
            for kept, images, unreadable in stream:
                for index in set(unreadable) - self.unreadable:
                    self.unreadable.add(index)
                    log.warning(
                        "%s cannot be read and is left out (%d such so far)",
                        self.file(index),
                        len(self.unreadable),
                    )
                if kept:
                    yield kept, images

    def _read(
        self, resize: int, size: int, part: Sequence[int]
    ) -> tuple[list[int], Tensor, list[int]]:
        images, unreadable = {}, []
        for index in part:
            try:
                image = folders.decode(str(self.file(index)))
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
    root = sources.data_root() if root is None else Path(root).expanduser()
    folder = sources.find_folder(name, root)
    base = next(
        (folder / place for place in ("VOCdevkit/VOC2007", "VOC2007") if (folder / place).is_dir()),
        folder,
    )
    suffix = f"_{LISTS[split]}.txt"
    lists = sorted((base / "ImageSets/Main").glob(f"*{suffix}"))
    if not lists or not (base / "JPEGImages").is_dir():
        raise FileNotFoundError(
            f"{base} lacks JPEGImages or ImageSets/Main/*{suffix}: unpack VOC 2007 there, both "
            f"splits "
            "(`imsvd data check voc07` tells how)"
        )
    columns, stems = [], None
    for file in lists:
        try:
            lines = [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is no text in UTF-8 ({error.reason} at byte {error.start}): unpack VOC "
                f"2007 again"
            ) from None
        if odd := next((line for line in lines if len(line) != 2 or line[1] not in LABELS), None):
            raise ValueError(f"{file} says {' '.join(odd)!r}: a name and -1, 0 or 1 belong there")
        listed = [stem for stem, _ in lines]
        stems = stems or listed
        if not listed or len(set(listed)) < len(listed):
            raise ValueError(
                f"{file} lists {'an image twice' if listed else 'no image'}: unpack VOC 2007 again"
            )
        if listed != stems:
            raise ValueError(
                f"{file} lists other images than {lists[0].name}: unpack VOC 2007 again"
            )
        columns.append(torch.tensor([LABELS[label] for _, label in lines], dtype=torch.int8))
    classes = tuple(file.name.removesuffix(suffix) for file in lists)
    return VOCImages(
        name,
        folder.name,
        split,
        base / "JPEGImages",
        tuple(stems),
        torch.stack(columns, 1),
        classes,
        on_corrupt,
    )
