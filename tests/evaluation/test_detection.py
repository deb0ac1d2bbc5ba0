"""Detection: COCO's scoring by hand, a planted detector, exact resumption, precise batch-norm,
ranks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pycocotools import mask as rle
from torch import nn

from imsvd_core.data import workers
from imsvd_core.data.coco import open_coco
from imsvd_core.engine.config import LoopConfig
from imsvd_core.evaluation.base import Setup
from imsvd_core.evaluation.detection import protocol as detection
from imsvd_core.evaluation.detection.detector import DetectorConfig
from imsvd_core.evaluation.detection.protocol import DetectionConfig
from imsvd_core.evaluation.detection.score import score
from imsvd_core.networks import build_backbone
from imsvd_core.system import signals
from tests.data.test_coco import alter, draw_coco, outline, write_listing

SMALL = DetectorConfig(
    min_sizes=(48, 64),
    test_size=64,
    max_size=112,
    anchors=(16, 32),
    rpn_samples=16,
    train_proposals=(100, 20),
    test_proposals=(60, 10),
    rois=8,
    roi_size=4,
    mask_channels=8,
    score_threshold=0.01,
    detections=5,
)
CONFIG = DetectionConfig(
    SMALL,
    iterations=4,
    lr=0.01,
    warmup=2,
    drops=(3,),
    precise_bn=3,
    loop=LoopConfig(batch_size=2, precision="fp32", device="cpu", log_every=1),
)


@pytest.fixture
def pair(tmp_path):
    name = draw_coco(tmp_path / "drawn", train=4, test=5)
    return open_coco(name), open_coco(name, "test")


def backbone():
    torch.manual_seed(0)
    return build_backbone("narrow")


def weights(folder):
    (path,) = Path(folder).glob("*/test-*/detector.safetensors")
    return safetensors.torch.load_file(path)


def blocks(folder):
    return {
        path.name: json.loads(path.read_text())
        for path in sorted(Path(folder).glob("*/test-*/detections-*.json"))
    }


def evaluate(backbone, data, config, *, run_dir):
    return config.run(backbone, data, Setup(Path(run_dir)))


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The score


def box_mask(x, y, w, h):
    return rle.merge(rle.frPyObjects(outline(x, y, w, h), 200, 200)) if w else None


def found(image, box, score, mask=None, category=3):
    packed = box_mask(*(mask or box))
    return {
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "score": score,
        "segmentation": {"size": [200, 200], "counts": packed["counts"].decode()},
    }


@pytest.fixture
def three_objects(tmp_path):
    """Two images with three objects of class 3, and a crowd."""
    objects = [(10, [0, 0, 100, 100]), (10, [100, 100, 100, 100]), (20, [50, 50, 100, 100])]
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": 3,
            "bbox": box,
            "area": 10_000,
            "iscrowd": 0,
            "segmentation": outline(*box),
        }
        for number, (image, box) in enumerate(objects, 1)
    ]
    annotations.append(
        {
            **annotations[0],
            "id": 9,
            "image_id": 20,
            "bbox": [0, 0, 40, 40],
            "iscrowd": 1,
            "segmentation": {
                "size": [200, 200],
                "counts": box_mask(0, 0, 40, 40)["counts"].decode(),
            },
        }
    )
    (tmp_path / "val2017").mkdir()
    write_listing(
        tmp_path,
        "val",
        [{"id": n, "file_name": f"{n}.jpg", "height": 200, "width": 200} for n in (10, 20)],
        annotations,
    )
    return open_coco(f"coco:{tmp_path}", "test").truth()


def test_average_precision_is_that_which_precision_and_recall_give_by_hand(three_objects):
    """By falling score: a box that is right; a wrong one; one that overlaps its object by 62 %. The
    third object is missed.

    Recall rises to 1/3 at precision 1, and to 2/3 at precision 2/3 while 62 % suffice. Of COCO's
    101 recalls, 34 lie up to 1/3 and 33 between 1/3 and 2/3. One mask covers 52 % of its object:
    only at overlap .5 is it right.
    """
    detections = [
        found(20, [50, 50, 100, 62], 0.6),
        found(10, [0, 0, 100, 100], 0.9, mask=[0, 0, 100, 52]),
        found(10, [100, 0, 100, 50], 0.8),
    ]
    figures = score(detections, three_objects, [10, 20])
    one, two = 34 / 101, (34 + 33 * 2 / 3) / 101
    third = (
        34 / 101 / 3
    )  # masks at .55 and .6: the first two wrong, the last right, at recall and precision 1/3
    assert figures == pytest.approx(
        {
            "box_ap50": 100 * two,
            "box_ap75": 100 * one,
            "box_ap": 100 * (3 * two + 7 * one) / 10,
            "mask_ap50": 100 * two,
            "mask_ap75": 0,
            "mask_ap": 100 * (two + 2 * third) / 10,
        },
        abs=0.006,
    )


def test_what_lies_in_a_crowd_counts_for_nothing_and_duplicates_are_wrong(three_objects):
    right = [
        found(10, [0, 0, 100, 100], 0.9),
        found(10, [100, 100, 100, 100], 0.8),
        found(20, [50, 50, 100, 100], 0.7),
    ]
    crowd, again = found(20, [5, 5, 20, 20], 0.99), found(10, [0, 0, 100, 100], 0.95)
    assert score([*right, crowd], three_objects, [10, 20])["box_ap"] == 100
    twice = score([*right, again], three_objects, [10, 20])["box_ap"]
    assert twice == pytest.approx(100 * (34 + 33 * 3 / 4 + 34 * 3 / 4) / 101, abs=0.01)


def test_images_that_were_not_looked_at_do_not_count(three_objects):
    assert score([found(20, [50, 50, 100, 100], 0.7)], three_objects, [20])["mask_ap"] == 100
    assert score([], three_objects, [20]) == dict.fromkeys(score([], three_objects, [10]), 0)


def test_images_without_objects_cannot_be_scored(three_objects):
    with pytest.raises(ValueError, match="no object is annotated"):
        score([], three_objects, [30])


# A planted detector


class Planted(nn.Module):
    """Finds what `change` makes of the truth, which it knows by the pictures' bytes."""

    def __init__(self, data, change):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.zeros(1)), nn.BatchNorm2d(3)
        self.known = {
            image.numpy().tobytes(): change(target)
            for image, target in map(data.read, range(len(data)))
        }

    def forward(self, images, targets=None):
        if self.training:
            self.norm(torch.stack([image[:, :40, :60] for image in images]))
            return {
                "loss_nothing": self.weight.square().sum()
                + 0 * sum(p.sum() for p in self.norm.parameters())
            }
        found = [self.known[(255 * image).round().byte().numpy().tobytes()] for image in images]
        return [
            {
                "boxes": one["boxes"],
                "labels": one["labels"],
                "scores": torch.linspace(0.9, 0.5, len(one["labels"])),
                "masks": one["masks"][:, None].float(),
            }
            for one in found
        ]


