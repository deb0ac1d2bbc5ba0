"""The command line, `imsvd`: which command there is, and how its end is told.

The commands are in `imsvd_core.commands`; each is imported when it is called, and no other.
"""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module

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
                         prepare one

`imsvd COMMAND --help` lists every setting. Environment: IMSVD_SCALE (smoke, laptop, full),
IMSVD_DATA (data root), IMSVD_DATASET (auto, cifar10, attributes, ...)."""

#: The file of `imsvd_core.commands` in which each command is a function.
COMMANDS = {
    "pretrain": "training",
    "evaluate": "training",
    "export": "training",
    "bench": "training",
    "launch": "jobs",
    "reproduce": "jobs",
    "status": "jobs",
    "data": "data",
}


def run(argv: Sequence[str]) -> None:
    """Do one command. Exits with 2 and one line for anything that the user can mend; raises
    `signals.Stopped` where a notice ended it before its end, with all that it had done saved."""
    from imsvd_core.engine.checkpoints import CheckpointError
    from imsvd_core.engine.trainer import NonFiniteError
    from imsvd_core.system.ranks import first_to_say
    from imsvd_core.system.run_folder import Superseded

    module = import_module(f"imsvd_core.commands.{COMMANDS[argv[0]]}")
    try:
        getattr(module, argv[0])(argv[1:])
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        CheckpointError,
        NonFiniteError,
        Superseded,
    ) as error:
        if first_to_say(str(error)):
            print(f"imsvd {argv[0]}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: `run`, and exit with 143 where a signal stopped it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not argv or argv[0] not in COMMANDS:
        print(USAGE)
        raise SystemExit(0 if argv[:1] in (["-h"], ["--help"]) else 2)
    from imsvd_core.distributed import world
    from imsvd_core.system import signals

    try:
        run(argv)
    except signals.Stopped as stopped:
        # The launcher, which keeps the count of who has said what, may be gone.
        if world()[0] == 0:
            print(f"imsvd {argv[0]}: {stopped}", file=sys.stderr)
        raise SystemExit(signals.STOPPED) from None


if __name__ == "__main__":
    main()
