"""The scripts whose results the book stores."""

import importlib.util
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imsvd_core.recipes import recipe
from imsvd_core.results import STORE, read_result
from imsvd_core.runs.backbones import load_backbone
from imsvd_core.runs.pretrain import pretrain

STUDIES = Path(__file__).parents[2] / "book" / "studies"


def load(name):
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    return study


@pytest.mark.slow  # a training for every setting
def test_the_grid_of_units_runs_every_setting_once(tmp_path, monkeypatch):
    monkeypatch.setenv("IMSVD_SCALE", "smoke")
    monkeypatch.setenv("IMSVD_DATASET", "attributes")
    study = load("units")
    monkeypatch.setattr(study, "BATCH_SIZES", (64,))
    monkeypatch.setattr(study, "UNITS", (4, 8))
    monkeypatch.setattr(study, "SEEDS", (0,))
    study.main(tmp_path)
    first = read_result(tmp_path / "result.json")["figures"]
    assert [run["units"] for run in first["runs"]] == [4, 8]
    assert (
        len({run["knn_20"] for run in first["runs"]} | {run["mean_top"] for run in first["runs"]})
        > 2
    )
    monkeypatch.setattr(
        study.Pretraining, "__iter__", lambda self: 1 / 0
    )  # nothing is trained again
    study.main(tmp_path)
    assert read_result(tmp_path / "result.json")["figures"] == first


def test_cheaper_losses_train_beside_the_exact_one_and_are_judged_by_it(tmp_path, monkeypatch):
    monkeypatch.setenv("IMSVD_SCALE", "smoke")
    monkeypatch.setenv("IMSVD_DATASET", "attributes")
    study = load("cheaper")
    monkeypatch.setattr(study, "SEEDS", (0,))
    study.main(tmp_path)
    exact, rounded, drawn = read_result(tmp_path / "result.json")["figures"]["runs"]
    assert (exact["setting"], rounded["setting"], drawn["setting"]) == ("fp32", "bf16", "quarter")
    assert exact["total"] != rounded["total"] != drawn["total"]
    assert abs(exact["total"] - rounded["total"]) < 0.05 * abs(exact["total"])


def test_a_run_is_kept_with_its_model_and_its_matrices(tmp_path):
    small = replace(recipe("cifar10", "smoke"), data="attributes")
    pretrain(small, tmp_path / "run", progress=False)
    (tmp_path / "store").mkdir()
    load("keep").main(tmp_path / "run", "kept", tmp_path / "store")
    before, after = (
        read_result(tmp_path / "run" / "result.json"),
        read_result(tmp_path / "store" / "kept.json"),
    )
    assert after["name"] == "kept"
    assert after["provenance"] == before["provenance"]
    assert after["figures"].items() >= before["figures"].items()
    assert (
        abs(after["figures"]["knn_20_as_kept"] - before["figures"]["knn_20"]) <= 2
    )  # of 200 queries
    matrices = load_file(tmp_path / "store" / "kept-joints.safetensors")
    assert len(matrices) == 1 + small.loop.epochs
    trained, kept = (
        load_backbone(path)
        for path in (
            tmp_path / "run" / "backbone.safetensors",
            tmp_path / "store" / "kept.safetensors",
        )
    )
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(trained.eval()(images), kept.eval()(images), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("path", sorted(STORE.glob("*.json")), ids=lambda path: path.stem)
def test_a_stored_result_names_no_folder_of_the_machine_that_made_it(path):
    assert not re.findall(r"/(?:root|home|tmp|work|Users|mnt)/\S*", path.read_text())


def test_the_recorded_launch_tells_what_a_log_says_by_the_names_of_folders_alone(tmp_path):
    pytest.importorskip("fcntl")  # the cluster is of Linux
    study, run_dir = load("launch"), tmp_path / "runs" / "run"
    (run_dir / "jobs").mkdir(parents=True)
    (run_dir / "jobs" / "7_0_log.err").write_text(
        f"srun: error\n2026-11-23 03:36:53,148 resumed {run_dir} at step 51 of 160, data "
        f"{tmp_path}/runs/cifar10\n"
    )
    watch = study.Watch(None, run_dir)
    watch.job, watch.began = "7", datetime(2026, 11, 23, 3, 36, 50).timestamp()
    assert study.log(watch) == [(3.148, "resumed run at step 51 of 160, data cifar10")]


def test_a_watch_sees_steps_that_are_done_again(tmp_path):
    watch = load("launch").Watch(None, tmp_path)
    watch._slow = float("inf")  # no cluster to look at
    lines = [f'{{"step": {step}, "loss": 1}}\n' for step in (1, 2, 3)]
    for there in (lines[:1], lines, lines[:2], lines):  # the third: a resumption has dropped a step
        (tmp_path / "metrics.jsonl").write_text("".join(there))
        watch.look()
    assert [step for _, step in watch.steps] == [1, 2, 3, 2, 3]