def shifted(target):
    boxes = target["boxes"] + torch.tensor([0.0, 24, 0, 24])
    return target | {"boxes": boxes, "masks": target["masks"].roll(24, 1)}


@pytest.mark.parametrize(
    ("change", "low", "high"),
    [
        (dict, 100, 100),
        (shifted, 0, 5),
        (lambda target: target | {"labels": target["labels"] % 3 + 1}, 0, 0),
    ],
    ids=["truth", "shifted", "wrong labels"],
)
def test_a_detector_that_knows_the_truth_is_scored_100_and_others_what_they_deserve(
    pair, tmp_path, monkeypatch, change, low, high
):
    monkeypatch.setattr(detection, "build_detector", lambda *a: Planted(pair[1], change))
    monkeypatch.chdir(tmp_path)
    figures = evaluate(backbone(), pair, CONFIG, run_dir="run")  # as a command names it
    assert len(blocks("run")) == 1
    assert weights("run")
    assert figures.keys() == {
        "box_ap",
        "box_ap50",
        "box_ap75",
        "mask_ap",
        "mask_ap50",
        "mask_ap75",
        "iterations",
        "train_images",
        "test_images",
        "seconds",
    }
    assert all(low <= figures[name] <= high for name in figures if "_ap" in name)
    assert (figures["iterations"], figures["train_images"], figures["test_images"]) == (4, 4, 5)


# The training


