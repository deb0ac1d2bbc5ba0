"""VOC's layout: what its lists and annotations say of each image, and what becomes of the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imsvd_core.data.voc import open_voc

CLASSES = ("cat", "dog", "sheep")
OBJECTS = {  # of each image: (class, difficult)
    "trainval": {
        "000001": [("cat", False)],
        "000004": [("cat", True), ("dog", False)],
        "000005": [("dog", True), ("dog", False)],
        "000009": [("cat", True), ("cat", True)],
        "000010": [],
    },
    "test": {"000002": [("dog", True)], "000003": [("sheep", False), ("cat", False)]},
}
LABELS = {
    "train": [[1, -1, -1], [0, 1, -1], [-1, 1, -1], [0, -1, -1], [-1, -1, -1]],
    "test": [[-1, 0, -1], [1, -1, 1]],
}


def picture(seed: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Annotations as the challenge's, and the lists that its development kit makes of them."""
    base = tmp_path / "mine/VOCdevkit/VOC2007"
    for place in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / place).mkdir(parents=True)
    for split, images in OBJECTS.items():
        (base / f"ImageSets/Main/{split}.txt").write_text("".join(f"{stem}\n" for stem in images))
        for stem, objects in images.items():
            picture(int(stem), 80 + int(stem), 50).save(base / f"JPEGImages/{stem}.jpg", quality=95)
            told = "".join(
                f"<object><name>{name}</name><difficult>{int(hard)}</difficult></object>"
                for name, hard in objects
            )
            (base / f"Annotations/{stem}.xml").write_text(f"<annotation>{told}</annotation>")
        for name in CLASSES:
            lines = []
            for stem, objects in images.items():
                hard = [difficult for label, difficult in objects if label == name]
                lines.append(f"{stem} {-1 if not hard else 0 if all(hard) else 1:2d}\n")
            (base / f"ImageSets/Main/{name}_{split}.txt").write_text("".join(lines))
    return base


def test_an_image_is_of_a_class_not_of_it_or_only_difficult(base):
    for split, expected in LABELS.items():
        data = open_voc(f"voc:{base}", split)
        assert data.classes == CLASSES
        assert data.labels.dtype == torch.int8
        assert data.labels.tolist() == expected
        assert data.stems.tolist() == list(OBJECTS["trainval" if split == "train" else "test"])
        assert len(data) == len(expected)


def test_the_layout_is_found_where_it_is_unpacked(base):
    root = base.parents[2]
    for name in ("voc:mine", "voc:mine/VOCdevkit", f"voc:{base}"):
        data = open_voc(name, "test", root)
        assert data.file(1) == base / "JPEGImages/000003.jpg"
        assert data.name == name
    assert open_voc("voc:mine", root=root).title == "mine"


def test_an_image_is_resized_twice_and_never_cropped(base):
    data = open_voc(f"voc:{base}")
    ((kept, images),) = data.images(32, 24, workers=0)
    assert kept == [0, 1, 2, 3, 4]
    assert images.shape == (5, 3, 24, 24)
    assert images.dtype == torch.uint8
    for index, found in enumerate(images):
        whole = Image.open(data.file(index))
        shorter = whole.resize((int(32 * whole.width / 50), 32), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(
            np.array(shorter.resize((24, 24), Image.Resampling.BILINEAR))
        ).permute(2, 0, 1)
        assert (found.int() - expected.int()).abs().max() <= 2  # Pillow rounds between its passes
        cropped = whole.resize((24, 24), Image.Resampling.BILINEAR, box=(15, 0, 65, 50))
        assert (
            found.int() - torch.from_numpy(np.array(cropped)).permute(2, 0, 1).int()
        ).abs().max() > 20


def test_workers_keep_the_order_and_a_part_may_be_asked_for(base, monkeypatch):
    monkeypatch.setattr("imsvd_core.data.voc.PART", 2)
    data = open_voc(f"voc:{base}")
    alone, others = (
        list(data.images(32, 24, workers=workers, indices=[4, 0, 2])) for workers in (0, 1)
    )
    assert [kept for kept, _ in others] == [[4, 0], [2]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone, others, strict=True))
    whole = torch.cat([images for _, images in data.images(32, 24, workers=0)])
    assert torch.equal(torch.cat([images for _, images in alone]), whole[[4, 0, 2]])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_an_error_or_left_out(base, workers, caplog, monkeypatch):
    monkeypatch.setattr("imsvd_core.data.voc.PART", 2)
    for stem in ("000005", "000009", "000010"):
        (base / f"JPEGImages/{stem}.jpg").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"000005\.jpg cannot be read"):
        list(open_voc(f"voc:{base}").images(32, 24, workers=workers))
    data = open_voc(f"voc:{base}", on_corrupt="skip")
    ((kept, images),) = data.images(32, 24, workers=workers)
    assert kept == [0, 1]
    assert len(images) == 2
    assert data.unreadable == {2, 3, 4}
    assert sum("is left out" in record.message for record in caplog.records) == 3


def test_a_subset_keeps_names_and_labels_together(base):
    data = open_voc(f"voc:{base}")
    part = data.subset(3, seed=1)
    places = [data.stems.tolist().index(stem) for stem in part.stems]
    assert places == sorted(places)
    assert torch.equal(part.labels, data.labels[places])
    assert data.subset(3, seed=1).stems.tolist() == part.stems.tolist()
    with pytest.raises(ValueError, match="n is 6: take 1 to 5"):
        data.subset(6)


def test_what_is_not_vocs_layout_says_what_is_expected(base):
    def attempt(
        match: str, name: str = f"voc:{base}", error: type[Exception] = ValueError, **settings
    ) -> None:
        with pytest.raises(error, match=match):
            open_voc(name, **settings)

    lists = base / "ImageSets/Main"
    attempt("'cifar10' has another layout: give voc:PATH", "cifar10")
    attempt("split is 'val'", split="val")
    attempt("nowhere is not a folder", "voc:nowhere", FileNotFoundError)
    attempt("lacks JPEGImages or ImageSets", f"voc:{lists}", FileNotFoundError)
    (lists / "dog_trainval.txt").write_text("000001 1\n")
    attempt("dog_trainval.txt lists other images than cat_trainval.txt")
    (lists / "dog_trainval.txt").write_text("000001 2\n")
    attempt("dog_trainval.txt says '000001 2': an image, once, and -1, 0 or 1")
    whole = (lists / "cat_trainval.txt").read_text()
    for name, text, match in (
        (
            "cat",
            whole + whole.splitlines()[0] + "\n",
            "cat_trainval.txt says '000001 .*': an image, once",
        ),
        ("cat", "", "cat_trainval.txt lists no image"),
        ("cat", b"\xff 1\n", "dog_trainval.txt says"),
    ):
        (lists / f"{name}_trainval.txt").write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )
        attempt(match)
    for file in lists.glob("*_test.txt"):
        file.unlink()
    attempt("both splits", error=FileNotFoundError, split="test")
