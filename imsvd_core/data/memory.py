"""Images in memory as uint8: CIFAR-10 and its kin, folders of images, and `attributes`, which needs no file.

`load("auto")` takes CIFAR-10 where it can be had and `attributes` where it cannot. `IMSVD_DATA` is the data
root, `IMSVD_DATASET` says what `auto` shall mean.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import queue
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2 import functional as TF

from imsvd_core.data import attributes
from imsvd_core.data.batch import Batch, OrderLike, members
from imsvd_core.views import EvalView, TwoViews, View

Split = Literal["train", "test"]
OnCorrupt = Literal["error", "skip"]

TITLES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "fashion-mnist": "Fashion-MNIST",
    "attributes": "attributes (drawn)",
}
PUBLISHED = {"cifar10": CIFAR10, "cifar100": CIFAR100, "fashion-mnist": FashionMNIST}
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
SUFFIXES = (".png", ".jpg", ".jpeg")
ATTRIBUTES_SIZES = {"train": 20_000, "test": 4_000}
PROBE_SECONDS = (
    5.0  # for the first byte of a download; silent for longer, a host counts as out of reach
)
STALL_SECONDS = 10.0  # of silence end a download that had begun
REMEMBERED_SECONDS = 600.0  # a failed download is not tried again for `auto` before that

log = logging.getLogger(__name__)
_told = False  # whether this process has said that `auto` fell back
_failed: dict[Path, str] = {}  # why CIFAR-10 could not be downloaded to a root, in this process


@dataclass(frozen=True, eq=False)
class ImageData:
    """One split of a data set, in memory. Raises ValueError where shapes or types do not fit together."""

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
        """`n` images drawn at random, as evenly over the classes as these allow, in their present order.

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
        views: TwoViews | View,
        *,
        device: torch.device | str = "cpu",
        workers: int | None = None,
    ) -> Iterator[Batch]:
        """The batches of a training: for each piece of the order, its images seen through `views`.

        Images are kept on `device`. All draws of a step come from one generator, the order's, piece after piece.
        Images in memory need no `workers`.
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
        """The images `rows` (by default all) as `view` shows them, on `device`: `batch_size` at a time.

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
    """Sorted indices (n,) of images drawn at random, as evenly over the classes as `labels` (N,) allow.

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


def data_root() -> Path:
    """Where data sets are looked for and downloaded to: `IMSVD_DATA`, or ~/.cache/imsvd."""
    return Path(os.environ.get("IMSVD_DATA") or "~/.cache/imsvd").expanduser()


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
        name: `auto`, `cifar10`, `cifar100`, `fashion-mnist` (grey repeated in three channels, padded to 32),
            `attributes`, or `folder:PATH` for a tree PATH/{train,test or val}/<class>/*.{png,jpg}, PATH being
            absolute or under the data root. The named photographs are taken from torchvision's layout or from
            such a tree ROOT/NAME, and downloaded (checksum verified) where neither is there.
        root: the data root; `data_root()` by default.
        seed: of `attributes`; train and test differ under every seed.
        on_corrupt: whether an unreadable image file is an error that names it, or skipped and counted.
        size: the shorter side is resized to it and the centre cropped; images of unequal sizes need it.
        progress: show a bar while files are decoded.

    Raises ValueError for an argument or a tree that cannot be used, naming an unreadable file, and
    FileNotFoundError, with the remedy, for data that are not there and cannot be downloaded.
    """
    check_choices(split, on_corrupt)
    if size is not None and size < 1:
        raise ValueError(
            f"size is {size}: give a number of pixels, or None to keep the images' own"
        )
    root = _root(root)
    name = resolve(name, root)
    if name == "attributes":
        return _draw(split, seed, 32 if size is None else size)
    if name.startswith("folder:"):
        folder = find_folder(name, root)
        return _read_tree(folder, name, folder.name, split, on_corrupt, size, progress)
    place = _find(name, root)
    if place is None:
        reason = _download(name, root)
        place = _find(name, root)
        if place is None:
            raise FileNotFoundError(
                f"{TITLES[name]} is not under {root} and could not be downloaded ({reason}). Put "
                f"torchvision's {_layout(name)[0].parent} there, or images as "
                f"{root / name}/{{train,test}}/<class>/*.png or *.jpg; IMSVD_DATA names another data root, "
                "and the data set 'attributes' needs no files"
            )
    if place.tree:
        return _read_tree(
            place.folder, name, _title(name, place), split, on_corrupt, size, progress
        )
    return _read_published(place.folder, name, split, size)


