"""Images streamed from a tree: what is read, what is drawn, what a worker survives and what ends
it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imsvd_core.data import memory as datasets
from imsvd_core.data import tree as folders
from imsvd_core.data import workers as processes
from imsvd_core.data.decoding import decode
from imsvd_core.data.tree import FolderImages, open_folder
from imsvd_core.evaluation import features, knn
from imsvd_core.views import EvalView, TwoViews, imagenet_views

VIEWS = TwoViews(imagenet_views(24))


def picture(seed: int, height: int = 60, width: int = 80) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes, eight train and three val images each, of several sizes and suffixes."""
    for split, count in (("train", 8), ("val", 3)):
        for label in ("cat", "dog"):
            home = tmp_path / "mine" / split / label
            home.mkdir(parents=True)
            for i in range(count):
                name = f"{i}.{('jpg', 'JPEG', 'png')[i % 3]}"
                picture(i + 100 * (label == "dog"), 40 + 5 * i, 70 - 3 * i).save(home / name)
    return tmp_path / "mine"


def crops(
    data: FolderImages, *entries: tuple[int, list[int]], seed: int = 0, workers: int = 0
) -> list:
    plan = ((step, torch.tensor(indices)) for step, indices in entries)
    return list(data.crops(VIEWS, plan, seed=seed, workers=workers))


def test_names_and_labels_are_the_trees_and_nothing_is_decoded(tree):
    (tree / "train/cat/0.jpg").write_bytes(b"no image")
    data = open_folder(f"tree:{tree}")
    assert data.classes == ("cat", "dog")
    assert len(data) == 16
    assert data.labels.tolist() == [0] * 8 + [1] * 8
    assert data.title == "mine"
    assert data.file(9) == tree / "train/dog/1.JPEG"
    assert len(open_folder("tree:mine", "test", tree.parent)) == 6


def test_a_name_costs_its_bytes_and_a_label_eight():
    names, labels = np.full(1000, b"n01440764_10026.JPEG"), torch.zeros(1000, dtype=torch.int64)
    data = FolderImages("tree:x", "x", "train", Path("x"), names, labels, ("n01440764",))
    assert data.names.nbytes + data.labels.nbytes == 28 * len(data)


def test_a_subset_is_that_of_images_in_memory(tree):
    for file in tree.glob("*/*/*"):
        Image.open(file).convert("RGB").resize((16, 16)).save(file)
    data, loaded = open_folder(f"tree:{tree}"), datasets.load(f"folder:{tree}")
    assert torch.equal(loaded.labels, data.labels)
    part, twin = data.subset(7, seed=3), loaded.subset(7, seed=3)
    assert torch.equal(part.labels, twin.labels)
    places = [int((loaded.images == image).flatten(1).all(1).nonzero()[0]) for image in twin.images]
    assert [part.file(i) for i in range(7)] == [data.file(i) for i in places]
    with pytest.raises(ValueError, match="n is 17: take 1 to 16"):
        data.subset(17)


