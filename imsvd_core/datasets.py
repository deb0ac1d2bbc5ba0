"""Data sets of small images, held whole in memory as uint8.

`auto` is CIFAR-10 if it is under the data root or can be downloaded, and otherwise `attributes`, which is drawn here.
"""

import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from imsvd_core import attributes

log = logging.getLogger(__name__)

Split = Literal["train", "test"]
SUFFIXES = {".png", ".jpg", ".jpeg"}
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "fashion-mnist": "Fashion-MNIST", "attributes": "attributes (drawn)"}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "fashion-mnist": "FashionMNIST"}
HOSTS = {"cifar10": "www.cs.toronto.edu", "cifar100": "www.cs.toronto.edu",
         "fashion-mnist": "fashion-mnist.s3-website.eu-central-1.amazonaws.com"}
PATIENCE = 4.0  # seconds that a connection may take, or a download stand still
ATTRIBUTES = {"train": 20_000, "test": 4_000}  # pictures drawn of each split
RETRY_AFTER = 600.0  # seconds for which a failed download is not tried again


@dataclass(frozen=True)
class ImageData:
    """One split of a data set: `images` uint8 (N, 3, H, W), `labels` int64 (N,) into `classes`."""

    name: str
    title: str  #: what a page prints, with what must be said beside every number ("CIFAR-10 (JPEG)")
    split: Split
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    factors: Mapping[str, Tensor] | None = None  #: `attributes` alone: each factor's value per image
    factor_values: Mapping[str, tuple[str, ...]] | None = None  #: and the names of those values
    skipped: int = 0  #: unreadable files left out

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, n: int, seed: int = 0) -> "ImageData":
        """`n` images, classes as equal as they can be, the same for the same seed. Raises ValueError if n > N."""
        if not 1 <= n <= len(self):
            raise ValueError(f"n={n} must lie between 1 and the {len(self)} images of {self.title} ({self.split})")
        shuffled = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        labels = self.labels[shuffled]
        by_class = labels.argsort(stable=True)
        counts = labels.bincount(minlength=len(self.classes))
        starts = (counts.cumsum(0) - counts)[labels[by_class]]
        rank = torch.empty_like(labels).scatter_(0, by_class, torch.arange(len(self)) - starts)  # place within its class
        chosen = shuffled[rank.argsort(stable=True)[:n]]
        factors = None if self.factors is None else {name: value[chosen] for name, value in self.factors.items()}
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], factors=factors)


def data_root() -> Path:
    """IMSVD_DATA, or ~/.cache/imsvd."""
    return Path(os.environ.get("IMSVD_DATA") or "~/.cache/imsvd").expanduser()


def resolve(name: str = "auto", root: Path | None = None) -> str:
    """What `name` stands for here and now: `auto` becomes cifar10 or attributes, downloading CIFAR-10 if it can.

    IMSVD_DATASET replaces `auto`. Falling back is said in one visible line, once a process.
    """
    root = data_root() if root is None else Path(root)
    name = os.environ.get("IMSVD_DATASET", "auto") if name == "auto" else name
    if name != "auto":
        _check_name(name)
        return name
    if _found("cifar10", root) or _download("cifar10", root) is None:
        return "cifar10"
    _say_once(f"CIFAR-10 is not under {root} and cannot be downloaded: using the drawn data set `attributes` instead")
    return "attributes"