def resolve(name: str = "auto", root: Path | str | None = None) -> str:
    """The data set that `name` stands for here and now.

    `auto` is `IMSVD_DATASET` if that is set; else `cifar10` if it is under the root or can be downloaded;
    else `attributes`, which one printed line says, once a process. An attempt to download gives up within ten
    seconds where there is no network, and is not repeated within ten minutes. Raises ValueError for an
    unknown name.
    """
    if name == "auto":
        name = os.environ.get("IMSVD_DATASET") or "auto"
    if name in TITLES or name.startswith("folder:"):
        return name
    if name != "auto":
        raise ValueError(
            f"data set {name!r} is unknown: choose auto, {', '.join(TITLES)}, folder:PATH or, streamed, tree:PATH"
        )
    root = _root(root)
    if _find("cifar10", root):
        return "cifar10"
    reason = _failed_before(root) or _download("cifar10", root)
    if reason is None:
        return "cifar10"
    global _told
    if not _told:
        print(
            f"Data set: {TITLES['attributes']}. CIFAR-10 is not under {root} and could not be downloaded "
            f"({reason}).",
            flush=True,
        )
        _told = True
    return "attributes"


def title(name: str = "auto", root: Path | str | None = None) -> str:
    """What a page prints for the data found now, such as "CIFAR-10 (JPEG)"; downloads and prints nothing."""
    root = _root(root)
    name = _known(name, root)
    if name.startswith("folder:"):
        return find_folder(name, root).name
    return _title(name, _find(name, root, check=False))


def manifest(name: str = "auto", root: Path | str | None = None) -> str:
    """A short identity of the data found now: name, number of files, hash of their names and sizes.

    It is quick (it opens no file), stable from machine to machine, and downloads and prints nothing.
    """
    root = _root(root)
    name = _known(name, root)
    if name == "attributes":
        return f"attributes {ATTRIBUTES_SIZES['train']}+{ATTRIBUTES_SIZES['test']}"
    place = _find(name, root, check=False)
    if place is None:
        return f"{name} absent"
    if place.tree:
        files = [(file, entry.stat().st_size) for file, entry in scan(place.folder)]
    else:
        files = [(file.as_posix(), (place.folder / file).stat().st_size) for file in _layout(name)]
    return f"{name} {len(files)} files {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


# --- finding ------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    folder: Path
    tree: bool  # of images, {train,test}/<class>/; else what torchvision calls its root


def _root(root: Path | str | None) -> Path:
    return data_root() if root is None else Path(root).expanduser()


def _known(name: str, root: Path) -> str:
    """`resolve` without network and without a word."""
    if name == "auto" and os.environ.get("IMSVD_DATASET", "auto") in ("", "auto"):
        return "cifar10" if _find("cifar10", root, check=False) else "attributes"
    return resolve(name, root)


def check_choices(split: str, on_corrupt: str) -> None:
    """Raise ValueError for a split or a way with unreadable files that does not exist."""
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split is {split!r}: choose 'train' or 'test'")
    if on_corrupt not in ("error", "skip"):
        raise ValueError(f"on_corrupt is {on_corrupt!r}: choose 'error' or 'skip'")


def find_folder(name: str, root: Path) -> Path:
    """The folder that `folder:PATH` or `tree:PATH` names, absolute or below `root`; FileNotFoundError if it is none."""
    path = root / Path(name.partition(":")[2]).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder: {name!r} is an absolute path, or one under {root}; give another --data, "
            "or put it there (`imsvd data check` tells how)"
        )
    return path


def _layout(name: str) -> list[Path]:
    """The files of torchvision's layout, relative to the folder that it calls its root."""
    published = PUBLISHED[name]
    if published is FashionMNIST:
        return [
            Path("FashionMNIST/raw", file.removesuffix(".gz")) for file, _ in published.resources
        ]
    files = [*published.train_list, *published.test_list, [published.meta["filename"]]]
    return [Path(published.base_folder, file[0]) for file in files]


def _find(name: str, root: Path, check: bool = True) -> _Place | None:
    """Where `name` can be read, torchvision's layout first; with `check`, its checksums must be right."""
    if name.startswith("folder:"):
        return _Place(find_folder(name, root), tree=True)
    if name not in PUBLISHED:
        return None
    for folder in (root, root / name):
        with suppress(FileNotFoundError, NotADirectoryError):
            found = [(str(folder / file), (folder / file).stat()) for file in _layout(name)]
            if not check or all(
                _intact(name, path, now.st_size, now.st_mtime_ns) for path, now in found
            ):
                return _Place(folder, tree=False)
    splits = [root / name / folder for folders in SPLIT_FOLDERS.values() for folder in folders]
    return _Place(root / name, tree=True) if any(map(Path.is_dir, splits)) else None


def _title(name: str, place: _Place | None) -> str:
    first = next(scan(place.folder), ("", None))[0] if place and place.tree else ""
    return TITLES[name] + (" (JPEG)" if first.lower().endswith((".jpg", ".jpeg")) else "")


@lru_cache(maxsize=64)
def _intact(name: str, path: str, size: int, modified: int) -> bool:
    """Whether a file of torchvision's layout has its published checksum: half a download is no data set."""
    published = PUBLISHED[name]
    if (
        published is FashionMNIST
    ):  # its checksums are of the compressed files; its reader counts bytes
        return size > 0
    sums = dict(
        [
            *published.train_list,
            *published.test_list,
            (published.meta["filename"], published.meta["md5"]),
        ]
    )
    return check_integrity(path, sums[os.path.basename(path)])


