"""Folders of images as people have them: without labels or a test split, of many formats, with
what systems leave among them, and too large.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imsvd_core.data import open_data
from imsvd_core.data.decoding import decode
from imsvd_core.evaluation.base import unlabelled
from imsvd_core.evaluation.knn import KNNConfig
from imsvd_core.evaluation.linear import LinearConfig


def save(file: Path, size: tuple[int, int] = (8, 8)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(file)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, three train and two val images each."""
    for name in ("cat", "dog"):
        for number in range(3):
            save(tmp_path / f"mine/train/{name}/{number}.png")
        for number in range(2):
            save(tmp_path / f"mine/val/{name}/{number}.png")
    return tmp_path / "mine"


@pytest.mark.parametrize("scheme", ["folder", "tree"])
@pytest.mark.parametrize("place", ["", "train/"])
def test_images_in_no_class_folder_have_no_labels(tmp_path, scheme, place):
    for number in range(5):
        save(tmp_path / f"{place}{number}.jpg")
    data = open_data(f"{scheme}:{tmp_path}")
    assert len(data) == 5
    assert data.classes == ()
    assert data.labels.tolist() == [-1] * 5
    assert len(data.subset(3)) == 3
    with pytest.raises(FileNotFoundError, match=r"make .*/test or val"):
        open_data(f"{scheme}:{tmp_path}", "test")


def test_class_folders_without_a_folder_for_training_are_those_of_training(tmp_path):
    for name in ("cat", "dog"):
        save(tmp_path / f"{name}/0.png")
    data = open_data(f"tree:{tmp_path}")
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 1]


def empty_test_class(root: Path) -> None:
    for file in (root / "val/dog").iterdir():
        file.unlink()


def no_test_class(root: Path) -> None:
    empty_test_class(root)
    (root / "val/dog").rmdir()


def empty_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "bird").mkdir()


@pytest.mark.parametrize(
    ("change", "split", "images", "told"),
    [
        (empty_test_class, "test", 2, {"classes without image": 1}),
        (no_test_class, "test", 2, {"classes without image": 1}),
        (empty_class, "train", 6, {"folders without image": 1}),
        (empty_class, "test", 4, {"folders without image": 1}),
        (lambda root: save(root / "train/5.png"), "train", 6, {"images in no class folder": 1}),
    ],
)
def test_a_class_without_images_is_counted_and_no_fault(root, change, split, images, told, caplog):
    change(root)
    data = open_data(f"tree:{root}", split)
    assert data.classes == ("cat", "dog")
    assert len(data) == images
    assert dict(data.passed_over) == told
    (line,) = [record.message for record in caplog.records]
    assert next(iter(told)) in line


def flatten(split: Path) -> None:
    for file in sorted(split.glob("*/*")):
        file.rename(split / f"{file.parent.name}{file.name}")
    for folder in split.iterdir():
        if folder.is_dir():
            folder.rmdir()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: flatten(root / "val"), r"test images of mine are in no class folder.*/val/<"),
        (lambda root: flatten(root / "train"), "train images of mine are in no class folder"),
        (
            lambda root: [flatten(root / split) for split in ("train", "val")],
            "train images of mine are in no class folder",
        ),
        (
            lambda root: [
                file.unlink() for split in ("train", "val") for file in (root / split).glob("dog/*")
            ],
            "all images of mine are of one class, 'cat'",
        ),
    ],
)
@pytest.mark.parametrize("scheme", ["folder", "tree"])
def test_no_figure_comes_of_images_without_labels_or_of_one_class(root, scheme, change, said):
    change(root)
    data = [open_data(f"{scheme}:{root}", split) for split in ("train", "test")]
    for config in (KNNConfig(neighbors=(2,)), LinearConfig()):
        with pytest.raises(ValueError, match=said):
            config.choose(*data)
    assert "no test split" in unlabelled(data[0], None) or not data[0].classes


@pytest.mark.parametrize(
    "suffix", ["jpg", "JPEG", "jfif", "png", "webp", "tif", "tiff", "bmp", "gif", "ppm", "jp2"]
)
def test_whatever_pillow_reads_is_an_image(root, suffix):
    save(root / f"train/cat/more.{suffix}")
    data = open_data(f"tree:{root}")
    assert len(data) == 7
    assert data.passed_over == ()
    (place,) = [place for place in range(7) if data.file(place).stem == "more"]
    red, green, blue = data.decode(place).float().mean((1, 2))
    assert red > 190
    assert max(green, blue) < 45


def test_what_is_passed_over_is_counted_by_kind_and_told_once(root, caplog):
    save(root / "train/cat/@eaDir/0.png/thumb.png")
    save(root / "train/@eaDir/0.png")
    save(root / "train/cat/.hidden.png")
    (root / "train/cat/notes.txt").write_text("x")
    (root / "train/dog/film.MP4").write_text("x")
    (root / "train/dog/film2.mp4").write_text("x")
    (root / "train/cat/back").symlink_to(root / "train")
    (root / "train/cat/self").symlink_to(root / "train/cat")
    (root / "train/loop").symlink_to(root)
    for _ in range(2):
        data = open_data(f"tree:{root}")
    assert len(data) == 6
    assert data.classes == ("cat", "dog")
    assert dict(data.passed_over) == {
        "system folders": 1,
        "links to a folder above": 2,
        ".txt": 1,
        ".mp4": 2,
    }
    assert dict(open_data(f"folder:{root}", stream=False).passed_over) == dict(data.passed_over)
    (line,) = [record.message for record in caplog.records]
    assert ".mp4 2" in line


def test_links_that_lead_in_a_circle_end(root, tmp_path):
    save(tmp_path / "other/9.png")
    (tmp_path / "other/cat").symlink_to(root / "train/cat")
    (root / "train/cat/other").symlink_to(tmp_path / "other")
    data = open_data(f"tree:{root}")
    assert len(data) == 7
    assert dict(data.passed_over) == {"links to a folder above": 1}


def test_a_file_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    deep, large = tmp_path / "deep.png", tmp_path / "large.png"
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep)
    save(large, (30, 20))
    (tmp_path / "page.png").write_text("<html>")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for file, cause in (
        (deep, r"mode I;16, of more than 8 bits"),
        (large, r"30 x 20 pixels, more than 500; if they are right, set IMSVD_MAX_PIXELS"),
        (tmp_path / "page.png", "it is none of JPEG, PNG, WEBP"),
        (tmp_path / "gone.png", "No such file"),
    ):
        with pytest.raises(ValueError, match=rf"{file.name} cannot be read .*{cause}"):
            decode(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # beyond twice that Pillow itself refuses
    with pytest.raises(ValueError, match=r"exceeds limit.*set IMSVD_MAX_PIXELS"):
        decode(large)
    monkeypatch.setenv("IMSVD_MAX_PIXELS", "1e9")
    with pytest.raises(ValueError, match="IMSVD_MAX_PIXELS='1e9' must be a number of pixels"):
        decode(large)
    for limit in ("600", "0"):
        monkeypatch.setenv("IMSVD_MAX_PIXELS", limit)
        assert decode(large).shape == (3, 20, 30)
