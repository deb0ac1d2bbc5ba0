"""Where data sets are: names, layouts on disk, and what is under the data root.

`IMSVD_DATA` is the data root, `IMSVD_DATASET` says what the name `auto` means.
"""

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
Root = Path | str | None

say_once = cache(print)  #: prints a line the first time that a process is asked to

TITLES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "fashion-mnist": "Fashion-MNIST",
    "attributes": "attributes (drawn)",
}
PUBLISHED = {"cifar10": CIFAR10, "cifar100": CIFAR100, "fashion-mnist": FashionMNIST}
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
SUFFIXES = (".png", ".jpg", ".jpeg")


def data_root(root: Root = None) -> Path:
    """The folder of all data sets: `root`, or else `IMSVD_DATA`, or else ~/.cache/imsvd."""
    return Path(root or os.environ.get("IMSVD_DATA") or "~/.cache/imsvd").expanduser()


def resolve(name: str = "auto", root: Root = None, *, quiet: bool = False) -> str:
    """The data set that `name` stands for here and now; downloads nothing.

    `auto` is `IMSVD_DATASET` if that is set; else `cifar10` if it is under the root; else
    `attributes`, which one printed line says, once a process, unless `quiet`. Raises ValueError for
    an unknown name.
    """
    if name == "auto":
        name = os.environ.get("IMSVD_DATASET") or "auto"
    if name in TITLES or name.startswith("folder:"):
        return name
    if name != "auto":
        raise ValueError(
            f"data set {name!r} is unknown: choose auto, {', '.join(TITLES)} or folder:PATH "
            "(tree:PATH, voc:PATH and coco:PATH where images are streamed)"
        )
    root = data_root(root)
    if find("cifar10", root):
        return "cifar10"
    if not quiet:
        say_once(
            f"Data set: {TITLES['attributes']}. CIFAR-10 is not under {root}: "
            "`imsvd data get cifar10` downloads it.",
            flush=True,
        )
    return "attributes"


def title(name: str = "auto", root: Root = None) -> str:
    """The published name of the data at hand, with a remark if its files are JPEGs, or a folder's;
    prints nothing.
    """
    name = resolve(name, root, quiet=True)
    place = find(name, root)
    if place is None or not place.tree:
        return TITLES[name]
    if name not in TITLES:
        return place.folder.name
    first = next(scan(place.folder), "")
    return TITLES[name] + (" (JPEG)" if first.lower().endswith(SUFFIXES[1:]) else "")


class Place(NamedTuple):
    folder: Path
    tree: bool  # of images, {train,test}/<class>/; else what torchvision calls its root


def check_choices(split: str, on_corrupt: str) -> None:
    """Raise ValueError for a split or a treatment of unreadable files that does not exist."""
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split is {split!r}: choose 'train' or 'test'")
    if on_corrupt not in ("error", "skip"):
        raise ValueError(f"on_corrupt is {on_corrupt!r}: choose 'error' or 'skip'")


def find_root(name: str, schemes: tuple[str, ...], split: str, on_corrupt: str, root: Root) -> Path:
    """The folder of a data set that is streamed; raises ValueError for another one's name."""
    check_choices(split, on_corrupt)
    if not name.startswith(schemes):
        raise ValueError(f"data set {name!r} has another layout: give {schemes[0]}PATH")
    return find_folder(name, root)


def find_folder(name: str, root: Root = None) -> Path:
    """The folder that `folder:PATH` and the like name, absolute or below the data root.

    Raises FileNotFoundError if there is none.
    """
    root = data_root(root)
    path = root / Path(name.partition(":")[2]).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder: {name!r} is an absolute path, or one under {root}; "
            "give another --data, or put it there (`imsvd data check` tells how)"
        )
    return path


def layout(name: str) -> dict[Path, str | None]:
    """The files of torchvision's layout, relative to what it calls its root, and their checksums.

    Fashion-MNIST's are of the compressed files: it has none here, but its reader counts bytes.
    """
    published = PUBLISHED[name]
    if published is FashionMNIST:
        names = [file.removesuffix(".gz") for file, _ in published.resources]
        return {Path("FashionMNIST/raw", file): None for file in names}
    meta = published.meta["filename"], published.meta["md5"]
    files = [*published.train_list, *published.test_list, meta]
    return {Path(published.base_folder, file): checksum for file, checksum in files}


def find(name: str, root: Root) -> Place | None:
    """Where `name` can be read, torchvision's layout first, if its files have their checksums."""
    if name.startswith("folder:"):
        return Place(find_folder(name, root), tree=True)
    if name not in PUBLISHED:
        return None
    root = data_root(root)
    for folder in (root, root / name):
        with suppress(FileNotFoundError, NotADirectoryError):
            if all(
                _intact(folder / file, checksum, (folder / file).stat().st_mtime_ns)
                for file, checksum in layout(name).items()
            ):
                return Place(folder, tree=False)
    splits = [root / name / folder for folders in SPLIT_FOLDERS.values() for folder in folders]
    return Place(root / name, tree=True) if any(map(Path.is_dir, splits)) else None


@lru_cache(maxsize=64)
def _intact(file: Path, checksum: str | None, modified: int) -> bool:
    """Whether a file has its checksum, computed again when it was modified."""
    return check_integrity(file, checksum)


def scan(folder: Path | str, prefix: str = "") -> Iterator[str]:
    """The image files below `folder`, sorted, relative to it."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from scan(entry.path, f"{prefix}{entry.name}/")
        elif is_image(entry.name):
            yield prefix + entry.name


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(SUFFIXES)


def find_split(folder: Path, split: Split) -> tuple[Path, tuple[str, ...]]:
    """Where one split of a tree is, and its classes, which every split of the tree must have.

    Raises FileNotFoundError or ValueError, with the layout of a tree, for a folder that is none.
    """
    homes = {}
    for key, options in SPLIT_FOLDERS.items():
        folders = filter(Path.is_dir, map(folder.joinpath, options))
        homes[key] = max(folders, key=lambda home: bool(class_names(home)), default=None)
    home = homes[split]
    if home is None:
        names = " or ".join(SPLIT_FOLDERS[split])
        raise FileNotFoundError(
            f"split {split!r} is not there: make {folder}/{names}, one folder a class in it"
        )
    classes = class_names(home)
    if not classes:
        raise ValueError(f"{home} holds no class folder: put the images in {home}/<class>/")
    for other in filter(None, homes.values()):
        if difference := sorted(set(classes) ^ set(class_names(other))):
            raise ValueError(
                f"{home} and {other} differ in classes ({', '.join(difference[:5])}): give both all"
            )
    return home, classes


def find_images(home: Path, class_name: str) -> list[str]:
    """The image files of one class, sorted, relative to its folder; ValueError if it has none."""
    files = list(scan(home / class_name))
    if not files:
        raise ValueError(
            f"{home / class_name} holds no {', '.join(SUFFIXES)} file: fill or remove it"
        )
    return files


def class_names(home: Path) -> tuple[str, ...]:
    """The class folders in `home`, sorted."""
    return tuple(sorted(path.name for path in home.glob("[!.]*") if path.is_dir()))
