"""What a launch will take, and what would be refused, told before anything is sent."""

import json
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from imsvd_core.data import check as prepared
from imsvd_core.data import memory as datasets
from imsvd_core.data import sources
from imsvd_core.data.sources import data_root
from imsvd_core.launch.config import LaunchConfig
from imsvd_core.launch.submit import Submission
from imsvd_core.methods import IMSVD, BarlowTwins, VICReg
from imsvd_core.networks import NetworkConfig, TwinNetwork
from imsvd_core.recipes import Recipe
from imsvd_core.results import STORE, read_result

#: Table IV: what 100 epochs of ImageNet took on 32 Tesla V100 at batch size 2,048 (hours), and a
#: GPU's peak memory (GB); by the `name` of the method's config.
TABLE_IV = {
    IMSVD.name: (8.5, 10.4),
    VICReg.name: (11.0, 11.3),
    BarlowTwins.name: (12.0, 11.3),
}
TABLE_IV_GPUS, TABLE_IV_BATCH = 32, 2048
PAPER = NetworkConfig("resnet50", False, (8192,), 8160)  #: of IMSVD's row
PUBLISHED = {"cifar10": 50_000, "cifar100": 50_000, "fashion-mnist": 60_000}  #: training images
OPTIMIZER_STATES = {"adamw": 2, "sgd": 1, "lars": 1}  #: numbers kept beside each weight


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
        useful = self.config.minutes / 60 - self.config.grace_seconds / 3600
        return None if self.hours is None else max(1, math.ceil(self.hours / useful))

    def __str__(self) -> str:
        lines = [self._devices(), self._steps(), self._time(), *self._price(), self._memory()]
        lines += [self._cores(), self._disk()]
        lines += [f"  refused: {reason}" for reason in self.refused]
        return "\n".join(lines)

    def _devices(self) -> str:
        config = self.config
        devices = f"{config.gpus} GPUs" if config.gpus else f"{config.ranks} processes without GPU"
        return (
            f"{self.name}: {devices} ({config.nodes} × {config.ranks_per_node}), "
            f"{self.batch_per_rank} images on each"
        )

    def _steps(self) -> str:
        over = f" over {self.samples:,} images" if self.samples else ""
        return f"  steps     {_number(self.steps)}{over}"

    def _time(self) -> str:
        hours = _number(self.hours, " hours")
        attempts = f"{self.attempts or ''} attempt{'s' if self.attempts != 1 else ''}".strip()
        limit = self.config.time
        return f"  time      {hours} ({self.hours_source}), in {attempts} of at most {limit}"

    def _price(self) -> list[str]:
        config = self.config
        if not config.gpus or self.hours is None:
            return []
        hours, price = self.hours * config.gpus, config.gpu_hour_price
        cost = "cost unknown: set gpu_hour_price in the profile"
        if price:
            cost = f"{hours * price:,.0f} {config.currency} at {price:g} an hour"
        return [f"  GPU hours {hours:,.0f}; {cost}"]

    def _memory(self) -> str:
        memory = _number(self.memory_gb, " GB on each GPU")
        return f"  memory    {memory} ({self.memory_source})"

    def _cores(self) -> str:
        remark = ", which decode its images: set cpus_per_task" if self.starved else ""
        return f"  cores     {self.config.cpus_per_task or 1} for each process{remark}"

    def _disk(self) -> str:
        needed, free = _number(self.disk_gb), _number(self.disk_free_gb)
        return f"  disk      {needed} GB for the run, {free} GB free"


