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

from imsvd_core.data.decoding import formats, suffixes

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
SPLITS: tuple[Split, ...] = "train", "test"
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
#: Folders that systems and devices leave, of thumbnails, deleted files and the like.
LEFTOVERS = {"@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "$recycle.bin"}
LEFTOVERS |= {"__macosx", "lost+found", "system volume information", "__pycache__"}


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
    return TITLES[name] + (" (JPEG)" if first.lower().endswith(JPEG_SUFFIXES) else "")


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


def scan(folder: Path | str) -> Iterator[str]:
    """The image files below `folder`, sorted, relative to it."""
    return (name for name, reason in walk(folder) if not reason)


def walk(
    folder: Path | str, prefix: str = "", above: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """What is below `folder`, sorted, relative to it, each with the reason why it is passed over;
    none for an image. What is hidden is not told of.
    """
    above = *above, os.path.realpath(folder)
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        name = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield name, "" if is_image(name) else Path(name).suffix.lower() or "no suffix"
        elif reason := _leftover(entry.path, above):
            yield name, reason
        else:
            yield from walk(entry.path, f"{name}/", above)


def _leftover(folder: str, above: tuple[str, ...]) -> str:
    """Why a folder is not looked into, in those `above` it; nothing if it is."""
    if os.path.basename(folder).lower() in LEFTOVERS:
        return "system folders"
    place = os.path.realpath(folder)
    loops = os.path.islink(folder) and any(
        os.path.commonpath([place, other]) == place for other in above
    )
    return "links to a folder above" if loops else ""


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return not name.startswith(".") and name.lower().endswith(suffixes())


def find_home(folder: Path, split: Split) -> Path | None:
    """Where the images of a split are, if anywhere: in its folder; those for training also in
    `folder` itself, if that has no folder of a split.
    """
    homes = [folder / name for names in SPLIT_FOLDERS.values() for name in names]
    if split == "train" and not any(map(Path.is_dir, homes)):
        return folder if any(scan(folder)) else None
    options = [folder / name for name in SPLIT_FOLDERS[split] if (folder / name).is_dir()]
    return max(options, key=lambda home: bool(class_names(home)), default=None)


def find_split(folder: Path, split: Split) -> tuple[Path, tuple[str, ...]]:
    """Where one split of a tree is, and its classes, those of the training if it has any; none of
    images that are in no class folder.

    Raises FileNotFoundError or ValueError, with the layout of a tree, for a folder that is none.
    """
    homes = {key: find_home(folder, key) for key in SPLITS}
    home = homes[split]
    if home is None:
        names = " or ".join(SPLIT_FOLDERS[split])
        raise FileNotFoundError(
            f"split {split!r} is not there: make {folder}/{names}, one folder a class in it"
        )
    classes = {key: _filled(place) if place else () for key, place in homes.items()}
    known = classes["train"] or classes["test"]
    if unseen := sorted(set(classes["test"]) - set(known)):
        names = ", ".join(sorted({*known} ^ {*classes["test"]})[:5])
        raise ValueError(
            f"{homes['train']} and {homes['test']} differ in classes ({names}): there is nothing "
            f"to train on for {unseen[0]!r}; give it training images, or take it out of the test"
        )
    if not classes[split] and not any(is_image(path.name) for path in home.iterdir()):
        empty = [f"{home / name} holds no image" for name in class_names(home)]
        fault = empty[0] if empty else f"{home} holds no class folder and no image"
        raise ValueError(
            f"{fault} ({', '.join(formats())}): put images in {home}/<class>/, or in {home} itself "
            "where they have no labels"
        )
    return home, known if classes[split] else ()


def find_images(home: Path, class_name: str) -> list[str]:
    """The image files of one class, sorted, relative to its folder."""
    return list(scan(home / class_name))


def class_names(home: Path) -> tuple[str, ...]:
    """The class folders in `home`, sorted."""
    above = (os.path.realpath(home),)
    folders = (path for path in home.glob("[!.]*") if path.is_dir())
    return tuple(sorted(path.name for path in folders if not _leftover(str(path), above)))


def _filled(home: Path) -> tuple[str, ...]:
    """Its class folders that hold an image."""
    return tuple(name for name in class_names(home) if _holds_image(home / name))


def _holds_image(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        if any(is_image(entry.name) for entry in entries):
            return True
    return any(scan(folder))
