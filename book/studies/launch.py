"""The launch that chapter 14 tells of, recorded: a notice, a lost node, and the end, on a real
Slurm of two nodes.

    python book/studies/launch.py RUN_DIR

Starts the cluster of the tests (tests/slurm; needs root and Slurm) on this machine, sends one
training with `imsvd launch`, disturbs it, and writes down from outside what happens when; then
sends the same again and leaves it alone. The result goes to RUN_DIR/result.json. Needs CIFAR-10
under IMSVD_DATA.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch

from imsvd_core.data.sources import Split, data_root, find_images, find_split
from imsvd_core.results import provenance, write_result
from imsvd_core.system.config import plain

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "slurm"))
from cluster import NODES, Cluster  # noqa: E402

IMAGES: dict[Split, int] = {"train": 256, "test": 40}  # of each class
SETTINGS = (
    "--scale",
    "smoke",
    "--samples",
    "2560",
    "--loop.epochs",
    "4",
    "--loop.save-minutes",
    "0.05",
    "--loop.keep",
    "1000",
)
LAUNCH = ("--nodes", "2", "--tasks-per-node", "1", "--time", "10", "--grace-seconds", "60")
PATIENCE = 300.0  # seconds for anything


class Watch:
    """One job seen from outside: `look` notes what has changed since; all times are seconds since
    it was sent."""

    def __init__(self, cluster: Cluster, run_dir: Path):
        self.cluster, self.run_dir, self.began = cluster, run_dir, time.time()
        self.states: list[tuple[float, str]] = []  # of the queue
        self.steps: list[tuple[float, int]] = []
        self.saves: list[tuple[float, int]] = []
        self.ranks: dict[str, list[list[float]]] = {
            node: [] for node in NODES
        }  # when Python was there: [from, to]
        self.events: list[tuple[float, str]] = []
        self.job = ""
        self.alive: set[str] = set()  # nodes on which there is Python now
        self._read, self._slow = 0, 0.0

    def note(self, event: str, when: float | None = None) -> None:
        self.events.append((self.now(when), event))
        print(f"{self.events[-1][0]:7.2f}  {event}", flush=True)

    def now(self, when: float | None = None) -> float:
        return round((when or time.time()) - self.began, 3)

    def look(self) -> None:
        now = self.now()
        metrics = self.run_dir / "metrics.jsonl"
        if metrics.exists():
            lines = metrics.read_text().splitlines(keepends=True)
            if len(lines) < self._read:  # a resumption has dropped what it does again
                self._read = len(lines)
                self.steps.append(
                    (now, max((json.loads(line)["step"] for line in lines), default=0))
                )
            for line in lines[self._read :]:
                if line.endswith("\n"):
                    self._read += 1
                    if "loss" in (told := json.loads(line)):
                        self.steps.append((now, told["step"]))
        known = {when for when, _ in self.saves}
        for path in (self.run_dir / "checkpoints").glob("step-*.pt"):
            if (when := self.now(path.stat().st_mtime)) not in known:
                self.saves.append((when, int(path.stem.removeprefix("step-"))))
        if now - self._slow > 0.2:
            self._slow = now
            self._look_around(now)

    def _look_around(self, now: float) -> None:
        asked = "squeue", "-h", "-j", self.job, "-t", "all", "-o", "%T %r"
        told = self.cluster.run(*asked, check=False).strip() if self.job else ""
        if told and (not self.states or self.states[-1][1] != told):
            self.states.append((now, told))
            self.note(f"Slurm: {told}")
        for node in NODES:
            here = any(
                "submitit.core._submit" in command
                and "srun" not in command
                and "slurm_script" not in command
                for command in self.cluster.processes(node)
            )
            if here and node not in self.alive:
                self.ranks[node].append([now, now])
                self.alive.add(node)
            elif here:
                self.ranks[node][-1][1] = now
            else:
                self.alive.discard(node)

    def until(self, what: str, happened: Callable[[], object]) -> None:
        end = time.time() + PATIENCE
        while not happened():
            if time.time() > end:
                raise TimeoutError(
                    f"not within {PATIENCE:g} s: {what}; last seen {self.states[-1:]}, step "
                    f"{self.step}"
                )
            time.sleep(0.02)
            self.look()

    @property
    def step(self) -> int:
        return self.steps[-1][1] if self.steps else 0

    @property
    def state(self) -> str:
        return self.states[-1][1].split()[0] if self.states else ""


def launch(cluster: Cluster, run_dir: Path, data: Path) -> Watch:
    """Send the training; returns its watch."""
    command = [
        sys.executable,
        "-m",
        "imsvd_core.cli",
        "launch",
        "cifar10",
        *LAUNCH,
        *SETTINGS,
        "--data",
        f"folder:{data.resolve()}",
        "--run-dir",
        str(run_dir),
    ]
    watch = Watch(cluster, run_dir)
    sent = subprocess.run(
        command,
        env=cluster.env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if sent.returncode:
        raise RuntimeError(sent.stderr)
    job = re.search(r"job (\d+) sent", sent.stdout)
    if job is None:
        raise RuntimeError(f"imsvd launch named no job: {sent.stdout}")
    watch.job = job[1]
    watch.note(f"imsvd launch has sent job {watch.job}")
    return watch


def disturb(watch: Watch) -> None:
    """A notice in the middle of an epoch; then a node that dies between two checkpoints."""
    watch.until("step 50", lambda: watch.step >= 50)
    watch.note("notice: SIGUSR2 to the job")
    watch.cluster.scancel("--signal=USR2", watch.job)
    watch.until("queued again", lambda: watch.state == "PENDING")
    watch.until("running again", lambda: watch.state == "RUNNING")
    watch.until("step 100", lambda: watch.step >= 100)
    saved = len(watch.saves)
    watch.until("a checkpoint", lambda: len(watch.saves) > saved)
    at = watch.step
    watch.until("some steps more", lambda: watch.step >= at + 5)
    watch.note("n1 dies: slurmd, slurmstepd and rank at one blow")
    watch.cluster.kill_node("n1")
    watch.until("queued again", lambda: watch.state == "PENDING")
    watch.note("n1 is switched on again")
    watch.cluster.start_node("n1")


def figures(watch: Watch) -> dict:
    watch.until(
        "its end",
        lambda: watch.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
    )
    watch.until("its ranks' end", lambda: not watch.alive)
    watch.until("its accounts", lambda: watch.cluster.sacct(watch.job)[-1]["State"] == watch.state)
    return {
        "events": watch.events,
        "states": watch.states,
        "steps": watch.steps,
        "saves": sorted(watch.saves),
        "ranks": watch.ranks,
        "log": log(watch),
        "accounts": watch.cluster.sacct(watch.job),
    }


def log(watch: Watch) -> list[tuple[float, str]]:
    """What rank 0 said on its standard error, and when; folders by their names alone."""
    lines = []
    for line in (watch.run_dir / "jobs" / f"{watch.job}_0_log.err").read_text().splitlines():
        if match := re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) (.*)", line):
            when = (
                datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(match[2]) / 1000
            )
            lines.append((watch.now(when), shortened(match[3], watch.run_dir)))
    return lines


def shortened(text: str, run_dir: Path) -> str:
    for folder in (run_dir.resolve(), run_dir.parent.resolve(), ROOT):
        text = text.replace(f"{folder}/", "").replace(str(folder), folder.name)
    return text


def link_images(folder: Path) -> Path:
    """A small CIFAR-10 as a tree of links."""
    for split, count in IMAGES.items():
        home, classes = find_split(data_root() / "cifar10", split)
        for label in classes:
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for name in find_images(home, label)[:count]:
                link = folder / split / label / name
                if not link.is_symlink():
                    link.symlink_to((home / label / name).resolve())
    return folder


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = max((run_dir / "checkpoints").glob("step-*.pt"))
    return torch.load(newest, weights_only=True)["state"]["modules"]["network"]


def main(home: Path) -> None:
    began = time.perf_counter()
    data = link_images(home / "cifar10")
    with Cluster(home / "slurm") as cluster:
        disturbed = launch(cluster, home / "run", data)
        disturb(disturbed)
        story = figures(disturbed)
        alone = launch(cluster, home / "undisturbed", data)
        peaceful = figures(alone)
    first, second = weights(home / "run"), weights(home / "undisturbed")
    identical = all(torch.equal(first[name], second[name]) for name in first)
    slurm = cluster.run("sinfo", "--version").strip()
    kept = {
        "disturbed": story,
        "undisturbed": peaceful,
        "identical_weights": identical,
        "epochs": 4,
        "slurm": slurm,
    }
    origin = provenance(
        config={"settings": SETTINGS, "launch": LAUNCH},
        seed=0,
        device="cpu",
        world_size=2,
        dataset="CIFAR-10 (JPEG), 2,560 training images",
        seconds=time.perf_counter() - began,
    )
    write_result(home / "result.json", "launch-recorded", plain(kept), origin, overwrite=True)
    print(f"weights identical: {identical}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
