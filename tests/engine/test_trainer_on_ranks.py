"""The loop on several processes: they share every batch, and stop, fail and resume together."""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from imsvd_core.data.batch import Batch
from imsvd_core.engine import checkpoints
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.engine.trainer import NonFiniteError, Trainer
from imsvd_core.methods.base import Method

CLASSIFIER = LoopConfig(epochs=4, batch_size=8, precision="fp32", log_every=2, device="cpu")


class Classifier(Method):
    """A loss of its own, not the ranks' together; spoilt or stopped at a step of a rank."""

    whole_batch = False

    def __init__(self, hooks):
        super().__init__()
        self.model, self.hooks = nn.Linear(3, 1), hooks

    def embed(self, batch):
        (x,) = batch.views
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        return loss * self.hooks(batch), x.mean()

    def loss(self, loss, own):
        return {"loss": loss, "own": own}


def classifier(run_dir, spoil=None, stop=None, rank=0, config=CLASSIFIER, seen=None):
    """A trainer of a classifier, spoilt or stopped at (rank, step); and the model."""
    torch.manual_seed(0)
    counter = itertools.count(1)

    def hooks(batch):
        count = next(counter)
        if seen is not None:
            draw = trainer.order.generator(trainer.step)
            seen.append((batch.indices.tolist(), torch.rand(1, generator=draw).item()))
        if stop == (rank, count):
            trainer.stop()
        return torch.nan if spoil == (rank, count) else 1

    method = Classifier(hooks)
    optim = OptimConfig(name="sgd", lr=0.1, warmup_epochs=0)
    trainer = Trainer(method, 40, config, optim, run_dir, progress=False)
    return trainer, method.model


def steps(trainer):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    order = trainer.order.since(trainer.step)
    return trainer.train(Batch((x[rows],), rows, rows) for _, rows in order)


def shared_folder(rank):
    """One folder for all ranks."""
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(folder)
    return folder[0]


def seen_and_recorded(rank, size):
    seen = []
    trainer, model = classifier(
        shared_folder(rank) if size > 1 else tempfile.mkdtemp(), rank=rank, seen=seen
    )
    list(steps(trainer))
    if size > 1:
        torch.distributed.barrier()
    return (
        seen,
        [(line["step"], line["loss"], line["own"]) for line in trainer.records()],
        model.weight.detach(),
    )


def test_ranks_share_every_batch_draw_their_own_and_record_their_means(ranks):
    (alone, record, weight), ((first, record_1, weight_1), (second, record_2, _)) = (
        seen_and_recorded(0, 1),
        ranks(seen_and_recorded, 2),
    )
    assert len(first) == len(second) == len(alone) == 20
    for (indices, draw), (indices_1, draw_1), (indices_2, draw_2) in zip(
        alone, first, second, strict=True
    ):
        assert indices == indices_1 + indices_2
        assert draw == draw_1 != draw_2
    assert record_1 == record_2
    assert torch.allclose(torch.tensor(record_1), torch.tensor(record), atol=1e-5)
    assert torch.allclose(weight, weight_1, atol=1e-5)


def stopped(rank, size):
    folder = shared_folder(rank)
    trainer, _ = classifier(folder, stop=(1, 7), rank=rank)
    visited = [progressed.step for progressed in steps(trainer)]
    left_at, saved = (
        trainer.step,
        [path.name for path in checkpoints.paths(f"{folder}/checkpoints")],
    )
    trainer, model = classifier(folder, rank=rank)
    taken_up_at = trainer.step
    list(steps(trainer))
    return len(visited), left_at, saved, taken_up_at, model.weight.detach()


def test_one_rank_stops_all_at_the_same_step_and_nothing_is_lost(ranks, tmp_path):
    trainer, model = classifier(tmp_path / "alone")
    list(steps(trainer))
    for count, left_at, saved, taken_up_at, weight in ranks(stopped, 2):
        assert (count, left_at, taken_up_at) == (7, 7, 7)
        assert saved == ["step-000000007.pt", "step-000000005.pt"]
        assert torch.allclose(weight, model.weight, atol=1e-5)


def test_a_stop_saves_once_and_resumes_bit_for_bit_on_one_process_too(tmp_path):
    whole = classifier(tmp_path / "whole")
    list(steps(whole[0]))
    trainer, _ = classifier(tmp_path / "cut", stop=(0, 3))
    assert [progressed.step for progressed in steps(trainer)] == [1, 2, 3]
    again = classifier(tmp_path / "cut")
    assert again[0].step == 3
    list(steps(again[0]))
    assert torch.equal(whole[1].weight, again[1].weight)


def spoilt(rank, size):
    folder = shared_folder(rank)
    trainer, _ = classifier(folder, spoil=(1, 7), rank=rank)
    try:
        list(steps(trainer))
    except NonFiniteError as error:
        return str(error)


def test_what_is_no_number_on_one_rank_stops_all_at_its_step(ranks):
    first, second = ranks(spoilt, 2)
    assert first == second
    assert "step 6 " in first
    assert "step-000000005.pt" in first


def refused(rank, size):
    folder, said = shared_folder(rank), []
    for config in (
        replace(CLASSIFIER, batch_size=5),
        replace(CLASSIFIER, batch_size=6, accumulate=2),
    ):
        try:
            classifier(folder, config=config, rank=rank)
        except ValueError as error:
            said.append(str(error))
    if rank == 0:  # found by rank 0: refused on all
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / "step-000000001.pt").write_bytes(b"torn")
    try:
        classifier(folder, rank=rank)
    except checkpoints.CheckpointError as error:
        said.append(str(error))
    return said


def test_batches_without_equal_pieces_and_torn_runs_are_refused_on_every_rank(ranks):
    for uneven, pieces, torn in ranks(refused, 2):
        assert "batch_size=5" in uneven
        assert "2 ranks: take a multiple of 2" in uneven
        assert "batch_size=6" in pieces
        assert "take a multiple of 4" in pieces
        assert "none of the 1 checkpoints" in torn


def test_the_plan_is_cheap_may_be_read_ahead_and_left_early(tmp_path):
    """Read a whole batch ahead by whoever loads, and dropped when the caller leaves: the next loop
    goes on exactly."""
    ends, plans = [], []
    for name, leave in (("whole", None), ("cut", 7)):

        def ahead(order, x):
            plans.append([])
            waiting = []
            for step, indices in order:
                plans[-1].append(step)
                waiting.append(Batch((x[indices],), indices, indices))
                if len(waiting) > 3:
                    yield waiting.pop(0)
            yield from waiting

        for attempt in range(2 if leave else 1):
            torch.manual_seed(0)
            method = Classifier(lambda batch: 1)
            model, x = method.model, torch.randn(40, 3)
            config, folder = replace(CLASSIFIER, accumulate=2), tmp_path / name
            trainer = Trainer(method, 40, config, OptimConfig(), folder, progress=False)
            order = trainer.order.since(trainer.step)
            for progressed in trainer.train(ahead(order, x)):
                if progressed.step == leave and attempt == 0:
                    break
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)
    assert plans[0] == sorted([*range(20)] * 2)
    assert plans[2] == sorted([*range(5, 20)] * 2)
