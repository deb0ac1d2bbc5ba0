"""Where a job runs and what it may use: as options, or kept in a file for each cluster."""

import math
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from imsvd_core.system.checks import at_least, literals, positive
from imsvd_core.system.config import from_plain

Executor = Literal["slurm", "local", "debug"]
PROFILES = Path("~/.config/imsvd/clusters.toml")  #: or where IMSVD_CLUSTERS points


@dataclass(frozen=True)
class LaunchConfig:
    """Where a job runs and what it may use."""

    executor: Executor = "slurm"
    """slurm submits; local starts the same job in the background of this machine; debug runs it in
    this process."""
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None
    """Processes (ranks) on each node; by default one for each GPU, or one."""
    cpus_per_task: int | None = None
    """Cores of each process: its threads, and its workers that decode. Slurm's default is one."""
    mem_gb: float | None = None
    """Main memory of each node, in GB; the cluster's default if not given."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that the nodes must have, v100 say."""
    exclude: str | None = None
    """Nodes to keep away from, as Slurm writes them: node[3,7]."""
    options: dict[str, str] = field(default_factory=dict)
    """Any other options of sbatch: --options reservation night mail-type END."""
    time: str = "1-00:00:00"
    """Limit of one attempt, as Slurm writes it: minutes, H:MM:SS, D-HH:MM:SS. A run that needs
    longer goes on in the next."""
    grace_seconds: int = 120
    """How long before the limit the job is told (SIGUSR2), to save and be queued again."""
    max_requeues: int = 1000
    """How often a job may be queued again before it counts as failed."""
    setup: tuple[str, ...] = ()
    """Shell lines to run first on the node: "module load cuda", say."""
    gpu_hour_price: float | None = None
    """What a GPU costs in an hour, for the plan."""
    currency: str = "USD"

    def __post_init__(self) -> None:
        literals(self)
        at_least(self, nodes=1, gpus_per_node=0, tasks_per_node=1, cpus_per_task=1)
        at_least(self, grace_seconds=1, max_requeues=0)
        positive(self, "mem_gb", "gpu_hour_price")
        if self.executor != "slurm" and self.nodes > 1:
            raise ValueError(f"nodes={self.nodes} needs executor='slurm': this machine is one node")
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(
                f"tasks_per_node={self.tasks_per_node} exceeds gpus_per_node={self.gpus_per_node}: "
                "each process needs a GPU of its own"
            )
        if self.useful_minutes <= 0:
            raise ValueError(
                f"time={self.time!r} must exceed grace_seconds={self.grace_seconds}, or the job is "
                "told to stop as it starts"
            )

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def minutes(self) -> int:
        """The time limit, rounded up. Raises ValueError for what Slurm would not read."""
        form = r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(?:(\d+):)?(\d+):(\d+)|(\d+))"
        match = re.fullmatch(form, self.time)
        if not match:
            raise ValueError(
                f"time={self.time!r} is no time limit: write minutes, H:MM:SS or D-HH:MM:SS"
            )
        days, hours, minutes, seconds, h, m, s, alone = map(int, match.groups("0"))
        return math.ceil(1440 * days + 60 * (hours + h) + minutes + m + alone + (seconds + s) / 60)

    @property
    def useful_minutes(self) -> float:
        """Of one attempt, before it is told to stop."""
        return self.minutes - self.grace_seconds / 60


def load_profile(name: str | None = None, path: Path | str | None = None) -> LaunchConfig:
    """The settings that a TOML file keeps for the cluster `name`; by default its `default`.

        default = "ours"
        [ours]
        partition = "gpu"
        gpus_per_node = 8

    `path` is ~/.config/imsvd/clusters.toml unless IMSVD_CLUSTERS or the caller names another.
    Without a file and a name, plain `LaunchConfig()`. Raises ValueError saying what the file has
    instead.
    """
    file = Path(path or os.environ.get("IMSVD_CLUSTERS") or PROFILES).expanduser()
    try:
        content = tomllib.loads(file.read_text()) if file.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
    name = name or content.get("default")
    if name is None:
        return LaunchConfig()
    profiles = {key: value for key, value in content.items() if isinstance(value, dict)}
    if name not in profiles:
        raise ValueError(
            f"profile={name!r} is not in {file}; there are: {', '.join(profiles) or 'none'}"
        )
    try:
        return from_plain(LaunchConfig, profiles[name])
    except ValueError as error:
        raise ValueError(f"{file}, [{name}]: {error}") from None
