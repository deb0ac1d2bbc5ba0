"""The words that follow `imsvd`: what usages list, and what a mistyped one is compared with.

Nothing slow is imported for them.
"""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from imsvd_core.system.scale import current_scale

USAGE = """usage: imsvd COMMAND ...

commands:
  pretrain RECIPE        train a recipe; a run that was cut off goes on from its last checkpoint.
                         SIGTERM and SIGUSR2 let it save and stop (exit status 143). On several
                         processes: torchrun --nproc-per-node 2 -m imsvd_core.cli pretrain RECIPE
  evaluate NAME RUN      judge a run's backbone, or a file of weights: knn and linear on its own
                         data; imagenet-knn, imagenet-linear, places205-linear, voc07-svm and
                         coco-detection as the paper does
  export RUN --to FORM   its backbone as torchvision, timm, detectron2 or safetensors read it
  bench step RECIPE      time of a training step, hours of 100 epochs, peak memory, on the device
                         at hand
  launch RECIPE          the same training as a job of a cluster (Slurm), queued again whenever it
                         is stopped; --dry-run shows what it will take
  launch evaluate NAME RUN ...   an evaluation as such a job
  reproduce              a table of the paper, a figure, or all: what it needs as a graph of jobs;
                         the finished ones are left alone
  status [FOLDER]        where what was launched stands: waiting, running, done, failed
  data check NAME ROOT   whether a data root (imagenet, places205, voc07, coco) is whole, or how to
                         prepare one; folder:PATH, voc:PATH or coco:PATH: what of one's own data is
                         read, passed over and wrong
  doctor [FOLDER]        whether this machine and its cluster are ready: /dev/shm, folders, disk,
                         data root, Slurm's variables and limits, CUDA, NCCL

`imsvd COMMAND --help` lists settings. Environment: IMSVD_SCALE (smoke, laptop, full),
IMSVD_DATA (data root), IMSVD_DATASET (auto, cifar10, attributes, ...)."""

RECIPES = {
    "cifar10": "IMSVD on CIFAR-10",
    "cifar10-vicreg": "VICReg, all else equal",
    "cifar10-barlow-twins": "Barlow Twins, all else equal",
    "cifar10-byol": "BYOL on CIFAR-10",
    "cifar10-swav": "SwAV on CIFAR-10, with four small crops",
    "cifar10-simclr": "SimCLR on CIFAR-10",
    "cifar10-moco": "MoCo v2 on CIFAR-10",
    "cifar10-simsiam": "SimSiam on CIFAR-10",
    "cifar10-iic": "IIC of many variables on CIFAR-10: IMSVD without pairs",
    "cifar10-sem": "SEM in BYOL on CIFAR-10: soft codes without entropies",
    "cifar10-frossl": "FroSSL on CIFAR-10",
    "cifar10-mmcr": "MMCR on CIFAR-10",
    "cifar10-lejepa": "LeJEPA (SIGReg) on CIFAR-10",
    "cifar10-twist": "TWIST on CIFAR-10",
    "cifar10-corinfomax": "CorInfoMax on CIFAR-10",
    "cifar10-wmse": "W-MSE on CIFAR-10",
    "cifar10-supervised": "classification of CIFAR-10 by its labels",
    "cifar10-npid": "NPID on CIFAR-10",
    "cifar10-dissl": "DISSL on CIFAR-10",
    "cifar10-units": "a short run, for comparing numbers of units and batch sizes",
    "two-views": "short runs that show collapse and what prevents it",
    "imagenet-100": "IMSVD on ImageNet, 100 epochs, as in the paper (Table I)",
    "imagenet-200": "the same, 200 epochs",
    "imagenet-400": "the same, 400 epochs",
    "imagenet-800": "the same, 800 epochs",
    "imagenet-1000": "the same, 1000 epochs",
}
EVALUATIONS = {
    "knn": "weighted kNN, on the run's own data",
    "linear": "linear probe, on the run's own data",
    "imagenet-knn": "kNN on ImageNet (Table II)",
    "imagenet-linear": "linear probe on ImageNet (Tables I and IV to IX)",
    "places205-linear": "linear probe on Places205 (Table III)",
    "voc07-svm": "support vector machines on VOC07 (Table III)",
    "coco-detection": "Mask R-CNN R50-C4 on COCO (Table III)",
}
#: The file of `imsvd_core.commands` in which each command is a function.
COMMANDS = {
    "pretrain": "training",
    "evaluate": "training",
    "export": "export",
    "bench": "training",
    "launch": "jobs",
    "reproduce": "jobs",
    "status": "jobs",
    "data": "data",
    "doctor": "doctor",
}
#: Commands whose settings start from a scale's.
SCALED = "pretrain", "evaluate", "bench", "launch", "reproduce"
#: What a command needs as its next word: what that is called, and each with its meaning.
FOLLOWING = {
    "": ("command", COMMANDS),
    "pretrain": ("recipe", RECIPES),
    "evaluate": ("evaluation", EVALUATIONS),
    "bench": ("benchmark", {"step": "time and memory of a training step"}),
    "bench step": ("recipe", RECIPES),
    "launch": ("recipe", RECIPES | {"evaluate": "an evaluation of a run, or of a file of weights"}),
    "launch evaluate": ("evaluation", EVALUATIONS),
    "data": (
        "data command",
        {"get": "download a data set", "check": "verify a data root, or say how to prepare one"},
    ),
    "data get": (
        "data set",
        dict.fromkeys(("cifar10", "cifar100", "fashion-mnist"), "to the data root (IMSVD_DATA)"),
    ),
    "data check": (
        "data set",
        {
            "imagenet": "ImageNet (ILSVRC 2012)",
            "places205": "Places205",
            "voc07": "PASCAL VOC 2007",
            "coco": "COCO 2017",
            "folder:PATH": "a folder of images",
            "tree:PATH": "the same",
            "voc:PATH": "VOC's layout, other data",
            "coco:PATH": "COCO's layout, other data",
        },
    ),
}


