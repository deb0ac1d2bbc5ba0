"""What a launch will take, and what would be refused, told before anything is sent."""

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from imsvd_core.data import check as prepared
from imsvd_core.data import memory as datasets
from imsvd_core.data import sources
from imsvd_core.data.sources import data_root
from imsvd_core.data.tree import open_folder
from imsvd_core.engine.order import Order
from imsvd_core.launch.submit import Submission, unusable
from imsvd_core.methods import IMSVD, BarlowTwins, VICReg
from imsvd_core.networks import NetworkConfig, TwinNetwork
from imsvd_core.recipes import Recipe
from imsvd_core.system.cluster import LaunchConfig
from imsvd_core.system.looks import existing, folder_look

#: Table IV: what 100 epochs of ImageNet took on 32 Tesla V100 at batch size 2,048 (hours), and a
#: GPU's peak memory (GB); by the `name` of the method's config.
TABLE_IV = {
    IMSVD.name: (8.5, 10.4),
    VICReg.name: (11.0, 11.3),
    BarlowTwins.name: (12.0, 11.3),
}
TABLE_IV_GPUS, TABLE_IV_BATCH = 32, 2048
PAPER = NetworkConfig("resnet50", False, (8192,), 8160, zero_init_residual=True)  #: of IMSVD's row
PUBLISHED = {"cifar10": 50_000, "cifar100": 50_000, "fashion-mnist": 60_000}  #: training images
OPTIMIZER_STATES = {"adamw": 2, "sgd": 1, "lars": 1}  #: numbers kept beside each weight

UNKNOWN = "not measured, and the paper has none"


@dataclass(frozen=True)
class Plan:
    """A launch before it is sent. Unknown figures are None; others say where they come from."""

    name: str
    config: LaunchConfig
    #: Training images; None where the data are not here.
    samples: int | None
    batch_per_rank: int
    steps: int | None
    hours: float | None
    hours_source: str
    memory_gb: float | None
    memory_source: str
    #: Whether decoding is limited to one CPU core for each GPU.
    starved: bool
    disk_gb: float
    disk_free_gb: float
    #: Why it would not be sent, each with its remedy.
    refused: tuple[str, ...]

    @property
    def attempts(self) -> int | None:
        """How often the job has to be queued, by its time limit alone."""
        hours = self.hours
        return None if hours is None else max(1, math.ceil(60 * hours / self.config.useful_minutes))

    @property
    def devices(self) -> str:
        gpus, ranks = self.config.gpus, self.config.ranks
        number, unit = (gpus, "GPU") if gpus else (ranks, "process")
        more = {"GPU": "s", "process": "es"}[unit] if number > 1 else ""
        return f"{number} {unit}{more}" + ("" if gpus else " without GPU")

    def __str__(self) -> str:
        config = self.config
        over = f" over {self.samples:,} images" if self.samples else ""
        remark = ", which decode its images: set cpus_per_task" if self.starved else ""
        rows = {
            "steps": f"{_number(self.steps)}{over}",
            "time": f"{_number(self.hours, ' hours')} ({self.hours_source})",
            "attempts": f"{_number(self.attempts)} of at most {config.time}",
            "GPU hours": self._price(),
            "memory": f"{_number(self.memory_gb, ' GB on each GPU')} ({self.memory_source})",
            "cores": f"{config.cpus_per_task or 1} for each process{remark}",
            "disk": f"{self.disk_gb:,.1f} GB for the run, {self.disk_free_gb:,.1f} GB free",
        }
        return "\n".join(
            [
                f"{self.name}: {self.devices} ({config.nodes} × {config.ranks_per_node}), "
                f"{self.batch_per_rank} images on each",
                *(f"  {label:9} {text}" for label, text in rows.items() if text),
                *(f"  refused: {reason}" for reason in self.refused),
            ]
        )

    def _price(self) -> str:
        """What the GPUs cost; "" without GPUs or hours."""
        config = self.config
        if not config.gpus or self.hours is None:
            return ""
        hours, price = self.hours * config.gpus, config.gpu_hour_price
        if not price:
            return f"{hours:,.0f}; cost unknown: set gpu_hour_price in the profile"
        return f"{hours:,.0f}; {hours * price:,.0f} {config.currency} at {price:g} an hour"


