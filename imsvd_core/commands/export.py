"""`imsvd export`: a run's backbone for other toolkits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from imsvd_core.system.foreign import ForeignConfig


@dataclass(frozen=True)
class ExportCommand:
    """Write a run's backbone as others read it."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run, or a file of weights."""
    to: Literal["torchvision", "timm", "detectron2", "safetensors"]
    foreign: Annotated[ForeignConfig, tyro.conf.arg(name="")] = field(default_factory=ForeignConfig)
    out: Path | None = None
    """The file; by default backbone-TO with its suffix, in the run's folder."""


def export(argv: Sequence[str]) -> None:
    """Write a backbone as others read it."""
    command = tyro.cli(ExportCommand, prog="imsvd export", args=argv)
    from imsvd_core import export as exporting  # imports torch
    from imsvd_core.runs.backbones import open_backbone

    trained = open_backbone(command.run, foreign=command.foreign)
    network = trained.recipe.network
    name = f"backbone-{command.to}{exporting.SUFFIXES[command.to][0]}"
    path = exporting.export(
        trained.backbone,
        network.backbone,
        network.cifar_stem,
        command.to,
        command.out or trained.folder / name,
    )
    print(f"written to {path}")
