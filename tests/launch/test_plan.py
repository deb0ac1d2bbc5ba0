"""What a launch will take, and what would be refused, before anything is sent."""

import json
import re
from dataclasses import replace

import pytest

from imsvd_core.data import check as prepared
from imsvd_core.data import tree
from imsvd_core.launch import LaunchConfig, plan
from imsvd_core.methods import IMSVD, BarlowTwins, VICReg
from imsvd_core.recipes import recipe
from imsvd_core.system.files import atomic_write

FULL = LaunchConfig(nodes=4, gpus_per_node=8, gpu_hour_price=2.0)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """A data root with a folder that could be ImageNet's, and a stamp that says it was checked."""
    monkeypatch.setenv("IMSVD_DATA", str(tmp_path))
    root = tmp_path / "imagenet"
    (root / "train" / "n01440764").mkdir(parents=True)
    (root / "train" / "n01440764" / "one.JPEG").touch()
    report = prepared.Report("imagenet", str(root), "header")
    (root / prepared.STAMP).write_text(json.dumps(vars(report)))
    return root


def test_the_papers_own_launch_is_quoted_from_table_iv(imagenet, tmp_path):
    one = plan("imagenet-200", recipe("imagenet-200", "full"), FULL, tmp_path)
    assert one.hours == 17.0
    assert one.memory_gb == pytest.approx(10.4)
    assert one.batch_per_rank == 64
    assert one.steps == 200 * (1_281_167 // 2048)
    assert not one.refused
    assert one.attempts == 1
    assert replace(one, config=replace(FULL, time="2:00:00")).attempts == 9
    text = str(one)
    assert "quoted: Table IV, 8.5 hours for 100 epochs on 32 V100" in text
    assert "GPU hours 544; 1,088 USD at 2" in text


def test_table_iv_is_quoted_for_each_of_its_methods(imagenet, tmp_path):
    imsvd = recipe("imagenet-100", "full")
    hours = {
        method.name: plan("x", replace(imsvd, method=method), FULL, tmp_path).hours
        for method in (IMSVD(), VICReg(), BarlowTwins())
    }
    assert hours == {"imsvd": 8.5, "vicreg": 11.0, "barlow_twins": 12.0}


def test_time_and_memory_scale_with_the_gpus_but_not_what_every_gpu_holds(imagenet, tmp_path):
    half = plan("imagenet-100", recipe("imagenet-100", "full"), replace(FULL, nodes=2), tmp_path)
    assert half.hours == 17.0
    assert half.batch_per_rank == 128
    # ResNet-50 without classifier, 2048-8192-8160 with one batch-norm; weights, gradients, momentum
    # in fp32
    fixed = 12 * (23_508_032 + 2048 * 8192 + 2 * 8192 + 8192 * 8160) / 1e9
    assert half.memory_gb == pytest.approx(fixed + 2 * (10.4 - fixed))


@pytest.mark.parametrize("ranks", [32, 16])
def test_a_run_that_has_begun_on_as_many_ranks_tells_its_own_time(imagenet, tmp_path, ranks):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "samples_per_second": speed}) + "\n"
            for step, speed in ((1, 10.0), (2, 1000.0), (3, 1100.0))
        )
    )
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "submission.json").write_text(
        json.dumps(
            {
                "name": "run",
                "argv": [],
                "job_id": "1",
                "executor": "slurm",
                "folder": "",
                "tasks": ranks,
                "submitted": "",
            }
        )
    )
    one = plan("imagenet-100", recipe("imagenet-100", "full"), FULL, tmp_path)
    if ranks == FULL.ranks:
        assert one.hours == pytest.approx(100 * 1_281_167 / 1000 / 3600)
        assert one.hours_source == "measured: this run so far"
    else:
        assert "quoted" in one.hours_source


def test_idle_gpus_save_no_time_and_cost_all_the_same(imagenet, tmp_path):
    one = plan(
        "imagenet-100", recipe("imagenet-100", "full"), replace(FULL, tasks_per_node=4), tmp_path
    )
    assert one.hours == 17.0
    assert one.batch_per_rank == 128
    assert "GPU hours 544" in str(one)


def test_one_core_to_decode_a_gpu_s_images_is_remarked_upon(imagenet, tmp_path):
    assert "set cpus_per_task" in str(
        plan("imagenet-100", recipe("imagenet-100", "full"), FULL, tmp_path)
    )
    assert "set cpus_per_task" not in str(
        plan(
            "imagenet-100",
            recipe("imagenet-100", "full"),
            replace(FULL, cpus_per_task=10),
            tmp_path,
        )
    )


