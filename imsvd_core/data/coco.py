"""COCO's images and what stands in them: boxes, masks and classes, in the layout of its release of
2017.

Nothing is decoded before it is asked for; the annotations wait as bytes, since a million Python
objects, in every worker that decodes, would not fit beside the images.
"""

import io
import pickle
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor

from imsvd_core.data import sources
from imsvd_core.data.batch import Device, Plan
from imsvd_core.data.sources import OnCorrupt, Root, Split
from imsvd_core.data.streamed import StreamedImages
from imsvd_core.system.progress import bar

SPLITS = {"train": "train2017", "test": "val2017"}

#: What stands in an image, as torchvision's detectors take it: boxes float32 (n, 4), x1 y1 x2 y2 in
#: pixels; labels int64 (n,), from 1; masks uint8 (n, H, W); area float32 (n,); iscrowd int64 (n,);
#: image_id int64 ().
Target = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class CocoImages(StreamedImages):
    """One split of a COCO data root ROOT/{train,val}2017/*.jpg,
    ROOT/annotations/instances_{train,val}2017.json.

    As in detectron2, training leaves out objects that are marked as crowds or have no mask, and
    images without any other; the test split keeps all images. Boxes end at the picture's edge, and
    those without an area are left out.
    """

    columns: ClassVar = ("ids", "places")

    listing: Path  # the annotations' file
    ids: Tensor = field(repr=False)  # int64 (N,), COCO's numbers of the images
    records: Tensor = field(repr=False)  # uint8: every image's record, pickled, one after the other
    places: Tensor = field(repr=False)  # int64 (N, 2): where in `records` each begins and ends
    classes: tuple[str, ...] = field(repr=False)  # of labels 1, 2, ...
    categories: tuple[int, ...] = field(repr=False)  # COCO's numbers of the classes

    def record(self, index: int) -> dict[str, Any]:
        """COCO's own entry of an image, with its usable objects under "objects"."""
        begin, end = self.places[index].tolist()
        return pickle.loads(self.records[begin:end].numpy().tobytes())  # our own bytes

    def file(self, index: int) -> Path:
        return self.home / self.record(index)["file_name"]

    def target(self, index: int, *, masks: bool = True) -> Target:
        """What stands in an image; see `Target`. Without `masks` they are left out, which saves the
        time to draw them.
        """
        record = self.record(index)
        objects, height, width = record["objects"], record["height"], record["width"]
        boxes = [_corners(mark, height, width) for mark in objects]
        labels = [1 + self.categories.index(mark["category_id"]) for mark in objects]
        crowds = [mark.get("iscrowd", 0) for mark in objects]
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "area": torch.tensor([mark["area"] for mark in objects], dtype=torch.float32),
            "iscrowd": torch.tensor(crowds, dtype=torch.int64),
            "image_id": torch.tensor(record["id"]),
        }
        if masks:
            target["masks"] = torch.zeros(len(objects), height, width, dtype=torch.uint8)
            coco = COCO()
            coco.imgs[record["id"]] = record
            for out, mark in zip(target["masks"], objects, strict=True):
                if shape := _polygons(mark["segmentation"]):
                    out[:] = torch.from_numpy(coco.annToMask({**mark, "segmentation": shape}))
        return target

    def read(self, index: int, *, masks: bool = True) -> tuple[Tensor, Target]:
        """An image, uint8 (3, H, W), and what stands in it. Raises ValueError naming a file that
        cannot be read, or whose size is not what the annotations were made for.
        """
        image, record = self.decode(index), self.record(index)
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
        device: Device = "cpu",
    ) -> Generator[tuple[list[Tensor], list[Target]]]:
        """Images and targets on `device`, for each entry (step, indices (n,)) of the plan, in
        order; read ahead by workers.

        With `on_corrupt` "skip", training takes the next image for one that cannot be read, and
        testing goes without: then there are fewer than n.
        """
        entries = (indices.tolist() for _, indices in plan)
        read = partial(self._read_all, masks)
        with closing(self.stream(read, entries, workers, device)) as results:
            for images, targets in results:
                sent = partial(torch.as_tensor, device=device)
                parts = [{name: sent(part) for name, part in target.items()} for target in targets]
                yield list(map(sent, images)), parts

    def _read_all(
        self, masks: bool, indices: Iterable[int]
    ) -> tuple[list[np.ndarray], list[dict[str, np.ndarray]], list[int]]:
        """One entry, as arrays: every tensor that leaves a worker keeps a file open."""
        unreadable: list[int] = []
        read = partial(self.read, masks=masks)
        images, targets = [], []
        for _, (image, target) in self.readable(read, indices, unreadable):
            images.append(image.numpy())
            targets.append({name: part.numpy() for name, part in target.items()})
        return images, targets, unreadable

    def truth(self) -> COCO:
        """The annotations as pycocotools reads them, for its scoring: of all images of the split,
        crowds included.
        """
        return read_listing(self.listing)


