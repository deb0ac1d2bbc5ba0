"""An evaluation from its name to its result: whatever backbone, whatever data, one code path."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.io import write_jpeg

from imsvd_core.cli import main
from imsvd_core.data import attributes, sources
from imsvd_core.data import memory as datasets
from imsvd_core.engine import checkpoints
from imsvd_core.engine.trainer import Trainer
from imsvd_core.evaluation.knn import KNNConfig
from imsvd_core.networks import NetworkConfig
from imsvd_core.recipes import EVALUATIONS, OWN, evaluation, recipe
from imsvd_core.results import read_result
from imsvd_core.runs import evaluate as evaluations
from imsvd_core.runs.backbones import open_backbone, save_backbone
from imsvd_core.runs.pretrain import build_network
from imsvd_core.system import signals

REAL = sources.data_root()  # before it is set aside


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "ATTRIBUTES_SIZES", {"train": 600, "test": 200})
    monkeypatch.setenv("IMSVD_DATASET", "attributes")
    monkeypatch.setenv("IMSVD_SCALE", "smoke")
    monkeypatch.setenv("IMSVD_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weights(tmp_path):
    """Anybody's state dict: a narrow network's, untrained."""
    network = build_network(NetworkConfig("narrow", cifar_stem=False), seed=0)
    torch.save(network.backbone.state_dict(), tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


@pytest.fixture
def tree(tmp_path):
    """Photographs of ImageNet, or drawn ones where there are none, as of two classes, in class
    folders under the data root."""
    photographs = sorted((REAL / "imagenet-samples").glob("*/*.JPEG"))
    for split, count in (("train", 16), ("val", 8)):
        factors = attributes.sample(count, torch.Generator().manual_seed(count))
        images = attributes.draw(factors, size=64)
        for number in range(count):
            folder = tmp_path / "data" / "tiny-imagenet-40" / split / f"n{number % 2:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            if photographs:
                shutil.copy(photographs.pop(), folder / f"{number}.JPEG")
            else:
                write_jpeg(images[number], str(folder / f"{number}.JPEG"))


@pytest.mark.slow  # evaluations of a ResNet-50
def test_a_state_dict_is_judged_by_the_papers_protocol_wherever_a_run_is(weights, tree, capsys):
    main(["evaluate", "imagenet-linear", str(weights), "--no-progress"])
    main(["evaluate", "imagenet-knn", str(weights), "--no-progress"])
    linear = read_result("runs/theirs/imagenet-linear.json")
    assert linear["figures"]["train_images"] == 16
    assert linear["provenance"]["dataset"] == "tiny-imagenet-40"
    assert read_result("runs/theirs/imagenet-knn.json")["figures"].keys() >= {"knn_5", "gallery"}
    first = linear["provenance"]["date"]
    torch.save(
        {**torch.load(weights), "conv1.weight": torch.load(weights)["conv1.weight"] + 1}, weights
    )
    with pytest.raises(SystemExit):  # other weights under the same name are another backbone
        main(["evaluate", "imagenet-linear", str(weights), "--no-progress"])
    assert "pass --overwrite" in capsys.readouterr().err
    main(["evaluate", "imagenet-linear", str(weights), "--no-progress", "--overwrite"])
    assert read_result("runs/theirs/imagenet-linear.json")["provenance"]["date"] >= first


@pytest.mark.slow  # two evaluations
def test_other_data_get_a_file_of_their_own(weights, tree):
    main(
        [
            "evaluate",
            "knn",
            str(weights),
            "--data",
            "attributes",
            "--gallery",
            "100",
            "--queries",
            "50",
            "--no-progress",
        ]
    )
    found = read_result("runs/theirs/knn-attributes.json")
    assert found["figures"]["gallery"] == 100
    assert found["provenance"]["dataset"] == "attributes (drawn)"


@pytest.mark.slow  # two evaluations
def test_figures_of_other_data_are_not_replaced_in_silence(weights, tree, tmp_path, capsys):
    """Two folders whose names become one file's name; the same folder, its spoilt files passed
    over."""
    small = ["evaluate", "imagenet-knn", str(weights), "--no-progress", "--data"]
    for name in ("a/t", "a_t"):
        shutil.copytree(tmp_path / "data" / "tiny-imagenet-40", tmp_path / "data" / name)
    main([*small, "tree:a/t"])
    for words in (["tree:a_t"], ["tree:a/t", "--on-corrupt", "skip"]):
        with pytest.raises(SystemExit):
            main([*small, *words])
        assert "pass --overwrite" in capsys.readouterr().err
    main([*small, "tree:a/t"])


@pytest.mark.parametrize("name", [*OWN, *EVALUATIONS])
def test_every_evaluation_sees_images_as_the_backbone_knows_them(name):
    asked = evaluation(name, "full", recipe("cifar10", "full"))
    mean = recipe("cifar10").eval_view.mean
    told = {
        "voc07-svm": asked.config,
        "coco-detection": getattr(asked.config, "detector", None),
    }.get(name, asked.eval_view)
    assert told.mean == mean


def test_the_protocols_are_the_papers():
    """ImageNet: SGD .02, cosine, wd 1e-6, batch 256, 100 epochs, crops .2 to 1. Places205: 14
    epochs, .01, a tenth at 5 and 10."""
    imagenet, places = (
        evaluation(name, "full").config for name in ("imagenet-linear", "places205-linear")
    )
    assert (
        imagenet.optim.lr,
        imagenet.optim.weight_decay,
        imagenet.optim.milestones,
        imagenet.optim.warmup_epochs,
    ) == (0.02, 1e-6, (), 0)
    assert (
        imagenet.loop.epochs,
        imagenet.loop.batch_size,
        imagenet.view.scale,
        imagenet.view.flip,
    ) == (100, 256, (0.2, 1.0), 0.5)
    assert (
        places.optim.lr,
        places.optim.weight_decay,
        places.optim.milestones,
        places.optim.momentum,
    ) == (0.01, 5e-4, (5, 10), 0.9)
    assert (
        places.loop.epochs,
        places.loop.batch_size,
        places.optim.warmup_epochs,
        places.augment,
    ) == (14, 256, 0, True)
    assert evaluation("imagenet-knn", "full").config.neighbors == (20, 200)
    for name in ("imagenet-linear", "imagenet-knn", "places205-linear"):
        view = evaluation(name, "full").eval_view
        assert (view.resize, view.size) == (256, 224)
    detection = evaluation("coco-detection", "full").config
    assert (detection.lr, detection.iterations, detection.drops, detection.loop.batch_size) == (
        0.1,
        90_000,
        (60_000, 80_000),
        16,
    )


@pytest.mark.slow  # a training and four evaluations
def test_a_run_and_its_weights_give_the_same_figures(weights, tmp_path):
    main(["pretrain", "cifar10", "--run-dir", "run", "--no-progress", "--loop.epochs", "1"])
    main(["evaluate", "knn", "run", "--no-progress"])
    main(["export", "run", "--to", "torchvision", "--out", "run.pth"])
    main(["evaluate", "knn", "run.pth", "--data", "attributes", "--no-progress"])
    ours, theirs = (
        read_result("run/knn.json")["figures"],
        read_result("runs/run/knn-attributes.json")["figures"],
    )
    assert ours == theirs


def test_the_folders_file_and_a_foreign_one_are_told_apart(tmp_path):
    network = NetworkConfig("narrow", cifar_stem=True)
    save_backbone(tmp_path / "ours.safetensors", build_network(network, 0).backbone, network)
    trained = open_backbone(tmp_path / "ours.safetensors")
    assert trained.recipe.network.cifar_stem
    assert trained.recipe.eval_view.size == 32
    assert not trained.is_ours
    (tmp_path / "none.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none\.pth"):
        open_backbone(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere.* is not there: give the folder"):
        open_backbone("nowhere")


@pytest.mark.slow  # times training steps
def test_bench_step_tells_hours_and_memory(capsys, tmp_path):
    main(
        [
            "bench",
            "step",
            "cifar10",
            "--steps",
            "2",
            "--warmup",
            "1",
            "--json",
            "step.json",
            "--no-progress",
        ]
    )
    figures = json.loads((tmp_path / "step.json").read_text())["figures"]
    assert figures["hours_per_100_epochs"] > 0
    assert figures["peak_resident_GB"] > 0
    assert "hours" in capsys.readouterr().out


def test_what_cannot_be_is_said_in_one_line(weights, capsys):
    for words, message in (
        (
            ["evaluate", "svd", str(weights)],
            "evaluation='svd' is unknown. There are: knn, linear, imagenet-knn",
        ),
        (["evaluate", "voc07-svm", str(weights)], "voc-mini"),
        (["export", str(weights), "--to", "onnx"], "onnx"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert message in said.err + said.out
        assert "Traceback" not in said.err


@pytest.mark.slow  # a whole evaluation each
@pytest.mark.parametrize(
    ("name", "data", "figures"),
    [
        ("voc07-svm", "voc-mini", {"svm", "classes", "not_evaluable"}),
        ("coco-detection", "coco-mini", {"box_ap50", "mask_ap75", "iterations"}),
    ],
)
def test_real_photographs_are_judged_through_the_whole_path(
    weights, monkeypatch, name, data, figures
):
    if not (REAL / data).is_dir():
        pytest.skip(f"{data} is not in the data root")
    monkeypatch.setenv("IMSVD_DATA", str(REAL))
    main(["evaluate", name, str(weights), "--no-progress"])
    found = read_result(f"runs/theirs/{name}.json")
    assert found["figures"].keys() >= figures
    assert found["provenance"]["dataset"] == data


@pytest.mark.slow  # two steps of a frozen ResNet-50 at 224 pixels
def test_a_full_width_probe_takes_a_step_saves_and_goes_on(tree, tmp_path, monkeypatch):
    backbone = build_network(
        NetworkConfig("resnet50", cifar_stem=False, hidden=(), dim=8), seed=0
    ).backbone
    torch.save(backbone.state_dict(), tmp_path / "resnet50.pth")
    taken = Trainer.take_step

    def and_stop(self, batches):
        self.stop()
        return taken(self, batches)

    monkeypatch.setattr(Trainer, "take_step", and_stop)
    trained = open_backbone(tmp_path / "resnet50.pth")
    asked = evaluation("imagenet-linear", None, trained.recipe)
    assert asked.config.view.size == 224
    assert asked.config.train_images == 16
    assert asked.config.loop.batch_size == 8
    with pytest.raises(signals.Stopped, match="step 1 of 2"):
        evaluations.evaluate("imagenet-linear", trained, asked, progress=False)
    monkeypatch.setattr(Trainer, "take_step", taken)
    cut = read_result(
        evaluations.evaluate(
            "imagenet-linear", open_backbone(tmp_path / "resnet50.pth"), asked, progress=False
        )
    )
    whole = replace(open_backbone(tmp_path / "resnet50.pth"), folder=tmp_path / "whole")
    left_alone = read_result(evaluations.evaluate("imagenet-linear", whole, asked, progress=False))
    heads = [
        checkpoints.load(checkpoints.newest(folder / "checkpoints"))["method"]
        for home in (Path("runs/resnet50"), tmp_path / "whole")
        for folder in (home / "imagenet-linear").iterdir()
    ]
    assert len(heads) == 2
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert cut["figures"] | {"seconds": 0} == left_alone["figures"] | {"seconds": 0}


@pytest.mark.slow  # five processes that import torch
def test_two_ranks_judge_as_one(weights, tree, free_port):
    """kNN exactly; the probe, whose ranks draw each their own crops, from the same features."""
    words = {"imagenet-knn": [], "imagenet-linear": ["--no-augment", "--loop.precision", "fp32"]}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "imsvd_core.cli",
    ]
    for name, more in words.items():
        command = ["evaluate", name, str(weights), *more, "--device", "cpu", "--no-progress"]
        subprocess.run(
            [*torchrun, *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        together = read_result(f"runs/theirs/{name}.json")
        assert together["provenance"]["world_size"] == 2
        shutil.rmtree(f"runs/theirs/{name}", ignore_errors=True)
        main(command)
        alone = read_result(f"runs/theirs/{name}.json")
        assert together["figures"] | {"seconds": 0} == alone["figures"] | {"seconds": 0}


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("voc07-svm", "tree:imagenet", "give voc:PATH"),
        ("voc07-svm", "coco:x", "give voc:PATH"),
        ("coco-detection", "voc:x", "give coco:PATH"),
        ("knn", "voc:x", "give tree:PATH, folder:PATH"),
    ],
)
def test_data_of_another_layout_are_refused_at_once(weights, capsys, name, data, said):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", name, str(weights), "--data", data])
    assert stop.value.code == 2
    assert f"data='{data}' does not serve {name}: {said}" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_refused_before_any_work(weights, capsys):
    torch.save({**torch.load(weights), "bn1.weight": torch.full((32,), torch.nan)}, weights)
    with pytest.raises(SystemExit):
        main(["evaluate", "imagenet-linear", str(weights)])
    assert (
        "contains 1 tensors with NaN or infinite values, the first is bn1.weight"
        in capsys.readouterr().err
    )


@pytest.mark.slow  # two evaluations
def test_a_result_that_another_call_has_left_meanwhile_stays(weights, tree, monkeypatch):
    """It came while this call was at work; what this one has trained is kept too."""
    trained = open_backbone(weights)
    asked = evaluation("imagenet-knn", None, trained.recipe)
    other = replace(asked, config=replace(asked.config, neighbors=(3,)))
    work = KNNConfig.judge

    def and_meanwhile(*args):
        monkeypatch.setattr(KNNConfig, "judge", work)
        evaluations.evaluate("imagenet-knn", trained, other, progress=False)
        return work(*args)

    monkeypatch.setattr(KNNConfig, "judge", and_meanwhile)
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        evaluations.evaluate("imagenet-knn", trained, asked, progress=False)
    assert "knn_3" in read_result("runs/theirs/imagenet-knn.json")["figures"]
