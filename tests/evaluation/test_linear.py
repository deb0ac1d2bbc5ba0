"""The linear probe: finds a planted answer, learns nothing from shuffled labels, freezes the backbone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from imsvd_core.datasets import ImageData
from imsvd_core.evaluation import linear
from imsvd_core.loop import LoopConfig
from imsvd_core.optim import OptimConfig
from imsvd_core.views import EvalView, ViewConfig

CONFIG = linear.LinearConfig(OptimConfig(name="sgd", lr=1.0, weight_decay=0.0, warmup_epochs=0),
                             LoopConfig(epochs=5, batch_size=50, precision="fp32", device="cpu"))
VIEW = EvalView(resize=8, size=8)


def data(split, n, shuffled=False):
    """The class is the channel that is bright."""
    generator = torch.Generator().manual_seed(int(split == "test"))
    labels = torch.randint(3, (n,), generator=generator)
    images = torch.randint(120, (n, 3, 8, 8), generator=generator)
    images[torch.arange(n), labels] += 100
    if shuffled:
        labels = labels[torch.randperm(n, generator=generator)]
    return ImageData("planted", "planted", split, images.to(torch.uint8), labels, ("r", "g", "b"))


@pytest.fixture
def backbone():
    return nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()


AUGMENTED = replace(CONFIG, augment=True, view=ViewConfig(size=8, scale=(0.8, 1.0)))


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, normalize=True), AUGMENTED])
def test_a_planted_answer_is_found(backbone, tmp_path, config):
    found = linear.evaluate(backbone, (data("train", 400), data("test", 200)), config, view=VIEW, run_dir=tmp_path, progress=False)
    assert found["linear"] > 97


def test_shuffled_labels_give_chance(backbone, tmp_path):
    found = linear.evaluate(backbone, (data("train", 400, shuffled=True), data("test", 200)), CONFIG, view=VIEW, run_dir=tmp_path,
                            progress=False)
    assert found["linear"] < 60  # a third is chance; a classifier that has learned nothing may favour one class


@pytest.mark.parametrize("config", [CONFIG, AUGMENTED])
def test_the_backbone_is_frozen_batch_norm_too(backbone, tmp_path, config):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    linear.evaluate(backbone, (data("train", 100), data("test", 50)), config, view=VIEW, run_dir=tmp_path,
                    progress=False)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_the_last_epoch_is_reported_not_the_best(backbone, tmp_path, monkeypatch):
    """A rate that explodes at the end must show: the best epoch on the test set was perfect."""
    rates = iter([1.0] * 32 + [-5e3] * 8)
    monkeypatch.setattr("imsvd_core.loop.learning_rate", lambda *a: next(rates))
    pair = (data("train", 400), data("test", 200))
    found = linear.evaluate(backbone, pair, CONFIG, view=VIEW, run_dir=tmp_path, progress=False)
    assert found["linear"] < 60


def test_normalizing_augmented_features_is_refused():
    with pytest.raises(ValueError, match="normalize=True"):
        replace(AUGMENTED, normalize=True)


def test_a_finished_probe_is_reused_for_the_same_backbone_and_data_only(backbone, tmp_path, monkeypatch):
    pair = (data("train", 200), data("test", 100))
    swapped = tuple(replace(part, labels=(part.labels + 1) % 3) for part in pair)
    for _ in range(2):
        assert linear.evaluate(backbone, pair, CONFIG, view=VIEW, run_dir=tmp_path, progress=False)["linear"] > 97
    assert len(list(tmp_path.iterdir())) == 1
    assert linear.evaluate(backbone, swapped, CONFIG, view=VIEW, run_dir=tmp_path, progress=False)["linear"] > 97
    with torch.no_grad():
        backbone[0].weight.neg_()
    assert linear.evaluate(backbone, pair, CONFIG, view=VIEW, run_dir=tmp_path, progress=False)["linear"] > 97
    assert len(list(tmp_path.iterdir())) == 3
