"""Training: one resumable loop over a method's steps; pretraining and every trained evaluation run
on it."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imsvd_core.data.batch import Batch
from imsvd_core.distributed import mean_over_ranks, on_rank_0, world
from imsvd_core.engine import checkpoints
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.gradients import Gradients
from imsvd_core.engine.metrics import Metrics
from imsvd_core.engine.optim import OptimConfig, build_optimizer, learning_rate
from imsvd_core.engine.order import Order
from imsvd_core.methods.base import Method
from imsvd_core.system import signals
from imsvd_core.system.config import complete, differences, essential, plain
from imsvd_core.system.devices import PRECISIONS, pick_device, warn_of_emulation
from imsvd_core.system.faults import Fault
from imsvd_core.system.progress import bar
from imsvd_core.system.ranks import launcher_is_gone
from imsvd_core.system.run_folder import RunFolder
from imsvd_core.system.watchdog import watched

log = logging.getLogger(__name__)


class NonFiniteError(Fault):
    """The loss or its gradient is NaN or infinite."""


@dataclass(frozen=True)
class Progressed:
    """Where a training stands after a step; `epoch` is whole at an epoch's end."""

    step: int
    epoch: float
    ends_epoch: bool
    metrics: Mapping[str, Tensor] = field(repr=False)


