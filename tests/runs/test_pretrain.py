"""Pretraining: exact after any kill, complete in what it leaves, the same from the same seed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from imsvd_core.data import memory as datasets
from imsvd_core.data.streamed import StreamedImages
from imsvd_core.engine.trainer import Trainer
from imsvd_core.methods import BarlowTwins, VICReg
from imsvd_core.networks import NetworkConfig
from imsvd_core.recipes import recipe
from imsvd_core.results import read_result
from imsvd_core.runs.backbones import load_backbone, load_run, save_backbone
from imsvd_core.runs.pretrain import Pretraining, build_network, load_data, pretrain
from imsvd_core.system import signals
from imsvd_core.system.run_folder import TOKEN, RunFolder, Superseded


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 80 + 20 small pictures in two classes, bright and dark; returns its path."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("test", 10)):
        for label, name in enumerate(("dark", "bright")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = torch.randint(100, (3, 32, 32), generator=generator) + 140 * label
                Image.fromarray(image.permute(1, 2, 0).to(torch.uint8).numpy()).save(
                    folder / split / name / f"{number}.png"
                )
    return folder


@pytest.fixture
def small(images):
    """The smoke recipe on those pictures: ten steps in two epochs."""
    smoke = recipe("cifar10", "smoke")
    knn = replace(smoke.knn, neighbors=(20,), gallery=None, queries=None)
    return replace(
        smoke,
        data=f"folder:{images}",
        samples=None,
        loop=replace(smoke.loop, batch_size=16),
        knn=knn,
        watch=replace(knn, gallery=40, queries=20),
    )


KILLED = """
import os, signal, sys
from imsvd_core.engine.trainer import Trainer
from imsvd_core.cli import main
step, original = int(sys.argv.pop(1)), Trainer.take_step
def train_one(self, batches):
    metrics = original(self, batches)
    if self.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return metrics
