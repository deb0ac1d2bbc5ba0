"""One resumable training loop over a step function; pretraining and every trained evaluation run on it."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from imsvd_core import checkpoints
from imsvd_core.files import atomic_write
from imsvd_core.optim import OptimConfig, build_optimizer, learning_rate

log = logging.getLogger(__name__)

#: (sample indices, generator of this step) → scalars to record; "loss" is the one that is minimised.
Step = Callable[[Tensor, torch.Generator], Mapping[str, Tensor]]


@dataclass(frozen=True)
class LoopConfig:
    """How long, how large, how precise, and where."""

    epochs: int = 3
    """Times that every sample is visited."""
    batch_size: int = 512
    """Samples of one optimizer step; what is left of an epoch's last batch is dropped."""
    accumulate: int = 1
    """Pieces that a batch is cut into; their gradients are averaged. Each piece has a loss of its own."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the network's products and activations, by autocast; weights and losses stay fp32."""
    channels_last: bool = True
    """Keep convolutions, and with them what flows through, in the memory layout that is faster for most."""
    compile: bool = False
    """Compile the trained modules with torch.compile."""
    device: str = "auto"
    """auto takes CUDA, else Apple's MPS, else the CPU."""
    seed: int = 0
    """Of the first weights, the order of the data and every draw."""
    save_every: int = 0
    """Steps between checkpoints beside those at the end of every epoch; 0 for those alone."""
    keep: int = 2
    """Checkpoints to keep."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("save_every", 0), ("keep", 1), ("log_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} equal pieces")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision={self.precision!r} must be 'fp32', 'bf16' or 'fp16'")


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Settings of a loop that touch the record and not the training: a run may be resumed under others.
OPERATIONAL = ("save_every", "keep", "log_every", "tensorboard")


def essential(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without what a resumption may change."""
    kept = {name: value for name, value in settings.get("loop", {}).items() if name not in OPERATIONAL}
    return {**settings, "loop": kept} if "loop" in settings else dict(settings)


class NonFiniteError(RuntimeError):
    """The loss or its gradient stopped being a number."""


@dataclass(frozen=True)
class Progressed:
    """Where a run stands after a step; `epoch` is whole at an epoch's end."""

    step: int
    epoch: float
    ends_epoch: bool
    metrics: Mapping[str, Tensor] = field(repr=False)


def pick_device(name: str = "auto") -> torch.device:
    """CUDA, else MPS, else the CPU; or the device that `name` says. Raises ValueError for one that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name.split(":")[0], False):
        raise ValueError(f"device={name!r} is not here; there is: {', '.join(k for k, there in available.items() if there)}")
    return torch.device(name)


def stream_seed(seed: int, stream: str, number: int) -> int:
    """A seed for the `number`-th draw of a named stream: fixed by its arguments, unrelated to all others."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=7).digest())


