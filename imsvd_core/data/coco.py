"""COCO's images and what stands in them: boxes, masks and classes, in the layout of its release of
2017.

Nothing is decoded before it is asked for; the annotations wait as bytes, since a million Python
objects, in every worker that decodes, would not fit beside the images.
"""

import io
import json
import pickle
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
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
#: The tables of a listing, by their names in COCO's files.
Listing = dict[str, list[dict[str, Any]]]

TABLES = "images", "annotations", "categories"
BOUND = 2**63  #: numbers are below it
LARGEST = 10**10  #: area that COCO's scoring knows


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
        crowds = [mark["iscrowd"] for mark in objects]
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
                out[:] = torch.from_numpy(coco.annToMask(mark))
        return target

    def decode(self, index: int) -> Tensor:
        """An image, uint8 (3, H, W). Raises ValueError naming a file that cannot be read, or whose
        size is not what the annotations were made for.
        """
        image, record = super().decode(index), self.record(index)
        if image.shape[1:] != (record["height"], record["width"]):
            raise ValueError(
                f"{self.file(index)} is {image.shape[2]}×{image.shape[1]} and {self.listing.name} "
                f"says {record['width']}×{record['height']}: unpack the images again, unresized"
            )
        return image

    def read(self, index: int, *, masks: bool = True) -> tuple[Tensor, Target]:
        """An image, uint8 (3, H, W), and what stands in it."""
        return self.decode(index), self.target(index, masks=masks)

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
        """What stands in these images, crowds included, as pycocotools reads it for its scoring;
        objects are numbered from 1, since it takes 0 for none.
        """
        records = list(map(self.record, range(len(self))))
        marks = [mark for record in records for mark in record["objects"]]
        truth = COCO()
        truth.dataset = {
            "images": records,
            "annotations": [{**mark, "id": number} for number, mark in enumerate(marks, 1)],
            "categories": [{"id": number} for number in self.categories],
        }
        with redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth

    def lost(self) -> list[str]:
        """The objects that COCO's scoring does not find where the truth itself is scored: none of
        sound annotations, whose precision is 100.
        """
        truth, lost = self.truth(), set()
        marks = {number: mark for number, mark in truth.anns.items() if not mark["iscrowd"]}
        for kind, name in (("bbox", "bbox"), ("segm", "segmentation")) if marks else ():
            shape = truth.annToRLE if kind == "segm" else lambda mark: mark["bbox"]
            found = [
                {key: mark[key] for key in ("image_id", "category_id")}
                | {"score": 1.0, name: shape(mark)}
                for mark in marks.values()
            ]
            with redirect_stdout(io.StringIO()):
                scores = COCOeval(truth, truth.loadRes(found), kind)
                scores.params.maxDets = [len(found)]
                scores.params.areaRng, scores.params.areaRngLbl = [[0, LARGEST]], ["all"]
                scores.evaluate()
            matched = {
                number
                for entry in filter(None, scores.evalImgs)
                for number, match in zip(entry["gtIds"], entry["gtMatches"][-1], strict=True)
                if match
            }
            lost |= marks.keys() - matched
        return [marks[number]["source"] for number in sorted(lost)]


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
        tables = read_listing(listing)
        for kind, fault in faults(tables, split):
            raise ValueError(f"{listing}: {kind}: {fault}")
        records, passed_over = sorted_records(tables, split)
    if not records:
        raise ValueError(
            f"{listing} lists no image with an object that serves (passed over: {passed_over}): "
            "unpack COCO's annotations again, or give objects with boxes and masks"
        )
    sizes = torch.tensor([len(record) for record in records.values()])
    ends = sizes.cumsum(0)
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in tables["categories"]}
    return CocoImages(
        name,
        folder.name,
        split,
        home,
        listing,
        torch.tensor(list(records)),
        torch.frombuffer(bytearray().join(records.values()), dtype=torch.uint8),
        torch.stack([ends - sizes, ends], 1),
        tuple(names[number] for number in sorted(names)),
        tuple(sorted(names)),
        on_corrupt=on_corrupt,
        passed_over=tuple(passed_over.items()),
        replaced=split == "train",
    )


