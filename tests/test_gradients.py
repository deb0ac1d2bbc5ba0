"""One batch in pieces and on ranks has the gradient of the batch as a whole."""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from imsvd_core import checkpoints
from imsvd_core.loop import Loop, LoopConfig, NonFiniteError
from imsvd_core.methods import IMSVD, BarlowTwins, VICReg
from imsvd_core.optim import OptimConfig

METHODS = [IMSVD(units=4, temperature=0.5), VICReg(), BarlowTwins()]
CONFIG = LoopConfig(epochs=3, batch_size=16, precision="fp32", log_every=1, device="cpu")
SAMPLES = 32


def train(run_dir, method, accumulate=1, config=CONFIG, norm=False, noise=0.1, draws=None):
    """A small twin network on two noisy views, all noise the sample's own: trained parameters, and the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12) if norm else nn.Tanh(), nn.Linear(12, 8))
    x = torch.randn(SAMPLES, 6)
    views = x + noise * torch.randn(2, SAMPLES, 6)

    def step(indices, generator):
        if draws is not None:
            draws.append((torch.rand(1, generator=generator).item(), torch.rand(1).item()))
        return model(views[0, indices]), model(views[1, indices])

    loop = Loop(step, {"model": model}, SAMPLES, replace(config, accumulate=accumulate), OptimConfig(name="sgd", lr=0.05, warmup_epochs=0),
                run_dir, objective=method.build(8), progress=False)
    losses = torch.stack([progressed.metrics["loss"] for progressed in loop])
    return model.state_dict(), losses


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_pieces_train_as_the_whole_batch(tmp_path, method, accumulate):
    whole, losses = train(tmp_path / "whole", method)
    pieces, losses_of_pieces = train(tmp_path / "pieces", method, accumulate)
    torch.testing.assert_close(losses_of_pieces, losses, rtol=1e-6, atol=1e-6)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    assert (whole["0.weight"] - nn.Linear(6, 12).weight).abs().max() > 1e-3  # it was trained at all


def test_running_statistics_see_every_piece_once(tmp_path):
    """Where the views do not change and the rate is 0, one step more or less of the running mean would show."""
    state, _ = train(tmp_path, METHODS[0], accumulate=4, norm=True)
    assert state["1.num_batches_tracked"] == 2 * 4 * 6  # views, pieces, steps


def test_both_passes_draw_alike(tmp_path):
    draws = []
    train(tmp_path, METHODS[0], accumulate=4, draws=draws)
    for step in range(6):
        first, again = draws[8 * step:8 * step + 4], draws[8 * step + 4:8 * step + 8]
        assert first == again and len(set(first)) == 4


def test_fp16_scales_the_loss_of_the_whole(tmp_path):
    """The embeddings' gradients are float16: unscaled, they would lose what lies under 6e-8."""
    ends = [train(tmp_path / str(accumulate), VICReg(1e-4, 1e-4, 1e-4), accumulate, replace(CONFIG, precision="fp16"))[0]
            for accumulate in (1, 4)]
    start, _ = train(tmp_path / "start", VICReg(0, 0, 0))
    moved, alike = (ends[0]["0.weight"] - start["0.weight"]).norm(), (ends[0]["0.weight"] - ends[1]["0.weight"]).norm()
    assert alike < 0.02 * moved


# On ranks


def value_and_gradient(rank, size):
    """Of every method on this rank's share of 24 samples."""
    results = []
    for method in METHODS:
        z = 2 * torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0))
        z1, z2 = (view.chunk(size)[rank].clone().requires_grad_() for view in z)
        loss = method.build(8)(z1, z2)["loss"]
        loss.backward()
        results.append((loss.detach(), torch.stack([z1.grad, z2.grad])))
    return results


def test_every_method_takes_the_batch_of_all_ranks(ranks):
    """Its mean over ranks, which DDP takes, is the joined batch's gradient: no factor of the world size either way."""
    alone = value_and_gradient(0, 1)
    for method, (loss, gradient), *shares in zip(METHODS, alone, *ranks(value_and_gradient, 2)):
        for value, _ in shares:
            torch.testing.assert_close(value, loss, rtol=1e-6, atol=1e-6, msg=method.name)
        averaged = torch.cat([share for _, share in shares], dim=1) / 2
        torch.testing.assert_close(averaged, gradient, rtol=1e-5, atol=1e-8, msg=method.name)


def trained(rank, size):
    with tempfile.TemporaryDirectory() as folder:  # only rank 0 writes to its own
        return [train(f"{folder}/{method.name}-{accumulate}", method, accumulate)
                for method, accumulate in itertools.product(METHODS, (1, 2))]


def test_ranks_train_as_one_process(ranks):
    alone, (first, second) = trained(0, 1), ranks(trained, 2)
    for (state, losses), (state_1, losses_1), (state_2, _) in zip(alone, first, second, strict=True):
        torch.testing.assert_close(losses_1, losses, rtol=1e-5, atol=1e-5)
        for name in state:
            assert torch.equal(state_1[name], state_2[name])
            torch.testing.assert_close(state_1[name], state[name], rtol=1e-5, atol=1e-6)


CLASSIFIER = LoopConfig(epochs=4, batch_size=8, precision="fp32", log_every=2, device="cpu")


