"""The command line, in this process: what it writes, what it says, what it refuses."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import imsvd_core
from imsvd_core.cli import main
from imsvd_core.commands.data import DataGetCommand
from imsvd_core.commands.jobs import ReproduceCommand, launch_of_pretraining
from imsvd_core.commands.training import parse_pretraining
from imsvd_core.commands.words import FOLLOWING
from imsvd_core.data import memory as datasets
from imsvd_core.data.check import SCHEMES, SPECS
from imsvd_core.launch.graph import FIGURES, TABLES
from imsvd_core.loss import CrossJointEntropyLoss
from imsvd_core.recipes import EVALUATIONS, OWN, RECIPES
from imsvd_core.runs import pretrain as training
from imsvd_core.system import signals


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "ATTRIBUTES_SIZES", {"train": 600, "test": 200})
    monkeypatch.setenv("IMSVD_DATASET", "attributes")
    monkeypatch.setenv("IMSVD_SCALE", "smoke")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow  # a training and its evaluations
def test_pretrain_then_evaluate(capsys):
    main(["pretrain", "cifar10", "--optim.lr", "0.003", "--knn.neighbors", "5", "--no-progress"])
    run = Path("runs/cifar10-smoke-seed0")
    config = json.loads((run / "config.json").read_text())
    assert config["optim"]["lr"] == 0.003
    assert config["loop"]["batch_size"] == 64
    assert config["data"] == "attributes"
    main(["evaluate", "knn", "--neighbors", "10", "20", "--gallery", "300", str(run)])
    with pytest.raises(SystemExit):
        main(["evaluate", "knn", str(run), "--neighbors", "10"])
    assert "pass --overwrite" in capsys.readouterr().err
    main(
        ["evaluate", "linear", str(run), "--loop.epochs", "1", "--loop.seed", "5", "--no-progress"]
    )
    knn, linear = (json.loads((run / f"{name}.json").read_text()) for name in ("knn", "linear"))
    assert set(knn["figures"]) == {"data", "knn_10", "knn_20", "gallery", "queries"}
    assert knn["figures"]["gallery"] == 300
    assert linear["figures"]["epochs"] == 1
    assert 0 <= linear["figures"]["linear"] <= 100
    assert knn["provenance"]["dataset"] == "attributes (drawn)"
    assert linear["provenance"]["seed"] == 5
    assert "written to runs/cifar10-smoke-seed0/linear.json" in capsys.readouterr().out.replace(
        "\n", ""
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "knn", "nowhere"], "run='nowhere' is not there: give the folder"),
        (["evaluate", "svd", "run"], "evaluation='svd' is unknown. There are: knn, linear"),
        (["pretrain", "cifar10", "--scale", "huge"], "scale='huge' must be one of"),
        (
            ["pretrain", "cifar10", "--knn.gallery", "100", "--no-progress"],
            "knn.neighbors=(20, 200): k = 200 exceeds the gallery of 100",
        ),
        (
            ["pretrain", "cifar10", "--knn.queries", "300", "--no-progress"],
            "knn.queries=300 must lie between 1 and the 200",
        ),
        (["pretrain", "cifar10", "--loop.epochs", "0"], "epochs=0 must be at least 1"),
        (["pretrain", "cifar10", "--method.units", "7"], "units=7 does not divide"),
        (
            ["pretrain", "cifar10", "--loop.device", "tpu", "--no-progress"],
            "device='tpu' is not here",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert message in said.err + said.out
    assert "Traceback" not in said.err


@pytest.mark.parametrize(("name", "says"), [("RANK", 1), ("SLURM_PROCID", 1), ("RANK", 0)])
def test_of_ranks_that_are_all_mistyped_one_says_so(name, says):
    command = [sys.executable, "-m", "imsvd_core.cli", "pretrain", "cifar11"]
    done = subprocess.run(command, env={**os.environ, name: str(says)}, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.count(b"did you mean cifar10?") == 1 - says


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room there, then run the same command again"),
        (errno.EDQUOT, "make room there"),
        (errno.EROFS, "give a folder that you may write to"),
        (errno.EACCES, "give a folder that you may write to"),
    ],
)
def test_a_disk_that_takes_no_more_is_one_line_with_the_file(capsys, monkeypatch, number, remedy):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number), "runs/metrics.jsonl")

    monkeypatch.setattr(training, "pretrain", fail)
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "cifar10"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("imsvd pretrain: ")
    assert "'runs/metrics.jsonl'" in line
    assert remedy in line


def test_a_stopped_training_says_how_to_go_on_and_exits_as_after_sigterm(capsys, monkeypatch):
    def stopped(*args, **kwargs):
        raise signals.Stopped("stopped at step 3 of 10: run the same command to go on")

    monkeypatch.setattr(training, "pretrain", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "cifar10"])
    assert stop.value.code == 143
    assert (
        capsys.readouterr().err
        == "imsvd pretrain: stopped at step 3 of 10: run the same command to go on\n"
    )


def test_help_shows_what_is_changed_first_and_the_rest_by_group_or_all_at_once(capsys):
    def shown(*words) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["pretrain", "cifar10", *words])
        assert stop.value.code == 0
        return capsys.readouterr().out

    first, of_one, every = shown("--help"), shown("--help", "views"), shown("--help-all")
    for words in (
        "loop.epochs",
        "batch-size",
        "seed",
        "optim.lr",
        "data",
        "run-dir",
        "Peak learning rate",
    ):
        assert words in first, words
    assert "--views.first.blur-probability" not in first
    assert first.count("\n") < 70
    assert "GROUP those of one: method, network, views, optim, loop, eval-view, knn" in first
    assert "--views.first.flip" in of_one
    assert "--views.second.flip" in of_one
    assert "--optim.lr" not in of_one
    for words in ("--optim.lr", "--views.second.flip", "--network.backbone", "--run-dir"):
        assert words in every, words
    with pytest.raises(SystemExit):
        main(["evaluate", "linear", "--help", "lop"])
    assert "--help lop is no group of settings; optim, loop, view" in capsys.readouterr().err


def test_a_lack_of_words_shows_the_usage(capsys):
    for words, code in (([], 2), (["bench"], 2), (["--help"], 0), (["evaluate", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == code
        assert "usage: imsvd" in capsys.readouterr().out


@pytest.mark.slow  # a process that imports torch
def test_no_command_waits_for_what_only_the_svms_need():
    """Which takes over a second to import."""
    code = (
        "import sys, imsvd_core.commands.training, imsvd_core.commands.jobs\n"
        "assert not {'sklearn', 'joblib', 'timm', 'lightly'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_usages_and_refusals_of_words_import_neither_torch_nor_recipes():
    code = """
