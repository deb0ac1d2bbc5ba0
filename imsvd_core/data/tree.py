"""Images streamed from a tree of class folders: decoded and cropped whenever they are needed.

Worker processes decode and crop, the trainer's device does the rest. An image's crops depend on the
seed, the step and the image, and on nothing else.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imsvd_core.data import sources
from imsvd_core.data.batch import Batch, OrderLike, Plan, balanced, members
from imsvd_core.data.decoding import decode
from imsvd_core.data.sources import OnCorrupt, Split
from imsvd_core.data.workers import Unreadable, stream
from imsvd_core.views import CROP_DRAWS, EvalView, View, Views

SCHEMES = ("folder:", "tree:")
PART = 64  # images that a worker hands over at a time, some 20 MB of 224-pixel crops
CHUNK = 8  # decoded images that a worker holds at a time: their crops are drawn together


@dataclass(frozen=True, eq=False)
class FolderImages:
    """One split of a tree ROOT/{train,val or test}/<class>/*.{jpg,png}, as names; no pixels yet.

    A name costs as many bytes as the longest below its class folder, and eight for its label:
    ImageNet's 1,281,167 some 40 MB.
    """

    name: str  # "folder:PATH" or "tree:PATH"
    title: str  # what a page prints
    split: str  # "train" or "test"
    home: Path  # holds the class folders
    names: np.ndarray = field(repr=False)  # (N,) bytes: file names below the class folders
    labels: Tensor = field(repr=False)  # int64 (N,), indices into `classes`
    classes: tuple[str, ...] = field(repr=False)
    on_corrupt: OnCorrupt = "error"
    unreadable: Unreadable = field(default_factory=Unreadable, repr=False)  # files so far

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def skipped(self) -> int:
        """Unreadable files met so far, each replaced by the next one of the list."""
        return len(self.unreadable)

    def file(self, index: int) -> Path:
        return self.home / self.classes[self.labels[index]] / os.fsdecode(self.names[index])

    def subset(self, n: int, seed: int = 0) -> FolderImages:
        """`n` images drawn at random, as evenly over the classes as these allow, in their order.

        The same `n` and `seed` give the same images. Raises ValueError unless 1 <= n <= len(self).
        """
        rows = balanced(self.labels, n, seed, f"{self.title} ({self.split})")
        names, labels = self.names[rows.numpy()], self.labels[rows]
        return replace(self, names=names, labels=labels, unreadable=Unreadable())

    def identity(self) -> list[Tensor]:
        """Names and labels: a fingerprint of these images is made of them."""
        return [torch.frombuffer(bytearray(self.names.tobytes()), dtype=torch.uint8), self.labels]

    def views(
        self,
        order: OrderLike,
        views: Views | View,
        *,
        device: torch.device | str = "cpu",
        workers: int | None = None,
    ) -> Generator[Batch]:
        """The batches of a training: for each piece of the order, its images seen through `views`.

        Args:
            order: read ahead by as much as the workers are ahead. Its seed, the step and the index
                fix an image's crops; its generator, one a step, fixes the other draws, piece after
                piece.
            views: how many, and the law of each.
            device: where the views are made.
            workers: processes that decode and crop; 0 decodes here; by default this rank's share of
                the cores.

        Closing the iterator ends the workers. Raises ValueError naming a file that cannot be read
        or is gone, unless `on_corrupt` is "skip".
        """
        current, generator = -1, torch.Generator(device)
        with closing(self._cropped(views, order, order.seed, workers, device)) as pieces:
            for step, indices, crops in pieces:
                if step != current:
                    current, generator = step, order.generator(step, device)
                pairs = zip(members(views), crops, strict=True)
                finished = tuple(view.finish(crop, generator) for view, crop in pairs)
                yield Batch(finished, self.labels[indices].to(device), indices.to(device))

    def crops(
        self,
        views: Views | View,
        plan: Plan,
        *,
        seed: int,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[Tensor, ...]]:
        """What the views' `finish` takes: for each entry of the plan, in order, one random crop of
        every image for each view, uint8 (n, 3, size, size); all else as in `views`."""
        with closing(self._cropped(views, plan, seed, workers, device)) as pieces:
            for _, _, crops in pieces:
                yield crops

    def in_order(
        self,
        view: EvalView,
        rows: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 500,
        workers: int | None = None,
    ) -> Generator[Tensor]:
        """The images `rows` (by default all) through `view`: float32 (n, 3, size, size).

        Streamed images come 64 at a time, whatever `batch_size` says; all else as in `views`.
        """
        rows = range(len(self)) if rows is None else rows
        parts = (rows[start : start + PART] for start in range(0, len(rows), PART))
        with closing(
            self._stream(partial(self._read_centers, view), parts, workers, device)
        ) as stream_of_crops:
            for (crops,) in stream_of_crops:
                yield view.finish(crops)

    def _cropped(
        self,
        views: Views | View,
        plan: Plan,
        seed: int,
        workers: int | None,
        device: torch.device | str,
    ) -> Generator[tuple[int, Tensor, tuple[Tensor, ...]]]:
        """For each entry of the plan: step, indices, and each view's crops of its images."""
        ahead: deque[tuple[int, Tensor]] = deque()  # entries that were handed out

        def parts() -> Iterator[tuple[int, list[int]]]:
            for step, indices in plan:
                ahead.append((step, indices))
                yield from ((step, part.tolist()) for part in indices.split(PART))

        read = partial(self._read_crops, members(views), seed)
        with closing(self._stream(read, parts(), workers, device)) as pieces:
            for first in pieces:
                step, indices = ahead.popleft()
                rest = islice(pieces, math.ceil(len(indices) / PART) - 1)
                by_view = zip(first, *rest, strict=True)
                crops = [torch.cat(tables) if len(tables) > 1 else tables[0] for tables in by_view]
                yield step, indices, tuple(crops)

    def _read_centers(self, view: EvalView, part: Sequence[int]) -> tuple[Tensor, list[int]]:
        unreadable: list[int] = []
        crops = [view.crop(self._decode(index, unreadable)) for index in part]
        return torch.stack(crops), unreadable

    def _read_crops(self, views: tuple[View, ...], seed: int, part: tuple[int, list[int]]) -> tuple:
        """The part's crops by each view, uint8 (n, 3, size, size), then the unreadable files."""
        step, indices = part
        sides = [view.config.size for view in views]
        # Rows of pixels, as a decoder's.
        crops = [torch.empty(len(indices), side, side, 3, dtype=torch.uint8) for side in sides]
        crops = [crop.permute(0, 3, 1, 2) for crop in crops]
        unreadable: list[int] = []
        for start in range(0, len(indices), CHUNK):
            chunk = indices[start : start + CHUNK]
            images = [self._decode(index, unreadable) for index in chunk]
            height, width = torch.tensor([image.shape[1:] for image in images]).unbind(1)
            draws = [
                np.random.default_rng((seed, step, index)).random(
                    (len(views), CROP_DRAWS), np.float32
                )
                for index in chunk
            ]
            uniforms = torch.from_numpy(np.stack(draws, 1))
            for uniform, view, out in zip(uniforms, views, crops, strict=True):
                boxes = view.draw_crops(uniform, height, width).tolist()
                for place, (image, box) in enumerate(zip(images, boxes, strict=True), start):
                    out[place] = view.crop(image, box)
        return *crops, unreadable

    def _decode(self, index: int, unreadable: list[int]) -> Tensor:
        """The image; or, where unreadable files may be skipped, the next that can be read.

        Files that cannot are appended to `unreadable`.
        """
        for place in range(index, index + len(self)):
            place %= len(self)
            try:
                return decode(str(self.file(place)))
            except ValueError:
                if self.on_corrupt == "error":
                    raise
                unreadable.append(place)
        raise ValueError(f"{self.home} holds no image that can be read, of {len(self)} files")

    def _stream(
        self, read: Callable, parts: Iterable, workers: int | None, device: torch.device | str
    ) -> Generator[list[Tensor]]:
        """The tensors that `read` makes of each part; its last item, unreadable files, is noted."""
        with closing(stream(read, parts, workers, device)) as results:
            for *crops, unreadable in results:
                self.unreadable.note(unreadable, self.file, "replaced by the next image")
                yield crops


def open_folder(
    name: str,
    split: Split = "train",
    root: Path | str | None = None,
    *,
    on_corrupt: OnCorrupt = "error",
) -> FolderImages:
    """One split of `folder:PATH` or `tree:PATH`, PATH absolute or below the data root, streamed.

    Opens no image. Raises ValueError or FileNotFoundError, with what is expected, where PATH has no
    split or no class folders.
    """
    if not name.startswith(SCHEMES):
        raise ValueError(f"data set {name!r} is not streamed: give tree:PATH or folder:PATH")
    sources.check_choices(split, on_corrupt)
    folder = sources.find_folder(name, root)
    home, classes = sources.find_split(folder, split)
    files = [sources.find_images(home, class_name) for class_name in classes]
    names = np.concatenate([np.array([os.fsencode(file) for file in group]) for group in files])
    counts = torch.tensor([len(group) for group in files])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return FolderImages(name, folder.name, split, home, names, labels, classes, on_corrupt)
