"""What a run tells while it goes: metrics.jsonl, TensorBoard, a progress bar."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from imsvd_core.system.run_folder import RunFolder


class Metrics:
    """metrics.jsonl: a line of figures for every step that somebody recorded something of."""

    def __init__(self, path: Path, run: RunFolder | None = None):
        self.path = path
        self.run = run or RunFolder(path.parent)

    def clear(self) -> None:
        self.run.check()
        self.path.write_text("")

    def append(self, step: int, epoch: float, figures: Mapping[str, float]) -> None:
        # JSON has no NaN
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        line = json.dumps({"step": step, "epoch": epoch} | finite)
        self.run.check()
        with open(self.path, "a") as file:
            file.write(line + "\n")

    def lines(self, key: str) -> list[dict[str, float]]:
        """The lines that hold `key`, oldest first."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [line for line in lines if key in line]

    def forget_after(self, step: int) -> None:
        """Drop what was written after `step`, and a last line that was cut short."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        with self.run.atomic_write(self.path.absolute()) as file:
            file.writelines(
                line.encode()
                for line in lines
                if line.endswith("\n") and json.loads(line)["step"] <= step
            )


class Display:
    """A progress bar, and curves for TensorBoard in `board`, if given; a context manager."""

    def __init__(self, done: int, steps: int, progress: bool, board: Path | None):
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            disable=not progress,
        )
        self.task = self.bar.add_task("training", total=steps, completed=done)
        self.writer: Any = None
        if board:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(str(board), purge_step=done + 1)

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.writer:
            self.writer.close()

    def advance(self) -> None:
        self.bar.update(self.task, advance=1)

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        if self.writer:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
        self.bar.update(self.task, description=f"loss {figures['loss']:.4f}")