def sorted_records(tables: Listing, split: Split) -> tuple[dict[int, bytes], dict[str, int]]:
    """The pickled record of each image that the split uses, by COCO's numbers, ascending, none
    without any object; and how much is passed over, by reason. Of tables without `faults`.
    """
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in tables["images"]}
    sizes = {image["id"]: (image["height"], image["width"]) for image in tables["images"]}
    passed_over: Counter[str] = Counter()
    for mark in tables["annotations"]:
        mark["segmentation"] = _polygons(mark["segmentation"])
        if reason := _unused(mark, *sizes[mark["image_id"]], split):
            passed_over[reason] += 1
        else:
            objects[mark["image_id"]].append(mark)
    if not any(objects.values()):
        return {}, dict(passed_over)
    records = {
        image["id"]: pickle.dumps({**image, "objects": objects[image["id"]]})
        for image in sorted(tables["images"], key=lambda image: image["id"])
        if objects[image["id"]] or split == "test"
    }
    passed_over["images without object"] = len(objects) - len(records)
    return records, dict(+passed_over)


def read_listing(file: Path) -> Listing:
    """COCO's annotations from their file, with what is optional, and the name that tells each
    object under "source". Raises ValueError for a file that holds none.
    """
    try:
        content = json.loads(file.read_bytes())
        tables: Listing = {name: content[name] for name in TABLES}
        for entry in chain(*tables.values()):
            if not isinstance(entry, dict):
                raise TypeError(f"{entry!r:.60} is no entry")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} holds no COCO annotations ({type(error).__name__}: {error}): unpack them again"
        ) from error
    ids = [repr(mark.get("id")) for mark in tables["annotations"]]
    counts = Counter(ids)
    for place, (name, mark) in enumerate(zip(ids, tables["annotations"], strict=True), 1):
        mark["source"] = name if counts[name] == 1 else f"{name} (number {place} of the list)"
        mark["iscrowd"] = mark.get("iscrowd") or 0
    return tables


def faults(tables: Listing, split: Split) -> Iterator[tuple[str, str]]:
    """What a split cannot use: the kind of each fault, and which image or object has it."""
    for kind, entries in (("image", tables["images"]), ("category", tables["categories"])):
        ids = [entry.get("id") for entry in entries]
        for name, count in Counter(map(repr, ids)).items():
            if count > 1:
                yield f"{kind} listed twice", f"id {name}"
        for value in ids:
            if not _is_number(value, int):
                yield f"unusable {kind}", f"id {value!r} must be a whole number below 2**63"
    images = {repr(image.get("id")): image for image in tables["images"]}
    categories = {repr(category.get("id")) for category in tables["categories"]}
    unusable = set()
    for number, image in images.items():
        if fault := _fault_of_image(image):
            unusable.add(number)
            yield "unusable image", f"image {number} {fault}"
    for mark in tables["annotations"]:
        number = repr(mark.get("image_id"))
        if number not in images:
            yield "annotation of no image", mark["source"]
        elif number not in unusable and (
            fault := _fault_of_object(mark, images[number], categories, split)
        ):
            yield "unusable annotation", fault


def _fault_of_image(image: dict[str, Any]) -> str:
    if lacking := {"file_name", "height", "width"} - image.keys():
        return f"has no {', '.join(sorted(lacking))}"
    sides = [image["height"], image["width"]]
    if not all(_is_number(side, int) and side > 0 for side in sides):
        return f"has height and width {sides}: give whole numbers above 0"
    return "" if isinstance(image["file_name"], str) else f"has file_name {image['file_name']!r}"


