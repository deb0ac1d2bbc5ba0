"""Images streamed from a tree of class folders: decoded and cropped whenever they are needed.

Worker processes decode and crop, the trainer's device does the rest. An image's crops depend on the
seed, the step and the image, and on nothing else.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby, islice, tee
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from imsvd_core.data import sources
from imsvd_core.data.batch import Batch, Device, OrderLike, Plan, groups, members
from imsvd_core.data.sources import OnCorrupt, Root, Split
from imsvd_core.data.streamed import StreamedImages
from imsvd_core.views import CROP_DRAWS, EvalView, View, Views

PART = 64  # images that a worker hands over at a time, some 20 MB of 224-pixel crops
_warn_once = cache(logging.getLogger(__name__).warning)

CHUNK = 8  # decoded images that a worker holds at a time: their crops are drawn together


@dataclass(frozen=True, eq=False)
class FolderImages(StreamedImages):
    """One split of a tree ROOT/{train,val or test}/<class>/<image>, as names; no pixels yet.

    A name costs as many bytes as the longest below its class folder, and eight for its label:
    ImageNet's 1,281,167 some 40 MB.
    """

    columns: ClassVar = ("names", "labels")

    names: np.ndarray = field(repr=False)  # (N,) bytes: file names below the class folders
    labels: Tensor = field(repr=False)  # int64 (N,), indices into `classes`; -1 without any
    classes: tuple[str, ...] = field(repr=False)

    def file(self, index: int) -> Path:
        folder = self.classes[self.labels[index]] if self.classes else ""
        return self.home / folder / os.fsdecode(self.names[index])

    def strata(self) -> Tensor:
        return self.labels.clamp(min=0)

    def identity(self) -> list[Tensor]:
        """Names, contents and labels: a fingerprint of these images is made of them."""
        files = bytearray(self.names.tobytes() + self.contents())
        return [torch.frombuffer(files, dtype=torch.uint8), self.labels]

    def views(
        self,
        order: OrderLike,
        views: Views | View,
        *,
        device: Device = "cpu",
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
        plan, pieces = tee(order)
        crops = self.crops(views, plan, seed=order.seed, workers=workers, device=device)
        with closing(crops):
            for step, pieces_of_step in groupby(pieces, itemgetter(0)):
                generator = order.generator(step, device)
                for (_, indices), tables in zip(pieces_of_step, crops, strict=False):
                    pairs = zip(members(views), tables, strict=True)
                    finished = tuple(view.finish(table, generator) for view, table in pairs)
                    yield Batch(finished, self.labels[indices].to(device), indices.to(device))

    def crops(
        self,
        views: Views | View,
        plan: Plan,
        *,
        seed: int,
        workers: int | None = None,
        device: Device = "cpu",
    ) -> Generator[tuple[Tensor, ...]]:
        """What the views' `finish` takes: for each entry of the plan, in order, one random crop of
        every image for each view, uint8 (n, 3, size, size); all else as in `views`."""
        plan, pieces = tee(plan)
        parts = ((step, part.tolist()) for step, indices in plan for part in indices.split(PART))
        read = partial(self._read_crops, members(views), seed)
        size = PART * sum(3 * view.config.size**2 for view in members(views))
        with closing(self.stream(read, parts, workers, device, size)) as tables:
            for _, indices in pieces:
                by_view = zip(*islice(tables, math.ceil(len(indices) / PART)), strict=True)
                yield tuple(map(torch.cat, by_view))

    def in_order(
        self,
        view: EvalView,
        rows: Sequence[int] | None = None,
        *,
        device: Device = "cpu",
        batch_size: int = 500,
        workers: int | None = None,
    ) -> Generator[Tensor]:
        """The images `rows` (by default all) through `view`: float32 (n, 3, size, size).

        Streamed images come 64 at a time, whatever `batch_size` says; all else as in `views`.
        """
        rows = range(len(self)) if rows is None else rows
        read = partial(self._read_centers, view)
        with closing(self.stream(read, groups(rows, PART), workers, device)) as tables:
            for (crops,) in tables:
                yield view.finish(crops)

    def _read_centers(self, view: EvalView, part: Sequence[int]) -> tuple[Tensor, list[int]]:
        unreadable: list[int] = []
        crops = [view.crop(image) for image in self._images(part, unreadable)]
        return torch.stack(crops), unreadable

    def _read_crops(self, views: tuple[View, ...], seed: int, part: tuple[int, list[int]]) -> tuple:
        """The part's crops by each view, uint8 (n, 3, size, size), then the unreadable files."""
        step, indices = part
        shapes = [(len(indices), view.config.size, view.config.size, 3) for view in views]
        # Rows of pixels, as a decoder's.
        crops = [torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2) for shape in shapes]
        unreadable: list[int] = []
        for start in range(0, len(indices), CHUNK):
            chunk = indices[start : start + CHUNK]
            images = self._images(chunk, unreadable)
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

    def _images(self, indices: Sequence[int], unreadable: list[int]) -> list[Tensor]:
        return [image for _, image in self.readable(self.decode, indices, unreadable)]


def open_folder(
    name: str,
    split: Split = "train",
    root: Root = None,
    *,
    on_corrupt: OnCorrupt = "error",
) -> FolderImages:
    """One split of `folder:PATH` or `tree:PATH`, PATH absolute or below the data root, streamed.

    Opens no image; says once what is passed over. Images in no class folder have no labels, if
    there are no others. Raises ValueError or FileNotFoundError, with what is expected, where PATH
    has no such split.
    """
    folder = sources.find_root(name, ("tree:", "folder:"), split, on_corrupt, root)
    home, classes = sources.find_split(folder, split)
    places = [home / name for name in classes] or [home]
    entries = [list(sources.walk(place)) if place.is_dir() else [] for place in places]
    files = [[file for file, reason in group if not reason] for group in entries]
    passed = Counter(reason for group in entries for _, reason in group if reason)
    if classes:
        others = set(sources.class_names(home)) - set(classes)
        passed["folders without image"] = len(others)
        passed["classes without image"] = files.count([])
        loose = (path.name for path in home.iterdir() if path.is_file())
        passed["images in no class folder"] = sum(map(sources.is_image, loose))
    passed_over = tuple((+passed).items())
    told = [f"{reason} {count:,}" for reason, count in passed_over]
    if not classes:
        told.append("labels: its images are in no class folder")
    if told:
        _warn_once("%s (%d classes): passed over: %s", home, len(classes), ", ".join(told))
    names = np.array([os.fsencode(file) for group in files for file in group])
    counts = torch.tensor(list(map(len, files)))
    labels = torch.arange(len(files)).repeat_interleave(counts)
    return FolderImages(
        name,
        folder.name,
        split,
        home,
        names,
        labels if classes else labels - 1,
        classes,
        on_corrupt=on_corrupt,
        passed_over=passed_over,
        replaced=True,
    )
