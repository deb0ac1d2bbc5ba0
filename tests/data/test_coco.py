"""COCO's images: what stands in them, in the order of a plan, and what is left out as detectron2
leaves it out.
"""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from imsvd_core.data import check
from imsvd_core.data.coco import CocoImages, faults, open_coco, read_listing
from imsvd_core.data.workers import stream
from imsvd_core.evaluation.detection.score import score

CATEGORIES = [{"id": 7, "name": "green"}, {"id": 3, "name": "red"}, {"id": 90, "name": "blue"}]
CHANNEL = {3: 0, 7: 1, 90: 2}


def outline(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def draw_coco(root, train=4, test=3, seed=0):
    """A data root of grey pictures with one to three bright rectangles each, whose colour is their
    class.
    """
    generator = np.random.default_rng(seed)
    for split, n in (("train", train), ("val", test)):
        images, objects = [], []
        for number in range(1, n + 1):
            height, width = int(generator.integers(48, 64)), int(generator.integers(64, 80))
            picture = torch.full((3, height, width), 90, dtype=torch.uint8)
            for place in range(generator.integers(1, 4)):
                x, y, w, h = (
                    4 + 20 * place,
                    int(generator.integers(2, 20)),
                    int(generator.integers(12, 18)),
                    int(generator.integers(12, 26)),
                )
                category = int(generator.choice(list(CHANNEL)))
                picture[CHANNEL[category], y : y + h, x : x + w] = 250
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": 10 * number,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": outline(x, y, w, h),
                    }
                )
            images.append(
                {"id": 10 * number, "file_name": f"{number}.jpg", "height": height, "width": width}
            )
            (root / f"{split}2017").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(
                root / f"{split}2017/{number}.jpg", quality=95
            )
        write_listing(root, split, images, objects)
    return f"coco:{root}"


def write_listing(root, split, images, objects):
    (root / "annotations").mkdir(exist_ok=True)
    listing = {"images": images, "annotations": objects, "categories": CATEGORIES}
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(listing))


def alter(root, split, change):
    """Let `change(images, annotations)` work on a listing."""
    file = root / f"annotations/instances_{split}2017.json"
    listing = json.loads(file.read_text())
    change(listing["images"], listing["annotations"])
    file.write_text(json.dumps(listing))


@pytest.fixture
def drawn(tmp_path):
    return draw_coco(tmp_path)


def test_a_picture_comes_with_its_boxes_masks_and_labels_from_one(drawn, capsys):
    data = open_coco(drawn)
    assert data.classes == ("red", "green", "blue")
    assert data.categories == (3, 7, 90)
    for index in range(len(data)):
        image, target = data.read(index)
        assert image.dtype == target["masks"].dtype == torch.uint8
        assert target["masks"].shape == (len(target["labels"]), *image.shape[1:])
        for label, box, mask, area in zip(
            target["labels"],
            target["boxes"].int().tolist(),
            target["masks"],
            target["area"],
            strict=True,
        ):
            x1, y1, x2, y2 = box
            inside = torch.zeros_like(mask)
            inside[y1:y2, x1:x2] = 1
            assert torch.equal(mask, inside)
            assert mask.sum() == area
            assert image[label - 1][mask.bool()].float().mean() > 220  # its colour is there
    assert capsys.readouterr().out == ""  # pycocotools likes to talk


