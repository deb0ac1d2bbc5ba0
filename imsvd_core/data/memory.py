"""Images in memory as uint8: CIFAR-10 and its kin, folders of images, and `attributes`, which needs
no file.

`load("auto")` takes CIFAR-10 where it can be had and `attributes` where it cannot. `IMSVD_DATA` is
the data root, `IMSVD_DATASET` says what `auto` shall mean.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from imsvd_core.data import attributes
from imsvd_core.data.batch import Batch, OrderLike, members
from imsvd_core.data.download import get
from imsvd_core.data.sources import (
    PUBLISHED,
    TITLES,
    OnCorrupt,
    Split,
    check_choices,
    find,
    find_folder,
    find_images,
    find_split,
    known_name,
    layout,
    resolve,
    root_of,
    scan,
    title_of,
)
from imsvd_core.views import EvalView, View, Views

ATTRIBUTES_SIZES = {"train": 20_000, "test": 4_000}

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageData:
    """One split of a data set, in memory. Raises ValueError where shapes or types do not fit
    together."""

    name: str  # what `load` takes: "cifar10", "attributes", ...
    title: str  # what a page prints: "CIFAR-10", "CIFAR-10 (JPEG)", "attributes (drawn)", ...
    split: str  # "train" or "test"
    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,), indices into `classes`
    classes: tuple[str, ...]
    factors: dict[str, Tensor] | None = None  # (N,) each: int64 if named, float32 if continuous
    factor_values: dict[str, tuple[str, ...]] | None = (
        None  # the names behind an int64 factor's numbers
    )
    skipped: int = 0  # unreadable files left out

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            found = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise ValueError(f"images are {found}: give torch.uint8 (N, 3, H, W)")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            found = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise ValueError(
                f"labels are {found}: give torch.int64 ({len(self.images)},), one an image"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, n: int, seed: int = 0) -> ImageData:
        """`n` images drawn at random, as evenly over the classes as these allow, in their present
        order.

        The same `n` and `seed` give the same images. Raises ValueError unless 1 <= n <= len(self).
        """
        rows = balanced(self.labels.cpu(), n, seed, f"{self.title} ({self.split})").to(
            self.labels.device
        )
        factors = self.factors and {name: values[rows] for name, values in self.factors.items()}
        return replace(self, images=self.images[rows], labels=self.labels[rows], factors=factors)

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with every tensor on `device`."""
        factors = self.factors and {
            name: values.to(device) for name, values in self.factors.items()
        }
        return replace(
            self, images=self.images.to(device), labels=self.labels.to(device), factors=factors
        )

    def views(
        self,
        order: OrderLike,
        views: Views | View,
        *,
        device: torch.device | str = "cpu",
        workers: int | None = None,
    ) -> Iterator[Batch]:
        """The batches of a training: for each piece of the order, its images seen through `views`.

        Images are kept on `device`. All draws of a step come from one generator, the order's, piece
        after piece. Images in memory need no `workers`.
        """
        images, labels = self.images.to(device), self.labels.to(device)
        current, generator = None, None
        for step, indices in order:
            if step != current:
                current, generator = step, order.generator(step, device)
            rows = indices.to(device)
            batch = images[rows]
            drawn = tuple(view(batch, generator) for view in members(views))
            yield Batch(drawn, labels[rows], rows)

    def in_order(
        self,
        view: EvalView,
        rows: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 500,
        workers: int | None = None,
    ) -> Iterator[Tensor]:
        """The images `rows` (by default all) as `view` shows them, on `device`: `batch_size` at a
        time.

        Yields float32 (n, 3, size, size), normalised. Images in memory need no `workers`.
        """
        rows = range(len(self)) if rows is None else rows
        for start in range(0, len(rows), batch_size):
            part = torch.as_tensor(rows[start : start + batch_size])
            yield view(self.images[part.to(self.images.device)].to(device))

    def identity(self) -> list[Tensor]:
        """What a fingerprint of these images is made of: their pixels and labels."""
        return [self.images, self.labels]