def open_coco(
    name: str,
    split: Split = "train",
    root: Root = None,
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
    folder = sources.find_root(name, ("coco:",), split, on_corrupt, root)
    home, listing = folder / SPLITS[split], folder / f"annotations/instances_{SPLITS[split]}.json"
    if not (home.is_dir() and listing.is_file()):
        raise FileNotFoundError(
            f"{home} or {listing} is not there: {name!r} needs them as COCO's archives unpack"
        )
    with bar(f"reading {listing.name}", None, progress):
        coco = read_listing(listing)
        records = _sorted_records(coco, listing, split)
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
        on_corrupt=on_corrupt,
        replaced=split == "train",
    )


def _sorted_records(coco: COCO, listing: Path, split: Split) -> dict[int, bytes]:
    """The pickled record of each image that the split uses, by COCO's numbers, ascending."""
    records = {}
    for number, image in sorted(coco.imgs.items()):
        for fault in faults(image, coco):
            raise ValueError(f"{listing}: {fault}: give COCO's annotations of instances")
        objects = [mark for mark in coco.imgToAnns[number] if _usable(mark, image, split)]
        if objects or split == "test":
            records[number] = pickle.dumps({**image, "objects": objects})
    return records


def read_listing(file: Path) -> COCO:
    """COCO's annotations from their file, without pycocotools' remarks. Raises ValueError for a
    file that holds none.
    """
    try:
        with redirect_stdout(io.StringIO()):
            coco = COCO(str(file))
        coco.dataset["images"], coco.dataset["annotations"], coco.dataset["categories"]
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} holds no COCO annotations ({type(error).__name__}: {error}): unpack them again"
        ) from error
    return coco


def faults(image: dict[str, Any], coco: COCO) -> Iterator[str]:
    """What an image or one of its objects lacks, or says of another picture."""
    if lacking := {"file_name", "height", "width"} - image.keys():
        yield f"image {image['id']} has no {', '.join(sorted(lacking))}"
        return
    size = [image["height"], image["width"]]
    for mark in coco.imgToAnns.get(image["id"], []):
        shape = mark.get("segmentation")
        if lacking := {"category_id", "bbox", "area", "segmentation"} - mark.keys():
            yield f"annotation {mark['id']} has no {', '.join(sorted(lacking))}"
        elif mark["category_id"] not in coco.cats:
            yield f"annotation {mark['id']} is of an unknown category, {mark['category_id']}"
        elif isinstance(shape, dict) and shape.get("size") != size:
            yield (
                f"the mask of annotation {mark['id']} is of size {shape.get('size')}, and its "
                f"image {image['id']} of {size}"
            )


def _usable(mark: dict[str, Any], image: dict[str, Any], split: Split) -> bool:
    x1, y1, x2, y2 = _corners(mark, image["height"], image["width"])
    drawn = split == "test" or (
        not mark.get("iscrowd", 0) and _polygons(mark["segmentation"]) != []
    )
    return drawn and x2 > x1 and y2 > y1


def _corners(mark: dict[str, Any], height: int, width: int) -> list[float]:
    x, y, w, h = mark["bbox"]
    ends = zip((x, y, x + w, y + h), (width, height, width, height), strict=True)
    return [min(max(end, 0), side) for end, side in ends]


def _polygons(segmentation: Any) -> Any:
    """Polygons less those of fewer than three corners, which pycocotools would take for boxes; run
    lengths as they are.
    """
    if not isinstance(segmentation, list):
        return segmentation
    return [corners for corners in segmentation if len(corners) >= 6 and len(corners) % 2 == 0]
