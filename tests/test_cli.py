"""The command line, in this process: what it writes, what it says, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from imsvd_core.cli import main
from imsvd_core.data import memory as datasets
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
    assert (
        config["optim"]["lr"] == 0.003
        and config["loop"]["batch_size"] == 64
        and config["data"] == "attributes"
    )
    main(["evaluate", "knn", "--neighbors", "10", "20", "--gallery", "300", str(run)])
    with pytest.raises(SystemExit):
        main(["evaluate", "knn", str(run), "--neighbors", "10"])
    assert "pass --overwrite" in capsys.readouterr().err
    main(
        ["evaluate", "linear", str(run), "--loop.epochs", "1", "--loop.seed", "5", "--no-progress"]
    )
    knn, linear = (json.loads((run / f"{name}.json").read_text()) for name in ("knn", "linear"))
    assert (
        set(knn["figures"]) == {"knn_10", "knn_20", "gallery", "queries"}
        and knn["figures"]["gallery"] == 300
    )
    assert linear["figures"]["epochs"] == 1 and 0 <= linear["figures"]["linear"] <= 100
    assert (
        knn["provenance"]["dataset"] == "attributes (drawn)" and linear["provenance"]["seed"] == 5
    )
    assert "written to runs/cifar10-smoke-seed0/linear.json" in capsys.readouterr().out.replace(
        "\n", ""
    )


@pytest.mark.parametrize(
    "words, message",
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
    assert stop.value.code == 2 and message in said.err + said.out and "Traceback" not in said.err


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
        assert stop.value.code == code and "usage: imsvd" in capsys.readouterr().out


@pytest.mark.slow  # a process that imports torch
def test_no_command_waits_for_what_only_the_svms_need():
    """Which takes over a second to import."""
    code = "import sys, imsvd_core.cli; assert not {'sklearn', 'joblib', 'timm', 'lightly'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