@pytest.mark.slow  # trains a detector three times
def test_a_run_cut_in_training_and_in_testing_ends_identical(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "BLOCK", 2)
    whole = evaluate(backbone(), pair, CONFIG, run_dir=tmp_path / "whole")

    _, trainer = detection.training(backbone(), pair[0], CONFIG, tmp_path / "cut", progress=False)
    for progressed in detection.steps(trainer, pair[0], CONFIG):
        if progressed.step == 2:
            break
    torch.manual_seed(5)  # what happens in between must not matter
    looked, detect = [], detection.detect

    def detect_until_killed(*args):
        if len(looked) == 3:
            raise signals.Stopped("killed")
        looked.append(args[2])
        return detect(*args)

    monkeypatch.setattr(detection, "detect", detect_until_killed)
    with pytest.raises(signals.Stopped):
        evaluate(backbone(), pair, CONFIG, run_dir=tmp_path / "cut")
    assert len(blocks(tmp_path / "cut")) == 1
    after = []
    monkeypatch.setattr(detection, "detect", lambda *args: after.append(args[2]) or detect(*args))
    monkeypatch.setattr(
        detection, "precise_statistics", lambda *args: pytest.fail("they are there")
    )
    figures = evaluate(backbone(), pair, CONFIG, run_dir=tmp_path / "cut")
    assert after == [30, 40, 50]  # the first block is there
    assert identical(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert blocks(tmp_path / "whole") == blocks(tmp_path / "cut")
    assert figures | {"seconds": 0} == whole | {"seconds": 0}


@pytest.mark.slow  # builds detectors
def test_the_seed_fixes_first_weights_and_precise_statistics_whatever_was_drawn_before(
    pair, tmp_path
):
    runs = []
    for number in (1, 2):
        torch.manual_seed(0)
        given = build_backbone("narrow")
        torch.manual_seed(number)
        runs.append(
            detection.training(given, pair[0], CONFIG, tmp_path / f"{number}", progress=False)
        )
    first, second = (
        {name: value.clone() for name, value in detector.state_dict().items()}
        for detector, _ in runs
    )
    assert identical(first, second)
    other = replace(CONFIG, loop=replace(CONFIG.loop, seed=1))
    assert not identical(
        first, detection.training(given, pair[0], other, tmp_path, progress=False)[0].state_dict()
    )
    for number, (detector, trainer) in enumerate(runs):
        torch.manual_seed(number)
        folder = tmp_path / f"precise-{number}"
        detection._make_precise(detector, pair[0], CONFIG, trainer, folder)
    first, second = (detector.state_dict() for detector, _ in runs)
    assert identical(first, second)


@pytest.mark.slow  # trains a detector
def test_another_test_of_the_same_detector_does_not_train_it_again(pair, tmp_path, monkeypatch):
    evaluate(backbone(), pair, CONFIG, run_dir=tmp_path)
    monkeypatch.setattr(detection.Detection, "embed", lambda *a: pytest.fail("trained again"))
    other = replace(
        CONFIG, test_images=2, precise_bn=0, detector=replace(SMALL, score_threshold=0.5)
    )
    assert evaluate(backbone(), pair, other, run_dir=tmp_path)["test_images"] == 2
    assert len(list(tmp_path.glob("*/checkpoints"))) == 1
    assert len(list(tmp_path.glob("*/test-*"))) == 2
    monkeypatch.undo()
    evaluate(backbone(), pair, replace(CONFIG, lr=0.02), run_dir=tmp_path)
    assert len(list(tmp_path.glob("*/checkpoints"))) == 2


def test_the_backbone_of_the_caller_stays_as_it_was_and_another_trains_anew(pair, tmp_path):
    given = backbone().requires_grad_(False)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    for _ in range(2):
        _, trainer = detection.training(given, pair[0], CONFIG, tmp_path / "runs", progress=False)
        list(detection.steps(trainer, pair[0], CONFIG))
    assert identical(given.state_dict(), before)
    assert len(list((tmp_path / "runs").iterdir())) == 1
    with torch.no_grad():
        given.bn1.weight.mul_(2)
    detection.training(given, pair[0], CONFIG, tmp_path / "runs", progress=False)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_unreadable_test_images_are_not_scored(pair, tmp_path, monkeypatch):
    test = replace(pair[1], on_corrupt="skip")
    planted = Planted(pair[1], dict)
    monkeypatch.setattr(detection, "build_detector", lambda *a: planted)
    test.file(1).write_bytes(b"no image")
    figures = evaluate(backbone(), (pair[0], test), CONFIG, run_dir=tmp_path)
    assert (figures["test_images"], figures["box_ap"]) == (4, 100)


def test_mirrored_and_resized_pictures_keep_boxes_and_masks_on_their_objects(pair):
    train = pair[0]
    detector, _ = detection.training(backbone(), train, CONFIG, train.home.parent, progress=False)
    for index in range(len(train)):
        image, target = train.read(index)
        image, target = image.float() / 255, target
        mirrored = detection.flip(image, target)
        assert torch.equal(detection.flip(*mirrored)[0], image)
        assert not torch.equal(mirrored[0], image)
        resized, (bent,) = detector.transform([mirrored[0]], [mirrored[1]])
        for picture, there, slack in (
            (mirrored[0], mirrored[1], 0),
            (resized.tensors[0], bent, 1.5),
        ):
            for label, box, mask in zip(
                there["labels"], there["boxes"], there["masks"].bool(), strict=True
            ):
                ys, xs = mask.nonzero().unbind(1)
                extent = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
                assert (extent - box).abs().max() <= slack
                picture_there = picture[:, : mask.shape[0], : mask.shape[1]]
                assert (
                    picture_there[label - 1][mask].mean()
                    > picture_there[:, ~there["masks"].bool().any(0)].mean() + 0.3
                )


def test_flips_are_drawn_with_their_probability(pair):
    images, targets = zip(*map(pair[0].read, range(4)), strict=True)
    for probability, changed, slack in ((0.0, 0, 0), (1.0, 40, 0), (0.5, 20, 7)):
        edges = []
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            marked = [image.clone() for image in images]
            for image in marked:
                image[:, :, 0] = 0
            mirrored, _ = detection.mirror(marked, list(targets), probability, generator)
            edges += [image.sum(0)[:, 0] for image in mirrored]
        assert abs(sum(bool(edge.any()) for edge in edges) - changed) <= slack


def test_the_rate_rises_in_the_warm_up_and_drops_tenfold():
    rate = DetectionConfig().learning_rate
    assert rate(0) == pytest.approx(1e-4)
    assert rate(25) == pytest.approx(0.1 * 0.5005)
    assert [rate(step) for step in (50, 59_999)] == [0.1, 0.1]
    assert [rate(step) for step in (60_000, 79_999, 80_000, 89_999)] == pytest.approx(
        [0.01, 0.01, 0.001, 0.001]
    )
    assert replace(DetectionConfig(), warmup=0).learning_rate(0) == 0.1


@pytest.mark.slow  # trains a detector
def test_the_schedule_is_the_trainings(pair, tmp_path):
    evaluate(backbone(), pair, CONFIG, run_dir=tmp_path)
    (file,) = tmp_path.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([1e-5, 0.01 * 0.5005, 0.01, 0.001])
    assert lines[-1].keys() > {
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_objectness",
        "loss_rpn_box_reg",
    }


# Precise batch-norm


def test_precise_statistics_are_the_means_over_batches_and_leave_the_weights_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=0.3)
    )
    batches = [torch.randn(2, 3, 5, 5) * scale for scale in (1, 2, 5)]
    model(batches[0])
    before = {name: value.clone() for name, value in model.named_parameters()}
    detection.precise_statistics(model, batches)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert [module.momentum for module in (model[1], model[3])] == [0.1, 0.3]
    assert not model.training
    seen = [model[0](batch) for batch in batches]
    torch.testing.assert_close(
        model[1].running_mean, torch.stack([one.mean((0, 2, 3)) for one in seen]).mean(0)
    )
    torch.testing.assert_close(
        model[1].running_var, torch.stack([one.var((0, 2, 3)) for one in seen]).mean(0)
    )
    inner = [
        (one - one.mean((0, 2, 3), keepdim=True))
        / (one.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        for one in seen
    ]
    inner = [
        (one * model[1].weight.view(-1, 1, 1) + model[1].bias.view(-1, 1, 1)).relu()
        for one in inner
    ]
    torch.testing.assert_close(
        model[3].running_mean, torch.stack([one.mean((0, 2, 3)) for one in inner]).mean(0)
    )


@pytest.mark.slow  # trains a detector
def test_the_test_uses_precise_statistics_of_the_last_weights(pair, tmp_path):
    evaluate(backbone(), pair, CONFIG, run_dir=tmp_path / "precise")
    evaluate(
        backbone(),
        pair,
        replace(CONFIG, precise_bn=0),
        run_dir=tmp_path / "running",
    )
    precise, running = (weights(tmp_path / name) for name in ("precise", "running"))
    differ = {
        name.rsplit(".", 1)[1] for name in precise if not torch.equal(precise[name], running[name])
    }
    assert differ == {"running_mean", "running_var", "num_batches_tracked"}
    counts = {
        value.item() for name, value in precise.items() if name.endswith("num_batches_tracked")
    }
    assert counts == {CONFIG.precise_bn}


# Ranks


def _evaluate(rank, size):
    shared = [None]
    if rank == 0:
        import tempfile

        shared = [tempfile.mkdtemp()]
        draw_coco(Path(shared[0]) / "drawn", train=4, test=5)
    torch.distributed.broadcast_object_list(shared)
    folder = Path(shared[0])
    data = tuple(open_coco(f"coco:{folder}/drawn", split) for split in ("train", "test"))
    workers.share_of_cores = lambda: 0  # what such processes start would import torch again
    detection.BLOCK, seen, detect = 2, [], detection.detect
    detection.detect = lambda *args: seen.append(args[2]) or detect(*args)
    figures = evaluate(backbone(), data, CONFIG, run_dir=folder / "run")
    model = nn.BatchNorm2d(2)
    detection.precise_statistics(model, [torch.full((2, 2, 3, 3), 1.0 + rank)])
    return {
        "figures": figures,
        "precise": model.running_mean,
        "seen": seen,
        "images": [number for part in blocks(folder / "run").values() for number in part["images"]],
        "weights": weights(folder / "run"),
    }


def test_ranks_train_one_detector_share_the_test_and_average_their_statistics(ranks):
    first, second = ranks(_evaluate, 2)
    assert (
        first["figures"].items()
        >= {name: value for name, value in second["figures"].items() if name != "seconds"}.items()
    )
    assert (first["seen"], second["seen"]) == ([10, 20, 50], [30, 40])
    assert first["images"] == [10, 20, 30, 40, 50]
    assert identical(first["weights"], second["weights"])
    assert first["precise"].tolist() == second["precise"].tolist() == [1.5, 1.5]


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"precise_bn": -1}, "precise_bn=-1 must be at least 0"),
        ({"drops": (5, 5)}, r"drops=\(5, 5\) must be rising"),
        ({"flip": 1.5}, r"flip=1\.5 must be between 0 and 1"),
        ({"lr": -1.0}, r"lr=-1\.0 must be a finite number"),
        ({"momentum": 1.0}, r"momentum=1\.0 must be below 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DetectionConfig(**settings)


def test_data_that_cannot_serve_are_refused(pair, tmp_path):
    with pytest.raises(
        ValueError, match=r"detection\.train_images=5 must lie between 1 and the 4 images"
    ):
        evaluate(backbone(), pair, replace(CONFIG, train_images=5), run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"batch_size=2 exceeds the 1 samples"):
        evaluate(backbone(), pair, replace(CONFIG, train_images=1), run_dir=tmp_path)
    with pytest.raises(ValueError, match="has other classes than"):
        evaluate(
            backbone(), (pair[0], replace(pair[1], categories=(3, 7))), CONFIG, run_dir=tmp_path
        )
    assert not list(tmp_path.glob("*/checkpoints"))
    thin = {"segmentation": [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]}
    alter(pair[0].home.parent, "val", lambda images, objects: objects[2].update(thin))
    with pytest.raises(ValueError, match="misses 1 objects, such as annotation 3"):
        evaluate(backbone(), (pair[0], open_coco(pair[0].name, "test")), CONFIG, run_dir=tmp_path)
    assert not list(tmp_path.glob("*/checkpoints"))
    alter(pair[0].home.parent, "val", lambda images, objects: objects.clear())
    with pytest.raises(ValueError, match="lists no image with an object"):
        open_coco(pair[0].name, "test")