def test_a_crop_depends_on_seed_step_and_image_and_on_nothing_else(tree, monkeypatch):
    data = open_folder(f"tree:{tree}")
    whole = crops(data, (0, list(range(16))), (1, [5, 3]))
    monkeypatch.setattr(folders, "PART", 3)
    monkeypatch.setattr(folders, "CHUNK", 2)
    for first, second in zip(
        whole, crops(data, (0, list(range(16))), (1, [5, 3]), workers=2), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    ((again1, again2),) = crops(data, (1, [3]))  # a resumption, or another rank
    assert torch.equal(again1[0], whole[1][0][1])
    assert torch.equal(again2[0], whole[1][1][1])
    for other in (crops(data, (2, [3])), crops(data, (1, [3]), seed=1)):
        assert not torch.equal(other[0][0], again1)
    assert not torch.equal(again1, again2)
    assert again1.shape == (1, 3, 24, 24)
    assert again1.dtype == torch.uint8


def test_one_views_crops_are_drawn_as_the_first_of_two(tree):
    data, plan = open_folder(f"tree:{tree}"), [(0, torch.arange(16)), (3, torch.tensor([5, 3]))]
    for (alone,), (first, _) in zip(
        data.crops(VIEWS.views[0], plan, seed=1, workers=1),
        crops(data, *((step, indices.tolist()) for step, indices in plan), seed=1),
        strict=True,
    ):
        assert torch.equal(alone, first)


@pytest.mark.parametrize("rows", [range(5, 16), range(1, 16, 3), [7, 2, 2], range(0)])
def test_images_of_a_share_are_those_of_the_whole(tree, monkeypatch, rows):
    monkeypatch.setattr(folders, "PART", 4)
    data, view = open_folder(f"tree:{tree}"), EvalView(32, 28)
    whole = torch.cat(list(data.in_order(view, workers=0)))
    parts = list(data.in_order(view, rows, workers=1))
    assert [len(part) for part in parts] == [
        len(rows[start : start + 4]) for start in range(0, len(rows), 4)
    ]
    assert torch.equal(torch.cat([*parts, whole[:0]]), whole[list(rows)])


def _read(part: int) -> tuple:
    if part == 3:
        raise ValueError("part 3 is bad")
    return str(part), torch.full((2,), part), np.zeros(part)


@pytest.mark.parametrize("workers", [0, 2])
def test_anything_is_streamed_in_order_and_its_tensors_are_sent(workers):
    found = list(processes.stream(_read, range(3), workers, "meta"))
    assert [name for name, _, _ in found] == ["0", "1", "2"]
    assert all(tensor.is_meta for _, tensor, _ in found)
    assert all(isinstance(array, np.ndarray) for _, _, array in found)
    with pytest.raises(ValueError, match="part 3 is bad"):
        list(processes.stream(_read, iter(range(5)), workers))
    assert not multiprocessing.active_children()


def test_crops_are_cut_from_their_own_image_at_its_own_size(tree):
    for i, file in enumerate(
        sorted((tree / "train/cat").iterdir())
    ):  # each image one colour of its own
        Image.new("RGB", Image.open(file).size, (20 * i, 255 - 20 * i, 7)).save(
            file.with_suffix(".png")
        )
        file.unlink() if file.suffix != ".png" else None
    data = open_folder(f"tree:{tree}")
    for some in crops(data, (0, [6, 0, 3]))[0]:
        assert some[:, 0].flatten(1).tolist() == [[20 * i] * 24 * 24 for i in (6, 0, 3)]


def pixels_of_pillow(file: Path) -> torch.Tensor:
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_whatever_a_jpeg_or_png_holds_becomes_what_pillow_makes_of_it(tmp_path):
    for mode, suffix in (
        ("L", "jpg"),
        ("CMYK", "jpg"),
        ("RGB", "jpg"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("1", "png"),
    ):
        file = tmp_path / f"{mode}.{suffix}"
        picture(1).convert(mode).save(file, **({"transparency": 0} if mode == "P" else {}))
        assert torch.equal(decode(str(file)), pixels_of_pillow(file)), mode
    renamed = tmp_path / "png.JPEG"  # ImageNet has one
    picture(1).save(renamed, format="PNG")
    assert torch.equal(decode(str(renamed)), pixels_of_pillow(renamed))


def test_a_spoilt_png_is_an_error_and_not_the_end_of_the_process(tmp_path):
    file = tmp_path / "spoilt.png"
    picture(1).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(99) + content[len(content) // 2 + 99 :])
    with pytest.raises(ValueError, match=r"spoilt\.png cannot be read"):
        decode(str(file))


def broken(file: Path, kind: str) -> None:
    content = file.read_bytes()
    deep = np.zeros((8, 8), np.uint16)
    {
        "truncated": lambda: file.write_bytes(content[: len(content) // 2]),
        "text": lambda: file.write_text("hello"),
        "empty": lambda: file.write_bytes(b""),
        "16 bits": lambda: Image.fromarray(deep).save(file, format="PNG"),
        "gone": file.unlink,
        "a folder": lambda: (file.unlink(), file.mkdir()),
        "lying size": lambda: file.write_bytes(claiming(content, 12_000, 9_000)),
    }[kind]()


def claiming(jpeg: bytes, *size: int) -> bytes:
    """The JPEG with another height and width in its header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", *size) + jpeg[at + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "kind", ["truncated", "text", "empty", "16 bits", "gone", "a folder", "lying size"]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tree, kind, workers):
    data = open_folder(f"tree:{tree}")
    broken(tree / "train/cat/3.jpg", kind)
    with pytest.raises(ValueError, match=r"^.*cat/3\.jpg cannot be read.*replace or remove it"):
        crops(data, (0, [1, 3]), workers=workers)
    assert not multiprocessing.active_children()
    data = replace(data, on_corrupt="skip")
    assert len(crops(data, (0, [1, 3]), workers=workers)[0][0]) == 2
    assert data.unreadable == {3}


def test_an_unreadable_file_may_be_replaced_and_is_counted_and_told_once(tree, caplog):
    for name in ("3.jpg", "4.JPEG"):
        broken(tree / "train/cat" / name, "truncated")
    data = open_folder(f"tree:{tree}", on_corrupt="skip")
    (found, _), (again, _) = crops(data, (0, [1, 3, 5]), (0, [1, 3, 5]), workers=1)
    assert found.shape == (3, 3, 24, 24)
    assert torch.equal(found, again)
    assert data.skipped == 2
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "cat/3.jpg cannot be read and is replaced by the next" in said[0]
    for file in (tree / "val").glob("*/*"):
        broken(file, "empty")
    with pytest.raises(ValueError, match="val holds no image that can be read, of 6 files"):
        list(
            open_folder(f"tree:{tree}", "test", on_corrupt="skip").in_order(
                EvalView(24, 24), workers=0
            )
        )


def test_closing_early_leaves_no_process_and_the_trainers_chance_alone(tree):
    before = torch.get_rng_state()
    steps = iter(range(10**9))
    stream = open_folder(f"tree:{tree}").crops(
        VIEWS, ((k, torch.arange(4)) for k in steps), seed=0, workers=2
    )
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    assert 1 <= next(steps) <= 10  # the plan is read ahead, but not far
    stream.close()
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(
    not hasattr(signal, "sigwaitinfo"), reason="without sigwaitinfo a worker obeys every SIGTERM"
)
def test_a_worker_heeds_the_trainer_alone(tree):
    stream = open_folder(f"tree:{tree}").crops(
        VIEWS, ((k, torch.arange(4)) for k in range(40)), seed=0, workers=1
    )
    next(stream)
    (worker,) = multiprocessing.active_children()
    for name in ("TERM", "INT", "USR1", "USR2"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(stream)) == 39

    stream = open_folder(f"tree:{tree}").crops(
        VIEWS, ((k, torch.arange(4)) for k in range(10**9)), seed=0, workers=1
    )
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(
        worker.pid, signal.SIGTERM
    )  # as multiprocessing does where a program ends with its stream open
    worker.join(5)
    assert worker.exitcode == 0
    stream.close()


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="without /proc nobody sees what a thread blocks"
)
def test_no_thread_of_a_worker_dies_of_the_jobs_sigterm(tree):
    """Where the trainer computes with several threads, torch starts some in the worker before it is
    told whom to heed.
    """
    before, mask = torch.get_num_threads(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    torch.set_num_threads(2)
    try:
        torch.randn(300, 300) @ torch.randn(300, 300)
        stream = open_folder(f"tree:{tree}").crops(
            VIEWS, ((k, torch.arange(4)) for k in range(40)), seed=0, workers=1
        )
        next(stream)
        (worker,) = multiprocessing.active_children()
        blocked = [
            int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1
            for task in Path(f"/proc/{worker.pid}/task").iterdir()
            for line in (task / "status").read_text().splitlines()
            if line.startswith("SigBlk")
        ]
        stream.close()
    finally:
        torch.set_num_threads(before)
    assert len(blocked) > 1
    assert blocked.count(0) == 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask  # the trainer goes on hearing


def test_a_tree_that_cannot_be_streamed_says_what_is_expected(tree):
    def attempt(
        match: str,
        name: str = f"tree:{tree}",
        split: str = "train",
        error: type[Exception] = ValueError,
    ) -> None:
        with pytest.raises(error, match=match):
            open_folder(name, split, tree.parent)

    attempt("'cifar10' has another layout: give tree:PATH", "cifar10")
    attempt("nowhere is not a folder", "tree:nowhere", error=FileNotFoundError)
    attempt("split is 'validation'", split="validation")
    attempt(
        "make .*train/cat/test or val, one folder a class",
        f"tree:{tree}/train/cat",
        "test",
        error=FileNotFoundError,
    )
    (tree / "val/bird").mkdir()
    picture(0).save(tree / "val/bird/0.png")
    for split in ("train", "test"):
        attempt("differ in classes .bird.*nothing to train on for 'bird'", split=split)


def test_an_unlabelled_test_folder_does_not_hide_val(tree):
    (tree / "test").mkdir()
    picture(0).save(tree / "test/0.jpg")
    assert open_folder(f"tree:{tree}", "test").home == tree / "val"


def test_evaluation_takes_streamed_images_for_those_in_memory(tree, monkeypatch):
    for file in tree.glob("*/*/*"):
        Image.open(file).convert("RGB").resize((50, 40)).save(file.with_suffix(".png"))
        file.unlink() if file.suffix != ".png" else None
    monkeypatch.setattr(folders, "PART", 5)
    view, backbone = EvalView(32, 28, interpolation="bicubic"), torch.nn.Flatten()
    streamed = [open_folder(f"tree:{tree}", split) for split in ("train", "test")]
    loaded = [datasets.load(f"folder:{tree}", split) for split in ("train", "test")]
    for some, others in zip(streamed, loaded, strict=True):
        ours, theirs = (features.embed(backbone, data, view) for data in (some, others))
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 2.5 / 255 / 0.22
    config = knn.KNNConfig(neighbors=(3,), gallery=10)
    assert knn.evaluate(backbone, streamed, config, view=view) == knn.evaluate(
        backbone, loaded, config, view=view
    )