def test_masks_are_the_same_from_polygons_and_from_both_kinds_of_run_lengths(drawn, tmp_path):
    before = [target["masks"] for target in map(open_coco(drawn).target, range(4))]

    def rewrite(images, objects):
        size = {image["id"]: (image["height"], image["width"]) for image in images}
        for number, one in enumerate(objects):
            packed = rle.merge(rle.frPyObjects(one["segmentation"], *size[one["image_id"]]))
            if number % 2:
                one["segmentation"] = {
                    "size": list(packed["size"]),
                    "counts": packed["counts"].decode(),
                }
            else:
                flat = rle.decode(packed).flatten("F")
                ends = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
                counts = np.diff(np.concatenate([[0], ends, [len(flat)]])).tolist()
                one["segmentation"] = {"size": list(packed["size"]), "counts": counts}

    alter(tmp_path, "train", rewrite)
    after = [target["masks"] for target in map(open_coco(drawn).target, range(4))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_training_leaves_out_crowds_objects_without_area_or_mask_and_images_without_any_other(
    drawn, tmp_path
):
    def spoil(images, objects):
        by_image = {
            image["id"]: [one for one in objects if one["image_id"] == image["id"]]
            for image in images
        }
        for one in by_image[10]:
            one["iscrowd"] = 1
        for one in by_image[20]:
            one["bbox"][2] = 0
        for one in by_image[30]:
            one["segmentation"] = [
                [1, 1, 5, 5]
            ]  # two corners, which pycocotools would take for a box
        objects.append({**by_image[40][0], "id": 99, "iscrowd": 1})

    whole = open_coco(drawn).target(3)
    alter(tmp_path, "train", spoil)
    alter(tmp_path, "val", lambda images, objects: objects[0].update(iscrowd=1))
    train, test = open_coco(drawn), open_coco(drawn, "test")
    assert train.ids.tolist() == [40]
    assert train.target(0)["boxes"].tolist() == whole["boxes"].tolist()
    assert test.ids.tolist() == [10, 20, 30]
    assert test.target(0)["iscrowd"].tolist()[0] == 1


def test_boxes_end_where_the_picture_does(drawn, tmp_path):
    alter(tmp_path, "train", lambda images, objects: objects[0].update(bbox=[-5, -5, 500, 500]))
    data = open_coco(drawn)
    height, width = data.read(0)[0].shape[1:]
    assert data.target(0)["boxes"][0].tolist() == [0, 0, width, height]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_plan_whoever_decodes(drawn, workers):
    data = open_coco(drawn)
    plan = [(5, torch.tensor([2, 0, 2])), (6, torch.tensor([1]))]
    for (_, indices), (images, targets) in zip(
        plan, data.batches(plan, workers=workers), strict=True
    ):
        for index, image, target in zip(indices.tolist(), images, targets, strict=True):
            alone, there = data.read(index)
            assert torch.equal(image, alone)
            assert target.keys() == there.keys()
            assert all(
                torch.equal(target[name], there[name]) and target[name].dtype == there[name].dtype
                for name in there
            )
    ((_, targets),) = data.batches(plan[1:], masks=False, workers=0)
    assert "masks" not in targets[0]


def test_a_worker_hands_over_no_tensor_however_many_pictures(drawn):
    """Each tensor keeps a file open until it is used, and systems allow 1024 of them."""
    read = partial(open_coco(drawn)._read_all, True)
    ((images, targets, unreadable),) = stream(read, [range(4)], workers=1)
    assert len(images) == len(targets) == 4
    for target in targets:
        assert all(isinstance(part, np.ndarray) for part in target.values())
    assert all(isinstance(image, np.ndarray) for image in images)
    assert unreadable == []


def test_a_subset_is_drawn_once_and_for_all(drawn):
    data = open_coco(drawn)
    some = data.subset(2)
    assert len(some) == 2
    assert torch.equal(some.ids, data.subset(2).ids)
    assert some.ids.tolist() == sorted(some.ids.tolist())
    for index, number in enumerate(some.ids.tolist()):
        assert some.target(index)["image_id"] == number
    with pytest.raises(ValueError, match="n is 5: take 1 to 4"):
        data.subset(5)


def test_an_unreadable_image_stops_the_run_or_is_left_out(drawn, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}2017/2.jpg").write_bytes(b"no image")
    plan = [(0, torch.tensor([0, 1, 2]))]
    with pytest.raises(ValueError, match=r"2\.jpg"):
        next(open_coco(drawn).batches(plan, workers=0))
    train, test = (open_coco(drawn, split, on_corrupt="skip") for split in ("train", "test"))
    seen = {
        data.split: [target["image_id"].item() for target in next(data.batches(plan, workers=0))[1]]
        for data in (train, test)
    }
    assert seen == {
        "train": [10, 30, 30],
        "test": [10, 30],
    }  # training takes the next; a test cannot
    assert train.unreadable == test.unreadable == {1}
    assert next(test.batches([(0, torch.tensor([1]))], workers=0)) == ([], [])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda root: "tree:" + str(root), ValueError, "another layout: give coco:PATH"),
        (lambda root: "coco:nowhere", FileNotFoundError, "is not a folder"),
        (
            lambda root: (root / "annotations/instances_train2017.json").unlink(),
            FileNotFoundError,
            "as COCO's archives unpack",
        ),
        (
            lambda root: (root / "annotations/instances_train2017.json").write_text("{"),
            ValueError,
            "holds no COCO annotations",
        ),
        (
            lambda root: (root / "annotations/instances_train2017.json").write_text("{}"),
            ValueError,
            "holds no COCO annotations",
        ),
        (
            lambda root: alter(root, "train", lambda images, objects: images.append(None)),
            ValueError,
            r"holds no COCO annotations \(TypeError: None is no entry",
        ),
        (
            lambda root: alter(root, "train", lambda images, objects: objects.clear()),
            ValueError,
            "lists no image with an object",
        ),
        (
            lambda root: alter(
                root, "train", lambda images, objects: objects[0].pop("segmentation")
            ),
            ValueError,
            r"annotation \d+ has no segmentation",
        ),
        (
            lambda root: alter(root, "train", lambda images, objects: objects[0].pop("area")),
            ValueError,
            r"annotation \d+ has no area",
        ),
        (
            lambda root: alter(root, "train", lambda images, objects: images[0].pop("height")),
            ValueError,
            r"image \d+ has no height",
        ),
        (
            lambda root: alter(
                root, "train", lambda images, objects: objects[0].update(category_id=99)
            ),
            ValueError,
            "is of an unknown category, 99",
        ),
        (
            lambda root: alter(
                root,
                "train",
                lambda images, objects: objects[0].update(
                    segmentation={"size": [3, 4], "counts": [12]}
                ),
            ),
            ValueError,
            r"the mask of annotation \d+ is of size \[3, 4\]",
        ),
    ],
)
def test_what_is_no_data_root_is_told(drawn, tmp_path, spoil, error, message):
    name = spoil(tmp_path)
    with pytest.raises(error, match=message):
        open_coco(name if isinstance(name, str) else drawn, root=tmp_path)


