"""The gradient of one batch: over its pieces, at its precision, averaged over the ranks."""

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from imsvd_core.data.batch import Batch
from imsvd_core.distributed import world
from imsvd_core.methods.base import Method

log = logging.getLogger(__name__)


class Gradients:
    """Called with the pieces of a batch: leaves its gradient in the parameters and returns what was
    measured.

    Every rank brings pieces of its own, and all end with the mean of their gradients. Batch-norm
    sees one piece; on GPUs it sees that of every rank. Its running statistics forget as much over
    the pieces as over a whole batch.

    Args:
        method: embeds each piece, then gives the loss of all. What it draws comes from the seed.
        scaler: lifts losses out of the range where fp16 underflows; disabled for other precisions.
        precision: of products and activations, by autocast; None for float32.
        pieces: in a batch, on every rank.
    """

    def __init__(
        self,
        method: Method,
        device: torch.device,
        scaler: torch.amp.GradScaler,
        precision: torch.dtype | None,
        pieces: int,
    ):
        self.method, self.device = method, device
        self.scaler, self.precision, self.pieces = scaler, precision, pieces
        self.shared = _shared(method, device) if world()[1] > 1 else None

    def __call__(self, batch: Iterable[Batch], seed: int) -> dict[str, Tensor]:
        with _running_statistics(self.method, 1 / self.pieces):
            if self.method.whole_batch and self.pieces > 1:
                return self._of_the_whole(list(batch), seed)
            return self._of_each(batch, seed)

    def _of_each(self, batch: Iterable[Batch], seed: int) -> dict[str, Tensor]:
        """The mean of the pieces' losses."""
        means: dict[str, Tensor] = {}
        for number, piece in enumerate(batch):
            with self._averaged(number):
                with self._setting(seed + number):
                    metrics = self.method.loss(*(self.shared or self.method)(piece))
                torch.autograd.backward(self.scaler.scale(metrics["loss"] / self.pieces))
            for name, value in metrics.items():
                means[name] = means.get(name, 0) + value.detach().float() / self.pieces
        return means

    def _of_the_whole(self, batch: Sequence[Batch], seed: int) -> dict[str, Tensor]:
        """Embeddings first, gradients after (GradCache, Gao et al., 2021): a large batch
        in the memory of a piece."""
        with torch.no_grad(), _running_statistics(self.method, 0):
            embeddings = list(self._embed(self.method, batch, seed))
        whole = [torch.cat(parts).requires_grad_() for parts in zip(*embeddings, strict=True)]
        with self._setting(seed):
            metrics = self.method.loss(*whole)
        torch.autograd.backward(self.scaler.scale(metrics["loss"]))
        slopes = [None if z.grad is None else z.grad.chunk(self.pieces) for z in whole]
        again = self._embed(self.shared or self.method, batch, seed)
        for number in range(self.pieces):
            with self._averaged(number):
                tables = zip(next(again), slopes, strict=True)
                pairs = [(z, slope[number]) for z, slope in tables if z.requires_grad and slope]
                torch.autograd.backward([z for z, _ in pairs], [slope for _, slope in pairs])
        return {name: value.detach().float() for name, value in metrics.items()}

    def _embed(
        self, embed: nn.Module, batch: Iterable[Batch], seed: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """The embeddings of every piece, by the same draws whenever it is called."""
        for number, piece in enumerate(batch):
            with self._setting(seed + number):
                embeddings = embed(piece)
            yield embeddings

    def _averaged(self, number: int) -> AbstractContextManager[Any]:
        """Gradients of all pieces but the last stay on their rank: the sum travels once."""
        return self.shared.no_sync() if self.shared and number < self.pieces - 1 else nullcontext()

    @contextmanager
    def _setting(self, seed: int) -> Iterator[None]:
        """The precision; and for what draws by itself (dropout, say) a seed that leaves the
        global generator unchanged."""
        devices = [self.device] if self.device.type == "cuda" else []
        autocast = torch.autocast(
            self.device.type, self.precision, enabled=self.precision is not None
        )
        with torch.random.fork_rng(devices), autocast:
            torch.manual_seed(seed)
            yield


def _shared(method: Method, device: torch.device) -> DistributedDataParallel:
    """The method on every rank: equal weights, averaged gradients, and batch-norm over all ranks
    where torch has it."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(method)
    elif world()[0] == 0 and _norms(method):
        log.info("each rank's batch-norm sees its own samples alone: torch joins them on GPUs only")
    # Running statistics do not touch the training, and a checkpoint keeps rank 0's: no need to send
    # them at every step.
    with warnings.catch_warnings():  # torch 2.15 gives the argument a new name that 2.14 lacks
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(method, broadcast_buffers=False)


def _norms(method: nn.Module) -> list[_BatchNorm]:
    norms = (module for module in method.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.track_running_stats]


@contextmanager
def _running_statistics(method: nn.Module, share: float) -> Iterator[None]:
    """Let each update of batch-norm's running statistics count as so much of one: 1 / pieces for
    the pieces of a batch; 0 for a pass that is to leave no trace."""
    states = []
    for norm in _norms(method) if share < 1 else []:
        momentum, count = norm.momentum, norm.num_batches_tracked
        if momentum is None or count is None:
            # a plain mean, which is the same over two passes
            continue
        states.append((norm, momentum, count, count.clone()))
        norm.momentum = 1 - (1 - momentum) ** share
    try:
        yield
    finally:
        for norm, momentum, count, start in states:
            norm.momentum = momentum
            count.copy_(start + ((count - start) * share).round().long())
