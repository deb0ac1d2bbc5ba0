"""A training sent to the cluster, looked at from outside: its states, its steps, what it saved, and
when."""

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cluster import NODES, Cluster

from imsvd_core.data.sources import data_root

PATIENCE = 400.0  #: seconds that a job may need for anything


@dataclass
class Run:
    """One job. `step` is the last that its record names, `reached` the highest that it was seen to
    name before the job was first resumed; times are `time.time()`'s."""

    cluster: Cluster
    job: str
    run_dir: Path
    logs: Path
    sent: float
    reached: int = 0

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without the one that may just be being written."""
        path = self.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def step(self) -> int:
        step = max((line["step"] for line in self.records), default=0)
        if not self.resumed:
            self.reached = max(step, self.reached)
        return step

    @property
    def checkpoints(self) -> dict[int, float]:
        """Step of every checkpoint that is there, and when it was saved."""
        times = {}
        for path in self.run_dir.glob("checkpoints/step-*.pt"):
            try:
                times[int(path.stem.removeprefix("step-"))] = path.stat().st_mtime
            except FileNotFoundError:  # a newer one has just taken its place
                continue
        return times

    @property
    def log(self) -> str:
        """What all ranks of all attempts have said."""
        return "\n".join(
            path.read_text(errors="replace")
            for path in sorted(self.logs.glob("*.err")) + sorted(self.logs.glob("*.out"))
        )

    @property
    def resumed(self) -> list[int]:
        """The steps at which attempts took the run up again."""
        return [int(step) for step in re.findall(r"resumed .* at step (\d+) of", self.log)]

    @property
    def seconds_per_step(self) -> float:
        """The median over what the first attempt did, as far as it was kept."""
        last = min(self.resumed, default=self.step)
        speeds = sorted(
            line["samples_per_second"]
            for line in self.records
            if "samples_per_second" in line and line["step"] <= last
        )
        batch = json.loads((self.run_dir / "config.json").read_text())["loop"]["batch_size"]
        return batch / speeds[len(speeds) // 2]

    @property
    def attempts(self) -> int:
        return int(self.cluster.job(self.job)["Restarts"]) + 1

    def until(self, what: str, happened: Callable[[], Any], timeout: float = PATIENCE) -> float:
        """Wait until `happened()`; returns when that was. Raises TimeoutError with all that is
        known about the job."""
        end = time.time() + timeout
        while not happened():
            if time.time() > end:
                raise TimeoutError(f"not within {timeout:g} s: {what}\n{self.about()}")
            time.sleep(0.05)
        return time.time()

    def until_step(self, step: int) -> float:
        return self.until(f"step {step}", lambda: self.step >= step)

    def until_imports(self) -> None:
        """Wait until every node has started its Python, which does not listen yet."""
        self.until(
            "started",
            lambda: all(
                any("_submit" in command for command in self.cluster.processes(node))
                for node in NODES
            ),
        )
        time.sleep(0.3)

    def until_state(self, *states: str) -> float:
        return self.until(
            f"state {' or '.join(states)}", lambda: self.cluster.state(self.job) in states
        )

    def until_quiet(self, timeout: float = 30) -> None:
        """Wait until no node runs anything of any job."""
        self.until("no process left", lambda: not any(map(self.cluster.processes, NODES)), timeout)

    def about(self) -> str:
        processes = {node: self.cluster.processes(node) for node in NODES}
        return (
            f"job {self.cluster.job(self.job)}\nattempts {self.cluster.sacct(self.job)}\n"
            f"processes {processes}\n"
            f"step {self.step}, reached {self.reached}, checkpoints {self.checkpoints}\n"
            f"{self.log[-6000:]}"
        )

    def assert_ended_like(self, other: "Run") -> None:
        """Every weight, every statistic of the optimizer and every record but the speed are those
        of `other`."""
        ends = [
            torch.load(max(run.run_dir.glob("checkpoints/step-*.pt")), weights_only=True)["state"]
            for run in (self, other)
        ]
        assert ends[0]["step"] == ends[1]["step"]
        for part in ("method", "optimizer"):
            mine, others = (dict(_leaves(end[part])) for end in ends)
            assert mine.keys() == others.keys()
            assert len(mine) > 10
            for name, value in mine.items():
                assert (
                    torch.equal(value, others[name])
                    if isinstance(value, torch.Tensor)
                    else value == others[name]
                ), name
        mine, others = (
            [
                {name: value for name, value in line.items() if name != "samples_per_second"}
                for line in run.records
            ]
            for run in (self, other)
        )
        assert mine == others


def few_pictures(folder: Path, train: int, test: int) -> str:
    """So many images of each class of CIFAR-10, copied to `folder`, where there is a tree of it;
    else drawn ones: a data set's name."""
    source = data_root() / "cifar10"
    if not (source / "train").is_dir():
        return "attributes"
    for split, count in (("train", train), ("test", test)):
        for label in sorted((source / split).iterdir()):
            (folder / split / label.name).mkdir(parents=True)
            for image in sorted(label.iterdir())[:count]:
                shutil.copy(image, folder / split / label.name)
    return f"folder:{folder}"


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [leaf for key, value in items for leaf in _leaves(value, f"{path}.{key}")]
    return [(path, tree)]
