"""Checkpoints: written atomically, read safely, and never the only copy of a run."""

import io
import logging
from pathlib import Path
from typing import IO, Any, cast

import torch

from imsvd_core.system.faults import DiskFull, Fault
from imsvd_core.system.run_folder import RunFolder

FORMAT = "imsvd-checkpoint/1"
log = logging.getLogger(__name__)


class CheckpointError(Fault):
    """A file that is not a whole checkpoint of ours; the message names it and what to do."""


def save(run: RunFolder, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` as the checkpoint of `step`, and remove all but the newest `keep` ≥ 1.

    `state` may hold tensors, numbers, strings, and lists and dicts of them: what
    `weights_only=True` reads back. It goes to checkpoints/ in the run's folder.
    Returns the checkpoint's path. Raises Superseded if another process has taken `run` over, and
    DiskFull, with what it needs and what stands, where there is no room.
    """
    # else the files removed next may be those that a successor is writing
    run.check()
    path = run.path / "checkpoints" / f"step-{step:09d}.pt"
    for left_over in path.parent.glob(".step-*.part"):
        # of a process that was killed while it saved
        left_over.unlink(missing_ok=True)
    content = {"format": FORMAT, "step": step, "state": state}
    try:
        with run.atomic_write(path.relative_to(run.path)) as file:
            torch.save(content, file)
    except DiskFull as full:
        size = _Size()
        torch.save(content, cast(IO[bytes], size))
        stands = next(iter(paths(path.parent)), None)
        rest = f"the same command goes on from {stands}" if stands else "no checkpoint stands yet"
        raise DiskFull(
            f"{full}, for {size.bytes / 1e6:,.1f} MB are needed, or keep fewer than "
            f"loop.keep={keep}; {rest}"
        ) from None
    run.check()
    saved = paths(path.parent)
    now = saved.index(path)
    # files before it are of later steps: of a past that a resumption has undone
    for old in saved[:now] + saved[now + keep :]:
        old.unlink(missing_ok=True)
    return path


class _Size(io.RawIOBase):
    """A file that only counts what is written to it."""

    bytes = 0

    def write(self, content: Any) -> int:
        self.bytes += len(content)
        return len(content)


def paths(directory: Path | str) -> list[Path]:
    """The checkpoints under `directory`, newest step first."""
    return sorted(Path(directory).glob(f"step-{9 * '[0-9]'}.pt"), reverse=True)


def load(path: Path | str) -> dict[str, Any]:
    """The state saved at `path`. Raises CheckpointError for a torn or foreign file; runs no code
    from it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({type(error).__name__}: the file is torn, or "
            "holds more than tensors and plain values); remove it, or resume from an older one"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not written by this package as {FORMAT!r}; "
            "give a checkpoint from a run's checkpoints/ folder"
        )
    state: dict[str, Any] = content["state"]
    return state


def newest(directory: Path | str) -> Path | None:
    """The newest whole checkpoint; None if there is none at all.

    A bad file is reported and the one before it taken. Raises CheckpointError if files are there
    but none is whole: starting over silently would lose a run.
    """
    candidates = paths(directory)
    for path in candidates:
        try:
            load(path)
            return path
        except CheckpointError as error:
            log.warning("%s; taking the checkpoint before it", error)
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {directory} can be read "
            f"(newest: {candidates[0].name}); remove that folder to start over"
        )
    return None


def weights(state: dict[str, Any]) -> dict[str, Any]:
    """The method's state dict in a checkpoint's state; older ones hold its parts by name."""
    method: dict[str, Any] = state.get("method", {})
    for part, values in state.get("modules", {}).items():
        method |= {f"{part}.{name}": value for name, value in values.items()}
    return method
