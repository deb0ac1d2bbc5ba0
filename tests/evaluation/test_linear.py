"""The linear probe: finds a planted answer, learns nothing from shuffled labels, freezes the
backbone; on images in memory and on streamed ones, on one process and on several."""

import multiprocessing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.io import write_png

from imsvd_core.data.memory import ImageData
from imsvd_core.data.tree import open_folder
from imsvd_core.engine import checkpoints
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.evaluation import features, linear
from imsvd_core.evaluation.base import Setup
from imsvd_core.views import EvalView, ViewConfig

CONFIG = linear.LinearConfig(
    OptimConfig(name="sgd", lr=1.0, weight_decay=0.0, warmup_epochs=0),
    LoopConfig(epochs=5, batch_size=50, precision="fp32", device="cpu"),
)
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
    return make_backbone()


def make_backbone():
    return nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()


def evaluate(backbone, data, config, *, run_dir):
    return config.run(backbone, data, Setup(Path(run_dir), VIEW))


def plant(folder: Path, train: int = 120, test: int = 59, shuffled: bool = False) -> Path:
    """The images of `data` as a tree of files."""
    for name, there in (("train", data("train", train, shuffled)), ("val", data("test", test))):
        for number, (image, label) in enumerate(
            zip(there.images, there.labels.tolist(), strict=True)
        ):
            home = folder / name / there.classes[label]
            home.mkdir(parents=True, exist_ok=True)
            write_png(image, str(home / f"{number:03}.png"))
    return folder


def streamed(folder: Path):
    return tuple(open_folder(f"tree:{folder}", split) for split in ("train", "test"))


AUGMENTED = replace(CONFIG, augment=True, view=ViewConfig(size=8, scale=(0.8, 1.0)))


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, normalize=True), AUGMENTED])
def test_a_planted_answer_is_found(backbone, tmp_path, config):
    found = evaluate(
        backbone,
        (data("train", 400), data("test", 200)),
        config,
        run_dir=tmp_path,
    )
    assert found["linear"] > 97


def test_shuffled_labels_give_chance(backbone, tmp_path):
    found = evaluate(
        backbone,
        (data("train", 400, shuffled=True), data("test", 200)),
        CONFIG,
        run_dir=tmp_path,
    )
    assert (
        found["linear"] < 60
    )  # a third is chance; a classifier that has learned nothing may favour one class


@pytest.mark.parametrize("config", [CONFIG, AUGMENTED])
def test_the_backbone_is_frozen_batch_norm_too(backbone, tmp_path, config):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    evaluate(
        backbone,
        (data("train", 100), data("test", 50)),
        config,
        run_dir=tmp_path,
    )
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_the_last_epoch_is_reported_not_the_best(backbone, tmp_path, monkeypatch):
    """A rate that explodes at the end must show: the best epoch on the test set was perfect."""
    monkeypatch.setattr(
        "imsvd_core.engine.trainer.learning_rate",
        lambda optim, step, **lengths: 1.0 if step < 32 else -5e3,
    )
    pair = (data("train", 400), data("test", 200))
    found = evaluate(backbone, pair, CONFIG, run_dir=tmp_path)
    assert found["linear"] < 60


def test_normalizing_augmented_features_is_refused():
    with pytest.raises(ValueError, match="normalize=True"):
        replace(AUGMENTED, normalize=True)


def test_a_finished_probe_is_reused_for_the_same_backbone_and_data_only(
    backbone, tmp_path, monkeypatch
):
    pair = (data("train", 200), data("test", 100))
    swapped = tuple(replace(part, labels=(part.labels + 1) % 3) for part in pair)
    for _ in range(2):
        assert evaluate(backbone, pair, CONFIG, run_dir=tmp_path)["linear"] > 97
    assert len(list(tmp_path.iterdir())) == 1
    assert evaluate(backbone, swapped, CONFIG, run_dir=tmp_path)["linear"] > 97
    with torch.no_grad():
        backbone[0].weight.neg_()
    assert evaluate(backbone, pair, CONFIG, run_dir=tmp_path)["linear"] > 97
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow  # trains probes on streamed images
@pytest.mark.parametrize("config", [CONFIG, AUGMENTED])
def test_a_planted_answer_is_found_in_streamed_images_and_none_in_shuffled_ones(
    backbone, tmp_path, config
):
    config = replace(config, loop=replace(config.loop, batch_size=40))
    pair, lost = (
        streamed(plant(tmp_path / "planted")),
        streamed(plant(tmp_path / "shuffled", shuffled=True)),
    )
    found = evaluate(backbone, pair, config, run_dir=tmp_path / "a")
    assert found["linear"] > 95
    assert (found["train_images"], found["test_images"]) == (120, 59)
    assert evaluate(backbone, lost, config, run_dir=tmp_path / "b")["linear"] < 60


def weights(run_dir: Path) -> torch.Tensor:
    (home,) = run_dir.iterdir()
    return checkpoints.load(checkpoints.newest(home / "checkpoints"))["method"]["head.weight"]


