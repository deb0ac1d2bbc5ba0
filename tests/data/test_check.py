"""Data roots in miniature: a whole one passes, each kind of fault is reported with what to do about
it.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imsvd_core.cli import main
from imsvd_core.data import check as prepared
from imsvd_core.data.check import SPECS, Report, Spec

WNIDS = ("n01440764", "n01443537", "n02105855")


def draw(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        file
    )


def imagenet(root: Path) -> Spec:
    for wnid in WNIDS:
        for split, count in (("train", 3), ("val", 2)):
            for i in range(count):
                draw(root / f"{split}/{wnid}/{wnid}_{i}.JPEG")
    return replace(SPECS["imagenet"], classes=3, counts={"train": 9, "val": 6})


def voc07(root: Path) -> Spec:
    base = root / "VOCdevkit/VOC2007"
    lists = base / "ImageSets/Main"
    lists.mkdir(parents=True)
    (base / "Annotations").mkdir()
    for split, stems in (("trainval", ["000001", "000003"]), ("test", ["000002"])):
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for name in ("cat", "dog"):
            (lists / f"{name}_{split}.txt").write_text("".join(f"{stem} -1\n" for stem in stems))
        for stem in stems:
            draw(base / f"JPEGImages/{stem}.jpg")
            (base / f"Annotations/{stem}.xml").write_text(
                "<annotation><object><name>cat</name></object></annotation>"
            )
    return replace(SPECS["voc07"], classes=2, counts={"trainval": 2, "test": 1})


def coco(root: Path) -> Spec:
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 3), ("val", 2)):
        names = [f"{i:012d}.jpg" for i in range(count)]
        for name in names:
            draw(root / f"{split}2017" / name)
        drawn = {"category_id": 7, "bbox": [1, 1, 5, 5], "area": 25}
        drawn["segmentation"] = [[1, 1, 6, 1, 6, 6, 1, 6]]
        told = {
            "images": [
                {"id": i, "file_name": name, "height": 20, "width": 30}
                for i, name in enumerate(names)
            ],
            "categories": [{"id": 1}, {"id": 7}],
            "annotations": [{"id": 10 * i, "image_id": i, **drawn} for i in range(count)],
        }
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(told))
    return replace(SPECS["coco"], classes=2, counts={"train": 3, "val": 2})


def look(
    name: str, root: Path, spoil: Callable[[Path], object] = lambda root: None, **settings
) -> Report:
    if root.exists():
        shutil.rmtree(root)
    spec = {"imagenet": imagenet, "voc07": voc07, "coco": coco}[name](root)
    spoil(root)
    return prepared.check(name, root, spec=spec, workers=1, **settings)


@pytest.mark.parametrize("name", ["imagenet", "voc07", "coco"])
@pytest.mark.parametrize("decode", ["none", "header", "full"])
def test_a_whole_root_is_well_and_says_so_in_its_stamp(tmp_path, name, decode):
    report = look(name, tmp_path / "root", decode=decode)
    assert report.ok, report
    assert "all is well" in str(report)
    assert prepared.checked(name, tmp_path / "root") == report
    assert prepared.checked("places205", tmp_path / "root") is None


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def drop_image(root: Path) -> None:
    (root / "val2017/000000000001.jpg").unlink()


def swap(place: Path, make: Callable[[Path], object] | None) -> None:
    """Put a file where a folder was, or what `make` makes where a file was."""
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    make(place) if make else place.write_text("")


def flatten_val(root: Path) -> None:
    for file in (root / "val").glob("*/*"):
        file.rename(root / "val" / file.name)
    for folder in (root / "val").glob("n*[0-9]"):
        folder.rmdir()


BASE = "VOCdevkit/VOC2007"
FAULTS = [
    (
        "imagenet",
        lambda r: shutil.rmtree(r / "val/n01443537"),
        {"missing class": "val/n01443537", "wrong count": "val classes: 2, expected 3"},
    ),
    (
        "imagenet",
        lambda r: (r / "train/n01440764/n01440764_0.JPEG").unlink(),
        {"wrong count": "train images: 8, expected 9"},
    ),
    (
        "imagenet",
        lambda r: (r / "val/n01440764/n01440764_0.JPEG").rename(r / "val/n01443537/x.JPEG"),
        {"class of the wrong size": "n01440764: 1 images, expected 2"},
    ),
    (
        "imagenet",
        flatten_val,
        {"image outside class folders": "val/n01440764_0.JPEG", "missing class": "val/n01440764"},
    ),
    ("imagenet", lambda r: draw(r / "train/cats/0.jpg"), {"folder that is no class": "train/cats"}),
    ("imagenet", lambda r: shutil.rmtree(r / "train"), {"missing folder": "root/train"}),
    (
        "voc07",
        lambda r: (r / BASE / "JPEGImages/000002.jpg").unlink(),
        {"annotation without image": "000002", "missing image": "000002"},
    ),
    (
        "voc07",
        lambda r: (r / BASE / "Annotations/000003.xml").unlink(),
        {"missing annotation": "000003"},
    ),
    (
        "voc07",
        lambda r: rewrite(r / BASE / "Annotations/000003.xml", lambda b: b[:30]),
        {"unreadable annotation": "000003.xml"},
    ),
    (
        "voc07",
        lambda r: rewrite(
            r / BASE / "Annotations/000003.xml", lambda b: b.replace(b"cat", b"yeti")
        ),
        {"unknown class": "yeti in "},
    ),
    (
        "voc07",
        lambda r: (r / BASE / "ImageSets/Main/dog_test.txt").unlink(),
        {"wrong count": "test classes: 1, expected 2"},
    ),
    (
        "voc07",
        lambda r: rewrite(r / BASE / "ImageSets/Main/dog_trainval.txt", lambda b: b[10:]),
        {"unusable lists": "dog_trainval.txt lists other images than cat_trainval.txt"},
    ),
    (
        "voc07",
        lambda r: [f.unlink() for f in r.rglob("*_test.txt")],
        {"unusable lists": "lacks JPEGImages or ImageSets/Main/*_test.txt"},
    ),
    (
        "voc07",
        lambda r: [f.unlink() for f in r.rglob("dog_*")],
        {"wrong count": "classes: 1, expected 2"},
    ),
    (
        "voc07",
        lambda r: shutil.rmtree(r / BASE / "Annotations"),
        {"missing folder": "Annotations", "missing annotation": "000001"},
    ),
    (
        "coco",
        drop_image,
        {
            "missing image": "val2017/000000000001.jpg",
            "wrong count": "val images: 1",
        },
    ),
    (
        "coco",
        lambda r: draw(r / "train2017/9.jpg"),
        {"image without annotation": "9.jpg", "wrong count": "train images: 4"},
    ),
    (
        "coco",
        lambda r: rewrite(r / "annotations/instances_train2017.json", lambda b: b[:-9]),
        {"unreadable annotation": "instances_train"},
    ),
    (
        "coco",
        lambda r: rewrite(
            r / "annotations/instances_train2017.json",
            lambda b: b.replace(b'image_id": 2', b'image_id": 5'),
        ),
        {"annotation of no image": "20 in "},
    ),
    (
        "coco",
        lambda r: rewrite(
            r / "annotations/instances_val2017.json", lambda b: b.replace(b'{"id": 1}, ', b"")
        ),
        {"wrong count": "val categories: 1, expected 2"},
    ),
    (
        "coco",
        lambda r: rewrite(
            r / "annotations/instances_train2017.json",
            lambda b: b.replace(b'{"id": 1, "file', b'{"id": 2, "file'),
        ),
        {
            "image listed twice": "id 2 in ",
            "annotation of no image": "10 in ",
        },
    ),
    (
        "coco",
        lambda r: rewrite(
            r / "annotations/instances_train2017.json", lambda b: b.replace(b'"bbox"', b'"box"')
        ),
        {"unusable annotation": "annotation 0 has no bbox"},
    ),
    (
        "coco",
        lambda r: rewrite(
            r / "annotations/instances_val2017.json",
            lambda b: b.replace(b'category_id": 7', b'category_id": 8'),
        ),
        {"unusable annotation": "annotation 0 is of an unknown category, 8"},
    ),
    ("coco", lambda r: swap(r / "val2017", None), {"missing folder or file": "root/val2017"}),
    (
        "coco",
        lambda r: swap(r / "annotations/instances_val2017.json", Path.mkdir),
        {"missing folder or file": "annotations/instances_val2017.json"},
    ),
    (
        "voc07",
        lambda r: rewrite(r / BASE / "ImageSets/Main/dog_test.txt", lambda b: b"\xff\xfe" + b),
        {"unusable lists": "dog_test.txt lists other images"},
    ),
    (
        "voc07",
        lambda r: swap(r / BASE / "Annotations/000003.xml", Path.mkdir),
        {"unreadable annotation": "000003.xml (IsADirectoryError"},
    ),
    (
        "voc07",
        lambda r: rewrite(
            r / BASE / "ImageSets/Main/cat_trainval.txt", lambda b: b.replace(b"3 -1", b"3 7")
        ),
        {"unusable lists": "cat_trainval.txt says '000003 7': an image, once, and -1, 0 or 1"},
    ),
    (
        "voc07",
        lambda r: rewrite(
            r / BASE / "ImageSets/Main/cat_test.txt", lambda b: b.replace(b" -1", b"")
        ),
        {"unusable lists": "cat_test.txt says '000002'"},
    ),
    (
        "voc07",
        lambda r: [
            rewrite(r / BASE / f"ImageSets/Main/{name}test.txt", lambda b: b.replace(b"2", b"1"))
            for name in ("", "cat_", "dog_")
        ],
        {"image of both splits": "000001"},
    ),
    (
        "coco",
        lambda r: shutil.rmtree(r / "annotations"),
        {"missing folder or file": "annotations/instances_train2017.json"},
    ),
]


@pytest.mark.parametrize(("name", "spoil", "expected"), FAULTS)
def test_each_fault_of_a_root_is_reported_with_its_remedy_and_no_other(
    tmp_path, name, spoil, expected
):
    report = look(name, tmp_path / "root", spoil)
    found = {problem.what: problem.first[0] for problem in report.problems}
    for what, example in expected.items():
        assert example in found.pop(what)
    assert set(found) <= {"wrong count"}
    assert all(problem.remedy in str(report) for problem in report.problems)
    assert "not ready" in str(report)
    assert not report.ok
    assert not prepared.checked(name, tmp_path / "root").ok


def test_no_good_image_is_to_be_removed_for_a_fault_of_its_list(tmp_path):
    report = look(
        "coco",
        tmp_path / "root",
        lambda r: rewrite(
            r / "annotations/instances_train2017.json",
            lambda b: b.replace(b'"id": 1, "file', b'"id": 2, "file'),
        ),
    )
    assert "image listed twice" in str(report)
    assert "remove" not in str(report)
    assert "without annotation" not in str(report)


def spoilt_png(_: bytes) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        file, format="PNG"
    )
    content = file.getvalue()
    return content[: len(content) // 2] + bytes(99) + content[len(content) // 2 + 99 :]


def as_mpo(_: bytes) -> bytes:
    """Two pictures in one file, as of a stereo camera; it begins with a JPEG."""
    file, picture = io.BytesIO(), Image.new("RGB", (30, 20))
    picture.save(file, format="MPO", save_all=True, append_images=[picture])
    return file.getvalue()


def with_thumbnail(jpeg: bytes) -> bytes:
    inner = b"Exif\0\0" + jpeg
    return jpeg[:2] + b"\xff\xe1" + (len(inner) + 2).to_bytes(2, "big") + inner + jpeg[2:]


def big_claim(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + b"\xff\xdc\xff\xdc" + jpeg[at + 4 :]


def grey(jpeg: bytes) -> bytes:
    """Its second half is gone and its end kept: nothing sees that, as the help says."""
    return jpeg[:-300] + jpeg[-2:]


@pytest.mark.parametrize(
    ("change", "seen_by"),
    [
        (spoilt_png, {"full"}),
        (lambda b: b[:-20], {"header", "full"}),
        (lambda b: b"hello", {"header", "full"}),
        (lambda b: b"", {"header", "full"}),
        (lambda b: b + b"tail", set()),
        (lambda b: b + bytes(9999), set()),
        (as_mpo, set()),
        (big_claim, {"header", "full"}),
        (lambda b: with_thumbnail(b)[:-20], {"header", "full"}),
        (with_thumbnail, set()),
        (grey, set()),
        (lambda b: b[:25] + b[-2:], {"header", "full"}),
        (lambda b: b[:2] + b[600:], {"full", "header"}),
    ],
)
def test_an_unreadable_image_is_named_by_what_reads_far_enough(tmp_path, change, seen_by):
    for decode in ("none", "header", "full"):
        report = look(
            "imagenet",
            tmp_path / "root",
            lambda root: rewrite(root / "val/n01443537/n01443537_1.JPEG", change),
            decode=decode,
        )
        assert [problem.what for problem in report.problems] == ["unreadable image"] * (
            decode in seen_by
        ), decode
        assert all(
            "n01443537_1.JPEG (" in problem.first[0] and problem.count == 1
            for problem in report.problems
        )


def test_an_image_of_any_format_may_be_named_jpeg_and_a_pdf_is_none(tmp_path):
    def rename(root: Path) -> None:
        for kind, number in (("PNG", 0), ("PDF", 1), ("GIF", 2)):
            Image.new("RGB", (8, 8)).save(
                root / f"train/{WNIDS[0]}/{WNIDS[0]}_{number}.JPEG", format=kind
            )

    (problem,) = look("imagenet", tmp_path / "root", rename).problems
    assert problem.count == 1
    assert "_1.JPEG" in problem.first[0]


def test_ten_examples_and_the_count_are_told(tmp_path):
    def spoil(root: Path) -> None:
        for file in root.rglob("*.JPEG"):
            file.write_text("hello")

    report = look("imagenet", tmp_path / "root", spoil)
    (problem,) = report.problems
    assert problem.count == 15
    assert len(problem.first) == 10
    assert "unreadable image (15):" in str(report)
    assert "and 5 more" in str(report)


def test_a_stamp_that_is_none_and_a_root_that_cannot_be_written_are_borne(tmp_path, monkeypatch):
    assert prepared.checked("imagenet", tmp_path) is None
    for content in ("{", "[]", '{"name": "imagenet"}'):
        (tmp_path / prepared.STAMP).write_text(content)
        assert prepared.checked("imagenet", tmp_path) is None

    def refuse(path: Path):
        raise PermissionError(path)

    monkeypatch.setattr(prepared, "atomic_write", refuse)
    assert look("imagenet", tmp_path / "root").ok
    assert prepared.checked("imagenet", tmp_path / "root") is None


def test_published_counts_and_layouts_agree_with_each_other():
    assert SPECS["imagenet"].counts["val"] == 50 * SPECS["imagenet"].classes
    assert SPECS["places205"].counts["val"] == 100 * SPECS["places205"].classes
    assert sum(SPECS["voc07"].counts.values()) == 9963
    for spec in SPECS.values():
        assert "/data/root/" in prepared.how_to(spec, "/data/root")
        assert "{root}" not in prepared.how_to(spec, "x")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["data", *words])
    return stop.value.code


def test_the_command_exits_with_0_or_2_and_writes_its_report(tmp_path, capsys):
    imagenet(tmp_path / "root")
    subset = ["--classes", "3", "--counts", "train", "9", "val", "6", "--no-progress"]
    assert (
        run(
            "check",
            "imagenet",
            str(tmp_path / "root"),
            *subset,
            "--json",
            str(tmp_path / "report.json"),
        )
        == 0
    )
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["ok"]
    assert written["found"]["train images"] == 9
    assert "all is well" in capsys.readouterr().out
    assert run("check", "imagenet", str(tmp_path / "root"), "--no-progress") == 2
    told = capsys.readouterr().out
    assert "train images: 9, expected 1,281,167" in told
    assert "ILSVRC2012_img_val.tar" in told


def test_without_a_root_the_command_says_how_to_prepare_one(tmp_path, capsys):
    for name, archive in (
        ("imagenet", "ILSVRC2012_img_train.tar"),
        ("places205", "imagesPlaces205_resize.tar.gz"),
        ("voc07", "VOCDetection"),
        ("coco", "annotations_trainval2017.zip"),
    ):
        assert run("check", name, str(tmp_path / "nowhere")) == 2
        said = capsys.readouterr().err
        assert archive in said
        assert "nowhere is not a folder" in said
        assert "Traceback" not in said
    assert run("check", "svhn", str(tmp_path)) == 2
    assert "There are: imagenet, places205, voc07, coco, folder:PATH" in capsys.readouterr().err
    assert run() == 2
    assert run("--help") == 0
    assert "verify a data root" in capsys.readouterr().out
    assert run("check", "--help") == 0
    assert "COCO 2017" in capsys.readouterr().out
    with pytest.raises(ValueError, match="decode is 'half': choose none"):
        prepared.check("coco", tmp_path, decode="half")


def test_anybodys_folder_is_checked_without_published_counts(tmp_path, capsys):
    root = tmp_path / "mine"
    for name in ("cat", "dog"):
        for split, count in (("train", 3), ("val", 1)):
            for number in range(count):
                draw(root / split / name / f"{number}.png")
    (root / "train/cat/notes.txt").write_text("x")
    (root / "val/dog/0.png").unlink()
    assert run("check", f"folder:{root}", "--no-progress") == 0
    told = capsys.readouterr().out
    for fact in ("train classes 2", "train images 6", "train passed over: .txt 1", "val images 1"):
        assert fact in told
    assert "val passed over: classes without image 1" in told
    assert not list(root.glob(".*"))
    assert run("check", f"folder:{root}", "--no-progress", "--counts", "train", "7") == 2
    assert "train images: 6, expected 7" in capsys.readouterr().out
    rewrite(root / "train/dog/1.png", lambda content: content[:-60])
    draw(root / "val/bird/0.png")
    assert run("check", f"tree:{root}", "--no-progress") == 2
    told = capsys.readouterr().out
    assert "unusable folder" in told
    assert "nothing to train on for 'bird'" in told
    shutil.rmtree(root / "val")
    assert run("check", f"tree:{root}", "--no-progress") == 2
    told = capsys.readouterr().out
    assert "train/dog/1.png" in told
    assert "test images 0" in told
    assert "unpack" not in told


def test_anybodys_lists_and_listings_are_checked_as_they_are_read(tmp_path, capsys, monkeypatch):
    voc07(tmp_path / "voc")
    shutil.rmtree(tmp_path / "voc" / BASE / "Annotations")  # the lists tell all that is read
    draw(tmp_path / "voc" / BASE / "JPEGImages/7.jpg")
    monkeypatch.setenv("IMSVD_DATA", str(tmp_path))
    assert run("check", "voc:voc", "--no-progress") == 0
    told = capsys.readouterr().out
    assert "trainval classes 2, trainval images 2" in told
    assert "trainval passed over: classes without a positive 2" in told
    assert "images passed over: in no list 1" in told
    coco(tmp_path / "coco")
    draw(tmp_path / "coco/val2017/7.jpg")
    assert run("check", f"coco:{tmp_path / 'coco'}", "--no-progress") == 0
    told = capsys.readouterr().out
    assert "val truth against itself in percent 100" in told
    assert "val passed over: images not listed 1" in told
    listing = tmp_path / "coco/annotations/instances_val2017.json"
    rewrite(listing, lambda content: content.replace(b'"bbox"', b'"box"', 1))
    assert run("check", "coco:coco", "--no-progress") == 2
    assert "annotation 0 has no bbox" in capsys.readouterr().out