def load(name: str = "auto", split: Split = "train", *, root: Path | None = None, seed: int = 0,
         on_corrupt: Literal["error", "skip"] = "error", size: int | None = None) -> ImageData:
    """Load one split: auto, cifar10, cifar100, fashion-mnist, attributes, or folder:PATH (under the root, or absolute).

    A folder holds {train,test or val}/<class>/*.{png,jpg,jpeg}; images of different sizes need `size`, to which the
    shorter side is resized before a centre crop. Truncated files raise ValueError naming the file, or are skipped
    and counted. `seed` draws another `attributes`. Raises FileNotFoundError with the remedy if there is nothing to read.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} must be 'train' or 'test'")
    if on_corrupt not in ("error", "skip"):
        raise ValueError(f"on_corrupt={on_corrupt!r} must be 'error' or 'skip'")
    root = data_root() if root is None else Path(root)
    name = resolve(name, root)
    if name == "attributes":
        return _attributes(split, seed)
    if name.startswith("folder:"):
        folder = root / name.removeprefix("folder:")
        return _tree(folder, name, folder.name, split, size, on_corrupt)
    if not _found(name, root) and (failure := _download(name, root)):
        tree = f", or a tree {name}/{{train,test}}/<class>/*.png" if name == "cifar10" else ""
        raise FileNotFoundError(f"{TITLES[name]} is not under {root} and cannot be downloaded ({failure}); put torchvision's "
                                f"{FOLDERS[name]}/{tree} there, or point IMSVD_DATA to a root that has it")
    return _torchvision(name, root, split) if _torchvision_root(name, root) else _tree(
        root / name, name, TITLES[name], split, size, on_corrupt)


def manifest(name: str = "auto", root: Path | None = None) -> dict[str, Any]:
    """What identifies the data that `load(name)` would read: name, title, files and a hash over their names and sizes.

    Quick, reads no image and never downloads; where `auto` would have to, it counts as attributes.
    """
    root = data_root() if root is None else Path(root)
    name = os.environ.get("IMSVD_DATASET", "auto") if name == "auto" else name
    if name == "auto":
        name = "cifar10" if _found("cifar10", root) else "attributes"
    _check_name(name)
    if name == "attributes":
        source = Path(attributes.__file__).read_bytes()
        return {"name": name, "title": TITLES[name], "files": 0, "hash": hashlib.sha256(source).hexdigest()[:16]}
    folder = root / name.removeprefix("folder:") if name.startswith("folder:") else _torchvision_root(name, root) or root / name
    digest, files, jpeg = hashlib.sha256(), 0, False
    for path, bytes_ in sorted(_walk(folder)):
        digest.update(f"{path.relative_to(folder)}:{bytes_}\n".encode())
        files, jpeg = files + 1, jpeg or path.suffix in (".jpg", ".jpeg")
    title = TITLES.get(name, folder.name)
    return {"name": name, "title": f"{title} (JPEG)" if jpeg and name in TITLES else title, "files": files,
            "hash": digest.hexdigest()[:16]}


def _walk(folder: Path) -> Iterator[tuple[Path, int]]:
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.is_dir():
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path), entry.stat().st_size


def _check_name(name: str) -> None:
    if name not in TITLES and not name.removeprefix("folder:").strip() != name.strip():
        raise ValueError(f"data set {name!r} is unknown; there are: auto, {', '.join(TITLES)}, folder:PATH")


# Drawn here


@lru_cache(maxsize=4)
def _attributes(split: Split, seed: int) -> ImageData:
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    factors = attributes.sample(ATTRIBUTES[split], generator)
    return ImageData("attributes", TITLES["attributes"], split, attributes.draw(factors, noise=generator),
                     attributes.label(factors), attributes.CLASSES, factors, attributes.FACTORS)


# Trees of image files


def _tree(folder: Path, name: str, title: str, split: Split, size: int | None, on_corrupt: str) -> ImageData:
    place = next((folder / word for word in ((split, "val") if split == "test" else (split,)) if (folder / word).is_dir()), None)
    if place is None:
        raise FileNotFoundError(f"{folder} has no folder {split}/: need {{train,test}}/<class>/*.png or *.jpg")
    classes = sorted(entry.name for entry in place.iterdir() if entry.is_dir())
    files = [(path, label) for label, one in enumerate(classes)
             for path in sorted((place / one).iterdir()) if path.suffix.lower() in SUFFIXES]
    if empty := sorted(set(range(len(classes))) - {label for _, label in files}):
        raise FileNotFoundError(f"{place / classes[empty[0]]} holds no image (.png, .jpg): fill or remove that class")
    if not files:
        raise FileNotFoundError(f"{place} holds no class folders with images (.png, .jpg)")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as pool:
        read = list(pool.map(lambda file: _read(file[0], size), files, chunksize=256))
    good = [(image, label) for image, (_, label) in zip(read, files) if isinstance(image, Tensor)]
    bad = [error for error in read if not isinstance(error, Tensor)]
    if bad and on_corrupt == "error":
        raise ValueError(f"{bad[0]}; restore or remove it, or pass on_corrupt='skip' ({len(bad)} such of {len(files)} files)")
    if bad:
        log.warning("%s: skipped %d unreadable of %d files, the first: %s", place, len(bad), len(files), bad[0])
    if not good:
        raise ValueError(f"{place}: none of {len(files)} files can be read ({bad[0]})")
    sizes = {image.shape[1:] for image, _ in good}
    if len(sizes) > 1:
        raise ValueError(f"{place} holds images of {len(sizes)} sizes, {tuple(min(sizes))} to {tuple(max(sizes))}: "
                         "pass size=S to resize the shorter side and crop the centre")
    jpeg = name in TITLES and any(path.suffix.lower() in (".jpg", ".jpeg") for path, _ in files)
    return ImageData(name, f"{title} (JPEG)" if jpeg else title, split, torch.stack([image for image, _ in good]),
                     torch.tensor([label for _, label in good]), tuple(classes), skipped=len(bad))


def _read(path: Path, size: int | None) -> Tensor | str:
    """The image, uint8 (3, H, W), or what is wrong with the file."""
    try:
        with Image.open(path) as file:
            image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        return f"{path} is truncated or no image ({str(error).splitlines()[0]})"
    return image if size is None else F.center_crop(F.resize(image, [size], antialias=True), [size, size])


# torchvision's own layouts, and their download


def _torchvision_root(name: str, root: Path) -> Path | None:
    """The folder to give to torchvision, if its files are there and whole."""
    return next((place for place in (root, root / name) if _whole(name, place)), None) if name in FOLDERS else None


def _whole(name: str, place: Path) -> bool:
    if not (place / FOLDERS[name]).is_dir():
        return False
    try:
        _torchvision_class(name)(str(place), train=False)
    except (RuntimeError, OSError, EOFError):
        return False
    return True


def _torchvision_class(name: str) -> type:
    return {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100,
            "fashion-mnist": torchvision.datasets.FashionMNIST}[name]


def _torchvision(name: str, root: Path, split: Split) -> ImageData:
    data = _torchvision_class(name)(str(_torchvision_root(name, root)), train=split == "train")
    images = torch.as_tensor(data.data)
    if images.ndim == 3:  # Fashion-MNIST: grey, 28×28
        images = F.pad(images[:, None].expand(-1, 3, -1, -1), [2])
    else:
        images = images.permute(0, 3, 1, 2)
    return ImageData(name, TITLES[name], split, images.contiguous(), torch.as_tensor(data.targets), tuple(data.classes))


def _found(name: str, root: Path) -> bool:
    return (root / name / "train").is_dir() or _torchvision_root(name, root) is not None


def _download(name: str, root: Path) -> str | None:
    """Try torchvision's checksum-verified download; returns why it failed, or None. A failure is remembered a while."""
    memory = root / f".{name}-download-failed"
    try:
        if time.time() - memory.stat().st_mtime < RETRY_AFTER:
            return memory.read_text()
    except OSError:
        pass
    failure = _unreachable(HOSTS[name])
    if failure is None:
        log.warning("downloading %s to %s", TITLES[name], root)
        try:
            with _socket_timeout(PATIENCE):
                _torchvision_class(name)(str(root), train=True, download=True)
        except (OSError, RuntimeError) as error:
            failure = f"download failed: {error}"
    if failure:
        try:
            root.mkdir(parents=True, exist_ok=True)
            memory.write_text(failure)
        except OSError:
            pass  # a read-only root only costs the next process another try
    return failure


def _unreachable(host: str) -> str | None:
    """Why `host` cannot be reached within PATIENCE seconds, looking its name up included; None if it can."""
    outcome = [f"no answer within {PATIENCE:g} seconds"]

    def connect() -> None:
        try:
            socket.create_connection((host, 443), timeout=PATIENCE).close()
            outcome[0] = ""
        except OSError as error:
            outcome[0] = str(error)

    thread = threading.Thread(target=connect, daemon=True)  # a name look-up has no timeout of its own
    thread.start()
    thread.join(PATIENCE)
    return f"{host} cannot be reached: {outcome[0]}" if outcome[0] else None


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@lru_cache(maxsize=8)
def _say_once(line: str) -> None:
    print(line, flush=True)
