"""Images in memory as uint8: CIFAR-10 and its kin, trees of images, and the drawn `attributes`."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from imsvd_core.data import attributes, sources
from imsvd_core.data.batch import Batch, Device, OrderLike, balanced, groups, members
from imsvd_core.data.download import get
from imsvd_core.data.sources import PUBLISHED, TITLES, OnCorrupt, Root, Split
from imsvd_core.data.tree import FolderImages, open_folder
from imsvd_core.data.workers import in_threads
from imsvd_core.views import EvalView, View, Views

ATTRIBUTES_SIZES = {"train": 20_000, "test": 4_000}


@dataclass(frozen=True, eq=False)
class ImageData:
    """One split of a data set, in memory.

    Raises ValueError where shapes or types do not fit together.
    """

    name: str  # what `load` takes: "cifar10", "attributes", ...
    title: str  # what a page prints: "CIFAR-10", "CIFAR-10 (JPEG)", "attributes (drawn)", ...
    split: str  # "train" or "test"
    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,), indices into `classes`; -1 without any
    classes: tuple[str, ...]
    #: (N,) each: int64 for those of `attributes.FACTORS`, float32 if continuous
    factors: dict[str, Tensor] | None = None
    home: Path | None = None  # holds the images, if they have files of their own
    skipped: int = 0  # unreadable files left out
    #: what the data set holds beside these images and does not use: (reason, how often)
    passed_over: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            kind = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images are {kind}: give torch.uint8 (N, 3, H, W)")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            kind = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"labels are {kind}: give torch.int64 ({len(images)},), one an image")

    @property
    def part(self) -> str:
        """What the data set itself calls this split."""
        return self.home.name if self.home else self.split

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, n: int, seed: int = 0) -> Self:
        """`n` images drawn at random, as evenly over the classes as these allow, in their order.

        The same `n` and `seed` give the same images. Raises ValueError unless 1 <= n <= len(self).
        """
        rows = balanced(self.labels.cpu().clamp(min=0), n, seed, f"{self.title} ({self.split})")
        return self._each(lambda values: values[rows.to(values.device)])

    def to(self, device: Device) -> Self:
        """The same data with every tensor on `device`."""
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        images, labels = change(self.images), change(self.labels)
        factors = self.factors and {name: change(part) for name, part in self.factors.items()}
        return replace(self, images=images, labels=labels, factors=factors)

    def identity(self) -> list[Tensor]:
        """Pixels and labels: a fingerprint of these images is made of them."""
        return [self.images, self.labels]

    def views(
        self,
        order: OrderLike,
        views: Views | View,
        *,
        device: Device = "cpu",
        workers: int | None = None,
    ) -> Generator[Batch]:
        """The batches of a training: for each piece of the order, its images seen through `views`.

        Images are kept on `device`. All draws of a step come from one generator, the order's, piece
        after piece. Images in memory need no `workers`.
        """
        data = self.to(device)
        for step, pieces in groupby(order, itemgetter(0)):
            generator = order.generator(step, device)
            for _, indices in pieces:
                rows = indices.to(device)
                images = data.images[rows]
                drawn = tuple(view(images, generator) for view in members(views))
                yield Batch(drawn, data.labels[rows], rows)

    def in_order(
        self,
        view: EvalView,
        rows: Sequence[int] | None = None,
        *,
        device: Device = "cpu",
        batch_size: int = 500,
    ) -> Generator[Tensor]:
        """The images `rows` (by default all) through `view`, on `device`, `batch_size` at a time.

        Yields float32 (n, 3, size, size), normalised.
        """
        rows = range(len(self)) if rows is None else rows
        for group in groups(rows, batch_size):
            part = torch.as_tensor(group, device=self.images.device)
            yield view(self.images[part].to(device))


def load(
    name: str = "auto",
    split: Split = "train",
    *,
    root: Root = None,
    on_corrupt: OnCorrupt = "error",
    progress: bool = False,
) -> ImageData:
    """Load one split of a data set into memory.

    Args:
        name: `auto`, `cifar10`, `cifar100`, `fashion-mnist` (gray repeated in three channels,
            padded to 32), `attributes`, or `folder:PATH` for a tree PATH/{train,test or
            val}/<class>/<image>, PATH being absolute or under the data root. The published
            photographs are taken from torchvision's layout or from such a tree ROOT/NAME; by their
            own name they are downloaded where neither is there, by `auto` they are not.
        root: the data root; `data_root()` by default.
        on_corrupt: whether an unreadable image file is an error that names it, or is skipped and
            counted.
        progress: show a bar while files are decoded.

    Raises ValueError for an argument or a tree that cannot be used, naming an unreadable file, and
    FileNotFoundError, with the remedy, for data that are not there and cannot be downloaded.
    """
    sources.check_choices(split, on_corrupt)
    name = sources.resolve(name, root)
    if name == "attributes":
        return _draw(split)
    place = get(name, root)
    if not place.tree:
        return _read_published(place.folder, name, split)
    tree = open_folder(f"folder:{place.folder.absolute()}", split, on_corrupt=on_corrupt)
    title = sources.title(name, root)
    return _read_tree(replace(tree, name=name, title=title, replaced=False), progress)


def manifest(name: str = "auto", root: Root = None) -> str:
    """A short identity of the data at hand: name, number of files, hash of their names and sizes.

    It is quick (it decodes no image), stable from machine to machine, and prints nothing.
    """
    name = sources.resolve(name, root, quiet=True)
    if name == "attributes":
        return f"attributes {ATTRIBUTES_SIZES['train']}+{ATTRIBUTES_SIZES['test']}"
    place = sources.find(name, root)
    if place is None:
        return f"{name} absent"
    names = sources.scan(place.folder) if place.tree else map(str, sources.layout(name))
    files = [(file, (place.folder / file).stat().st_size) for file in names]
    return f"{name} {len(files)} files {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


def _draw(split: Split) -> ImageData:
    generator = torch.Generator().manual_seed(("train", "test").index(split))
    factors = attributes.sample(ATTRIBUTES_SIZES[split], generator)
    return ImageData(
        "attributes",
        TITLES["attributes"],
        split,
        attributes.draw(factors, noise=generator),
        attributes.label(factors),
        attributes.CLASSES,
        factors,
    )


def _read_published(folder: Path, name: str, split: Split) -> ImageData:
    try:
        data = PUBLISHED[name](folder, train=split == "train")
    except Exception as error:
        raise ValueError(
            f"{name} in {folder} cannot be read ({error}): remove it to download it again"
        ) from error
    images = torch.as_tensor(data.data)
    if name == "fashion-mnist":
        images = torch.nn.functional.pad(images, (2, 2, 2, 2)).unsqueeze(1).expand(-1, 3, -1, -1)
    else:
        images = images.permute(0, 3, 1, 2)
    labels, classes = torch.as_tensor(data.targets), tuple(data.classes)
    return ImageData(name, TITLES[name], split, images.contiguous(), labels, classes)


def _read_tree(tree: FolderImages, progress: bool) -> ImageData:
    unreadable: list[int] = []

    def read(row: int) -> list[tuple[int, Tensor]]:
        return list(tree.readable(tree.decode, [row], unreadable))

    parts = in_threads(read, range(len(tree)), "decoding", progress=progress)
    images = dict(chain.from_iterable(parts))
    tree.note(unreadable)
    if not images:
        raise ValueError(f"{tree.home} holds no image that can be read, of {len(tree)} files")
    shapes = {tuple(image.shape[1:]): tree.file(row) for row, image in images.items()}
    if len(shapes) > 1:
        examples = " and ".join([f"{shape} in {file}" for shape, file in shapes.items()][:2])
        raise ValueError(f"images differ in size, {examples}: stream them (tree:PATH)")
    return ImageData(
        tree.name,
        tree.title,
        tree.split,
        torch.stack([*images.values()]),
        tree.labels[[*images]],
        tree.classes,
        home=tree.home,
        skipped=len(unreadable),
        passed_over=tree.passed_over,
    )
