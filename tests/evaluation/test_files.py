"""What evaluations make of files as people have them: torn ones, pictures that were exchanged."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

from imsvd_core.data import open_data
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.evaluation import knn
from imsvd_core.evaluation.base import Setup
from imsvd_core.evaluation.detection.protocol import DetectionConfig
from imsvd_core.evaluation.knn import KNNConfig
from imsvd_core.evaluation.linear import LinearConfig
from imsvd_core.evaluation.svm import SVMConfig
from imsvd_core.recipes import EvaluationRecipe, EvalViewConfig, recipe
from imsvd_core.results import read_result
from imsvd_core.runs.backbones import TrainedBackbone
from imsvd_core.runs.evaluate import evaluate
from imsvd_core.views import EvalView, ViewConfig

COLOURS = {"a": (200, 30, 30), "b": (30, 30, 200)}
NEAREST = KNNConfig(neighbors=(3,))
PROBE = LinearConfig(
    OptimConfig(name="sgd", lr=1.0, weight_decay=0.0, warmup_epochs=0),
    LoopConfig(epochs=20, batch_size=4, precision="fp32", device="cpu"),
    view=ViewConfig(size=8, scale=(0.8, 1.0)),
)
VIEW = EvalView(8, 8)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No worker processes: they would cost more than they decode."""
    monkeypatch.setattr("imsvd_core.data.workers.share_of_cores", lambda: 0)


@pytest.fixture
def solid(tmp_path: Path) -> Path:
    """Two classes of one colour each, four train and two val images."""
    for split, count in (("train", 4), ("val", 2)):
        for name, colour in COLOURS.items():
            (tmp_path / "solid" / split / name).mkdir(parents=True)
            for number in range(count):
                file = tmp_path / "solid" / split / name / f"{number}.png"
                Image.new("RGB", (12 + number, 12), colour).save(file)
    return tmp_path / "solid"


def tear(root: Path) -> None:
    """Cut the last file of every class short."""
    for folder in root.glob("*/*"):
        last = max(folder.iterdir())
        last.write_bytes(last.read_bytes()[:-30])


def exchange(folder: Path) -> None:
    """Let a and b change their names."""
    (folder / "a").rename(folder / "c")
    (folder / "b").rename(folder / "a")
    (folder / "c").rename(folder / "b")


def backbone() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@pytest.mark.parametrize("scheme", ["tree", "folder"])
def test_torn_images_are_left_out_of_a_labelled_evaluation(solid, tmp_path, scheme):
    for file in solid.glob("*/*/*"):  # of one size, which memory can hold
        Image.open(file).resize((12, 12)).save(file)
    tear(solid)
    data = [open_data(f"{scheme}:{solid}", split, on_corrupt="skip") for split in ("train", "test")]
    figures = knn.evaluate(backbone(), data, NEAREST, view=VIEW)
    assert figures == {"knn_3": 100, "gallery": 6, "queries": 2}
    for config in (PROBE, replace(PROBE, augment=True)):
        figures = config.run(backbone(), data, Setup(tmp_path / "run", VIEW))
        assert (figures["linear"], figures["train_images"], figures["test_images"]) == (100, 6, 2)


def test_an_image_that_stands_for_a_torn_one_is_of_its_class(solid):
    tear(solid)
    train = open_data(f"tree:{solid}", on_corrupt="skip")
    (images,) = train.in_order(VIEW, workers=0)
    reddish = images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2))
    assert reddish.tolist() == (train.labels == 0).tolist()
    assert train.skipped == 2


def judged(config, root, folder, **settings):
    trained = TrainedBackbone(recipe("cifar10", "smoke"), backbone(), folder, is_ours=False)
    wanted = EvaluationRecipe(config, f"tree:{root}", EvalViewConfig(resize=8, size=8))
    path = evaluate("probe", trained, wanted, device="cpu", progress=False, **settings)
    return read_result(path)["figures"]


@pytest.mark.parametrize(
    "config",
    [replace(NEAREST, gallery=8, queries=4), replace(PROBE, train_images=8, test_images=4)],
)
def test_numbers_of_images_that_are_asked_for_count_the_torn_ones(solid, tmp_path, config):
    tear(solid)
    parts = judged(config, solid, tmp_path, on_corrupt="skip")["data"]
    assert [parts[split]["images"] for split in ("train", "test")] == [6, 2]
    assert [parts[split]["skipped"] for split in ("train", "test")] == [2, 2]


def test_pictures_that_were_exchanged_under_their_names_are_judged_anew(solid, tmp_path):
    for file in solid.glob("*/*/*"):
        os.utime(file, (0, 0))  # only the pixels tell
    assert judged(PROBE, solid, tmp_path)["linear"] == 100
    for split in ("train", "val"):
        exchange(solid / split)
    assert judged(PROBE, solid, tmp_path)["linear"] == 100


@pytest.mark.parametrize("config", [NEAREST, PROBE])
def test_a_result_says_what_its_figures_rest_on(solid, tmp_path, config):
    tear(solid)
    (solid / "train/a/notes.txt").write_text("x")
    assert judged(config, solid, tmp_path, on_corrupt="skip")["data"] == {
        "resolution": 8,
        "classes": 2,
        "train": {"split": "train", "images": 6, "skipped": 2, "passed_over": {".txt": 1}},
        "test": {"split": "val", "images": 2, "skipped": 2, "passed_over": {}},
    }


def test_every_evaluation_knows_its_resolution(tmp_path):
    setup = Setup(tmp_path, EvalView(64, 56))
    for config, pixels in (
        (NEAREST, 56),
        (PROBE, 56),
        (SVMConfig(resize=128, size=112), 112),
        (DetectionConfig(), 800),
    ):
        assert config.resolution(setup) == pixels


def test_overwrite_does_everything_anew(solid, tmp_path, monkeypatch):
    first = judged(PROBE, solid, tmp_path)
    (head,) = (tmp_path / "probe").iterdir()
    (head / "left").touch()
    assert judged(PROBE, solid, tmp_path)["linear"] == first["linear"]
    assert (head / "left").exists()
    judged(PROBE, solid, tmp_path, overwrite=True)
    assert head.is_dir()
    assert not (head / "left").exists()
