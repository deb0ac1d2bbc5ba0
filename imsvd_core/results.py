"""Results: figures and where they come from, in one JSON file each."""

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from imsvd_core.system.config import config_hash, plain, settings
from imsvd_core.system.devices import device_name
from imsvd_core.system.files import atomic_write

STORE = Path(__file__).parent.parent / "book" / "results"  #: of the book's own results


@dataclass(frozen=True)
class Provenance:
    """What somebody needs to get a figure again."""

    command: str
    commit: str
    """Git commit of the package, with "+changes" if the tree differs; "unknown" outside git."""
    config_hash: str
    """Hash of `settings`."""
    seed: int
    device: str
    """The processor's name."""
    dataset: str
    seconds: float
    """Wall time of the run."""
    date: str
    """UTC, ISO 8601."""
    versions: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    """Processes that ran it together."""
    settings: Any = None
    """What differs from the defaults in the configuration."""


def provenance(
    *,
    config: Any,
    seed: int,
    device: torch.device | str,
    dataset: str,
    seconds: float,
    command: str | None = None,
    world_size: int = 1,
) -> Provenance:
    """Provenance of a run of this process, now.

    `config` is a dataclass, or whatever JSON can hold, with dataclasses inside.
    """
    return Provenance(
        command=command or shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        commit=code_version(),
        config_hash=config_hash(config),
        seed=seed,
        device=device_name(device),
        dataset=dataset,
        seconds=round(seconds, 1),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: metadata.version(name) for name in ("torch", "torchvision", "numpy")}
        | {"python": platform.python_version()},
        world_size=world_size,
        settings=settings(config),
    )


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` atomically as readable JSON."""
    text = json.dumps(plain(value), indent=1, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def write_result(
    path: Path | str,
    name: str,
    figures: dict[str, Any],
    provenance: Provenance,
    *,
    overwrite: bool = False,
) -> Path:
    """Store `figures` under `name` with their provenance.

    Raises FileExistsError if other figures stand there already, unless `overwrite`; ValueError for
    NaN or infinity.
    """
    path = Path(path)
    if path.exists() and not overwrite and read_result(path)["figures"] != plain(figures):
        raise FileExistsError(
            f"{path} holds other figures; remove it or pass overwrite=True to replace them"
        )
    write_json(path, {"name": name, "figures": figures, "provenance": asdict(provenance)})
    return path


def read_result(path: Path | str) -> dict[str, Any]:
    """A stored result: name, figures, provenance. Raises ValueError for a file that is none."""
    try:
        result = json.loads(Path(path).read_text())
        result["name"], result["figures"], result["provenance"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a stored result: it needs name, figures and provenance"
        ) from error
    return result


def stored(name: str) -> dict[str, Any]:
    """The result that the book keeps under `name`. Raises FileNotFoundError that lists them."""
    return read_result(stored_path(f"{name}.json"))


def stored_path(file: str) -> Path:
    """Where the book keeps `file`, a result (.json) or a model (.safetensors).

    Raises FileNotFoundError that lists the files of that kind.
    """
    path = STORE / file
    if not path.exists():
        files = ", ".join(sorted(other.name for other in STORE.glob(f"*{path.suffix}"))) or "none"
        raise FileNotFoundError(f"no stored result {file!r} in {STORE}; there are: {files}")
    return path


@lru_cache(maxsize=1)
def code_version() -> str:
    """Git commit of the package, with "+changes" if the tree differs from it.

    A launch's copy of the package remembers its commit in a file.
    """
    here = Path(__file__).parent
    if (here / "COMMIT").exists():
        return (here / "COMMIT").read_text().strip()

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # The folder may lie in a repository of somebody else's.
        git("ls-files", "--error-unmatch", str(Path(__file__)))
        changes = "+changes" if git("status", "--porcelain", "--", ".") else ""
        return git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