def plan(name: str, recipe: Recipe, config: LaunchConfig, run_dir: Path | str) -> Plan:
    """What `recipe` will take under `config`, in `run_dir`.

    Time is what the run's own records say if it has begun, else the paper's Table IV, where it
    applies, labelled as quoted, and scaled to epochs and GPUs as if nothing were lost between them.
    """
    run_dir = Path(run_dir).absolute()
    loop = recipe.loop
    samples, refused = _data(recipe)
    refused += _refused_settings(recipe, config, samples)
    folder = folder_look(run_dir)
    refused += filter(None, [unusable(run_dir), str(folder) if folder.remedy else ""])
    states = OPTIMIZER_STATES[recipe.optim.name]
    # a new checkpoint stands beside those kept
    disk = _size(recipe.network) * 4 * (1 + states) * (loop.keep + 1) / 1e9
    free = shutil.disk_usage(existing(run_dir)).free / 1e9
    if disk > free:
        refused.append(
            f"run_dir={str(run_dir)!r} needs {disk:.1f} GB, and {free:.1f} are free: make room, or "
            f"keep fewer checkpoints than --loop.keep {loop.keep}"
        )
    asks_for_cores = config.cpus_per_task is not None or config.executor != "slurm"
    return Plan(
        name,
        config,
        samples,
        loop.batch_size // config.ranks,
        loop.epochs * (samples // loop.batch_size) if samples else None,
        *_hours(recipe, config, run_dir, samples),
        *_memory(recipe, config),
        config.gpus > 0 and recipe.data.startswith("tree:") and not asks_for_cores,
        disk,
        free,
        tuple(refused),
    )


def _refused_settings(recipe: Recipe, config: LaunchConfig, samples: int | None) -> list[str]:
    """What is wrong with batch, precision and time limit."""
    loop, refused = recipe.loop, []
    try:
        pieces = {"pieces": loop.accumulate, "ranks": config.ranks, "rank": 0}
        Order(samples or loop.batch_size, loop.batch_size, loop.epochs, **pieces)
    except ValueError as error:
        refused.append(str(error))
    if loop.precision == "fp16" and config.executor == "slurm" and not config.gpus:
        refused.append("precision='fp16' has no units on a CPU: use bf16, or ask for GPUs")
    useful = config.useful_minutes
    if not 0 < loop.save_minutes <= useful:
        refused.append(
            f"time={config.time!r} leaves {useful:.1f} minutes before the notice, and a checkpoint "
            f"is due every save_minutes={loop.save_minutes:g}: a node that dies would cost a whole "
            "attempt; ask for more time, or set --loop.save-minutes"
        )
    return refused


def _data(recipe: Recipe) -> tuple[int | None, list[str]]:
    """How many images there are to train on, without reading them, and what is wrong."""
    kind, _, path = recipe.data.partition(":")
    root, name = data_root() / path, Path(path).name
    samples, problem = None, ""
    if kind == "tree" and name in prepared.SPECS:
        # checked or not, its publishers say how many it has
        samples, report = prepared.SPECS[name].counts["train"], prepared.checked(name, root)
        if report is None or not report.ok:
            fault = "has not been checked" if report is None else "was found wanting"
            problem = f"{root} {fault}: run imsvd data check {name} {root}"
    else:
        try:
            samples = _count(recipe.data)
        except (ValueError, OSError) as error:
            problem = str(error)
    return recipe.samples or samples, [f"data={recipe.data!r}: {problem}"] if problem else []


def _count(data: str) -> int:
    if data.partition(":")[0] in ("tree", "folder"):
        return len(open_folder(data))
    name = sources.resolve(data)
    return datasets.ATTRIBUTES_SIZES["train"] if name == "attributes" else PUBLISHED[name]


def _hours(
    recipe: Recipe, config: LaunchConfig, run_dir: Path, samples: int | None
) -> tuple[float | None, str]:
    epochs, method = recipe.loop.epochs, recipe.method.name
    speed = _own_speed(run_dir, config.ranks)
    if samples and speed:
        return epochs * samples / speed / 3600, "measured: this run so far"
    if recipe.network.backbone != "resnet50" or method not in TABLE_IV or not config.gpus:
        return None, UNKNOWN
    per_hundred = TABLE_IV[method][0]
    return (
        per_hundred * epochs / 100 * TABLE_IV_GPUS / config.ranks,
        f"quoted: Table IV, {per_hundred:g} hours for 100 epochs on {TABLE_IV_GPUS} V100, scaled",
    )


def _own_speed(run_dir: Path, ranks: int) -> float | None:
    """The median images a second of a run that was launched before, on as many ranks."""
    try:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        begun = Submission.read(run_dir / "jobs")
    except (OSError, ValueError):
        return None
    speeds = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    return statistics.median(speeds) if speeds and begun and begun.tasks == ranks else None


def _memory(recipe: Recipe, config: LaunchConfig) -> tuple[float | None, str]:
    """A GPU's peak: the paper's, with this recipe's weights, gradients and momentum in place of the
    paper's, and the rest scaled with the images."""
    if recipe.network.backbone != "resnet50" or recipe.method.name != IMSVD.name or not config.gpus:
        return None, UNKNOWN
    quoted = TABLE_IV[IMSVD.name][1]
    fixed, ours = (
        4 * (2 + states) * _size(network) / 1e9
        for network, states in ((PAPER, 1), (recipe.network, OPTIMIZER_STATES[recipe.optim.name]))
    )
    images = recipe.loop.batch_size / config.ranks / recipe.loop.accumulate
    share = images / (TABLE_IV_BATCH / TABLE_IV_GPUS)
    return ours + (quoted - fixed) * share, (
        f"quoted: Table IV, {quoted:g} GB for 64 images on a V100, of which {fixed:.1f} are "
        "weights, gradients and momentum, the rest scaled"
    )


def _size(config: NetworkConfig) -> int:
    """Parameters of backbone and projector."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in TwinNetwork.build(config).parameters())


def in_all(plans: Sequence[Plan]) -> str:
    """What several launches will take together, what is refused of them included."""
    hours = [part.hours for part in plans if part.hours is not None]
    unknown = len(plans) - len(hours)
    disk, free = sum(part.disk_gb for part in plans), min(part.disk_free_gb for part in plans)
    steps = [part.steps for part in plans]
    rows = [
        f"{len(plans)} training{'s' if len(plans) > 1 else ''}, on {plans[0].devices} each",
        f"  steps     {_number(None if None in steps else sum(map(int, filter(None, steps))))}",
        f"  time      {_number(sum(hours), ' hours') if hours else 'unknown'}"
        + (f", and {unknown} of unknown time" if hours and unknown else ""),
        f"  disk      {disk:,.1f} GB for all, {free:,.1f} GB free",
    ]
    return "\n".join([*rows, *(f"  refused: {reason}" for reason in refusals(plans))])


def refusals(plans: Sequence[Plan]) -> list[str]:
    """Why launches would not be sent together: each reason once."""
    reasons = {reason: None for part in plans for reason in part.refused}
    disk, free = sum(part.disk_gb for part in plans), min(part.disk_free_gb for part in plans)
    if disk > free and not any(part.disk_gb > part.disk_free_gb for part in plans):
        reasons[f"all runs together need {disk:.1f} GB, and {free:.1f} are free: make room"] = None
    return list(reasons)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "unknown"
    return f"{value:,}{unit}" if isinstance(value, int) else f"{value:,.1f}{unit}"