def _probe(config, tree: str, run_dir: str, rank: int, size: int) -> tuple[dict, torch.Tensor]:
    multiprocessing.set_start_method(
        "fork", force=True
    )  # a spawned rank would spawn its workers, seconds each
    found = evaluate(make_backbone(), streamed(Path(tree)), config, run_dir=run_dir)
    return found, weights(Path(run_dir))


@pytest.mark.parametrize("augment", [False, True])
def test_two_ranks_equal_one_process(tmp_path, ranks, augment):
    """Their test shares are of 30 and 29 images, the last step's gradients the mean of two of 20;
    crops are drawn by image."""
    config = replace(
        AUGMENTED if augment else CONFIG,
        loop=replace(CONFIG.loop, epochs=3, batch_size=40),
        view=ViewConfig(size=8, scale=(0.3, 1.0), flip=0.0),
    )
    tree = str(plant(tmp_path / "tree"))
    (found, ours), (other, _) = ranks(partial(_probe, config, tree, str(tmp_path / "two")), 2)
    alone, theirs = _probe(config, tree, str(tmp_path / "one"), 0, 1)
    assert found | {"seconds": 0} == other | {"seconds": 0} == alone | {"seconds": 0}
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # processes that decode
def test_a_cut_run_on_streamed_images_ends_as_an_uncut_one(backbone, tmp_path, monkeypatch):
    config = replace(AUGMENTED, loop=replace(CONFIG.loop, epochs=2, batch_size=30, save_every=1))
    pair, steps = streamed(plant(tmp_path / "tree")), 0
    whole = evaluate(backbone, pair, config, run_dir=tmp_path / "whole")

    def cut(*args):
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(*args)

    monkeypatch.setattr(linear, "cross_entropy", cut)
    with pytest.raises(KeyboardInterrupt):
        evaluate(backbone, pair, config, run_dir=tmp_path / "cut")
    found = evaluate(backbone, pair, config, run_dir=tmp_path / "cut")
    assert steps == 6 + 3
    assert found["linear"] == whole["linear"]
    assert torch.equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_streamed_epoch_sees_every_image_once_and_crops_it_anew_in_the_next(
    tmp_path, monkeypatch
):
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.extend(x.sum((1, 2, 3)).tolist() if len(x) == 10 else [])
            return x.mean((2, 3))

    pair = streamed(plant(tmp_path / "tree", train=40, test=7))
    for scale, distinct in (((1.0, 1.0), 40), ((0.2, 0.5), 80)):
        seen.clear()
        config = replace(
            AUGMENTED,
            loop=replace(CONFIG.loop, epochs=2, batch_size=10),
            view=ViewConfig(size=8, scale=scale, ratio=(1, 1), flip=0.0),
        )
        evaluate(Watch(), pair, config, run_dir=tmp_path / str(distinct))
        assert len(seen) == 80
        assert len({round(one, 2) for one in seen}) > 0.95 * distinct
        assert distinct == 80 or sorted(seen[:40]) == sorted(seen[40:])


def test_subsets_are_balanced_and_named_where_they_cannot_be_had(backbone, tmp_path):
    pair = (data("train", 400), data("test", 200))
    config = replace(CONFIG, train_images=90, test_images=30)
    train, test = config.choose(*pair)
    assert train.labels.bincount().tolist() == [30] * 3
    assert test.labels.bincount().tolist() == [10] * 3
    found = evaluate(backbone, pair, config, run_dir=tmp_path)
    assert (found["train_images"], found["test_images"]) == (90, 30)
    with pytest.raises(
        ValueError,
        match=r"linear.test_images=201 must lie between 1 and the 200 images of planted \(test\)",
    ):
        replace(CONFIG, test_images=201).choose(*pair)
    with pytest.raises(ValueError, match="train_images=0 must be at least 1"):
        replace(CONFIG, train_images=0)


def test_top5_counts_a_class_among_the_first_five():
    """The classifier's logits are the features, once they are divided by their scale; image i has
    its class in place i % 7."""

    class Given(nn.Module):
        def forward(self, x):
            return table[: len(x)] * scale

    scale = torch.arange(7, 0, -1)
    table = torch.stack([torch.arange(7.0).roll(i) for i in range(70)])
    places = torch.arange(70) % 7
    labels = torch.stack(
        [row.argsort(descending=True)[place] for row, place in zip(table, places, strict=True)]
    )
    images = torch.zeros(70, 3, 8, 8, dtype=torch.uint8)
    test = ImageData("x", "x", "test", images, labels, tuple("abcdefg"))
    head = nn.Linear(7, 7)
    nn.init.eye_(head.weight), nn.init.zeros_(head.bias)
    right = linear._test(head, scale, Given(), test, Setup(Path(), VIEW))
    assert right == {"linear": 10, "linear_top5": 50}
    few = linear._test(nn.Linear(7, 5), torch.ones(()), Given(), test, Setup(Path(), VIEW))
    assert few.keys() == {"linear"}


def _embed(rank: int, size: int) -> torch.Tensor:
    return features.embed(make_backbone(), data("train", 1), VIEW, ranks=True)


def test_ranks_share_an_embedding_even_where_one_has_no_share(ranks):
    alone = features.embed(make_backbone(), data("train", 1), VIEW)
    assert all(torch.equal(table, alone) for table in ranks(_embed, 2))
