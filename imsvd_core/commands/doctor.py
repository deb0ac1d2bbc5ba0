"""`imsvd doctor`: whether this machine and its cluster are ready for a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from imsvd_core.system.looks import looks


@dataclass(frozen=True)
class DoctorCommand:
    """Look at /dev/shm, the run folder, its disk, the data root, Slurm's variables and limits, CUDA
    and NCCL: a line each, with a remedy where something is wrong.

    Exits with 0 if all is well, else with 1. The --dry-run of launch and reproduce looks too."""

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder of the runs."""


def doctor(argv: Sequence[str]) -> None:
    """Show what is there and what is wrong."""
    command = tyro.cli(DoctorCommand, prog="imsvd doctor", args=argv)
    from imsvd_core.data.sources import data_root  # imports torch

    seen = looks(command.folder, data_root())
    print(*seen, sep="\n")
    if any(look.remedy for look in seen):
        raise SystemExit(1)