def balanced(labels: Tensor, n: int, seed: int, whose: str) -> Tensor:
    """Sorted indices (n,) of images drawn at random, as evenly over the classes as `labels` (N,)
    allow.

    Raises ValueError, naming `whose` labels they are, unless 1 <= n <= N.
    """
    if not 1 <= n <= len(labels):
        raise ValueError(f"n is {n}: take 1 to {len(labels)}, as many as {whose} holds")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labels = labels[order]
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    turn = torch.empty_like(labels)  # an image's rank within its class
    turn[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return order[turn.argsort(stable=True)[:n]].sort().values


def load(
    name: str = "auto",
    split: Split = "train",
    *,
    root: Path | str | None = None,
    seed: int = 0,
    on_corrupt: OnCorrupt = "error",
    size: int | None = None,
    progress: bool = False,
) -> ImageData:
    """Load one split of a data set into memory.

    Args:
        name: `auto`, `cifar10`, `cifar100`, `fashion-mnist` (grey repeated in three channels,
            padded to 32), `attributes`, or `folder:PATH` for a tree PATH/{train,test or
            val}/<class>/*.{png,jpg}, PATH being absolute or under the data root. The named
            photographs are taken from torchvision's layout or from such a tree ROOT/NAME, and
            downloaded (checksum verified) where neither is there.
        root: the data root; `data_root()` by default.
        seed: of `attributes`; train and test differ under every seed.
        on_corrupt: whether an unreadable image file is an error that names it, or skipped and
            counted.
        size: the shorter side is resized to it and the centre cropped; images of unequal sizes need
            it.
        progress: show a bar while files are decoded.

    Raises ValueError for an argument or a tree that cannot be used, naming an unreadable file, and
    FileNotFoundError, with the remedy, for data that are not there and cannot be downloaded.
    """
    check_choices(split, on_corrupt)
    if size is not None and size < 1:
        raise ValueError(
            f"size is {size}: give a number of pixels, or None to keep the images' own"
        )
    root = root_of(root)
    name = resolve(name, root)
    if name == "attributes":
        return _draw(split, seed, 32 if size is None else size)
    if name.startswith("folder:"):
        folder = find_folder(name, root)
        return _read_tree(folder, name, folder.name, split, on_corrupt, size, progress)
    place = find(name, root)
    if place is None:
        get(name, root)
        place = find(name, root)
    assert place is not None
    if place.tree:
        return _read_tree(
            place.folder, name, title_of(name, place), split, on_corrupt, size, progress
        )
    return _read_published(place.folder, name, split, size)


def manifest(name: str = "auto", root: Path | str | None = None) -> str:
    """A short identity of the data found now: name, number of files, hash of their names and sizes.

    It is quick (it opens no file), stable from machine to machine, and downloads and prints
    nothing.
    """
    root = root_of(root)
    name = known_name(name, root)
    if name == "attributes":
        return f"attributes {ATTRIBUTES_SIZES['train']}+{ATTRIBUTES_SIZES['test']}"
    place = find(name, root, check=False)
    if place is None:
        return f"{name} absent"
    if place.tree:
        files = [(file, entry.stat().st_size) for file, entry in scan(place.folder)]
    else:
        files = [(file.as_posix(), (place.folder / file).stat().st_size) for file in layout(name)]
    return f"{name} {len(files)} files {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


# --- reading
# ------------------------------------------------------------------------------------------------


def _draw(split: Split, seed: int, size: int) -> ImageData:
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    factors = attributes.sample(ATTRIBUTES_SIZES[split], generator)
    images = attributes.draw(factors, size=size, noise=generator)
    return ImageData(
        "attributes",
        TITLES["attributes"],
        split,
        images,
        attributes.label(factors),
        attributes.CLASSES,
        factors,
        dict(attributes.FACTORS),
    )


def _read_published(folder: Path, name: str, split: Split, size: int | None) -> ImageData:
    try:
        data = PUBLISHED[name](folder, train=split == "train")
    except Exception as error:
        damaged = folder / layout(name)[0].parent
        raise ValueError(
            f"{damaged} cannot be read ({error}): remove it to download it again"
        ) from error
    images = torch.as_tensor(data.data)
    if name == "fashion-mnist":
        images = torch.nn.functional.pad(images, (2, 2, 2, 2)).unsqueeze(1).expand(-1, 3, -1, -1)
    else:
        images = images.permute(0, 3, 1, 2)
    return ImageData(
        name,
        TITLES[name],
        split,
        _resize(images.contiguous(), size),
        torch.as_tensor(data.targets),
        tuple(data.classes),
    )


def _read_tree(
    folder: Path,
    name: str,
    title: str,
    split: Split,
    on_corrupt: OnCorrupt,
    size: int | None,
    progress: bool,
) -> ImageData:
    home, classes = find_split(folder, split)
    files, labels = [], []
    for label, name_of_class in enumerate(classes):
        members = [str(home / name_of_class / file) for file in find_images(home, name_of_class)]
        files += members
        labels += [label] * len(members)
    images = _decode_all(files, size, skip=on_corrupt == "skip", progress=progress)
    kept = [i for i, image in enumerate(images) if image is not None]
    if not kept:
        raise ValueError(f"{home} holds no image that can be read, of {len(files)} files")
    if len(kept) < len(files):
        first = next(file for file, image in zip(files, images, strict=True) if image is None)
        log.warning("skipped %d unreadable images, first %s", len(files) - len(kept), first)
    shapes = {tuple(images[i].shape[1:]): files[i] for i in reversed(kept)}
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise ValueError(
            f"images differ in size, {one} in {first} and {other} in {second}: stream them "
            "(tree:PATH), or give size=, to which all are resized and cropped"
        )
    return ImageData(
        name,
        title,
        split,
        torch.stack([images[i] for i in kept]).contiguous(),
        torch.tensor(labels)[kept],
        classes,
        skipped=len(files) - len(kept),
    )


def _decode_all(
    files: list[str], size: int | None, skip: bool, progress: bool
) -> list[Tensor | None]:
    """All `files` decoded, None for an unreadable one where `skip` allows it.

    A thread takes many files at a time: one by one, small images cost more to hand over than to
    decode.
    """

    def decode_some(some: list[str]) -> list[Tensor | None]:
        images: list[Tensor | None] = []
        for file in some:
            try:
                images.append(_resize(decode(file), size))
            except ValueError:
                if not skip:
                    raise
                images.append(None)
        return images

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        Progress(disable=not progress, transient=True) as bars,
    ):
        starts = range(0, len(files), 64)
        parts = pool.map(decode_some, (files[i : i + 64] for i in starts))
        return [
            image
            for part in bars.track(parts, total=len(starts), description="decoding")
            for image in part
        ]


def decode(file: str) -> Tensor:
    """One image file, uint8 (3, H, W); raises ValueError, naming it, if it is broken or not of 8
    bits."""
    try:
        with open_image(io.BytesIO(Path(file).read_bytes())) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"mode {picture.mode}: more than 8 bits a channel")
            rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        raise ValueError(
            f"{file} cannot be read as an 8-bit image ({type(error).__name__}): replace or "
            "remove it, or pass --on-corrupt skip (in Python on_corrupt='skip')"
        ) from error


def open_image(content: BinaryIO) -> Image.Image:
    """A JPEG or PNG of which only the header is read; ValueError if that claims more pixels than
    Pillow thinks sane.

    Who believed a spoilt header would set gigabytes aside for a file of some bytes.
    """
    picture = Image.open(content, formats=("JPEG", "PNG"))
    if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"it claims {picture.width} x {picture.height} pixels")
    return picture


def _resize(images: Tensor, size: int | None) -> Tensor:
    """The shorter side to `size`, then the centre: (..., H, W) → (..., size, size); untouched for
    None."""
    if size is None or tuple(images.shape[-2:]) == (size, size):
        return images
    return TF.center_crop(TF.resize(images, [size], antialias=True), [size, size])
