"""Where data sets are: names, layouts on disk, and what is found under the data root.

`IMSVD_DATA` is the data root, `IMSVD_DATASET` says what `auto` shall mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.utils import check_integrity

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


def data_root() -> Path:
    """Where data sets are looked for and downloaded to: `IMSVD_DATA`, or ~/.cache/imsvd."""
    return Path(os.environ.get("IMSVD_DATA") or "~/.cache/imsvd").expanduser()


def resolve(name: str = "auto", root: Path | str | None = None) -> str:
    """The data set that `name` stands for here and now.

    `auto` is `IMSVD_DATASET` if that is set; else `cifar10` if it is under the root; else
    `attributes`, which one printed line says, once a process. Nothing is downloaded. Raises
    ValueError for an unknown name.
    """
    if name == "auto":
        name = os.environ.get("IMSVD_DATASET") or "auto"
    if name in TITLES or name.startswith("folder:"):
        return name
    if name != "auto":
        raise ValueError(
            f"data set {name!r} is unknown: choose auto, {', '.join(TITLES)}, folder:PATH or, "
            "streamed, tree:PATH"
        )
    root = root_of(root)
    if find("cifar10", root):
        return "cifar10"
    say_once(
        f"Data set: {TITLES['attributes']}. CIFAR-10 is not under {root}: "
        "`imsvd data get cifar10` downloads it."
    )
    return "attributes"


@cache
def say_once(message: str) -> None:
    """Print a line, the first time that a process is asked to."""
    print(message, flush=True)


def title(name: str = "auto", root: Path | str | None = None) -> str:
    """What a page prints for the data found now, such as "CIFAR-10 (JPEG)"; downloads and prints
    nothing."""
    root = root_of(root)
    name = known_name(name, root)
    if name.startswith("folder:"):
        return find_folder(name, root).name
    return title_of(name, find(name, root, check=False))


class Place(NamedTuple):
    folder: Path
    tree: bool  # of images, {train,test}/<class>/; else what torchvision calls its root


def root_of(root: Path | str | None) -> Path:
    return data_root() if root is None else Path(root).expanduser()


def known_name(name: str, root: Path) -> str:
    """`resolve` without network and without a word."""
    if name == "auto" and os.environ.get("IMSVD_DATASET", "auto") in ("", "auto"):
        return "cifar10" if find("cifar10", root, check=False) else "attributes"
    return resolve(name, root)


def check_choices(split: str, on_corrupt: str) -> None:
    """Raise ValueError for a split or a way with unreadable files that does not exist."""
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split is {split!r}: choose 'train' or 'test'")
    if on_corrupt not in ("error", "skip"):
        raise ValueError(f"on_corrupt is {on_corrupt!r}: choose 'error' or 'skip'")


def find_folder(name: str, root: Path) -> Path:
    """The folder that `folder:PATH` or `tree:PATH` names, absolute or below `root`;
    FileNotFoundError if it is none."""
    path = root / Path(name.partition(":")[2]).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder: {name!r} is an absolute path, or one under {root}; give "
            f"another --data, "
            "or put it there (`imsvd data check` tells how)"
        )
    return path


def layout(name: str) -> list[Path]:
    """The files of torchvision's layout, relative to the folder that it calls its root."""
    published = PUBLISHED[name]
    if published is FashionMNIST:
        return [
            Path("FashionMNIST/raw", file.removesuffix(".gz")) for file, _ in published.resources
        ]
    files = [*published.train_list, *published.test_list, [published.meta["filename"]]]
    return [Path(published.base_folder, file[0]) for file in files]


def find(name: str, root: Path, check: bool = True) -> Place | None:
    """Where `name` can be read, torchvision's layout first; with `check`, its checksums must be
    right."""
    if name.startswith("folder:"):
        return Place(find_folder(name, root), tree=True)
    if name not in PUBLISHED:
        return None
    for folder in (root, root / name):
        with suppress(FileNotFoundError, NotADirectoryError):
            found = [(str(folder / file), (folder / file).stat()) for file in layout(name)]
            if not check or all(
                intact(name, path, now.st_size, now.st_mtime_ns) for path, now in found
            ):
                return Place(folder, tree=False)
    splits = [root / name / folder for folders in SPLIT_FOLDERS.values() for folder in folders]
    return Place(root / name, tree=True) if any(map(Path.is_dir, splits)) else None


def title_of(name: str, place: Place | None) -> str:
    first = next(scan(place.folder), ("", None))[0] if place and place.tree else ""
    return TITLES[name] + (" (JPEG)" if first.lower().endswith((".jpg", ".jpeg")) else "")


@lru_cache(maxsize=64)
def intact(name: str, path: str, size: int, modified: int) -> bool:
    """Whether a file of torchvision's layout has its published checksum: half a download is no data
    set."""
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
    """The image files below `folder`, sorted: name relative to it, and its entry."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from scan(entry.path, f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(SUFFIXES):
            yield prefix + entry.name, entry


def find_split(folder: Path, split: Split) -> tuple[Path, tuple[str, ...]]:
    """Where one split of a tree is, and its classes, which every split of the tree must have.

    Raises FileNotFoundError or ValueError, saying what a tree looks like, for a folder that is
    none.
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
    """The image files of one class, sorted, relative to its folder; ValueError without one."""
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