import sys, imsvd_core.cli as cli
for words, status in {calls}:
    try:
        cli.main(words.split())
    except SystemExit as stop:
        assert stop.code == status, words
    slow = {{'torch', 'numpy', 'imsvd_core.recipes', 'submitit', *{more}}} & sys.modules.keys()
    assert not slow, (words, slow)
"""
    usages = [(f"{words} --help", 0) for words in FOLLOWING]
    wrong = [(f"{words} cifar11", 2) for words in FOLLOWING]
    scale = [("pretrain cifar10 --scale huge", 2), ("launch cifar10 --scale huge", 2)]
    lost = [
        ("evaluate knn nowhere", 2),
        ("evaluate knn", 2),
        ("export nowhere", 2),
        ("launch evaluate knn nowhere", 2),
    ]
    bare = [*usages, *wrong, *scale, *lost, ("", 2), ("pretrain --loop.epochs 3 cifar10", 2)]
    own = ("status", "reproduce", "launch cifar10", "export")
    read = [(f"{words} --help", 0) for words in own] + [("status nowhere", 2)]
    read += [("reproduce --table 9", 2), ("launch cifar10 --nodes 0", 2)]
    for calls, more in ((bare, ("tyro", "rich")), (read, ())):
        run = [sys.executable, "-c", code.format(calls=calls, more=more)]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_words_of_usages_are_those_that_are_heeded():
    assert list(FOLLOWING["pretrain"][1]) == list(RECIPES)
    assert list(FOLLOWING["evaluate"][1]) == [*OWN, *EVALUATIONS]
    own = [f"{scheme}:PATH" for scheme in SCHEMES]
    assert list(FOLLOWING["data check"][1]) == [*SPECS, *own]
    assert list(FOLLOWING["data get"][1]) == list(get_args(get_type_hints(DataGetCommand)["name"]))
    for kind, held in (("table", TABLES), ("figure", FIGURES)):
        numbers = get_args(get_type_hints(ReproduceCommand)[kind])[0]
        assert list(get_args(numbers)) == list(held)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pretrian cifar10", "imsvd: command='pretrian' is unknown: did you mean pretrain?"),
        ("pretrain cifar11", "imsvd pretrain: recipe='cifar11' is unknown: did you mean cifar10?"),
        ("pretrain CIFAR10_BYOL", "did you mean cifar10-byol?"),
        ("pretrain barlow", "did you mean cifar10-barlow-twins?"),
        ("bench setp cifar10", "imsvd bench: benchmark='setp' is unknown: did you mean step?"),
        ("bench step two-view", "did you mean two-views?"),
        ("launch evalaute knn run", "recipe='evalaute' is unknown: did you mean evaluate?"),
        ("data check imagnet /data", "data set='imagnet' is unknown: did you mean imagenet?"),
        ("evaluate runs/first", "evaluation='runs/first' is unknown. There are: knn, linear"),
        ("launch evaluate --nodes 1 knnn run", "evaluation='knnn' is unknown: did you mean knn?"),
        ("launch evaluate --nodes 1 knn nowhere", "run='nowhere' is not there"),
        ("pretrain --seed 1 cifar10", "imsvd pretrain: the recipe comes first, then --seed and"),
    ],
)
def test_a_mistyped_word_is_refused_with_the_one_that_comes_nearest(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_one_recipe_alone_is_built_to_read_its_settings(monkeypatch, capsys):
    def build(scale):
        raise AssertionError("another recipe is built")

    others = {name: build for name in RECIPES if name != "cifar10"}
    for name, function in others.items():
        monkeypatch.setitem(RECIPES, name, function)
    command = parse_pretraining(["cifar10", "--loop.epochs", "3"], "imsvd pretrain")
    assert command.recipe.loop.epochs == 3
    assert command.run_dir == Path("runs/cifar10-smoke-seed0")
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    assert stop.value.code == 0
    assert "cifar10-vicreg" in capsys.readouterr().out


def test_a_launched_job_is_the_command_with_its_place(tmp_path):
    given = ["--run-dir", "runs/cifar10-smoke-seed0", "--loop.epochs", "3"]
    job, launched = launch_of_pretraining("cifar10", given)
    command = parse_pretraining(job.argv[1:], "imsvd pretrain")
    assert command.run_dir == job.run_dir
    assert command.recipe == replace(launched, data="attributes")  # what auto is here
    run_dir = tmp_path / "runs" / "cifar10-smoke-seed0"
    place = ["--scale", "smoke", "--data", "attributes", "--run-dir", str(run_dir), "--no-progress"]
    assert job.argv == ("pretrain", "cifar10", *given, *place)
    assert (job.folder, job.name) == (run_dir / "jobs", "cifar10-smoke-seed0")


def test_the_package_opens_at_one_door():
    assert imsvd_core.CrossJointEntropyLoss is CrossJointEntropyLoss
    assert imsvd_core.recipe("cifar10", "smoke").loop.batch_size == 64
    assert imsvd_core.pretrain is training.pretrain
    assert {"recipe", "pretrain", "CrossJointEntropyLoss"} == set(imsvd_core.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        imsvd_core.train  # noqa: B018
    code = "import sys, imsvd_core; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