class Trainer:
    """Trains a method: `train(batches)` takes the steps and yields after each where the training
    stands.

    All chance of step k is drawn from a generator seeded by (seed, k) and the order of epoch e by
    (seed, e): a run that was killed and resumed from its newest checkpoint repeats what it lost to
    the last bit (on a CPU).

    In a process group every rank has a trainer of its own, and all take every step together: each
    has its share of the batch, and its draws; gradients are averaged; rank 0 alone writes.

    Args:
        method: all that is trained and saved; it is moved to the device, in place.
        samples: how many samples there are; each epoch visits each once, but for the last
            incomplete batch.
        run: the folder of checkpoints/ and metrics.jsonl; a run found there is resumed. `train`
            keeps it from other processes, unless the caller does.
        settings: everything else that fixes the run, stored with it; resuming under other settings
            is refused.
        kind: the dataclass that `settings` come from; a setting that a checkpoint lacks, since it
            was added later, then has its default.
        steps: to train, where a schedule counts them and no whole epochs; by default those of
            `config.epochs`.
        rate: step (from 0) → learning rate, where that is not the schedule of `optim`.
        embed_all: representations of the whole training set, for methods that cluster them before
            an epoch.
        saves: whether to write checkpoints; without them a run cannot be resumed.

    Raises ValueError if one batch needs more than `samples` or is not cut into equal pieces, if
    another process has `run`, or if the run there had other settings or ranks; NonFiniteError
    with the step and the last good checkpoint as soon as the loss is NaN or infinite.
    """

    def __init__(
        self,
        method: Method,
        samples: int,
        config: LoopConfig,
        optim: OptimConfig,
        run: RunFolder | Path | str,
        *,
        settings: Any = None,
        kind: type | None = None,
        progress: bool = True,
        steps: int | None = None,
        rate: Callable[[int], float] | None = None,
        embed_all: Callable[[], Tensor] | None = None,
        saves: bool = True,
    ):
        self.method, self.config, self.optim = method, config, optim
        self.run = run if isinstance(run, RunFolder) else RunFolder(run)
        self.rank, ranks = world()
        total = config.epochs * (samples // config.batch_size) if steps is None else steps
        self.order = Order(samples, config.batch_size, total, config.accumulate, config.seed)
        fixed = {"samples": samples, "world_size": ranks, **essential(settings or {})}
        self.settings, self.kind = plain(fixed), kind
        self.device = pick_device(config.device)
        warn_of_emulation(config.precision, self.device)
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        method.to(self.device).to(memory_format=layout)
        if config.compile:
            method.compile()
        self.optimizer = build_optimizer(optim, method)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        precision = PRECISIONS[config.precision]
        self.gradients = Gradients(method, self.device, self.scaler, precision, config.accumulate)
        self.rate = rate or partial(
            learning_rate,
            optim,
            total_steps=total,
            steps_per_epoch=self.order.steps_per_epoch,
        )
        self.embed_all, self.saves = embed_all, saves
        self.metrics, self.progress = Metrics(self.run), progress
        self.step = 0
        self.seconds = 0.0  #: wall time of the steps so far, those before a resumption included
        self._last_good: Path | None = None
        self._unchecked: list[Tensor] = []  # losses and gradient norms of the last steps
        self._stop_requested = self._stopping = False
        self._saved_at = time.monotonic()
        self._skipped = 0  # fp16 steps that the scaler has not taken
        with self.run.on_rank_0():
            self._resume()

    def train(self, batches: Iterable[Batch]) -> Iterator[Progressed]:
        """Take every step that is left; `batches` are the pieces of `order.since(step)`."""
        self._stopping, self._logged_at = False, (self.step, self.seconds)
        steps, per_epoch = self.order.steps, self.order.steps_per_epoch
        self.method.train()
        pieces = iter(batches)  # order → images → views
        with (
            self.run.on_rank_0(),
            bar("training", steps, self.progress, self.step) as advance,
            watched(self.config.patience_minutes, "loop.patience_minutes"),
            self._tensorboard() as self._writer,
        ):
            while self.step < steps and not self._stopping:
                if self.embed_all and self.step % per_epoch == 0:
                    self.method.before_epoch(self.embed_all)
                batch = islice(pieces, self.config.accumulate)
                metrics = self.take_step(batch)  # embed → loss → gradients → update
                metrics = self.keep_records(metrics, advance)  # finite? log, save, stop
                ends_epoch = self.step % per_epoch == 0
                yield Progressed(self.step, self.step / per_epoch, ends_epoch, metrics)

    def take_step(self, batch: Iterable[Batch]) -> dict[str, Tensor]:
        """One update of the weights from the pieces of a batch; returns what was measured."""
        self._started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self.gradients(batch, self.order.seed_of(self.step))
        self.scaler.unscale_(self.optimizer)
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        metrics["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.method.after_step(self.step / self.order.steps)
        return metrics

    def keep_records(
        self, metrics: dict[str, Tensor], advance: Callable[..., None]
    ) -> dict[str, Tensor]:
        """Check, log and save what is due after a step; returns what was measured, over all ranks
        if it was logged."""
        self._unchecked.append(torch.stack([metrics["loss"], metrics["grad_norm"]]))
        ends = self.step == self.order.steps or self.step % self.order.steps_per_epoch == 0
        saves = ends or (self.config.save_every and self.step % self.config.save_every == 0)
        logs = saves or self.step % self.config.log_every == 0
        if logs or self.device.type == "cpu":
            self._refuse_non_finite()
            self._stopping, save_due = self._agree()
            saves = saves or save_due or self._stopping
        self.seconds += time.perf_counter() - self._started
        if logs:
            metrics = self._log(metrics)
        if saves and self.saves:
            self._last_good = self._write_checkpoint()
            self._saved_at = time.monotonic()
        advance(1, f"loss {metrics['loss']:.4f}" if logs else None)
        return metrics

    def stop(self) -> None:
        """Let all ranks save and leave `train` together, soon: any rank may ask, at any time. A
        signal to stop asks too.

        They finish the step at which losses are checked next: every step on a CPU, every logged one
        elsewhere.
        """
        self._stop_requested = True

    def refuse_unfinished(self) -> None:
        """Raise `signals.Stopped` if `train` was left, saved, before the last step."""
        if self.step < self.order.steps:
            raise signals.Stopped(
                f"stopped at step {self.step} of {self.order.steps}: run the same command to go on"
            )

    def record(self, **figures: float) -> None:
        """Append figures that the caller measured (an accuracy, say) to metrics.jsonl, under the
        current step.

        They survive a resumption from this step on; `records()` tells whether they are there
        already. Rank 0's are kept.
        """
        if self.rank == 0:
            self.metrics.append(self.step, self.step / self.order.steps_per_epoch, figures)

    def records(self, key: str = "loss") -> list[dict[str, float]]:
        """The lines of metrics.jsonl that hold `key`, oldest first; "loss" for those that the
        trainer wrote itself."""
        return self.metrics.lines(key)

    def _tensorboard(self) -> AbstractContextManager[Any]:
        """Writer of curves for TensorBoard, if that is wanted."""
        if self.rank or not self.config.tensorboard:
            return nullcontext()
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        writer: AbstractContextManager[Any] = SummaryWriter(
            self.run.path / "tensorboard", purge_step=self.step + 1
        )
        return writer

    def _agree(self) -> tuple[bool, bool]:
        """Whether any rank wants to stop, and whether rank 0's clock says that saving is due."""
        stop = self._stop_requested or bool(signals.stop_requested()) or launcher_is_gone()
        waited = time.monotonic() - self._saved_at
        due = self.rank == 0 and 0 < 60 * self.config.save_minutes <= waited
        votes = torch.tensor([float(stop), float(due)], device=self.device)
        stop, due = (mean_over_ranks(votes) > 0).tolist()
        return stop, due

    def _refuse_non_finite(self) -> None:
        """Raise NonFiniteError for the first unchecked step whose loss or gradient is not finite on
        any rank.

        fp16's scaler may skip a gradient while it searches for its scale, which never needs to fall
        below 1.
        """
        unchecked = mean_over_ranks(torch.stack(self._unchecked))
        self._unchecked.clear()
        finite = unchecked.isfinite()
        if self.scaler.is_enabled():
            self._skipped += int((~finite[:, 1]).sum())
        searching = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        finite = finite[:, 0] if searching else finite.all(1)
        if finite.all():
            return
        bad = int((~finite).nonzero()[0])
        step = self.step - len(finite) + bad
        raise NonFiniteError(
            f"loss or gradient is not finite at step {step} "
            f"(loss {unchecked[bad, 0].item()}); last good checkpoint: "
            f"{self._last_good or 'no checkpoint yet'}. {self._advice(step)}"
        )

    def _advice(self, step: int) -> str:
        """What may keep the loss finite, of what is not done already."""
        advice = []
        if step:
            advice.append(f"lower the learning rate (optim.lr={self.optim.lr})")
        if step and self.optim.warmup_epochs < 1:
            advice.append(f"warm up (optim.warmup_epochs={self.optim.warmup_epochs:g})")
        if self.config.precision != "fp32":
            advice.append("use precision='fp32'")
        words = ", or ".join(advice or ["no weight has moved yet: look at images and settings"])
        return words[0].upper() + words[1:]

    def _log(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Record the means over ranks; returns them."""
        means = mean_over_ranks(torch.stack(list(metrics.values())))
        metrics = dict(zip(metrics, means, strict=True))
        step, seconds = self._logged_at
        speed = (self.step - step) * self.config.batch_size / (self.seconds - seconds)
        figures = {name: value.item() for name, value in metrics.items()}
        figures["lr"] = self.optimizer.param_groups[0]["lr"]
        figures["samples_per_second"] = round(speed, 1)
        if self.scaler.is_enabled():
            figures |= {"scale": self.scaler.get_scale(), "skipped": self._skipped}
        self._logged_at = self.step, self.seconds
        self.record(**figures)
        if self._writer:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, self.step)
        return metrics

    @on_rank_0
    def _write_checkpoint(self) -> Path:
        state = {
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self._skipped,
            "rng": torch.get_rng_state(),
            "seconds": self.seconds,
            "settings": self.settings,
        }
        return checkpoints.save(self.run, self.step, state, self.config.keep)

    def _resume(self) -> None:
        newest = on_rank_0(checkpoints.newest)(self.run.path / "checkpoints")
        if newest is None:
            on_rank_0(self.metrics.forget_after)(-1)
            return
        state = checkpoints.load(newest)
        before = {"world_size": 1, **state["settings"]}  # older checkpoints do not name the ranks
        now = self.settings
        if self.kind:
            before, now = complete(self.kind, before), complete(self.kind, now)
        if before != now:
            raise ValueError(
                f"run_dir={str(self.run.path)!r} holds a run with other settings "
                f"({differences(before, now)}): give the same ones, or another folder"
            )
        self.method.load_state_dict(checkpoints.weights(state))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        self.step, self.seconds, self._last_good = state["step"], state["seconds"], newest
        self._skipped = state.get("skipped", 0)  # older checkpoints did not count
        on_rank_0(self.metrics.forget_after)(self.step)  # it is written again
        log.info("resumed %s at step %d of %d", self.run.path, self.step, self.order.steps)
