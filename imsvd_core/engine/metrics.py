"""What a run tells while it goes: metrics.jsonl."""

import json
import math
from collections.abc import Mapping

from imsvd_core.system.run_folder import RunFolder


class Metrics:
    """metrics.jsonl: a line of figures for every step that somebody recorded something of."""

    def __init__(self, run: RunFolder):
        self.run, self.path = run, run.path / "metrics.jsonl"

    def append(self, step: int, epoch: float, figures: Mapping[str, float]) -> None:
        # JSON has no NaN
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        line = json.dumps({"step": step, "epoch": epoch} | finite)
        self.run.check()
        try:
            with open(self.path, "a") as file:
                file.write(line + "\n")
        except OSError as error:  # a write does not say to what
            error.filename = str(self.path)
            raise

    def lines(self, key: str) -> list[dict[str, float]]:
        """The lines that hold `key`, oldest first."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [line for line in lines if key in line]

    def forget_after(self, step: int) -> None:
        """Drop what was written after `step`, and a last line that was cut short."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        with self.run.atomic_write(self.path.name) as file:
            file.writelines(
                line.encode()
                for line in lines
                if line.endswith("\n") and json.loads(line)["step"] <= step
            )