def classifier(run_dir, spoil=None, stop=None, rank=0, config=CLASSIFIER, seen=None):
    """A step with a loss of its own, not the ranks' together; spoilt or stopped at (rank, step)."""
    torch.manual_seed(0)
    model, x, steps = nn.Linear(3, 1), torch.randn(40, 3), itertools.count(1)
    loop = None

    def step(indices, generator):
        count = next(steps)
        if seen is not None:
            seen.append((indices.tolist(), torch.rand(1, generator=generator).item()))
        if stop == (rank, count):
            loop.stop()
        loss = (model(x[indices]) - x[indices].sum(1, keepdim=True)).square().mean()
        return {"loss": loss * (torch.nan if spoil == (rank, count) else 1), "own": x[indices].mean()}

    loop = Loop(step, {"model": model}, 40, config, OptimConfig(name="sgd", lr=0.1, warmup_epochs=0), run_dir, progress=False)
    return loop, model


def shared_folder(rank):
    """One folder for all ranks."""
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(folder)
    return folder[0]


def seen_and_recorded(rank, size):
    seen = []
    loop, model = classifier(shared_folder(rank) if size > 1 else tempfile.mkdtemp(), rank=rank, seen=seen)
    for _ in loop:
        pass
    if size > 1:
        torch.distributed.barrier()
    return seen, [(line["step"], line["loss"], line["own"]) for line in loop.records()], model.weight.detach()


def test_ranks_share_every_batch_draw_their_own_and_record_their_means(ranks):
    (alone, record, weight), ((first, record_1, weight_1), (second, record_2, _)) = seen_and_recorded(0, 1), ranks(seen_and_recorded, 2)
    assert len(first) == len(second) == len(alone) == 20
    for (indices, draw), (indices_1, draw_1), (indices_2, draw_2) in zip(alone, first, second, strict=True):
        assert indices == indices_1 + indices_2
        assert draw == draw_1 != draw_2
    assert record_1 == record_2 and torch.allclose(torch.tensor(record_1), torch.tensor(record), atol=1e-5)
    assert torch.allclose(weight, weight_1, atol=1e-5)


def stopped(rank, size):
    folder = shared_folder(rank)
    loop, _ = classifier(folder, stop=(1, 7), rank=rank)
    steps = [progressed.step for progressed in loop]
    left_at, saved = loop.step, [path.name for path in checkpoints.paths(f"{folder}/checkpoints")]
    loop, model = classifier(folder, rank=rank)
    taken_up_at = loop.step
    list(loop)
    return len(steps), left_at, saved, taken_up_at, model.weight.detach()


def test_one_rank_stops_all_at_the_same_step_and_nothing_is_lost(ranks, tmp_path):
    loop, model = classifier(tmp_path / "alone")
    list(loop)
    for steps, left_at, saved, taken_up_at, weight in ranks(stopped, 2):
        assert (steps, left_at, taken_up_at) == (7, 7, 7)
        assert saved == ["step-000000007.pt", "step-000000005.pt"]
        assert torch.allclose(weight, model.weight, atol=1e-5)


def test_a_stop_saves_once_and_resumes_bit_for_bit_on_one_process_too(tmp_path):
    whole = classifier(tmp_path / "whole")
    list(whole[0])
    loop, _ = classifier(tmp_path / "cut", stop=(0, 3))
    assert [progressed.step for progressed in loop] == [1, 2, 3]
    again = classifier(tmp_path / "cut")
    assert again[0].step == 3
    list(again[0])
    assert torch.equal(whole[1].weight, again[1].weight)


def spoilt(rank, size):
    folder = shared_folder(rank)
    loop, _ = classifier(folder, spoil=(1, 7), rank=rank)
    try:
        list(loop)
    except NonFiniteError as error:
        return str(error)


def test_what_is_no_number_on_one_rank_stops_all_at_its_step(ranks):
    first, second = ranks(spoilt, 2)
    assert first == second and "step 6 " in first and "step-000000005.pt" in first


def refused(rank, size):
    folder, said = shared_folder(rank), []
    if size == 2:
        for config in (replace(CLASSIFIER, batch_size=5), replace(CLASSIFIER, batch_size=6, accumulate=2)):
            try:
                classifier(folder, config=config, rank=rank)
            except ValueError as error:
                said.append(str(error))
        if rank == 0:  # not whole on rank 0: refused on all
            (Path(folder) / "checkpoints").mkdir()
            (Path(folder) / "checkpoints" / "step-000000001.pt").write_bytes(b"torn")
        try:
            classifier(folder, rank=rank)
        except checkpoints.CheckpointError as error:
            said.append(str(error))
    return said


def test_batches_without_equal_pieces_and_torn_runs_are_refused_on_every_rank(ranks):
    for uneven, pieces, torn in ranks(refused, 2):
        assert "batch_size=5" in uneven and "2 ranks: take a multiple of 2" in uneven
        assert "batch_size=6" in pieces and "take a multiple of 4" in pieces
        assert "none of the 1 checkpoints" in torn


def test_the_plan_is_cheap_may_be_read_ahead_and_left_early(tmp_path):
    """Read a whole batch ahead by whoever loads, and dropped when the caller leaves: the next loop goes on exactly."""
    ends, plans = [], []
    for name, leave in (("whole", None), ("cut", 7)):
        def ahead(plan):
            plans.append([])
            waiting = []
            for step, indices in plan:
                plans[-1].append(step)
                waiting.append(indices)
                if len(waiting) > 3:
                    yield waiting.pop(0)
            yield from waiting

        for attempt in range(2 if leave else 1):
            torch.manual_seed(0)
            model, x = nn.Linear(3, 1), torch.randn(40, 3)
            loop = Loop(lambda i, g: {"loss": model(x[i]).square().mean()}, {"model": model}, 40, replace(CLASSIFIER, accumulate=2),
                        OptimConfig(), tmp_path / name, batches=ahead, progress=False)
            for progressed in loop:
                if progressed.step == leave and attempt == 0:
                    break
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)
    assert plans[0] == sorted([*range(20)] * 2) and plans[2] == sorted([*range(5, 20)] * 2)  # the last checkpoint is of step 5