def test_what_nobody_measured_is_unknown(tmp_path):
    one = plan(
        "cifar10", replace(recipe("cifar10", "smoke"), data="attributes"), LaunchConfig(), tmp_path
    )
    assert one.hours is None
    assert one.memory_gb is None
    assert "time      unknown" in str(one)
    assert one.steps == 8


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (
            replace(FULL, nodes=3),
            {},
            "batch_size=2048 cannot be cut into equal pieces, accumulate=1 on each of 24 ranks",
        ),
        (
            replace(FULL, time="0:12:00"),
            {},
            "time='0:12:00' leaves 10.0 minutes before the notice, and a checkpoint is due every "
            "save_minutes=15",
        ),
        (
            LaunchConfig(),
            {"loop": replace(recipe("imagenet-100", "full").loop, precision="fp16")},
            "precision='fp16' has no units on a CPU: use bf16, or ask for GPUs",
        ),
        (FULL, {"data": "tree:nowhere"}, "nowhere is not a folder"),
        (FULL, {"data": "folder:nowhere"}, "nowhere is not a folder"),
    ],
)
def test_what_would_fail_later_is_refused_now(imagenet, tmp_path, config, settings, words):
    refused = plan(
        "imagenet-100", replace(recipe("imagenet-100", "full"), **settings), config, tmp_path
    ).refused
    assert len(refused) == 1
    assert words in refused[0]


@pytest.mark.parametrize(
    ("run_dir", "words"),
    [
        ("file/run", "run folder: .*Not a directory → give another"),
        ("%j", "not take literally"),
    ],
)
def test_a_run_folder_that_cannot_be_is_refused(imagenet, tmp_path, run_dir, words):
    (tmp_path / "file").touch()
    full = recipe("imagenet-100", "full")
    (reason,) = plan("imagenet-100", full, FULL, tmp_path / run_dir).refused
    assert re.search(words, reason)


def test_data_that_were_not_checked_or_found_wanting_are_refused(imagenet, tmp_path):
    full = recipe("imagenet-100", "full")
    stamp = json.loads((imagenet / prepared.STAMP).read_text())
    stamp["problems"] = [{"what": "unreadable", "remedy": "replace them"}]
    (imagenet / prepared.STAMP).write_text(json.dumps(stamp))
    assert (
        "was found wanting: run imsvd data check imagenet"
        in plan("imagenet-100", full, FULL, tmp_path).refused[0]
    )
    (imagenet / prepared.STAMP).unlink()
    assert (
        "has not been checked: run imsvd data check imagenet"
        in plan("imagenet-100", full, FULL, tmp_path).refused[0]
    )


def test_a_check_of_a_root_that_is_read_only_counts_while_its_contents_are_the_same(
    imagenet, tmp_path, monkeypatch
):
    def read_only(path, *check):
        if path.is_relative_to(imagenet):
            raise OSError(30, "Read-only file system")
        return atomic_write(path, *check)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "atomic_write", read_only)
    (imagenet / prepared.STAMP).unlink()
    (imagenet / "val" / "n01440764").mkdir(parents=True)
    (imagenet / "val" / "n01440764" / "two.JPEG").touch()
    spec = replace(prepared.find_spec("imagenet"), counts={"train": 1, "val": 1}, classes=1)
    full = recipe("imagenet-100", "full")
    assert prepared.check("imagenet", imagenet, decode="none", spec=spec).ok
    assert not (imagenet / prepared.STAMP).exists()
    assert not plan("imagenet-100", full, FULL, tmp_path).refused
    (imagenet / "train" / "n01440764" / "three.JPEG").touch()
    assert "has not been checked" in plan("imagenet-100", full, FULL, tmp_path).refused[0]


def test_a_folders_images_are_counted_without_being_read(tmp_path, monkeypatch):
    monkeypatch.setenv("IMSVD_DATA", str(tmp_path))
    monkeypatch.setattr(tree.FolderImages, "decode", None)
    for label in "ab":
        (tmp_path / "mine" / "train" / label).mkdir(parents=True)
        for number in range(70):
            (tmp_path / "mine" / "train" / label / f"{number}.png").touch()
    one = replace(recipe("cifar10", "smoke"), data="folder:mine", samples=None)
    assert plan("cifar10", one, LaunchConfig(), tmp_path).samples == 140