def scan(folder: Path | str, prefix: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    """The image files below `folder`, sorted: name relative to it, and what the folder says of it."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from scan(entry.path, f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(SUFFIXES):
            yield prefix + entry.name, entry


# --- downloading --------------------------------------------------------------------------------------------


def _download(name: str, root: Path) -> str | None:
    """Download `name` to `root` through torchvision, which verifies the checksum; None, or why it failed.

    The files go to `root` only when all are whole: a download cut short leaves nothing to be found.
    """
    published = PUBLISHED[name]
    url = (
        published.mirrors[0] + published.resources[0][0]
        if published is FashionMNIST
        else published.url
    )
    stamp = root / f".{name}-not-downloaded"
    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
            _probe(url)
            print(f"Downloading {TITLES[name]} to {root}", flush=True)
            socket.setdefaulttimeout(STALL_SECONDS)  # torchvision sets none of its own
            published(folder, download=True)
            for file in _layout(name):
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(folder, file), root / file)
    except Exception as error:  # urllib, http, ssl, tarfile and torchvision each have their own
        reason = " ".join(f"{type(error).__name__}: {getattr(error, 'reason', error)}".split())
        with suppress(OSError):
            stamp.write_text(reason, encoding="utf-8")
        if name == "cifar10":
            _failed[root] = reason
        return reason
    finally:
        socket.setdefaulttimeout(timeout)
    stamp.unlink(missing_ok=True)
    _failed.pop(root, None)
    return None


def _failed_before(root: Path) -> str | None:
    """Why CIFAR-10 could not be downloaded to `root`, if this process or another has just found that out."""
    stamp = root / ".cifar10-not-downloaded"
    with suppress(OSError):
        if abs(time.time() - stamp.stat().st_mtime) < REMEMBERED_SECONDS:
            return stamp.read_text(encoding="utf-8")
    return _failed.get(root)


def _probe(url: str) -> None:
    """Ask for the first byte of `url`, through whatever proxy is set; raise what is wrong, in PROBE_SECONDS.

    The name server's patience cannot be set, and a host has several addresses that each time out in turn: so
    one deadline stands over all, and a thread that misses it is left behind.
    """
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=PROBE_SECONDS) as response:
                response.read(1)
        except Exception as error:
            answers.put(error)
        else:
            answers.put(None)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        error = TimeoutError(f"no answer from {url} within {PROBE_SECONDS:g} seconds")
    if error is not None:
        raise error


# --- reading ------------------------------------------------------------------------------------------------


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
        damaged = folder / _layout(name)[0].parent
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


def find_split(folder: Path, split: Split) -> tuple[Path, tuple[str, ...]]:
    """Where one split of a tree is, and its classes, which every split of the tree must have.

    Raises FileNotFoundError or ValueError, saying what a tree looks like, for a folder that is none.
    """
    homes = {}
    for key, options in SPLIT_FOLDERS.items():
        there = [folder / option for option in options if (folder / option).is_dir()]
        homes[key] = next(filter(class_names, there), there[0] if there else None)
    home = homes[split]
    if home is None:
        wanted = " or ".join(str(folder / option) for option in SPLIT_FOLDERS[split])
        raise FileNotFoundError(
            f"split {split!r} is not there: make {wanted}, one folder a class in it"
        )
    classes = class_names(home)
    if not classes:
        raise ValueError(f"{home} holds no class folder: put the images in {home}/<class>/")
    for other in homes.values():
        if other and class_names(other) != classes:
            odd = sorted(set(classes) ^ set(class_names(other)))
            raise ValueError(
                f"{home} and {other} differ in classes ({', '.join(odd[:5])}): give both all"
            )
    return home, classes


def find_images(home: Path, name_of_class: str) -> list[str]:
    """The image files of one class, sorted, relative to its folder; ValueError where there is none."""
    files = [file for file, _ in scan(home / name_of_class)]
    if not files:
        raise ValueError(
            f"{home / name_of_class} holds no {', '.join(SUFFIXES)} file: fill or remove it"
        )
    return files


def class_names(home: Path) -> tuple[str, ...]:
    """The class folders in `home`, sorted."""
    folders = (path.name for path in home.iterdir() if path.is_dir())
    return tuple(sorted(name for name in folders if not name.startswith(".")))


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

    A thread takes many files at a time: one by one, small images cost more to hand over than to decode.
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
    """One image file, uint8 (3, H, W); raises ValueError, naming it, if it is broken or not of 8 bits."""
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
    """A JPEG or PNG of which only the header is read; ValueError if that claims more pixels than Pillow thinks sane.

    Who believed a spoilt header would set gigabytes aside for a file of some bytes.
    """
    picture = Image.open(content, formats=("JPEG", "PNG"))
    if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"it claims {picture.width} x {picture.height} pixels")
    return picture


def _resize(images: Tensor, size: int | None) -> Tensor:
    """The shorter side to `size`, then the centre: (..., H, W) → (..., size, size); untouched for None."""
    if size is None or tuple(images.shape[-2:]) == (size, size):
        return images
    return TF.center_crop(TF.resize(images, [size], antialias=True), [size, size])