def plan(name: str, recipe: Recipe, config: LaunchConfig, run_dir: Path | str) -> Plan:
    """What `recipe` will take under `config`, in `run_dir`.

    Time is what the run's own records say if it has begun, else what was measured on one GPU and
    stored for this recipe (benchmarks/training.py), else the paper's Table IV, where it applies,
    labelled as quoted. The latter two are scaled to epochs and GPUs as if nothing were lost between
    them.
    """
    run_dir = Path(run_dir).absolute()
    loop = recipe.loop
    samples, refused = _data(recipe)
    per_step = config.ranks * loop.accumulate
    if loop.batch_size % per_step:
        refused.append(
            f"batch_size={loop.batch_size} cannot be cut into equal pieces, "
            f"accumulate={loop.accumulate} on each of {config.ranks} ranks: "
            f"take a multiple of {per_step}"
        )
    if samples and loop.batch_size > samples:
        refused.append(
            f"batch_size={loop.batch_size} exceeds the {samples} samples: "
            "take a smaller batch or more data"
        )
    useful = config.minutes - config.grace_seconds / 60
    if not 0 < loop.save_minutes <= useful:
        refused.append(
            f"time={config.time!r} leaves {useful:.1f} minutes before the notice, and a checkpoint "
            f"is due every save_minutes={loop.save_minutes:g}: a node that dies would cost a whole "
            "attempt; ask for more time, or set --loop.save-minutes"
        )
    network = _size(recipe.network)
    states = OPTIMIZER_STATES[recipe.optim.name]
    disk = (
        network * 4 * (1 + states) * (loop.keep + 1) / 1e9
    )  # a new checkpoint stands beside those kept
    free = (
        shutil.disk_usage(
            next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
        ).free
        / 1e9
    )
    if disk > free:
        refused.append(
            f"run_dir={str(run_dir)!r} needs {disk:.1f} GB, and {free:.1f} are free: make room, or "
            f"keep fewer checkpoints than --loop.keep {loop.keep}"
        )
    steps = loop.epochs * (samples // loop.batch_size) if samples else None
    hours, hours_source = _hours(name, recipe, config, run_dir, samples)
    memory, memory_source = _memory(recipe, config)
    starved = (
        config.gpus > 0
        and config.executor == "slurm"
        and config.cpus_per_task is None
        and recipe.data.startswith("tree:")
    )
    return Plan(
        name,
        config,
        samples,
        loop.batch_size // config.ranks,
        steps,
        hours,
        hours_source,
        memory,
        memory_source,
        starved,
        disk,
        free,
        tuple(refused),
    )


def _data(recipe: Recipe) -> tuple[int | None, list[str]]:
    """How many images there are to train on, without reading them, and what is wrong."""
    kind, _, path = recipe.data.partition(":")
    try:
        samples = _count(recipe.data)
    except (ValueError, OSError) as error:
        samples, refused = None, [f"data={recipe.data!r}: {error}"]
    else:
        refused = []
    root, name = data_root() / path, Path(path).name
    if (
        kind == "tree" and name in prepared.SPECS
    ):  # checked or not, its publishers say how many it has
        report = prepared.checked(name, root)
        if not refused and (report is None or not report.ok):
            fault = "has not been checked" if report is None else "was found wanting"
            refused = [f"data={recipe.data!r}: {root} {fault}: run imsvd data check {name} {root}"]
        samples = prepared.SPECS[name].counts["train"]
    return recipe.samples or samples, refused


def _count(data: str) -> int:
    if data.partition(":")[0] in ("tree", "folder"):
        home, classes = sources.find_split(sources.find_folder(data, data_root()), "train")
        return sum(len(sources.find_images(home, label)) for label in classes)
    name = sources.resolve(data)  # downloads it, rather now than on a node without network
    return datasets.ATTRIBUTES_SIZES["train"] if name == "attributes" else PUBLISHED[name]


def _hours(
    name: str, recipe: Recipe, config: LaunchConfig, run_dir: Path, samples: int | None
) -> tuple[float | None, str]:
    loop = recipe.loop
    images = loop.epochs * samples if samples else None
    if images and (speed := _own_speed(run_dir, config.ranks)):
        return images / speed / 3600, "measured: this run so far"
    for file in sorted(STORE.glob("benchmark-training-cuda*.json")):
        stored = read_result(file)
        setting, figures = stored["figures"].get("setting", {}), stored["figures"]
        if (
            images
            and config.gpus
            and setting.get("recipe") == name
            and "two_view_images_per_second" in figures
        ):
            scaled = f", divided by {config.ranks}" if config.ranks > 1 else ""
            return (
                images / figures["two_view_images_per_second"] / config.ranks / 3600,
                f"measured: one {stored['provenance']['device']}{scaled}",
            )
    if (
        recipe.network.backbone != "resnet50"
        or recipe.method.name not in TABLE_IV
        or not config.gpus
    ):
        return None, "no measurement is stored, and the paper has none"
    per_hundred = TABLE_IV[recipe.method.name][0]
    return (
        per_hundred * loop.epochs / 100 * TABLE_IV_GPUS / config.ranks,
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
        return None, "no measurement is stored, and the paper has none"
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


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "unknown"
    return f"{value:,}{unit}" if isinstance(value, int) else f"{value:,.1f}{unit}"
