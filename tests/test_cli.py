"""The command line, in this process: what it writes, what it says, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import imsvd_core
from imsvd_core.cli import main
from imsvd_core.commands.jobs import launch_of_pretraining
from imsvd_core.commands.training import parse_pretraining
from imsvd_core.data import memory as datasets
from imsvd_core.loss import CrossJointEntropyLoss
from imsvd_core.recipes import RECIPES
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
    assert set(knn["figures"]) == {"knn_10", "knn_20", "gallery", "queries"}
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
        (["evaluate", "svd", "run"], "evaluation='svd' must be one of knn, linear"),
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


def test_help_lists_settings_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "cifar10", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for words in (
        "--optim.lr",
        "Peak learning rate",
        "--method.temperature",
        "--network.backbone",
        "--run-dir",
    ):
        assert words in text, words


def test_no_command_and_a_wrong_one_show_the_usage(capsys):
    for words, code in (([], 2), (["train"], 2), (["--help"], 0), (["evaluate", "--help"], 0)):
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


def test_help_and_a_wrong_command_import_no_torch():
    code = (
        "import sys, imsvd_core.cli as cli\n"
        "try:\n    cli.main({words})\nexcept SystemExit as stop:\n    assert stop.code == {code}\n"
        "assert not {{'torch', 'numpy', 'tyro', 'rich'}} & sys.modules.keys()\n"
        "assert len(sys.modules) < 200, len(sys.modules)"
    )
    for words, status in ((["--help"], 0), ([], 2), (["train"], 2)):
        subprocess.run([sys.executable, "-c", code.format(words=words, code=status)], check=True)


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
    assert command.recipe == launched
    run_dir = tmp_path / "runs" / "cifar10-smoke-seed0"
    place = ["--scale", "smoke", "--run-dir", str(run_dir), "--no-progress"]
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