def _fault_of_object(
    mark: dict[str, Any], image: dict[str, Any], categories: set[str], split: Split
) -> str:
    name = f"annotation {mark['source']}"
    if lacking := {"category_id", "bbox", "area", "segmentation"} - mark.keys():
        return f"{name} has no {', '.join(sorted(lacking))}"
    if repr(mark["category_id"]) not in categories:
        return f"{name} is of an unknown category, {mark['category_id']!r}"
    box, area, shape = mark["bbox"], mark["area"], mark["segmentation"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        return f"{name} has bbox {box!r}: give [x, y, width, height]"
    if min(box[2:]) < 0:
        return f"{name} has bbox {box!r}: width and height must not be negative"
    if not (_is_number(area) and 0 <= area <= LARGEST):
        return f"{name} has area {area!r}: give its pixels"
    if mark["iscrowd"] not in (0, 1):
        return f"{name} has iscrowd {mark['iscrowd']!r}: give 0 or 1"
    size = [image["height"], image["width"]]
    if isinstance(shape, dict) and shape.get("size") != size:
        return (
            f"the mask of {name} is of size {shape.get('size')}, and its image {image['id']} "
            f"of {size}"
        )
    if not (_are_run_lengths if isinstance(shape, dict) else _are_polygons)(shape):
        return f"{name} has segmentation {shape!r:.60}: give polygons or run lengths of its image"
    if split == "test" and not _polygons(shape):
        return (
            f"{name} has no mask, which a test needs: give a polygon of three corners or more, or "
            "remove it"
        )
    return ""


def _is_number(value: Any, *kinds: type) -> bool:
    return type(value) in (kinds or (int, float)) and -BOUND <= value < BOUND


def _are_polygons(shape: Any) -> bool:
    return shape is None or (
        isinstance(shape, list)
        and all(isinstance(corners, list) and all(map(_is_number, corners)) for corners in shape)
    )


def _are_run_lengths(shape: dict[str, Any]) -> bool:
    """Whether run lengths, listed or compressed, make up the whole picture: pycocotools believes
    them, and reads and writes beyond its memory.
    """
    counts, (height, width) = shape.get("counts"), shape["size"]
    counts = _decompressed(counts) if isinstance(counts, str) else counts
    return (
        isinstance(counts, list)
        and all(_is_number(count, int) and count >= 0 for count in counts)
        and sum(counts) == height * width
    )


def _decompressed(text: str) -> list[int]:
    """COCO's run lengths from their compressed form, in which each from the fourth is told by its
    difference from the last but one; -1 is among them where the text is none.
    """
    counts: list[int] = []
    count = shift = 0
    for digit in (ord(letter) - 48 for letter in text):
        count |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            count -= (digit >> 4 & 1) << shift
            counts.append(count + (counts[-2] if len(counts) > 2 else 0))
            count = shift = 0
        if not 0 <= digit < 64:
            return [-1]
    return [*counts, -1] if shift else counts


def _unused(mark: dict[str, Any], height: int, width: int, split: Split) -> str:
    """Why a split passes over an object; nothing if it does not."""
    x1, y1, x2, y2 = _corners(mark, height, width)
    if x2 <= x1 or y2 <= y1:
        return "boxes without area"
    if split == "train" and mark["iscrowd"]:
        return "crowds"
    return "" if mark["segmentation"] else "objects without mask"


def _corners(mark: dict[str, Any], height: int, width: int) -> list[float]:
    x, y, w, h = mark["bbox"]
    ends = zip((x, y, x + w, y + h), (width, height, width, height), strict=True)
    return [min(max(end, 0), side) for end, side in ends]


def _polygons(segmentation: Any) -> Any:
    """Polygons less those of fewer than three corners, which pycocotools would take for boxes; run
    lengths as they are.
    """
    if isinstance(segmentation, dict):
        return segmentation
    polygons = segmentation or []
    return [corners for corners in polygons if len(corners) >= 6 and len(corners) % 2 == 0]
