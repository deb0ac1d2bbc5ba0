"""Support vector machines on VOC: the right answer is found, what cannot be judged is named, test
labels judge and no more."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from torch import nn

from imsvd_core.data.voc import VOCImages
from imsvd_core.evaluation import svm
from imsvd_core.evaluation.base import Setup
from imsvd_core.evaluation.svm import SVMConfig, voc_average_precision
from imsvd_core.networks import build_backbone

CONFIG = SVMConfig(costs=(0.1, 10), jobs=1)
CLASSES = ("cat", "dog", "sheep")


def planted(noise: float, n: int = 240, shuffled: bool = False) -> tuple[np.ndarray, ...]:
    """Features that are the labels' own columns beside noise; each class is in a third of the
    images."""
    chance = np.random.default_rng(0)
    labels = np.where(chance.random((2 * n, 3)) < 1 / 3, 1, -1)
    features = np.concatenate([labels == 1, np.ones((2 * n, 2))], 1) + noise * chance.normal(
        size=(2 * n, 5)
    )
    if shuffled:
        labels = chance.permutation(labels)
    return features[:n], labels[:n], features[n:], labels[n:]


def test_a_planted_answer_is_found():
    found = svm.fit(*planted(0.1), CLASSES, CONFIG)
    assert found["svm"] > 99.9
    assert min(found["classes"].values()) > 99.5
    assert list(found["classes"]) == list(CLASSES)
    assert found["train_images"] == found["test_images"] == 240
    assert found["features"] == 5
    assert not found["not_evaluable"]


def test_shuffled_labels_give_what_chance_does_the_share_of_positives():
    found = svm.fit(*planted(0.1, shuffled=True), CLASSES, CONFIG)
    assert (
        25 < found["svm"] < 45
    )  # a third; the envelope takes the best of what follows, so a little more


def test_only_the_direction_of_features_counts():
    x, y, test_x, test_y = planted(0.5)
    sizes = np.random.default_rng(1).uniform(10, 1000, (240, 1))
    found, scaled = (
        svm.fit(*data, CLASSES, CONFIG)
        for data in ((x, y, test_x, test_y), (x * sizes, y, test_x * sizes[::-1], test_y))
    )
    assert scaled["svm"] == pytest.approx(found["svm"], abs=0.1)


def test_average_precision_by_hand():
    labels = np.array([1, -1, 0, 1, -1, 1])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    # without the difficult: 1 0 1 0 1, precision 1, 1/2, 2/3, 2/4, 3/5;
    # envelope at recalls 1/3, 2/3, 1: 1, 2/3, 3/5
    assert voc_average_precision(scores, labels) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # 0 0 1 1: precision 1/3 and 2/4; the envelope is 2/4 at both,
    # where the mean of precisions is 5/12
    assert voc_average_precision(
        np.array([4, 3, 2, 1.0]), np.array([-1, -1, 1, 1])
    ) == pytest.approx(1 / 2)
    # tied: of three images at once two are positive, then a negative, then a positive
    tied = np.array([5, 5, 5, 3, 2.0]), np.array([1, -1, 1, -1, 1])
    assert voc_average_precision(*tied) == pytest.approx((2 * 2 / 3 + 3 / 5) / 3)
    assert voc_average_precision(
        *(part[[1, 4, 2, 0, 3]] for part in tied)
    ) == voc_average_precision(*tied)
    assert voc_average_precision(torch.zeros(4), torch.tensor([1, -1, -1, -1])) == pytest.approx(
        1 / 4
    )


def test_average_precision_is_what_a_walk_down_the_ranking_gives():
    chance = np.random.default_rng(0)
    for _ in range(20):
        labels, scores = chance.choice([-1, 0, 1], 50, p=[0.6, 0.1, 0.3]), chance.normal(size=50)
        ranked = [
            label for _, label in sorted(zip(scores, labels, strict=True), reverse=True) if label
        ]
        precision = [ranked[: k + 1].count(1) / (k + 1) for k in range(len(ranked))]
        expected = sum(
            max(precision[k:]) for k in range(len(ranked)) if ranked[k] == 1
        ) / ranked.count(1)
        assert voc_average_precision(scores, labels) == pytest.approx(expected)


def test_a_difficult_test_image_counts_for_nothing():
    x, y, test_x, test_y = planted(0.3)
    hidden = test_y.copy()
    hidden[:100, 1] = 0
    kept, found = (
        svm.fit(x, y, part_x, part_y, CLASSES, CONFIG)["classes"]
        for part_x, part_y in ((test_x[100:], test_y[100:]), (test_x, hidden))
    )
    assert found["dog"] == kept["dog"]
    assert found["cat"] != kept["cat"]


def test_a_difficult_training_image_is_a_negative_or_left_out():
    x, y, _test_x, _test_y = planted(0.3)
    marked, negative = y.copy(), y.copy()
    marked[:60, 1], negative[:60, 1] = 0, -1
    as_negative, omitted = (
        svm.train_class(x, marked[:, 1], replace(CONFIG, difficult=word))[1]
        for word in ("negative", "omit")
    )
    assert as_negative == svm.train_class(x, negative[:, 1], CONFIG)[1] != omitted
    assert omitted == svm.train_class(x[60:], y[60:, 1], CONFIG)[1]


def test_the_cost_is_of_the_best_cross_validation():
    x, y, *_ = planted(0.8, 120)
    x, y, config = (
        x / np.linalg.norm(x, axis=1, keepdims=True),
        y[:, 0],
        replace(CONFIG, costs=(1e-4, 0.1, 1, 1000)),
    )
    curve = []
    for cost in config.costs:
        aps = []
        for train, held_out in StratifiedKFold(3).split(x, y):
            one = LinearSVC(
                C=cost, dual=True, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=0
            ).fit(x[train], y[train])
            aps.append(average_precision_score(y[held_out], one.decision_function(x[held_out])))
        curve.append(np.mean(aps))
    found = svm.train_class(x, y, config)[1]
    assert found.cross_validated == pytest.approx(curve)
    assert found.cost == config.costs[int(np.argmax(curve))]
    assert len({round(one, 6) for one in curve}) > 1


def test_of_costs_that_cross_validate_equally_well_the_first_is_taken():
    """Classes so far apart that every cost separates them."""
    x, y, *_ = planted(0.01)
    for costs in ((0.1, 1, 10), (10, 1, 0.1)):
        _, result = svm.train_class(x, y[:, 0], replace(CONFIG, costs=costs))
        assert result.cross_validated == [1.0, 1.0, 1.0]
        assert result.cost == costs[0]


def test_test_labels_choose_nothing():
    x, y, test_x, test_y = planted(0.8)
    honest, reversed_ = (
        svm.fit(x, y, test_x, labels, CLASSES, CONFIG) for labels in (test_y, -test_y)
    )
    assert honest["costs"] == reversed_["costs"]
    assert honest["classes"] != reversed_["classes"]
    assert svm.fit(x, y, test_x[:50], test_y[:50], CLASSES, CONFIG)["costs"] == honest["costs"]


def test_a_class_that_cannot_be_judged_is_named_and_not_scored():
    x, y, test_x, test_y = planted(0.1)
    whole = svm.fit(x, y, test_x, test_y, CLASSES, CONFIG)
    y[np.flatnonzero(y[:, 0] == 1)[2:], 0] = 0  # two positives left, the others difficult
    test_y[test_y[:, 2] == 1, 2] = 0
    found = svm.fit(x, y, test_x, test_y, CLASSES, CONFIG)
    assert found["not_evaluable"] == ["cat", "sheep"]
    assert found["classes"] == {"dog": whole["classes"]["dog"]}
    assert found["svm"] == whole["classes"]["dog"]
    assert set(found["costs"]) == {"dog"}
    test_y[:, 1] = -1
    with pytest.raises(
        ValueError,
        match="none of the 3 classes has 3 positives and negatives to train on and 1 to test",
    ):
        svm.fit(x, y, test_x, test_y, CLASSES, CONFIG)


@pytest.mark.slow  # two worker processes
def test_the_result_does_not_depend_on_the_number_of_processes():
    data = planted(0.8)
    assert svm.fit(*data, CLASSES, CONFIG) == svm.fit(*data, CLASSES, replace(CONFIG, jobs=2))
    assert not workers(os.getpid())


def workers(of: int) -> list[str]:
    return subprocess.run(
        ["pgrep", "-P", str(of), "-f", "popen_loky"], capture_output=True, text=True
    ).stdout.split()


@pytest.mark.slow  # three processes
def test_a_worker_ends_with_the_process_that_it_works_for():
    code = (
        "import os, time, numpy as np\n"
        "from imsvd_core.evaluation.svm import SVMConfig, _fit_class\n"
        "x, y = np.eye(12), np.arange(12) % 2 * 2 - 1\n"
        "_fit_class(x, y, x, y, SVMConfig(costs=(1,)), None, os.getppid())\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = Path("/proc", parent.stdout.readline().strip())
    assert worker.exists()
    parent.kill()
    parent.wait()
    end = time.monotonic() + 60
    while worker.exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert not worker.exists()


def test_what_is_done_before_a_kill_is_not_done_again(tmp_path, monkeypatch):
    data, trained = planted(0.8), []
    whole, train_class = svm.fit(*data, CLASSES, CONFIG), svm.train_class

    def dies_at_the_third(*args):
        trained.append(1)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train_class(*args)

    monkeypatch.setattr(svm, "train_class", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        svm.fit(*data, CLASSES, CONFIG, folder=tmp_path)
    assert svm.fit(*data, CLASSES, CONFIG, folder=tmp_path) == whole
    assert len(trained) == 4
    assert svm.fit(*data, CLASSES, CONFIG, folder=tmp_path) == whole
    assert len(trained) == 4


def test_fits_that_do_not_converge_are_counted_and_told(caplog):
    found = svm.fit(*planted(0.8), CLASSES, replace(CONFIG, max_iter=1))
    assert found["not_converged"] == dict.fromkeys(
        CLASSES, 7
    )  # three folds at two costs, and the last
    assert sum("did not converge in max_iter=1" in record.message for record in caplog.records) == 3
    assert svm.fit(*planted(0.1), CLASSES, CONFIG)["not_converged"] == {}


def voc(home: Path, split: str, seed: int, n: int = 24) -> VOCImages:
    """Each class adds its colour to the picture, or does not."""
    chance = np.random.default_rng(seed)
    labels = np.where(chance.random((n, 3)) < 0.5, 1, -1)
    home.mkdir(parents=True, exist_ok=True)
    stems = np.array([f"{split}{number}" for number in range(n)], object)
    for stem, label in zip(stems, labels, strict=True):
        pixels = np.broadcast_to(np.where(label == 1, 200, 60).astype(np.uint8), (20, 30, 3))
        Image.fromarray(pixels).save(home / f"{stem}.jpg", quality=95)
    return VOCImages(
        "voc:mine", "mine", split, home, stems, torch.from_numpy(labels).to(torch.int8), CLASSES
    )


SMALL = replace(CONFIG, pool="mean", resize=12, size=8)


@pytest.fixture
def data(tmp_path: Path, monkeypatch) -> tuple[VOCImages, VOCImages]:
    monkeypatch.setattr("imsvd_core.data.workers.share_of_cores", lambda: 0)  # decode here
    return voc(tmp_path / "images", "train", 0), voc(tmp_path / "images", "test", 1)


@pytest.fixture
def backbone() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def test_images_are_judged_and_features_kept(data, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(svm, "BLOCK", 10)
    found = SMALL.run(backbone, data, Setup(tmp_path / "run"))
    assert found["svm"] == 100
    assert found["features"] == 12
    assert found["pool"] == "mean"
    assert found["train_images"] == 24
    blocks = sorted((tmp_path / "run").glob("*/*.safetensors"))
    assert [block.name for block in blocks] == [
        f"{split}-0000{k}.safetensors" for split in ("test", "train") for k in range(3)
    ]
    blocks[4].unlink()  # as after a kill
    for block in blocks:
        if block.exists():
            os.utime(block, (0, 0))
    assert SMALL.run(backbone, data, Setup(tmp_path / "run")) == found
    assert [block.stat().st_mtime > 0 for block in blocks] == [k == 4 for k in range(6)]


def test_a_folder_belongs_to_backbone_data_and_settings(data, backbone, tmp_path):
    def evaluate(backbone, data, config) -> int:
        config.run(backbone, data, Setup(tmp_path / "run"))
        return len(list((tmp_path / "run").iterdir()))

    train, test = data
    assert evaluate(backbone, data, SMALL) == evaluate(backbone, data, replace(SMALL, jobs=2)) == 1
    assert evaluate(backbone, data, replace(SMALL, seed=1)) == 2
    assert evaluate(backbone, (train, replace(test, labels=-test.labels)), SMALL) == 3
    with torch.no_grad():
        backbone[0].weight.neg_()
    assert evaluate(backbone, data, SMALL) == 4


def test_an_unreadable_image_takes_its_labels_along(data, backbone, tmp_path):
    (tmp_path / "images/train3.jpg").write_bytes(b"none")
    train, test = (replace(part, on_corrupt="skip") for part in data)
    found = SMALL.run(backbone, (train, test), Setup(tmp_path / "run"))
    assert found["train_images"] == 23
    assert found["svm"] == 100


def test_visslpool_is_four_means_of_six_by_six(data, tmp_path):
    torch.manual_seed(0)
    backbone, config = (
        build_backbone("narrow").eval(),
        replace(SMALL, pool="vissl", resize=224, size=224),
    )
    before = backbone.avgpool
    part = data[0].subset(2)
    features, rows = svm.embed(backbone, part, config, Setup(tmp_path))
    assert features.shape == (2, 4 * 256)
    assert rows.tolist() == [0, 1]
    assert backbone.avgpool is before
    ((_, images),) = part.images(224, 224, workers=0)
    x = (images / 255 - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[
        :, None, None
    ]
    with torch.no_grad():
        maps = nn.Sequential(*list(backbone.children())[:-2])(x)
    expected = torch.stack(
        [
            maps[:, :, top : top + 6, left : left + 6].mean((2, 3))
            for top in (0, 1)
            for left in (0, 1)
        ],
        2,
    ).flatten(1)
    assert torch.allclose(features, expected, atol=1e-4)
    with pytest.raises(
        ValueError, match="pool='vissl' needs a last map of 7×7, not 1×1: take pool='mean'"
    ):
        svm.embed(backbone, part, replace(config, resize=32, size=32), Setup(tmp_path / "32"))
    with pytest.raises(ValueError, match="needs a ResNet with its `avgpool`, not Flatten"):
        svm.embed(nn.Flatten(), part, config, Setup(tmp_path))


def test_an_image_of_both_splits_and_other_classes_are_refused(data, backbone, tmp_path):
    train, test = data
    leaking = replace(test, stems=np.append(test.stems[:-1], train.stems[5]))
    with pytest.raises(ValueError, match="1 images are in both splits, 'train5'"):
        SMALL.run(backbone, (train, leaking), Setup(tmp_path))
    with pytest.raises(ValueError, match=r"the splits differ in classes \['cow', 'sheep'\]"):
        SMALL.run(backbone, (train, replace(test, classes=("cat", "dog", "cow"))), Setup(tmp_path))


def test_subsets_are_drawn(data, backbone, tmp_path):
    found = replace(SMALL, train_images=20, test_images=15).run(
        backbone, data, Setup(tmp_path / "run")
    )
    assert (found["train_images"], found["test_images"]) == (20, 15)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"costs": ()}, "costs="),
        ({"costs": (1, -1)}, "costs="),
        ({"costs": (1, 1)}, "costs="),
        ({"folds": 1}, "folds=1 must be at least 2"),
        ({"size": 300}, "resize=256 must be at least 300"),
        ({"jobs": 0}, "jobs=0"),
        ({"size": None}, "size=None"),
        ({"train_images": 0}, "train_images=0"),
        ({"positive_weight": 0}, "positive_weight=0"),
        ({"pool": "max"}, "pool='max' must be one of 'vissl', 'mean'"),
        ({"difficult": "positive"}, "difficult='positive'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        SVMConfig(**settings)


def test_features_and_labels_that_cannot_be_are_refused():
    x, y, test_x, test_y = planted(0.1)
    for match, *data in (
        ("train: features .* and labels", x[1:], y, test_x, test_y),
        ("test: features", x, y, test_x, 2 * test_y),
        (
            "1 features are not finite",
            np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x),
            y,
            test_x,
            test_y,
        ),
        ("5 columns and test_features 4", x, y, test_x[:, :4], test_y),
    ):
        with pytest.raises(ValueError, match=match):
            svm.fit(*data, CLASSES, CONFIG)
    with pytest.raises(ValueError, match="1 of the scores are no numbers"):
        voc_average_precision(np.array([1, np.nan]), np.array([1, -1]))
    with pytest.raises(ValueError, match="0 of the labels are positive"):
        voc_average_precision(np.array([1, 2]), np.array([0, -1]))