def packed(*counts):
    """Run lengths of a picture of one row, compressed."""
    return rle.frPyObjects({"size": [1, sum(counts)], "counts": list(counts)}, 1, sum(counts))[
        "counts"
    ].decode()


def put(**values):
    """A change of every object of a listing; a value may be made of the object's place."""

    def change(images, objects):
        for place, mark in enumerate(objects):
            for name, value in values.items():
                mark[name] = value(place) if callable(value) else value

    return change


def faulty(root):
    """The problems that a check sees in a drawn root, but for its counts."""
    spec = replace(check.SPECS["coco"], classes=3, counts={"train": 4, "val": 3})
    return check.check("coco", root, spec=spec, workers=1).problems


@pytest.mark.parametrize(
    "change",
    [
        put(id=1),
        put(id=lambda place: place),
        put(id=lambda place: f"object {place}"),
        put(id=lambda place: 2**63 + place),
        put(id=None),
        put(id=lambda place: [place]),
        lambda images, objects: [mark.pop("id") for mark in objects],
        lambda images, objects: [mark.pop("iscrowd") for mark in objects],
        put(iscrowd=None),
        lambda images, objects: objects[0]["segmentation"].append([1, 1, 5, 5]),
        lambda images, objects: objects.append({**objects[0], "bbox": [3, 3, 0, 5]}),
        lambda images, objects: objects.extend([dict(mark) for mark in objects]),
    ],
)
def test_truth_scored_against_itself_is_100_however_it_is_numbered_and_without_what_is_optional(
    drawn, tmp_path, change
):
    for split in ("train", "val"):
        alter(tmp_path, split, change)
    assert faulty(tmp_path) == []
    test = open_coco(drawn, "test")
    assert test.lost() == []
    truth = test.truth()
    perfect = [
        {**mark, "score": 1.0, "segmentation": truth.annToRLE(mark)} for mark in truth.anns.values()
    ]
    assert set(score(perfect, truth, test.ids.tolist()).values()) == {100}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(segmentation=[]), "annotation 1 has no mask"),
        (put(segmentation=None), "annotation 1 has no mask"),
        (put(segmentation=[[1, 1, 5, 5]]), "annotation 1 has no mask"),
        (put(segmentation=[1, 1, 5, 1, 5, 5]), "annotation 1 has segmentation"),
        (put(segmentation=[["1", "1", "5", "1", "5", "5"]]), "annotation 1 has segmentation"),
        (put(segmentation="mask.png"), "annotation 1 has segmentation"),
        (put(bbox=[]), r"annotation 1 has bbox \[\]"),
        (put(bbox=None), "annotation 1 has bbox None"),
        (put(bbox=[1, 2, 3]), r"annotation 1 has bbox \[1, 2, 3\]"),
        (put(bbox=[1, 2, 3, "4"]), "annotation 1 has bbox"),
        (put(bbox=[1, 2, 3, float("nan")]), "annotation 1 has bbox"),
        (put(bbox=[9, 9, -3, 4]), "must not be negative"),
        (put(area="large"), "annotation 1 has area 'large'"),
        (put(area=-1), "annotation 1 has area -1"),
        (put(iscrowd="0"), "annotation 1 has iscrowd '0'"),
        (put(id=5, bbox=[]), r"annotation 5 \(number 1 of the list\) has bbox"),
        (put(category_id="cat"), "is of an unknown category, 'cat'"),
        (put(image_id="10"), "annotation of no image: 1"),
        (put(image_id=11), "annotation of no image: 1"),
        (lambda images, objects: images[0].update(id="10"), "id '10' must be a whole number"),
        (lambda images, objects: images[0].update(id=2**63), "must be a whole number below 2"),
        (lambda images, objects: images[1].update(id=10), "image listed twice: id 10"),
        (lambda images, objects: images[0].update(width="64"), "image 10 has height and width"),
        (lambda images, objects: images[0].update(file_name=3), "image 10 has file_name 3"),
    ],
)
def test_annotations_that_cannot_serve_are_refused_by_the_reader_and_the_check_in_the_same_words(
    drawn, tmp_path, change, said
):
    alter(tmp_path, "val", change)
    with pytest.raises(ValueError, match=rf"instances_val2017\.json: .*{said}"):
        open_coco(drawn, "test")
    texts = [f"{problem.what}: {problem.first[0]}" for problem in faulty(tmp_path)]
    assert any(re.search(said, text) for text in texts)