def look_over(argv: Sequence[str]) -> None:
    """Print a usage and exit where the next word is missing (2) or `--help` (0). Raises ValueError
    for a word that is none, with those that come near it, and for a scale that is none, and
    FileNotFoundError for a run that is not there."""
    path = ""
    for word in (*argv, ""):
        if path not in FOLLOWING:
            break
        kind, meanings = FOLLOWING[path]
        if word in ("", "-h", "--help"):
            print(_usage(path, kind, meanings) if path else USAGE)
            raise SystemExit(0 if word else 2)
        if word.startswith("-") and path.startswith(("data ", "launch evaluate")):
            return  # options may come first
        if word.startswith("-"):
            raise ValueError(f"the {kind} comes first, then {word} and other settings")
        if ":" in word:
            word = f"{word.partition(':')[0]}:PATH"
        if word not in meanings:
            like = word.lower().replace("_", "-")
            near = get_close_matches(like, meanings) or [name for name in meanings if like in name]
            hint = f": did you mean {near[0]}?" if near else "."
            raise ValueError(f"{kind}={word!r} is unknown{hint} There are: {', '.join(meanings)}")
        path = f"{path} {word}".strip()
    words = path.split()
    takes_run = words == ["export"] or words[-2:-1] == ["evaluate"]
    for run in [*argv[len(words) :], ""][: int(takes_run)]:
        if not run or not (run.startswith("-") or Path(run).exists()):
            raise FileNotFoundError(
                f"run={run!r} is not there: give the folder of a finished `imsvd pretrain`, or a "
                "file of weights (.pth, .pt, .safetensors)"
            )
    if argv[0] in SCALED:
        current_scale(peek(argv, "--scale"))


def peek(argv: Sequence[str], option: str) -> str | None:
    """The value of an option that decides from what the other settings start."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(option, dest="value")
    value: str | None = parser.parse_known_args(argv)[0].value
    return value


def _usage(path: str, kind: str, meanings: dict[str, str]) -> str:
    word = kind.split()[-1].upper()
    rows = "\n".join(f"  {name:22}{meaning}" for name, meaning in meanings.items())
    return (
        f"usage: imsvd {path} {word} ...\n\n{rows}\n\n"
        f"`imsvd {path} {word} --help` lists its settings."
    )
