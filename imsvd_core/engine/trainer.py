"""One resumable training loop over a step function; pretraining and every trained evaluation run on it."""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imsvd_core.distributed import mean_over_ranks, on_rank_0, world
from imsvd_core.engine import checkpoints
from imsvd_core.engine.gradients import Gradients, Objective, Step
from imsvd_core.engine.metrics import Display, Metrics
from imsvd_core.engine.optim import OptimConfig, build_optimizer, learning_rate
from imsvd_core.system import signals
from imsvd_core.system.config import differences, essential
from imsvd_core.system.devices import PRECISIONS, pick_device
from imsvd_core.system.files import Hold, hold
from imsvd_core.system.ranks import launcher_is_gone

log = logging.getLogger(__name__)

#: Plan of a training → what its steps are given, one for each piece. A plan yields, from the step to be done next to the
#: last, (number of the step, indices of this rank's samples in one piece); it may be read ahead, and left early.
Batches = Callable[[Iterator[tuple[int, Tensor]]], Iterator[Any]]


@dataclass(frozen=True)
class LoopConfig:
    """How long, how large, how precise, and where."""

    epochs: int = 3
    """Times that every sample is visited."""
    batch_size: int = 512
    """Samples of one optimizer step, on all ranks together; what is left of an epoch's last batch is dropped."""
    accumulate: int = 1
    """Pieces that a batch is cut into, to fit memory. Pretraining's loss is that of the whole batch all the same."""
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
    """Steps between checkpoints beside those at the end of every epoch; 0 for none by this count."""
    save_minutes: float = 15.0
    """Minutes after which a checkpoint is due, however many steps that were; 0 for none by the clock."""
    keep: int = 2
    """Checkpoints to keep."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too."""

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("accumulate", 1),
            ("seed", 0),
            ("save_every", 0),
            ("keep", 1),
            ("log_every", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value} must be at least {least}, and whole")
        if not self.save_minutes >= 0:
            raise ValueError(f"save_minutes={self.save_minutes} must be at least 0")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} equal pieces"
            )
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision={self.precision!r} must be 'fp32', 'bf16' or 'fp16'")


class NonFiniteError(RuntimeError):
    """The loss or its gradient stopped being a number."""


@dataclass(frozen=True)
class Progressed:
    """Where a run stands after a step; `epoch` is whole at an epoch's end."""

    step: int
    epoch: float
    ends_epoch: bool
    metrics: Mapping[str, Tensor] = field(repr=False)