class Loop:
    """Iterating runs the training: every step yields where it stands, so that the caller may look or evaluate.

    All randomness of step k is drawn from a generator seeded by (seed, k) and the order of epoch e by (seed, e):
    a run that was killed and resumed from its newest checkpoint repeats what it lost to the last bit (on a CPU).

    Args:
        step: see `Step`; called with indices into `samples` on the loop's device.
        modules: what is trained and saved, by name; they are moved to the device, in place.
        samples: how many samples there are; each epoch visits each once, but for the last incomplete batch.
        run_dir: receives checkpoints/ and metrics.jsonl; a run found there is resumed.
        settings: everything else that fixes the run, stored with it; resuming under other settings is refused.

    Raises ValueError if one batch needs more than `samples`, or if the run in `run_dir` had other settings;
    NonFiniteError with the step and the last good checkpoint as soon as the loss is no number.
    """

    def __init__(self, step: Step, modules: Mapping[str, nn.Module], samples: int, config: LoopConfig, optim: OptimConfig,
                 run_dir: Path | str, *, settings: Any = None, progress: bool = True):
        if config.batch_size > samples:
            raise ValueError(f"batch_size={config.batch_size} exceeds the {samples} samples: take a smaller batch or more data")
        self.step_function, self.modules, self.samples = step, dict(modules), samples
        self.config, self.optim, self.run_dir = config, optim, Path(run_dir)
        self.settings = json.loads(json.dumps({"samples": samples, **essential(settings or {})}))
        self.progress = progress
        self.device = pick_device(config.device)
        for module in self.modules.values():
            module.to(self.device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
            if config.compile:
                module.compile()
        self.optimizer = build_optimizer(optim, self.modules.values())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.steps_per_epoch = samples // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step = 0
        self.seconds = 0.0  #: wall time of the steps so far, those before a resumption included
        self._order: Tensor | None = None  # of the samples in the epoch under way
        self._last_good: Path | None = None
        self._suspects: list[Tensor] = []  # losses and gradient norms that nobody has looked at yet
        self._resume()

    def __iter__(self) -> Iterator[Progressed]:
        if self.step == self.total_steps:
            return
        for module in self.modules.values():
            module.train()
        with _Record(self, self.progress) as record:
            while self.step < self.total_steps:
                start = time.perf_counter()
                metrics = self._train_one(self._batch(self.step))
                self._suspects.append(torch.stack([metrics["loss"], metrics["grad_norm"]]))
                self.step += 1
                ends_epoch = self.step % self.steps_per_epoch == 0
                saves = ends_epoch or (self.config.save_every and self.step % self.config.save_every == 0)
                logs = saves or self.step % self.config.log_every == 0
                if logs or self.device.type == "cpu":
                    self._guard()
                self.seconds += time.perf_counter() - start
                if logs:
                    record.write(metrics)
                if saves:
                    self._save()
                record.advance()
                yield Progressed(self.step, self.step / self.steps_per_epoch, ends_epoch, metrics)

    def record(self, **figures: float) -> None:
        """Append figures that the caller measured (an accuracy, say) to metrics.jsonl, under the current step.

        They survive a resumption from this step on; look with `records()` whether they are there already.
        """
        line = {"step": self.step, "epoch": self.step / self.steps_per_epoch}
        line |= {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON has no NaN
        with open(self._metrics_path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def records(self, key: str = "loss") -> list[dict[str, float]]:
        """The lines of metrics.jsonl that hold `key`, oldest first; "loss" for those that the loop wrote itself."""
        lines = [json.loads(line) for line in self._metrics_path.read_text().splitlines()]
        return [line for line in lines if key in line]

    def _batch(self, step: int) -> Tensor:
        epoch, place = divmod(step, self.steps_per_epoch)
        if place == 0 or self._order is None:
            generator = torch.Generator().manual_seed(stream_seed(self.config.seed, "order", epoch))
            self._order = torch.randperm(self.samples, generator=generator).to(self.device)
        return self._order[place * self.config.batch_size:(place + 1) * self.config.batch_size]

    def _train_one(self, indices: Tensor) -> dict[str, Tensor]:
        rate = learning_rate(self.optim, self.step, self.total_steps, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed = stream_seed(self.config.seed, "step", self.step)
        generator = torch.Generator(self.device).manual_seed(seed)
        self.optimizer.zero_grad(set_to_none=True)
        precision = PRECISIONS[self.config.precision]
        sums: dict[str, Tensor] = {}
        for number, piece in enumerate(indices.chunk(self.config.accumulate)):
            with self._chance(seed + number), torch.autocast(self.device.type, precision, enabled=precision is not None):
                metrics = self.step_function(piece, generator)
            self.scaler.scale(metrics["loss"] / self.config.accumulate).backward()
            for name, value in metrics.items():
                share = value.detach().float() / self.config.accumulate
                sums[name] = sums.get(name, 0) + share
        self.scaler.unscale_(self.optimizer)
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        sums["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return sums

    @contextmanager
    def _chance(self, seed: int) -> Iterator[None]:
        """Let what draws without a generator (dropout, say) draw from this step's seed, and nobody else notice."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _guard(self) -> None:
        """Raise for the first step whose loss or gradient was no number.

        fp16's scaler may skip a gradient while it looks for its scale, which never needs to fall below 1.
        """
        suspects = self._suspects
        finite = torch.stack(suspects).isfinite()
        searching = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        finite = finite[:, 0] if searching else finite.all(1)
        if not finite.all():
            bad = self.step - len(suspects) + int((~finite).nonzero()[0])
            good = f"the last good checkpoint is {self._last_good}" if self._last_good else "no checkpoint had been saved yet"
            raise NonFiniteError(f"loss or gradient is not finite at step {bad} (loss {suspects[bad - self.step][0].item()}); "
                                 f"{good}. Lower the learning rate (optim.lr={self.optim.lr}), or use precision='fp32'")
        suspects.clear()

    # What survives a kill

    def _save(self) -> None:
        state = {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "seconds": self.seconds,
            "settings": self.settings,
        }
        self._last_good = checkpoints.save(self.run_dir / "checkpoints", self.step, state, self.config.keep)

    def _resume(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        found = checkpoints.load_latest(self.run_dir / "checkpoints")
        if found is None:
            self._metrics_path.write_text("")
            return
        state, path = found
        if state["settings"] != self.settings:
            raise ValueError(f"run_dir={str(self.run_dir)!r} holds a run with other settings "
                             f"({_differences(state['settings'], self.settings)}): give the same ones, or another folder")
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        lines = self._metrics_path.read_text().splitlines(keepends=True) if self._metrics_path.exists() else []
        with atomic_write(self._metrics_path) as file:  # what was written after the checkpoint is written again
            file.writelines(line.encode() for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"])
        self.step, self.seconds, self._last_good = state["step"], state["seconds"], path
        log.info("resumed %s at step %d of %d", self.run_dir, self.step, self.total_steps)

    @property
    def _metrics_path(self) -> Path:
        return self.run_dir / "metrics.jsonl"


class _Record:
    """What a run tells while it goes: metrics.jsonl, TensorBoard, a progress bar."""

    def __init__(self, loop: Loop, progress: bool):
        self.loop = loop
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                            disable=not progress)
        self.task = self.bar.add_task("training", total=loop.total_steps, completed=loop.step)

    def __enter__(self) -> "_Record":
        self.bar.start()
        self.board = None
        if self.loop.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(str(self.loop.run_dir / "tensorboard"), purge_step=self.loop.step + 1)
        self.since = self.loop.step, self.loop.seconds
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()
        if self.board:
            self.board.close()

    def advance(self) -> None:
        self.bar.update(self.task, advance=1)

    def write(self, metrics: Mapping[str, Tensor]) -> None:
        step, (before, seconds) = self.loop.step, self.since
        figures = {name: value.item() for name, value in metrics.items()}
        figures["lr"] = self.loop.optimizer.param_groups[0]["lr"]
        figures["samples_per_second"] = round((step - before) * self.loop.config.batch_size / (self.loop.seconds - seconds), 1)
        self.since = step, self.loop.seconds
        self.loop.record(**figures)
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
        self.bar.update(self.task, description=f"loss {figures['loss']:.4f}")


def _differences(before: Any, now: Any, path: str = "") -> str:
    """The settings that differ, as "optim.lr: 0.002 before, 0.001 now"."""
    if isinstance(before, dict) and isinstance(now, dict):
        parts = [_differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
                 for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        return "; ".join(parts)
    return f"{path or 'settings'}: {before} before, {now} now"
