"""`imsvd data`: data sets on this machine."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from imsvd_core.data import check, download
from imsvd_core.system.files import atomic_write


@dataclass(frozen=True)
class DataCheckCommand:
    """Verify a data root, a published one or one's own: classes, counts, annotations, unreadable
    files, what is passed over.

    Exits with 0 if all is well, else with 2; leaves its report in the root as .imsvd-checked.json,
    or in the user's cache where the root is read-only.
    Without a root it says how to prepare one."""

    name: tyro.conf.Positional[str]
    """imagenet, places205, voc07 or coco; or folder:PATH, tree:PATH, voc:PATH or coco:PATH of one's
    own, which are judged as a training will."""
    root: tyro.conf.Positional[Path | None] = None
    """Folder of the data set; by default PATH, or NAME in the data root (IMSVD_DATA)."""
    decode: check.Decode = "header"
    """What to read of every image: nothing; its two ends, which shows what is cut short or no
    image; or all of it, which shows what cannot be decoded too. A JPEG damaged in the middle still
    decodes (partly grey); no mode detects it."""
    workers: int | None = None
    """Threads that read; as many as cores by default."""
    classes: int | None = None
    """Expected classes, where the root holds a subset."""
    counts: dict[str, int] = field(default_factory=dict)
    """Expected images of a split, where the root holds a subset: --counts train 500 val 50."""
    json: Path | None = None
    """Also write the report to this file."""
    progress: bool = True


@dataclass(frozen=True)
class DataGetCommand:
    """Download a data set to the data root (IMSVD_DATA), verified by its checksum.

    Gives up within ten seconds where there is no network."""

    name: tyro.conf.Positional[Literal["cifar10", "cifar100", "fashion-mnist"]]
    """cifar10, cifar100 or fashion-mnist."""


def data(argv: Sequence[str]) -> None:
    """Download a data set, or verify a data root."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"get": DataGetCommand, "check": DataCheckCommand}, prog="imsvd data", args=argv
    )
    if isinstance(command, DataGetCommand):
        print(f"{command.name} is in {download.get(command.name).folder}")
        return
    spec = check.find_spec(command.name)
    counts = {**spec.counts, **command.counts}
    spec = replace(spec, classes=command.classes or spec.classes, counts=counts)
    report = check.check(
        command.name,
        command.root,
        decode=command.decode,
        workers=command.workers,
        spec=spec,
        progress=command.progress,
    )
    print(report if report.ok else f"{report}\n\n{check.how_to(spec, report.root)}")
    if command.json:
        with atomic_write(command.json) as file:
            file.write(json.dumps(asdict(report) | {"ok": report.ok}, indent=2).encode() + b"\n")
    raise SystemExit(0 if report.ok else 2)