def stream_seed(seed: int, stream: str, number: int) -> int:
    """A seed for the `number`-th draw of a named stream: fixed by its arguments, unrelated to all others."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=7).digest()
    )


class Loop:
    """Iterating runs the training: every step yields where it stands, so that the caller may look or evaluate.

    All randomness of step k is drawn from a generator seeded by (seed, k) and the order of epoch e by (seed, e):
    a run that was killed and resumed from its newest checkpoint repeats what it lost to the last bit (on a CPU).

    In a process group every rank iterates a loop of its own, and all take every step together: each has its share of the
    batch, and its draws; gradients are averaged; rank 0 alone writes.

    Args:
        step: see `Step`; called with what `batches` yields, by default indices into `samples` on the loop's device.
        modules: what is trained and saved, by name; they are moved to the device, in place.
        samples: how many samples there are; each epoch visits each once, but for the last incomplete batch.
        run_dir: receives checkpoints/ and metrics.jsonl; a run found there is resumed. It is kept from other processes
            until the iteration ends.
        batches: see `Batches`; it may load, prefetch, or index.
        objective: the loss of the whole batch, if there is one: `step` then returns embeddings.
        settings: everything else that fixes the run, stored with it; resuming under other settings is refused.
        steps: to train, where a schedule counts them and no whole epochs; by default those of `config.epochs`.
        rate: step (from 0) → learning rate, where that is not the schedule of `optim`.

    Raises ValueError if one batch needs more than `samples` or is not cut into equal pieces, if another process holds
    `run_dir`, or if the run there had other settings or ranks; NonFiniteError with the step and the last good
    checkpoint as soon as the loss is no number.
    """

    def __init__(
        self,
        step: Step,
        modules: Mapping[str, nn.Module],
        samples: int,
        config: LoopConfig,
        optim: OptimConfig,
        run_dir: Path | str,
        *,
        batches: Batches | None = None,
        objective: Objective | None = None,
        settings: Any = None,
        progress: bool = True,
        steps: int | None = None,
        rate: Callable[[int], float] | None = None,
    ):
        self.rank, self.ranks = world()
        if config.batch_size > samples:
            raise ValueError(
                f"batch_size={config.batch_size} exceeds the {samples} samples: take a smaller batch or more data"
            )
        if config.batch_size % (self.ranks * config.accumulate):
            raise ValueError(
                f"batch_size={config.batch_size} cannot be cut into equal pieces, accumulate={config.accumulate} "
                f"on each of {self.ranks} ranks: take a multiple of {self.ranks * config.accumulate}"
            )
        self.modules, self.samples = dict(modules), samples
        self.config, self.optim, self.run_dir = config, optim, Path(run_dir)
        fixed = {"samples": samples, "world_size": self.ranks, **essential(settings or {})}
        self.settings = json.loads(json.dumps(fixed))
        self.progress, self.metrics = progress, Metrics(self.run_dir / "metrics.jsonl")
        self.device = pick_device(config.device)
        for module in self.modules.values():
            module.to(
                self.device,
                memory_format=torch.channels_last
                if config.channels_last
                else torch.preserve_format,
            )
            if config.compile:
                module.compile()
        self.batches = batches or (lambda plan: (indices.to(self.device) for _, indices in plan))
        self.optimizer = build_optimizer(optim, self.modules.values())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.gradients = Gradients(
            step,
            objective,
            self.modules.values(),
            self.device,
            self.scaler,
            PRECISIONS[config.precision],
            config.accumulate,
        )
        self.steps_per_epoch = samples // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch if steps is None else steps
        self.rate = rate or (
            lambda step: learning_rate(optim, step, self.total_steps, self.steps_per_epoch)
        )
        self.step = 0
        self.seconds = 0.0  #: wall time of the steps so far, those before a resumption included
        self._last_good: Path | None = None
        self._suspects: list[Tensor] = []  # losses and gradient norms that nobody has looked at yet
        self._stopping = False
        self._saved_at = time.monotonic()
        self._skipped = 0  # fp16 steps that the scaler has not taken
        self._hold: Hold | None = None
        self._claim()
        self._resume()

    def __iter__(self) -> Iterator[Progressed]:
        self._claim()
        try:
            if self.step < self.total_steps:
                yield from self._train()
        finally:
            self._hold = None

    def _train(self) -> Iterator[Progressed]:
        for module in self.modules.values():
            module.train()
        batches = self.batches(self._plan(self.step))
        board = self.run_dir / "tensorboard" if self.config.tensorboard and self.rank == 0 else None
        since = self.step, self.seconds  # where the last line of metrics.jsonl was written
        with Display(
            self.step, self.total_steps, self.progress and self.rank == 0, board
        ) as display:
            while self.step < self.total_steps:
                start = time.perf_counter()
                metrics = self._train_one(batches)
                self._suspects.append(torch.stack([metrics["loss"], metrics["grad_norm"]]))
                self.step += 1
                ends_epoch = self.step % self.steps_per_epoch == 0
                ends = ends_epoch or self.step == self.total_steps
                saves = ends or (self.config.save_every and self.step % self.config.save_every == 0)
                logs = saves or self.step % self.config.log_every == 0
                stops, due = self._look() if logs or self.device.type == "cpu" else (False, False)
                self.seconds += time.perf_counter() - start
                if logs:
                    metrics = self._joined(metrics)
                    figures = self._figures(metrics, *since)
                    since = self.step, self.seconds
                    self.record(**figures)
                    display.show(self.step, figures)
                if saves or due or stops:
                    self._save()
                display.advance()
                yield Progressed(self.step, self.step / self.steps_per_epoch, ends_epoch, metrics)
                if stops:
                    return

    def stop(self) -> None:
        """Let all ranks save and leave the iteration together, soon: any rank may ask, at any time. A notice that
        `signals.heed` hears asks too.

        They finish the step at which the loop next looks at its losses: every step on a CPU, every logged one elsewhere.
        """
        self._stopping = True

    def refuse_unfinished(self) -> None:
        """Raise `signals.Stopped` if the iteration was left, saved, before the last step."""
        if self.step < self.total_steps:
            raise signals.Stopped(
                f"stopped at step {self.step} of {self.total_steps}: run the same command to go on"
            )

    def record(self, **figures: float) -> None:
        """Append figures that the caller measured (an accuracy, say) to metrics.jsonl, under the current step.

        They survive a resumption from this step on; look with `records()` whether they are there already. Rank 0's are kept.
        """
        if self.rank == 0:
            self.metrics.append(self.step, self.step / self.steps_per_epoch, figures)

    def records(self, key: str = "loss") -> list[dict[str, float]]:
        """The lines of metrics.jsonl that hold `key`, oldest first; "loss" for those that the loop wrote itself."""
        return self.metrics.lines(key)

    def _plan(self, first: int) -> Iterator[tuple[int, Tensor]]:
        """(step, indices of one of its pieces) for all that this rank has to do from step `first` on."""
        share = self.config.batch_size // self.ranks
        for step in range(first, self.total_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or step == first:
                generator = torch.Generator().manual_seed(
                    stream_seed(self.config.seed, "order", epoch)
                )
                order = torch.randperm(self.samples, generator=generator)
            start = place * self.config.batch_size + self.rank * share
            yield from (
                (step, piece)
                for piece in order[start : start + share].chunk(self.config.accumulate)
            )

    def _train_one(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed = stream_seed(
            self.config.seed, f"step of rank {self.rank}" if self.rank else "step", self.step
        )
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self.gradients(itertools.islice(batches, self.config.accumulate), seed)
        self.scaler.unscale_(self.optimizer)
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        metrics["grad_norm"] = torch.nn.utils.get_total_norm(
            [p.grad for p in parameters if p.grad is not None]
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return metrics

    def _look(self) -> tuple[bool, bool]:
        """Look at what nobody has looked at yet, all ranks at the same: does one of them
        want to stop? Is saving due?

        Raises for the first step whose loss or gradient was no number. fp16's scaler may
        skip a gradient while it looks for its scale, which never needs to fall below 1.
        """
        stops = self._stopping or bool(signals.told()) or launcher_is_gone()
        waited = time.monotonic() - self._saved_at
        due = self.rank == 0 and 0 < 60 * self.config.save_minutes <= waited  # one clock
        asked = torch.tensor([float(stops), float(due)], device=self.device)
        told = torch.cat([*self._suspects, asked])
        *suspects, (stops, due) = mean_over_ranks(told).split(2)
        finite = torch.stack(suspects).isfinite()
        searching = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if self.scaler.is_enabled():
            self._skipped += int((~finite[:, 1]).sum())
        finite = finite[:, 0] if searching else finite.all(1)
        if not finite.all():
            bad = self.step - len(suspects) + int((~finite).nonzero()[0])
            good = (
                f"the last good checkpoint is {self._last_good}"
                if self._last_good
                else "no checkpoint had been saved yet"
            )
            raise NonFiniteError(
                f"loss or gradient is not finite at step {bad} "
                f"(loss {suspects[bad - self.step][0].item()}); {good}. Lower the learning "
                f"rate (optim.lr={self.optim.lr}), or use precision='fp32'"
            )
        self._suspects.clear()
        return bool(stops > 0), bool(due > 0)

    def _joined(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means over ranks, of metrics that are to be read."""
        if self.ranks == 1:
            return metrics
        return dict(zip(metrics, mean_over_ranks(torch.stack(list(metrics.values()))), strict=True))

    def _figures(
        self, metrics: Mapping[str, Tensor], step: int, seconds: float
    ) -> dict[str, float]:
        """What is recorded now, the last time having been at `step` after so many `seconds`."""
        speed = (self.step - step) * self.config.batch_size / (self.seconds - seconds)
        fp16 = (
            {"scale": self.scaler.get_scale(), "skipped": self._skipped}
            if self.scaler.is_enabled()
            else {}
        )
        return (
            {name: value.item() for name, value in metrics.items()}
            | {"lr": self.optimizer.param_groups[0]["lr"], "samples_per_second": round(speed, 1)}
            | fp16
        )

    # What survives a kill

    def _save(self) -> None:
        self._last_good = self._write_checkpoint()
        self._saved_at = time.monotonic()

    @on_rank_0
    def _write_checkpoint(self) -> Path:
        state = {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self._skipped,
            "rng": torch.get_rng_state(),
            "seconds": self.seconds,
            "settings": self.settings,
        }
        return checkpoints.save(self.run_dir / "checkpoints", self.step, state, self.config.keep)

    @on_rank_0
    def _claim(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._hold = hold(self.run_dir)

    def _resume(self) -> None:
        found = self._newest()
        if found is None:
            if self.rank == 0:
                self.metrics.clear()
            return
        state, path = found
        before = {"world_size": 1, **state["settings"]}  # older checkpoints knew of no ranks
        if before != self.settings:
            raise ValueError(
                f"run_dir={str(self.run_dir)!r} holds a run with other settings "
                f"({differences(before, self.settings)}): give the same ones, or another folder"
            )
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        self.step, self.seconds, self._last_good = state["step"], state["seconds"], path
        self._skipped = state.get("skipped", 0)  # older checkpoints did not count
        on_rank_0(self.metrics.forget_after)(self.step)  # it is written again
        log.info("resumed %s at step %d of %d", self.run_dir, self.step, self.total_steps)

    def _newest(self) -> tuple[dict[str, Any], Path] | None:
        """The newest whole checkpoint that rank 0 finds, read by every rank."""
        found = None

        @on_rank_0
        def path() -> Path | None:
            nonlocal found
            found = checkpoints.load_latest(self.run_dir / "checkpoints")
            return found and found[1]

        newest = path()
        return found if self.rank == 0 or newest is None else (checkpoints.load(newest), newest)
