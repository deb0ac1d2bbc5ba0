"""COCO's images and what stands in them: boxes, masks and classes, in the layout of its release of
2017.

Nothing is decoded before it is asked for; the annotations wait as bytes, since a million Python
objects, in every worker that decodes, would not fit beside the images.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor

from imsvd_core.data import sources
from imsvd_core.data.batch import Plan, balanced
from imsvd_core.data.decoding import decode
from imsvd_core.data.sources import OnCorrupt, Split
from imsvd_core.data.workers import Unreadable, stream
from imsvd_core.system.progress import bar

PREFIX = "coco:"
SPLITS = {"train": "train2017", "test": "val2017"}

#: What stands in an image, as torchvision's detectors take it: boxes float32 (n, 4), x1 y1 x2 y2 in
#: pixels; labels int64 (n,), from 1; masks uint8 (n, H, W); area float32 (n,); iscrowd int64 (n,);
#: image_id int64 ().
Target = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class CocoImages:
    """One split of a COCO data root ROOT/{train,val}2017/*.jpg,
    ROOT/annotations/instances_{train,val}2017.json.

    As in detectron2, training leaves out objects that are marked as crowds or have no mask, and
    images without any other; the test split keeps all images. Boxes end at the picture's edge, and
    those without an area are left out.
    """

    name: str  # "coco:PATH"
    title: str  # what a page prints
    split: str  # "train" or "test"
    home: Path  # holds the images
    listing: Path  # the annotations' file
    ids: Tensor = field(repr=False)  # int64 (N,), COCO's numbers of the images
    records: Tensor = field(repr=False)  # uint8: every image's record, pickled, one after the other
    places: Tensor = field(repr=False)  # int64 (N, 2): where in `records` each begins and ends
    classes: tuple[str, ...] = field(repr=False)  # of labels 1, 2, ...
    categories: tuple[int, ...] = field(repr=False)  # COCO's numbers of the classes
    on_corrupt: OnCorrupt = "error"
    unreadable: Unreadable = field(default_factory=Unreadable, repr=False)  # images so far

    def __len__(self) -> int:
        return len(self.ids)

    def record(self, index: int) -> dict[str, Any]:
        """COCO's own entry of an image, with its usable objects under "objects"."""
        begin, end = self.places[index].tolist()
        return pickle.loads(self.records[begin:end].numpy().tobytes())  # our own bytes

    def file(self, index: int) -> Path:
        return self.home / self.record(index)["file_name"]

    def subset(self, n: int, seed: int = 0) -> CocoImages:
        """`n` images drawn at random, in their present order; the same `n` and `seed` give the
        same.

        Raises ValueError unless 1 <= n <= len(self).
        """
        as_one_class = torch.zeros(len(self), dtype=torch.int64)
        rows = balanced(as_one_class, n, seed, f"{self.title} ({self.split})")
        return replace(self, ids=self.ids[rows], places=self.places[rows], unreadable=Unreadable())

    def target(self, index: int, *, masks: bool = True) -> Target:
        """What stands in an image; see `Target`. Without `masks` they are left out, which saves the
        time to draw them.
        """
        record = self.record(index)
        objects, height, width = record["objects"], record["height"], record["width"]
        boxes = torch.tensor(
            [_corners(mark, height, width) for mark in objects], dtype=torch.float32
        ).reshape(-1, 4)
        label = {category: number for number, category in enumerate(self.categories, 1)}
        target = {
            "boxes": boxes,
            "labels": torch.tensor(
                [label[mark["category_id"]] for mark in objects], dtype=torch.int64
            ),
            "area": torch.tensor([mark["area"] for mark in objects], dtype=torch.float32),
            "iscrowd": torch.tensor(
                [mark.get("iscrowd", 0) for mark in objects], dtype=torch.int64
            ),
            "image_id": torch.tensor(record["id"]),
        }
        if masks:
            target["masks"] = torch.zeros(len(objects), height, width, dtype=torch.uint8)
            for out, mark in zip(target["masks"], objects, strict=True):
                out[:] = torch.from_numpy(
                    rle.decode(_run_lengths(mark["segmentation"], height, width))
                )
        return target

    def read(self, index: int, *, masks: bool = True) -> tuple[Tensor, Target]:
        """An image, uint8 (3, H, W), and what stands in it. Raises ValueError naming a file that
        cannot be read, or whose size is not what the annotations were made for.
        """
        image, record = decode(str(self.file(index))), self.record(index)
        if image.shape[1:] != (record["height"], record["width"]):
            raise ValueError(
                f"{self.file(index)} is {image.shape[2]}×{image.shape[1]} and {self.listing.name} "
                f"says {record['width']}×{record['height']}: unpack the images again, unresized"
            )
        return image, self.target(index, masks=masks)

    def batches(
        self,
        plan: Plan,
        *,
        masks: bool = True,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[list[Tensor], list[Target]]]:
        """Images and targets on `device`, for each entry (step, indices (n,)) of the plan, in
        order; read ahead by workers.

        With `on_corrupt` "skip", training takes the next image for one that cannot be read, and
        testing goes without: then there are fewer than n.
        """

        entries = (indices.tolist() for _, indices in plan)
        read = partial(self._read_all, masks)
        with closing(stream(read, entries, workers, device)) as results:
            for pixels, shapes, targets, unreadable in results:
                self.unreadable.note(unreadable, self.file, "left out")
                parts = pixels.split([math.prod(shape) for shape in shapes])
                tables = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
                images, pictures = tables[: len(targets)], tables[len(targets) :]
                sent = [
                    {name: torch.as_tensor(value, device=device) for name, value in target.items()}
                    for target in targets
                ]
                for target, mask in zip(sent, pictures, strict=masks):
                    target["masks"] = mask
                yield images, sent

    def _read_all(
        self, masks: bool, indices: Iterable[int]
    ) -> tuple[Tensor, list[torch.Size], list[dict], list[int]]:
        """Everything of one entry: all pixels in one tensor, since each that leaves a worker keeps
        a file open.
        """
        images, targets, unreadable = [], [], []
        for index in indices:
            for place in range(index, index + (len(self) if self.split == "train" else 1)):
                try:
                    image, target = self.read(place % len(self), masks=masks)
                except ValueError:
                    if self.on_corrupt == "error":
                        raise
                    unreadable.append(place % len(self))
                else:
                    images.append(image)
                    targets.append(target)
                    break
        if not images and self.split == "train":
            raise ValueError(f"{self.home} holds no image that can be read, of {len(self)} files")
        pictures = images + [target.pop("masks") for target in targets if masks]
        pixels = (
            torch.cat([picture.flatten() for picture in pictures])
            if pictures
            else torch.empty(0, dtype=torch.uint8)
        )
        numbers = [{name: value.numpy() for name, value in target.items()} for target in targets]
        return pixels, [picture.shape for picture in pictures], numbers, unreadable

    def truth(self) -> COCO:
        """The annotations as pycocotools reads them, for its scoring: of all images of the split,
        crowds included.
        """
        return read_listing(self.listing)


def open_coco(
    name: str,
    split: Split = "train",
    root: Path | str | None = None,
    *,
    on_corrupt: OnCorrupt = "error",
    progress: bool = False,
) -> CocoImages:
    """One split of the data set `coco:PATH`, PATH absolute or below the data root; test is val2017.
    Opens no image, but reads all annotations, half a gigabyte for COCO's training split: `progress`
    shows how far.

    Raises ValueError or FileNotFoundError, saying what is expected, where PATH has no such split or
    it holds no object.
    """
    if not name.startswith(PREFIX):
        raise ValueError(f"data set {name!r} is not COCO: give {PREFIX}PATH")
    sources.check_choices(split, on_corrupt)
    folder = sources.find_folder(name, root)
    home, listing = folder / SPLITS[split], folder / f"annotations/instances_{SPLITS[split]}.json"
    for place in (home, listing):
        if not place.exists():
            raise FileNotFoundError(
                f"{place} is not there: {name!r} needs train2017/, val2017/ and annotations/ with "
                "instances_train2017.json and instances_val2017.json, as COCO's archives unpack"
            )
    with bar(f"reading {listing.name}", None, progress):
        coco = read_listing(listing)
    records = _sorted_records(coco, listing, split, progress)
    if not coco.anns or not records:
        raise ValueError(
            f"{listing} lists no image with an object: unpack COCO's annotations again"
        )
    sizes = torch.tensor([len(record) for record in records.values()])
    ends = sizes.cumsum(0)
    categories = tuple(sorted(coco.cats))
    return CocoImages(
        name,
        folder.name,
        split,
        home,
        listing,
        torch.tensor(list(records)),
        torch.frombuffer(bytearray().join(records.values()), dtype=torch.uint8),
        torch.stack([ends - sizes, ends], 1),
        tuple(coco.cats[number]["name"] for number in categories),
        categories,
        on_corrupt,
    )


def _sorted_records(coco: COCO, listing: Path, split: Split, progress: bool) -> dict[int, bytes]:
    """The pickled record of each image that the split uses, by COCO's numbers, ascending."""
    records = {}
    with bar(f"sorting {listing.name}", len(coco.imgs), progress) as advance:
        for number in sorted(coco.imgs):
            image, marked = coco.imgs[number], coco.imgToAnns.get(number, [])
            _refuse_incomplete(image, marked, coco, listing)
            objects = [mark for mark in marked if _usable(mark, image, split)]
            if objects or split == "test":
                records[number] = pickle.dumps({**image, "objects": objects})
            advance(1)
    return records


def read_listing(file: Path) -> COCO:
    """COCO's annotations from their file, without pycocotools' remarks. Raises ValueError for a
    file that holds none.
    """
    try:
        with redirect_stdout(io.StringIO()):
            coco = COCO(str(file))
        coco.dataset["images"], coco.dataset["annotations"], coco.dataset["categories"]
    except (json.JSONDecodeError, UnicodeDecodeError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} holds no COCO annotations ({type(error).__name__}: {error}): unpack them again"
        ) from error
    return coco


def _refuse_incomplete(
    image: dict[str, Any], objects: Sequence[dict[str, Any]], coco: COCO, listing: Path
) -> None:
    """Raise ValueError for an image or one of its objects of which something is missing, or speaks
    of another picture.
    """
    for kind, entry, needed in (
        ("image", image, ("file_name", "height", "width")),
        *(
            ("annotation", mark, ("category_id", "bbox", "area", "segmentation"))
            for mark in objects
        ),
    ):
        if missing := [key for key in needed if key not in entry]:
            raise ValueError(
                f"{listing}: {kind} {entry['id']} has no {', '.join(missing)}: give COCO's "
                "annotations of instances, boxes and masks"
            )
    for mark in objects:
        if mark["category_id"] not in coco.cats:
            raise ValueError(
                f"{listing}: annotation {mark['id']} is of category {mark['category_id']}, which "
                f"is not among its {len(coco.cats)} categories: unpack COCO's annotations again"
            )
        shape = mark["segmentation"]
        size = [image["height"], image["width"]]
        if isinstance(shape, dict) and list(shape.get("size", ())) != size:
            raise ValueError(
                f"{listing}: the mask of annotation {mark['id']} is of size {shape.get('size')}, "
                f"and its image {image['id']} of {size}: unpack COCO's annotations again"
            )


def _usable(mark: dict[str, Any], image: dict[str, Any], split: Split) -> bool:
    x1, y1, x2, y2 = _corners(mark, image["height"], image["width"])
    drawn = split == "test" or (
        not mark.get("iscrowd", 0) and _polygons(mark["segmentation"]) != []
    )
    return drawn and x2 > x1 and y2 > y1


def _corners(mark: dict[str, Any], height: int, width: int) -> list[float]:
    x, y, w, h = mark["bbox"]
    return [
        min(max(x, 0), width),
        min(max(y, 0), height),
        min(max(x + w, 0), width),
        min(max(y + h, 0), height),
    ]


def _polygons(segmentation: Any) -> Any:
    """Polygons less those of fewer than three corners, which pycocotools would take for boxes; run
    lengths as they are.
    """
    if not isinstance(segmentation, list):
        return segmentation
    return [corners for corners in segmentation if len(corners) >= 6 and len(corners) % 2 == 0]


def _run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """One mask in COCO's compressed run lengths, from any of its three ways to write one."""
    shape = _polygons(segmentation)
    if isinstance(shape, list):
        nothing = np.zeros((height, width), np.uint8, "F")
        return rle.merge(rle.frPyObjects(shape, height, width)) if shape else rle.encode(nothing)
    return rle.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