Trainer.take_step = train_one
main()
"""


@pytest.mark.slow  # seven processes, each importing torch
def test_a_run_killed_at_five_random_steps_ends_with_the_weights_of_an_undisturbed_one(
    images, small, tmp_path
):
    options = [
        "pretrain",
        "cifar10",
        "--scale",
        "smoke",
        "--data",
        f"folder:{images}",
        "--samples",
        "80",
        "--loop.batch-size",
        "8",
        "--loop.save-every",
        "2",
        "--no-progress",
        "--knn.neighbors",
        "20",
        "--knn.gallery",
        "40",
        "--knn.queries",
        "20",
        "--watch.gallery",
        "40",
        "--watch.queries",
        "20",
    ]

    def start(run_dir, kill_at=-1):
        return subprocess.run(
            [
                sys.executable,
                "-c",
                KILLED,
                str(kill_at),
                *options,
                "--run-dir",
                str(tmp_path / run_dir),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    assert (whole := start("whole")).returncode == 0, whole.stderr
    for step in sorted(random.sample(range(1, 20), 5)):
        assert start("killed", step).returncode == -signal.SIGKILL, step
    assert (resumed := start("killed")).returncode == 0, resumed.stderr
    ends = [
        torch.load(tmp_path / name / "checkpoints" / "step-000000020.pt", weights_only=True)[
            "state"
        ]
        for name in ("whole", "killed")
    ]
    for name, value in ends[0]["method"].items():
        assert torch.equal(value, ends[1]["method"][name]), name
    records = [
        [
            (line["step"], line.get("loss"), line.get("knn_20"))
            for line in map(
                json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            )
        ]
        for name in ("whole", "killed")
    ]
    assert records[0] == records[1]


@pytest.mark.slow  # a whole training
def test_a_run_leaves_everything_and_its_backbone_comes_back(small, tmp_path):
    result = read_result(pretrain(small, tmp_path, progress=False))
    assert {path.name for path in tmp_path.iterdir()} - {".lock", ".attempt"} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "joints",
        "backbone.safetensors",
        "result.json",
    }
    assert result["figures"]["knn_20"] > 90  # bright and dark are easy to tell apart
    assert [line["step"] for line in result["figures"]["watched"]] == [0, 5, 10]
    assert result["provenance"]["dataset"] == small.data.rsplit("/", 1)[-1]
    assert result["provenance"]["seconds"] > 0
    loaded, backbone = load_run(tmp_path)
    assert loaded == small
    weights = load_file(tmp_path / "backbone.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    joints = [load_file(path)["joint"] for path in sorted((tmp_path / "joints").iterdir())]
    assert len(joints) == 3
    assert all(one.shape == (64, 64) for one in joints)


@pytest.mark.parametrize("last", ["backbone.safetensors", "result.json"])
def test_a_run_that_loses_its_folder_while_it_writes_leaves_the_old_file(
    small, tmp_path, monkeypatch, last
):
    with RunFolder(tmp_path) as folder:
        run = Pretraining(small, folder, progress=False)
        for name in ("backbone.safetensors", "result.json"):
            (tmp_path / name).write_text("old")
        check, checks = folder.check, []

        def lose() -> None:
            checks.append(None)
            if len(checks) == (1 if last == "backbone.safetensors" else 2):
                assert list(tmp_path.glob(f".{last}.*.part"))  # it is written, and not in place yet
                (tmp_path / TOKEN).unlink()
            check()

        monkeypatch.setattr(folder, "check", lose)
        with pytest.raises(Superseded):
            run.finish()
    assert (tmp_path / last).read_text() == "old"
    assert not list(tmp_path.glob(".*.part"))


def test_seeds_fix_the_network_and_the_views(small, tmp_path):
    torch.manual_seed(1)
    first = build_network(small.network, 0).state_dict()
    torch.manual_seed(2)
    again, other = (
        build_network(small.network, 0).state_dict(),
        build_network(small.network, 1).state_dict(),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.conv1.weight"], other["backbone.conv1.weight"])
    run = Pretraining(small, tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(run.test_codes(), run.test_codes(), strict=False))


@pytest.mark.slow  # two trainings
def test_looking_leaves_no_trace(small, tmp_path):
    ends = []
    for looks in (False, True):
        run = Pretraining(small, tmp_path / str(looks), progress=False)
        for _ in run:
            if looks:
                run.test_codes()
                run.knn()
                run.network.train()
        ends.append(run.network.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow  # a whole training each
@pytest.mark.parametrize("method", [VICReg(), BarlowTwins()])
def test_the_methods_it_is_compared_with_train_too(small, tmp_path, method):
    run = Pretraining(replace(small, method=method), tmp_path, progress=False)
    losses = [progressed.metrics["loss"].item() for progressed in run]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="no soft codes"):
        run.test_codes()


@pytest.mark.slow  # two trainings
def test_other_settings_do_not_resume_and_saving_more_often_does(small, tmp_path):
    for _ in Pretraining(small, tmp_path, progress=False):
        break
    list(
        Pretraining(
            replace(small, loop=replace(small.loop, save_every=1)), tmp_path, progress=False
        )
    )
    with pytest.raises(ValueError, match=r"method.temperature: 0.25 before, 1.0 now"):
        Pretraining(
            replace(small, method=replace(small.method, temperature=1.0)), tmp_path, progress=False
        )


def test_unreadable_images_are_looked_for_once_however_often_a_run_is_watched(
    small, images, tmp_path, monkeypatch
):
    passes, look = [], StreamedImages.unsound

    def counted(data, *settings):
        passes.append(data.on_corrupt)
        return look(data, *settings)

    monkeypatch.setattr(StreamedImages, "unsound", counted)
    small = replace(small, data=f"tree:{images}", on_corrupt="skip")
    run = Pretraining(small, tmp_path, progress=False)
    assert run.knn(small.watch) == run.knn(small.watch)
    assert passes.count("skip") == 2  # gallery and queries


@pytest.mark.slow  # two trainings
def test_a_streamed_run_that_a_spoilt_file_ended_goes_on_without_it(small, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    small = replace(
        small, data=f"tree:{tmp_path / 'images'}", loop=replace(small.loop, epochs=1, save_every=1)
    )
    for _ in Pretraining(small, tmp_path / "run", progress=False):
        break
    for file in (tmp_path / "images/train/dark").glob("*[02468].png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"png cannot be read.*--on-corrupt skip"):
        list(Pretraining(small, tmp_path / "run", progress=False))
    small = replace(small, on_corrupt="skip")
    run = Pretraining(small, tmp_path / "run", progress=False)
    assert run.trainer.step >= 1
    assert list(run)
    assert run.trainer.step == 5
    assert run.train.skipped
    assert load_data(replace(small, data=f"folder:{tmp_path / 'images'}"))[0].skipped == 20


@pytest.mark.parametrize("labelled", [False, True])
def test_images_without_labels_or_test_split_pretrain_and_give_no_knn(
    small, images, tmp_path, labelled, caplog
):
    for folder in (images / "train").iterdir():
        target = tmp_path / "mine/train" / (folder.name if labelled else "")
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir())[:8]:
            shutil.copy(file, target / f"{folder.name}{file.name}")
    mine = replace(
        small, data=f"folder:{tmp_path / 'mine'}", loop=replace(small.loop, epochs=1, save_every=1)
    )
    result = read_result(pretrain(mine, tmp_path / "run", progress=False))
    assert not [name for name in result["figures"] if name.startswith("knn_2")]
    assert result["figures"]["data"]["train"]["images"] == 16
    assert "test" not in result["figures"]["data"]
    reason = "no test split" if labelled else "in no class folder"
    assert reason in result["figures"]["knn_left_out"]
    assert any("kNN is left out" in record.message for record in caplog.records)
    assert [line["step"] for line in result["figures"]["watched"]] == [0, 1]
    with pytest.raises(ValueError, match="kNN cannot be"):
        Pretraining(mine, tmp_path / "run", progress=False).knn()


def test_peers_compute_in_float32_under_autocast():
    z1, z2 = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)) * 12
    for peer in (VICReg(), BarlowTwins()):
        method = peer.build(NetworkConfig(dim=32))
        plain = method.loss(z1, z2)["loss"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(method.loss(z1, z2)["loss"], plain)
    with pytest.raises(ValueError, match="variance_weight=-3"):
        VICReg(variance_weight=-3)


@pytest.mark.slow  # three trainings
def test_a_run_killed_between_an_epochs_end_and_its_record_watches_again_and_only_then(
    small, tmp_path
):
    run = Pretraining(small, tmp_path, progress=False)
    run.watch()
    for progressed in run:
        if progressed.ends_epoch:
            break  # saved, but not watched
    pretrain(small, tmp_path, progress=False)
    pretrain(small, tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn_20" in line] == [0, 5, 10]


@pytest.mark.slow  # two trainings
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_signal_lets_a_training_save_and_stop_and_the_same_call_ends_it_as_if_nothing_was(
    small, tmp_path, monkeypatch, name
):
    number, train_one = getattr(signal, name), Trainer.take_step

    def signalled(loop, batches):
        if loop.step == 3:
            os.kill(os.getpid(), number)
        return train_one(loop, batches)

    pretrain(small, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", signalled)
        with pytest.raises(
            signals.Stopped, match="stopped at step 4 of 10: run the same command to go on"
        ):
            pretrain(small, tmp_path / "cut", progress=False)
    assert signal.getsignal(number) is signal.SIG_DFL
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == [
        "step-000000004.pt"
    ]
    assert not (tmp_path / "cut" / "result.json").exists()
    pretrain(small, tmp_path / "cut", progress=False)
    whole, cut = (load_file(tmp_path / run / "backbone.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())


@pytest.mark.slow  # a whole training
def test_what_is_watched_is_kept_whatever_its_neighbors(small, tmp_path):
    other = replace(small, watch=replace(small.watch, neighbors=(10,)))
    figures = read_result(pretrain(other, tmp_path, progress=False))["figures"]
    assert [set(line) >= {"knn_10", "mean_top"} for line in figures["watched"]] == [True] * 3


def test_a_backbone_in_half_precision_keeps_its_network(small, tmp_path):
    backbone = build_network(small.network, 0).backbone
    save_backbone(tmp_path / "half.safetensors", backbone, small.network, torch.float16)
    loaded = load_backbone(tmp_path / "half.safetensors").state_dict()
    assert load_file(tmp_path / "half.safetensors")["conv1.weight"].dtype == torch.float16
    for name, value in backbone.state_dict().items():
        assert loaded[name].dtype == value.dtype
        assert torch.allclose(loaded[name], value, rtol=1e-3, atol=1e-4), name


def test_weights_that_do_not_say_their_network_are_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors does not say which backbone"):
        load_backbone(tmp_path / "w.safetensors")


def test_an_unfinished_run_cannot_be_evaluated(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_run(tmp_path)


@pytest.mark.slow  # a whole training
def test_the_joint_matrix_brightens_on_its_diagonal(tmp_path, monkeypatch):
    """Two short epochs on the drawn pictures must lower every term that has room: DE and TI."""
    monkeypatch.setattr(datasets, "ATTRIBUTES_SIZES", {"train": 600, "test": 200})
    smoke = replace(recipe("cifar10", "smoke"), data="attributes", samples=512)
    run = Pretraining(smoke, tmp_path, data=load_data(smoke), progress=False)
    terms = [progressed.metrics for progressed in run]
    assert terms[-1]["diagonal_entropy"] < terms[0]["diagonal_entropy"] - 0.1
    assert terms[-1]["transform_invariance"] < terms[0]["transform_invariance"] - 0.1
