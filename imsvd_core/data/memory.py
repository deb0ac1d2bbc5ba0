"""Images in memory as uint8: CIFAR-10 and its kin, trees of images, and the drawn `attributes`."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from imsvd_core.data import attributes, sources
from imsvd_core.data.batch import Batch, OrderLike, balanced, members
from imsvd_core.data.decoding import decode
from imsvd_core.data.download import get
from imsvd_core.data.sources import PUBLISHED, TITLES, OnCorrupt, Split
from imsvd_core.data.tree import open_folder
from imsvd_core.system.progress import bar
from imsvd_core.views import EvalView, View, Views

ATTRIBUTES_SIZES = {"train": 20_000, "test": 4_000}
GROUP = 64  # files that a thread decodes at a time: small ones cost more to hand over than to read

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageData:
    """One split of a data set, in memory.

    Raises ValueError where shapes or types do not fit together.
    """

    name: str  # what `load` takes: "cifar10", "attributes", ...
    title: str  # what a page prints: "CIFAR-10", "CIFAR-10 (JPEG)", "attributes (drawn)", ...
    split: str  # "train" or "test"
    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,), indices into `classes`
    classes: tuple[str, ...]
    factors: dict[str, Tensor] | None = None  # (N,) each: int64 if named, float32 if continuous
    # The names behind an int64 factor's numbers.
    factor_values: dict[str, tuple[str, ...]] | None = None
    skipped: int = 0  # unreadable files left out

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            kind = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images are {kind}: give torch.uint8 (N, 3, H, W)")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            kind = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"labels are {kind}: give torch.int64 ({len(images)},), one an image")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, n: int, seed: int = 0) -> ImageData:
        """`n` images drawn at random, as evenly over the classes as these allow, in their order.

        The same `n` and `seed` give the same images. Raises ValueError unless 1 <= n <= len(self).
        """
        rows = balanced(self.labels.cpu(), n, seed, f"{self.title} ({self.split})")
        rows = rows.to(self.labels.device)
        factors = self.factors and {name: values[rows] for name, values in self.factors.items()}
        return replace(self, images=self.images[rows], labels=self.labels[rows], factors=factors)

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with every tensor on `device`."""
        images, labels = self.images.to(device), self.labels.to(device)
        factors = self.factors and {key: part.to(device) for key, part in self.factors.items()}
        return replace(self, images=images, labels=labels, factors=factors)

    def identity(self) -> list[Tensor]:
        """Pixels and labels: a fingerprint of these images is made of them."""
        return [self.images, self.labels]

    def views(
        self,
        order: OrderLike,
        views: Views | View,
        *,
        device: torch.device | str = "cpu",
        workers: int | None = None,
    ) -> Generator[Batch]:
        """The batches of a training: for each piece of the order, its images seen through `views`.

        Images are kept on `device`. All draws of a step come from one generator, the order's, piece
        after piece. Images in memory need no `workers`.
        """
        images, labels = self.images.to(device), self.labels.to(device)
        current, generator = -1, torch.Generator(device)
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
    ) -> Generator[Tensor]:
        """The images `rows` (by default all) through `view`, on `device`, `batch_size` at a time.

        Yields float32 (n, 3, size, size), normalised. Images in memory need no `workers`.
        """
        rows = range(len(self)) if rows is None else rows
        for start in range(0, len(rows), batch_size):
            part = torch.as_tensor(rows[start : start + batch_size])
            yield view(self.images[part.to(self.images.device)].to(device))


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
        name: `auto`, `cifar10`, `cifar100`, `fashion-mnist` (gray repeated in three channels,
            padded to 32), `attributes`, or `folder:PATH` for a tree PATH/{train,test or
            val}/<class>/*.{png,jpg}, PATH being absolute or under the data root. The published
            photographs are taken from torchvision's layout or from such a tree ROOT/NAME; by their
            own name they are downloaded where neither is there, by `auto` they are not.
        root: the data root; `data_root()` by default.
        seed: of `attributes`; train and test differ under every seed.
        on_corrupt: whether an unreadable image file is an error that names it, or is skipped and
            counted.
        size: the shorter side is resized to it and the centre cropped; images of unequal sizes need
            it.
        progress: show a bar while files are decoded.

    Raises ValueError for an argument or a tree that cannot be used, naming an unreadable file, and
    FileNotFoundError, with the remedy, for data that are not there and cannot be downloaded.
    """
    sources.check_choices(split, on_corrupt)
    if size is not None and size < 1:
        raise ValueError(
            f"size is {size}: give a number of pixels, or None to keep the images' own"
        )
    name = sources.resolve(name, root)
    if name == "attributes":
        return _draw(split, seed, 32 if size is None else size)
    if name.startswith("folder:"):
        place = sources.Place(sources.find_folder(name, root), tree=True)
        title = place.folder.name
    else:
        place = get(name, root)
        title = sources.title_of(name, place)
    if not place.tree:
        return _read_published(place.folder, name, split, size)
    return replace(
        _read_tree(place.folder, split, on_corrupt, size, progress), name=name, title=title
    )


def manifest(name: str = "auto", root: Path | str | None = None) -> str:
    """A short identity of the data at hand: name, number of files, hash of their names and sizes.

    It is quick (it opens no file), stable from machine to machine, and prints nothing.
    """
    root = sources.data_root(root)
    name = sources.resolve(name, root, quiet=True)
    if name == "attributes":
        return f"attributes {ATTRIBUTES_SIZES['train']}+{ATTRIBUTES_SIZES['test']}"
    place = sources.find(name, root, verify=False)
    if place is None:
        return f"{name} absent"
    if place.tree:
        files = [(file, entry.stat().st_size) for file, entry in sources.scan(place.folder)]
    else:
        files = [
            (file.as_posix(), (place.folder / file).stat().st_size) for file in sources.layout(name)
        ]
    return f"{name} {len(files)} files {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


def _draw(split: Split, seed: int, size: int) -> ImageData:
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    factors = attributes.sample(ATTRIBUTES_SIZES[split], generator)
    return ImageData(
        "attributes",
        TITLES["attributes"],
        split,
        attributes.draw(factors, size=size, noise=generator),
        attributes.label(factors),
        attributes.CLASSES,
        factors,
        dict(attributes.FACTORS),
    )


def _read_published(folder: Path, name: str, split: Split, size: int | None) -> ImageData:
    try:
        data = PUBLISHED[name](folder, train=split == "train")
    except Exception as error:
        damaged = folder / sources.layout(name)[0].parent
        raise ValueError(
            f"{damaged} cannot be read ({error}): remove it to download it again"
        ) from error
    images = torch.as_tensor(data.data)
    if name == "fashion-mnist":
        images = torch.nn.functional.pad(images, (2, 2, 2, 2)).unsqueeze(1).expand(-1, 3, -1, -1)
    else:
        images = images.permute(0, 3, 1, 2)
    images, labels = _resize(images.contiguous(), size), torch.as_tensor(data.targets)
    return ImageData(name, TITLES[name], split, images, labels, tuple(data.classes))


def _read_tree(
    folder: Path, split: Split, on_corrupt: OnCorrupt, size: int | None, progress: bool
) -> ImageData:
    tree = open_folder(f"folder:{folder.absolute()}", split, on_corrupt=on_corrupt)
    files = [str(tree.file(index)) for index in range(len(tree))]
    images = _decode_all(files, size, skip=on_corrupt == "skip", progress=progress)
    rows = [row for row, image in enumerate(images) if image is not None]
    readable = [image for image in images if image is not None]
    skipped = len(files) - len(readable)
    if not readable:
        raise ValueError(f"{tree.home} holds no image that can be read, of {len(files)} files")
    if skipped:
        first = next(file for file, image in zip(files, images, strict=True) if image is None)
        log.warning("skipped %d unreadable images, first %s", skipped, first)
    shapes = {
        tuple(image.shape[1:]): files[row]
        for row, image in zip(reversed(rows), reversed(readable), strict=True)
    }
    if len(shapes) > 1:
        (shape, file), (other_shape, other_file) = list(shapes.items())[:2]
        raise ValueError(
            f"images differ in size, {shape} in {file} and {other_shape} in {other_file}: stream "
            "them (tree:PATH), or give size=, to which all are resized and cropped"
        )
    pixels, labels = torch.stack(readable), tree.labels[rows]
    return ImageData(
        tree.name, tree.title, split, pixels.contiguous(), labels, tree.classes, skipped=skipped
    )


def _decode_all(
    files: list[str], size: int | None, skip: bool, progress: bool
) -> list[Tensor | None]:
    """All `files` decoded, None for an unreadable one where `skip` allows it."""

    def read(file: str) -> Tensor | None:
        try:
            return _resize(decode(file), size)
        except ValueError:
            if not skip:
                raise
            return None

    def read_group(start: int) -> list[Tensor | None]:
        return [read(file) for file in files[start : start + GROUP]]

    images: list[Tensor | None] = []
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        bar("decoding", len(files), progress) as advance,
    ):
        for group in pool.map(read_group, range(0, len(files), GROUP)):
            images += group
            advance(len(group))
    return images


def _resize(images: Tensor, size: int | None) -> Tensor:
    """The shorter side to `size`, then the centre: (..., H, W) → (..., size, size); untouched for
    None.
    """
    if size is None or tuple(images.shape[-2:]) == (size, size):
        return images
    return TF.center_crop(TF.resize(images, [size], antialias=True), [size, size])