@pytest.mark.parametrize(
    ("counts", "sound"),
    [
        ([4, 8], True),
        (packed(4, 8), True),
        (packed(1, 2, 1, 3, 2, 3), True),
        ([4, 9], False),
        ([13, -1], False),
        (packed(4, 9), False),
        (packed(4, 8) + "o", False),
        ("", False),
        ("\u00e9", False),
        (3, False),
    ],
)
def test_run_lengths_must_make_up_their_picture(drawn, tmp_path, counts, sound):
    def change(images, objects):
        images[0].update(height=3, width=4)
        objects[0].update(segmentation={"size": [3, 4], "counts": counts}, bbox=[0, 0, 4, 3])

    alter(tmp_path, "train", change)
    listing = tmp_path / "annotations/instances_train2017.json"
    wrong = [text for _, text in faults(read_listing(listing), "train")]
    assert bool(wrong) != sound


def test_what_training_leaves_out_is_counted_and_no_fault(drawn, tmp_path):
    def change(images, objects):
        objects[0].update(iscrowd=1)
        objects[1].update(segmentation=[])
        objects[2].update(bbox=[3, 3, 0, 0])

    alter(tmp_path, "train", change)
    passed_over = dict(open_coco(drawn).passed_over)
    del passed_over["images without object"]
    assert passed_over == {"crowds": 1, "objects without mask": 1, "boxes without area": 1}
    assert faulty(tmp_path) == []


def test_a_mask_that_covers_no_pixel_is_named_by_the_check_and_before_training(drawn, tmp_path):
    thin = [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]
    alter(tmp_path, "val", lambda images, objects: objects[2].update(segmentation=thin))
    assert open_coco(drawn, "test").lost() == ["3"]
    (problem,) = faulty(tmp_path)
    assert problem.first[0].startswith("annotation 3 in ")


def test_a_resized_picture_is_refused(drawn, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "train2017/1.jpg")
    with pytest.raises(ValueError, match=r"1\.jpg is 40×30 and instances_train2017\.json says"):
        open_coco(drawn).read(0)


def test_the_data_set_travels_to_workers_as_bytes(drawn):
    """Objects would be copied, page by page, into every worker that counts references to them."""
    data = open_coco(drawn)
    assert isinstance(data, CocoImages)
    assert data.records.dtype == torch.uint8
    assert not any(isinstance(value, list | dict) for value in vars(data).values())
