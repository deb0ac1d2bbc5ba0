"""Images streamed from a tree on disk, for data sets that do not fit in memory: ImageNet, Places.

A worker reads and decodes a file once, draws every view's crop from it and resizes them as bytes.
All else is done for the whole batch on the device, by `imsvd_core.views`. A crop is drawn from
(seed, step, image) alone, so neither the number of workers nor that of ranks nor a resumption
changes it.
"""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from imsvd_core.data import memory as datasets
from imsvd_core.data import sources
from imsvd_core.data.batch import Batch, OrderLike, members
from imsvd_core.data.sources import OnCorrupt, Split
from imsvd_core.views import CROP_DRAWS, EvalView, View, Views

SCHEMES = ("folder:", "tree:")
PART = 64  # images that a worker hands over at a time, some 20 MB of 224-pixel crops
CHUNK = 8  # decoded images that a worker holds at a time: their crops are drawn together
AHEAD = 2  # parts that wait for each worker

log = logging.getLogger(__name__)

Plan = Iterable[
    tuple[int, Tensor]
]  # (step, int64 (n,) indices of images); it is consumed ahead of the yields


@dataclass(frozen=True, eq=False)
class FolderImages:
    """One split of a tree ROOT/{train,val or test}/<class>/*.{jpg,png}, as names: nothing is
    decoded yet.

    A name costs as many bytes as the longest below its class folder, and eight for its label:
    ImageNet's 1,281,167 some 40 MB.
    """

    name: str  # "tree:PATH"
    title: str  # what a page prints
    split: str  # "train" or "test"
    home: Path  # holds the class folders
    names: np.ndarray = field(repr=False)  # (N,) bytes: file names below the class folders
    labels: Tensor = field(repr=False)  # int64 (N,), indices into `classes`
    classes: tuple[str, ...] = field(repr=False)
    on_corrupt: OnCorrupt = "error"
    unreadable: set[int] = field(
        default_factory=set, repr=False
    )  # images met so far that had to be replaced

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def skipped(self) -> int:
        """Unreadable files met so far, each replaced by the next one of the list."""
        return len(self.unreadable)

    def file(self, index: int) -> Path:
        return self.home / self.classes[self.labels[index]] / os.fsdecode(self.names[index])

    def subset(self, n: int, seed: int = 0) -> FolderImages:
        """`n` images drawn at random, as evenly over the classes as these allow, in their present
        order.

        The same `n` and `seed` give the same images. Raises ValueError unless 1 <= n <= len(self).
        """
        rows = datasets.balanced(self.labels, n, seed, f"{self.title} ({self.split})")
        return replace(
            self, names=self.names[rows.numpy()], labels=self.labels[rows], unreadable=set()
        )

    def two_crops(
        self,
        views: Views,
        plan: Plan,
        *,
        seed: int,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Two independent crops of every image: for each entry of the plan, in order, what
        `views.finish` takes.

        Args:
            views: say the law and the size of the crops.
            plan: (step, indices (n,)), n >= 1; read ahead by as much as the workers are ahead.
            seed: with the step and the index it fixes an image's crops.
            workers: processes that decode; 0 decodes here; by default this rank's share of the
                cores.
            device: where the crops are sent.

        Yields uint8 (n, 3, size, size) twice. Closing the iterator ends the workers. Raises
        ValueError naming a file that cannot be read or is gone, unless `on_corrupt` is "skip".
        """
        for _, _, crops in self._random_crops(members(views), plan, seed, workers, device):
            yield crops

    def crops(
        self,
        view: View,
        plan: Plan,
        *,
        seed: int,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[Tensor]:
        """One random crop of every image, uint8 (n, 3, size, size), for `view.finish`; all else as
        in `two_crops`."""
        with closing(self._random_crops((view,), plan, seed, workers, device)) as stream:
            for _, _, (only,) in stream:
                yield only

    def center_crops(
        self,
        view: EvalView,
        *,
        indices: Sequence[int] | None = None,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[Tensor]:
        """The images in order, cropped by `view`: uint8 (up to 64, 3, size, size), for
        `view.finish`.

        `indices`, such as a range, are the images wanted, in their order: a rank's share, say, or
        those that are still to be done.
        """
        wanted = range(len(self)) if indices is None else indices
        parts = (wanted[start : start + PART] for start in range(0, len(wanted), PART))
        with closing(
            self._stream(partial(self._read_centers, view), parts, workers, device)
        ) as stream:
            for (crops,) in stream:
                yield crops

    def views(
        self,
        order: OrderLike,
        views: Views | View,
        *,
        device: torch.device | str = "cpu",
        workers: int | None = None,
    ) -> Iterator[Batch]:
        """The batches of a training: for each piece of the order, its images seen through `views`.

        Args:
            order: read ahead by as much as the workers are ahead. Its seed, the step and the index
                fix an image's crops; its generator, one a step, what else is drawn, piece after
                piece.
            views: how many, and the law of each.
            device: where the views are made.
            workers: processes that decode and crop; 0 decodes here; by default this rank's share of
                the cores.

        Closing the iterator ends the workers. Raises ValueError naming a file that cannot be read
        or is gone, unless `on_corrupt` is "skip".
        """
        parts = members(views)
        current, generator = None, None
        with closing(self._random_crops(parts, order, order.seed, workers, device)) as stream:
            for step, indices, crops in stream:
                if step != current:
                    current, generator = step, order.generator(step, device)
                finished = [
                    view.finish(crop, generator) for view, crop in zip(parts, crops, strict=True)
                ]
                yield Batch(tuple(finished), self.labels[indices].to(device), indices.to(device))

    def in_order(
        self,
        view: EvalView,
        rows: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 500,
        workers: int | None = None,
    ) -> Iterator[Tensor]:
        """The images `rows` (by default all) as `view` shows them: float32 (n, 3, size, size), on
        `device`.

        Streamed images come 64 at a time, whatever `batch_size` says, and are otherwise read as by
        `views`.
        """
        with closing(
            self.center_crops(view, indices=rows, workers=workers, device=device)
        ) as stream:
            for crops in stream:
                yield view.finish(crops)

    def identity(self) -> list[Tensor]:
        """What a fingerprint of these images is made of: their names and labels."""
        return [torch.frombuffer(bytearray(self.names.tobytes()), dtype=torch.uint8), self.labels]

    def _random_crops(
        self,
        views: tuple[View, ...],
        plan: Plan,
        seed: int,
        workers: int | None,
        device: torch.device | str,
    ) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
        """For each entry of the plan: step, indices, and the crops that each view draws of its
        images."""
        ahead: deque[tuple[int, Tensor]] = deque()  # entries that were handed out

        def parts() -> Iterator[tuple[int, list[int]]]:
            for step, indices in plan:
                ahead.append((step, indices))
                yield from ((step, part.tolist()) for part in indices.split(PART))

        with closing(
            self._stream(partial(self._read_crops, views, seed), parts(), workers, device)
        ) as stream:
            for first in stream:
                step, indices = ahead.popleft()
                rest = islice(stream, math.ceil(len(indices) / PART) - 1)
                by_view = zip(first, *rest, strict=True)
                crops = [torch.cat(crops) if len(crops) > 1 else crops[0] for crops in by_view]
                yield step, indices, tuple(crops)

    def _read_centers(self, view: EvalView, part: Sequence[int]) -> tuple[Tensor, list[int]]:
        unreadable: list[int] = []
        return torch.stack(
            [view.crop(self._decode(index, unreadable)) for index in part]
        ), unreadable

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
        """The image, or where it cannot be read and that is allowed, the next that can, with a note
        of it."""
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
    ) -> Iterator[list[Tensor]]:
        """What `read` makes of each part, less its last item: the unreadable files, which are
        noted."""
        with closing(stream(read, parts, workers, device)) as results:
            for *crops, unreadable in results:
                for index in set(unreadable) - self.unreadable:
                    self.unreadable.add(index)
                    log.warning(
                        "%s cannot be read and is replaced by the next image (%d such so far)",
                        self.file(index),
                        self.skipped,
                    )
                yield crops


def stream(
    read: Callable[[Any], Any],
    parts: Iterable,
    workers: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Any]:
    """What `read` makes of each part, in order, made by worker processes some parts ahead.

    Args:
        read: picklable; gives a tensor, or tuples, lists and dicts of tensors and of what else can
            be pickled.
        parts: what it is given, one after the other; consumed ahead of the yields.
        workers: processes; 0 reads here; by default this rank's share of the cores.
        device: where tensors are sent, also those inside tuples, lists and dicts.

    Closing the iterator ends the workers. Raises here the ValueError that `read` raises there.
    """
    device, workers = torch.device(device), share_of_cores() if workers is None else workers
    loader = DataLoader(
        _Reader(read),
        batch_size=None,
        sampler=parts,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=_heed_the_trainer_alone,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )  # not the trainer's chance
    with _sigterm_held_back():
        iterator = iter(loader)
    try:
        for result in iterator:
            if isinstance(result, ValueError):
                raise result
            yield _sent(result, device)
    finally:
        del iterator  # with it go the workers


def _sent(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple | list):
        return type(value)(_sent(one, device) for one in value)
    return (
        {key: _sent(one, device) for key, one in value.items()}
        if isinstance(value, dict)
        else value
    )


def open_folder(
    name: str,
    split: Split = "train",
    root: Path | str | None = None,
    *,
    on_corrupt: OnCorrupt = "error",
) -> FolderImages:
    """One split of the data set `folder:PATH` or `tree:PATH`, streamed, PATH absolute or below the
    data root; opens no image.

    Raises ValueError or FileNotFoundError, saying what is expected, where PATH has no split or no
    class folders.
    """
    if not name.startswith(SCHEMES):
        raise ValueError(f"data set {name!r} is not streamed: give tree:PATH or folder:PATH")
    sources.check_choices(split, on_corrupt)
    root = sources.data_root() if root is None else Path(root).expanduser()
    folder = sources.find_folder(name, root)
    home, classes = sources.find_split(folder, split)
    names = [
        np.array([os.fsencode(file) for file in sources.find_images(home, label)])
        for label in classes
    ]
    labels = torch.arange(len(classes)).repeat_interleave(
        torch.tensor([len(some) for some in names])
    )
    return FolderImages(
        name, folder.name, split, home, np.concatenate(names), labels, classes, on_corrupt
    )


def decode(file: str) -> Tensor:
    """One image file as uint8 RGB (3, H, W); ValueError naming one that cannot be read.

    Grey, CMYK and palette become RGB, transparency is dropped, the camera's orientation is left
    alone.
    """
    try:
        content = read_file(file)
        if content[:2].tolist() == [
            0xFF,
            0xD8,
        ]:  # a JPEG; broken PNGs crash the process in torchvision 0.29
            datasets.open_image(
                io.BytesIO(content.numpy())
            ).close()  # torchvision believes any size
            return decode_jpeg(content, mode=ImageReadMode.RGB)
    except Exception:  # a broken file makes Pillow raise nearly anything
        pass
    return datasets.decode(file)  # reads what torchvision does not, or says what is wrong


def share_of_cores() -> int:
    """The cores that this process may use, divided by the ranks on this host; 1 or more. A task of
    Slurm's has its own."""
    if (
        "SLURM_CPUS_PER_TASK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    ):  # not torchrun inside a task
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class _Reader(Dataset):
    """A function as a DataLoader calls it; its ValueError is an answer, to be raised without a
    worker's trace."""

    def __init__(self, read: Callable) -> None:
        self.read = read

    def __getitem__(self, part: object) -> object:
        try:
            return self.read(part)
        except ValueError as error:
            return error


@contextmanager
def _sigterm_held_back() -> Iterator[None]:
    """Let what is started here be born with SIGTERM blocked, in threads that a library starts
    before anybody can say so, too."""
    if not hasattr(signal, "sigwaitinfo"):  # as on macOS
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_the_trainer_alone(worker: int) -> None:
    """Let a worker outlive what is sent to the whole job, such as Ctrl-C: that is for the trainer
    to answer.

    The trainer's own SIGTERM still ends it; and a worker whose trainer is gone ends by itself,
    within seconds.
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
