"""The gradient of one batch: over its pieces, at its precision, averaged over the ranks."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from imsvd_core.distributed import world

log = logging.getLogger(__name__)

#: (a piece of the batch, the generator of its draws) → scalars to record, of which "loss" is minimised;
#: or, with an `Objective`, the embeddings that it is given.
Step = Callable[[Any, torch.Generator], Mapping[str, Tensor] | tuple[Tensor, ...]]

#: Embeddings of a whole batch → scalars to record; "loss" is the one that is minimised.
Objective = Callable[..., Mapping[str, Tensor]]


class Gradients:
    """Called with the pieces of a batch: leaves its gradient in the parameters and returns what was measured.

    Every rank brings pieces of its own, and all end with the mean of their gradients. Batch-norm sees one piece;
    on GPUs it sees that of every rank. Its running statistics forget as much over the pieces as over a whole batch.

    Args:
        step: see `Step`; what it draws without the generator comes from the seed all the same.
        objective: a loss of the whole batch. Without one, the losses of the pieces are averaged.
        modules: what is trained.
        scaler: lifts losses out of fp16's dust; disabled for other precisions.
        precision: of products and activations, by autocast; None for float32.
        accumulate: pieces in a batch, on every rank.
    """

    def __init__(
        self,
        step: Step,
        objective: Objective | None,
        modules: Iterable[nn.Module],
        device: torch.device,
        scaler: torch.amp.GradScaler,
        precision: torch.dtype | None,
        accumulate: int,
    ):
        self.step, self.objective, self.modules, self.device = (
            step,
            objective,
            nn.ModuleList(modules),
            device,
        )
        self.scaler, self.precision, self.accumulate = scaler, precision, accumulate
        self.shared = (
            _shared(step, self.modules, device) if world()[1] > 1 else None
        )  # the step whose gradients are averaged

    def __call__(self, pieces: Iterable[Any], seed: int) -> dict[str, Tensor]:
        with _one_update_of_statistics(self.modules, self.accumulate):
            if self.objective and self.accumulate > 1:
                return self._of_the_whole(list(pieces), seed)
            return self._of_each(pieces, seed)

    def _of_each(self, pieces: Iterable[Any], seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        sums: dict[str, Tensor] = {}
        for number, piece in enumerate(pieces):
            with self._averaged(number):
                with self._setting(seed + number):
                    metrics = (self.shared or self.step)(piece, generator)
                    metrics = self.objective(*metrics) if self.objective else metrics
                self.scaler.scale(metrics["loss"] / self.accumulate).backward()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / self.accumulate
        return sums

    def _of_the_whole(self, pieces: Sequence[Any], seed: int) -> dict[str, Tensor]:
        """Embeddings first, gradients after (GradCache, Gao et al., 2021): a large batch
        in the memory of a piece."""
        with torch.no_grad(), _untouched_statistics(self.modules):
            embeddings = list(self._embed(self.step, pieces, seed))
        whole = [torch.cat(parts).requires_grad_() for parts in zip(*embeddings, strict=True)]
        with self._setting(seed):
            metrics = self.objective(*whole)
        self.scaler.scale(metrics["loss"]).backward()
        slopes = zip(*(z.grad.chunk(self.accumulate) for z in whole), strict=True)
        again = self._embed(self.shared or self.step, pieces, seed)
        for number, slope in enumerate(slopes):
            with self._averaged(number):
                torch.autograd.backward(next(again), slope)
        return {name: value.detach().float() for name, value in metrics.items()}

    def _embed(self, step: Step, pieces: Iterable[Any], seed: int) -> Iterator[tuple[Tensor, ...]]:
        """The embeddings of every piece, by the same draws whenever it is called."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for number, piece in enumerate(pieces):
            with self._setting(seed + number):
                embeddings = step(piece, generator)
            yield embeddings

    def _averaged(self, number: int) -> AbstractContextManager:
        """Gradients of all pieces but the last stay on their rank: the sum travels once."""
        return (
            self.shared.no_sync() if self.shared and number < self.accumulate - 1 else nullcontext()
        )

    @contextmanager
    def _setting(self, seed: int) -> Iterator[None]:
        """The precision; and for what draws without a generator (dropout, say) a seed that nobody else notices."""
        with (
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            torch.autocast(self.device.type, self.precision, enabled=self.precision is not None),
        ):
            torch.manual_seed(seed)
            yield


class _Stepper(nn.Module):
    """A step as a module of what it trains: what DistributedDataParallel asks for."""

    def __init__(self, step: Step, modules: nn.ModuleList):
        super().__init__()
        self.step, self.modules_ = step, modules

    def forward(
        self, piece: Any, generator: torch.Generator
    ) -> Mapping[str, Tensor] | tuple[Tensor, ...]:
        return self.step(piece, generator)


def _shared(step: Step, modules: nn.ModuleList, device: torch.device) -> DistributedDataParallel:
    """The step on every rank: equal weights, averaged gradients, and batch-norm over all ranks where torch has it."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(modules)
    elif world()[0] == 0 and any(isinstance(module, _BatchNorm) for module in modules.modules()):
        log.info("each rank's batch-norm sees its own samples alone: torch joins them on GPUs only")
    # Running statistics do not touch the training, and a checkpoint keeps rank 0's: no need to send them at every step.
    return DistributedDataParallel(_Stepper(step, modules), broadcast_buffers=False)


def _norms(modules: nn.ModuleList) -> list[_BatchNorm]:
    return [
        module
        for module in modules.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]


@contextmanager
def _one_update_of_statistics(modules: nn.ModuleList, pieces: int) -> Iterator[None]:
    """Let `pieces` updates of batch-norm's running statistics weigh, and count, as one."""
    norms = (
        [norm for norm in _norms(modules) if norm.momentum is not None] if pieces > 1 else []
    )  # None: a plain mean
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 1 - (1 - norm.momentum) ** (1 / pieces)
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.sub_(batches).div_(pieces, rounding_mode="floor").add_(batches)


@contextmanager
def _untouched_statistics(modules: nn.ModuleList) -> Iterator[None]:
    """Batch-norm by the statistics of the batch, as in training, with no trace of it in the running ones."""
    norms = _norms(modules)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
