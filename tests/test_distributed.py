"""On W ranks the loss is that of the joined batch."""

import functools
import os
import time

import pytest
import torch
import torch.distributed as dist

from imsvd_core.distributed import mean_over_ranks, on_rank_0, rank_0_first, world
from imsvd_core.loss import CrossJointEntropyLoss
from imsvd_core.system import ranks
from imsvd_core.system.ranks import first_to_say, process_group


def logits(samples=24, dim=21, scale=2.0):
    return scale * torch.randn(2, samples, dim, generator=torch.Generator().manual_seed(0))


SETTINGS = dict(
    units=(5, 3, 4, 2, 7),
    diagonal_weight=0.7,
    off_diagonal_weight=1.3,
    invariance_weight=0.4,
    temperature=0.8,
)


def share(rank, size):
    z1, z2 = (z.chunk(size)[rank].clone().requires_grad_() for z in logits())
    terms = CrossJointEntropyLoss(**SETTINGS, gather_distributed=True)(z1, z2)
    terms.total.backward()
    return torch.stack(terms).detach(), z1.grad, z2.grad


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_value_and_gradient_are_those_of_the_joined_batch(ranks, size):
    z1, z2 = (z.requires_grad_() for z in logits())
    terms = CrossJointEntropyLoss(**SETTINGS)(z1, z2)
    terms.total.backward()
    results = ranks(share, size)
    for values, _, _ in results:
        assert torch.allclose(values, torch.stack(terms), rtol=1e-6, atol=1e-6)
    for view, z in enumerate((z1, z2), start=1):
        averaged = (
            torch.cat([result[view] for result in results]) / size
        )  # what DDP's mean makes of it
        assert (averaged - z.grad).norm() < 1e-6 * z.grad.norm()


def test_terms_need_no_gradient(ranks):
    z1, z2 = logits()
    alone = torch.stack(CrossJointEntropyLoss(**SETTINGS)(z1, z2))
    for values in ranks(value_alone, 2):
        assert torch.allclose(values, alone, rtol=1e-6, atol=1e-6)


def value_alone(rank, size):
    with torch.no_grad():
        return torch.stack(
            CrossJointEntropyLoss(**SETTINGS, gather_distributed=True)(
                *(z.chunk(size)[rank] for z in logits())
            )
        )


def under_ddp(rank, size):
    """Two steps of SGD of a linear layer, its gradients averaged by DDP."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 21, bias=False)
    model = torch.nn.parallel.DistributedDataParallel(layer) if size > 1 else layer
    loss = CrossJointEntropyLoss(**SETTINGS, gather_distributed=size > 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=20.0)
    x1, x2 = (x.chunk(size)[rank] for x in logits(dim=6))
    for _ in range(2):
        optimizer.zero_grad()
        loss(*model(torch.cat([x1, x2])).chunk(2)).total.backward()
        optimizer.step()
    return layer.weight.detach()


def test_training_under_ddp_is_training_on_the_joined_batch(ranks):
    """A factor of the world size, either way, would be seen at once at this learning rate."""
    start = torch.nn.Linear(6, 21, bias=False)
    alone = under_ddp(0, 1)
    torch.manual_seed(0)
    torch.nn.init.kaiming_uniform_(start.weight, a=5**0.5)
    for weights in ranks(under_ddp, 2):
        assert torch.allclose(weights, alone, atol=1e-5)
        assert (weights - start.weight).abs().max() > 0.1


def unlike(rank, size):
    """What is said where rank 1 differs: in samples, having none, in dimensions, in type, in
    wanting a gradient.
    """
    whole = torch.randn(4, 6, requires_grad=True)
    wide, detached = whole.detach().double().requires_grad_(), whole.detach()
    said = []
    for other in (
        torch.randn(3, 6, requires_grad=True),
        torch.randn(0, 6, requires_grad=True),
        torch.randn(4, 9, requires_grad=True),
        wide,
        detached,
    ):
        z = other if rank else whole
        try:
            CrossJointEntropyLoss(3, gather_distributed=True)(z, z)
        except ValueError as error:
            said.append(str(error))
    return said


def test_tables_that_differ_among_ranks_are_refused_on_every_rank(ranks):
    first, second = ranks(unlike, 2)
    assert first == second
    assert len(first) == 5
    for message, fact in zip(
        first,
        (
            "samples of z1, [4, 3]",
            "samples of z1, [4, 0]",
            "entries of z1, [24, 36]",
            "bytes an entry of z1, [4, 8]",
            "gradient wanted, [1, 0]",
        ),
        strict=True,
    ):
        assert f"the ranks differ in {fact}" in message


def with_one_infinity(rank, size):
    z = [z.chunk(size)[rank].clone() for z in logits()]
    if rank == size - 1:
        z[1][0, 0] = torch.inf
    z = [part.requires_grad_() for part in z]
    terms = CrossJointEntropyLoss(**SETTINGS, gather_distributed=True)(*z)
    return terms.total.detach(), *torch.autograd.grad(terms.total, z)


def test_an_infinite_logit_of_one_rank_is_seen_by_all(ranks):
    for result in ranks(with_one_infinity, 2):
        assert all(tensor.isnan().all() for tensor in result)


def test_outside_a_process_group_gathering_changes_nothing():
    z1, z2 = logits()
    plain, gathered = (
        CrossJointEntropyLoss(**SETTINGS, gather_distributed=flag)(z1, z2).total
        for flag in (False, True)
    )
    assert plain == gathered


@pytest.mark.parametrize(
    "settings",
    [dict(sampled_variables=3), dict(products="bf16"), dict(sampled_variables=2, products="bf16")],
)
def test_drawn_rows_and_bf16_products_are_shared_alike(ranks, settings):
    torch.manual_seed(5)
    terms, alone = some_share(0, 1, settings)
    results = ranks(functools.partial(some_share, settings=settings), 2)
    joined = torch.cat([gradient for _, gradient in results], dim=1) / 2
    tolerance = (
        2e-2 if settings.get("products") else 1e-5
    )  # gradients' tables are rounded in other places
    assert torch.allclose(results[0][0], terms, rtol=1e-4)
    assert torch.equal(results[0][0], results[1][0])
    assert (joined - alone).norm() < tolerance * alone.norm()


def some_share(rank, size, settings):
    torch.manual_seed(5 + rank)  # rank 0's draw counts
    z = [z.chunk(size)[rank].clone().requires_grad_() for z in logits()]
    terms = CrossJointEntropyLoss(**SETTINGS, **settings, gather_distributed=size > 1)(*z)
    return torch.stack(terms).detach(), torch.stack(torch.autograd.grad(terms.total, z))


def by_rank_0(rank, size):
    told, done = [], []

    @on_rank_0
    def work(number):
        done.append(number)
        if number < 0:
            raise KeyError("below zero")
        return {"rank": rank, "number": number}

    told.append(work(3))
    try:
        work(-1)
    except KeyError as error:
        told.append(str(error))
    return (
        told,
        done,
        first_to_say("the same"),
        first_to_say(f"from rank {rank}"),
        mean_over_ranks(torch.tensor([1.0 + rank])).item(),
    )


def test_what_rank_0_returns_or_raises_comes_to_all_and_one_reports(ranks):
    first, second = ranks(by_rank_0, 2)
    assert first[0] == second[0] == [{"rank": 0, "number": 3}, "'below zero'"]
    assert (first[1], second[1]) == ([3, -1], [])
    assert sorted([first[2], second[2]]) == [False, True]
    assert first[3]
    assert second[3]
    assert first[4] == second[4] == 1.5


def in_turn(rank, size):
    rank_0_first(lambda: (time.sleep(0.3 * (rank == 0)), times.append(time.monotonic())))
    return times[0]


times = []


def test_rank_0_goes_first(ranks):
    first, second = ranks(in_turn, 2)
    assert first < second


def test_a_process_alone_joins_no_group_and_torchrun_with_one_a_group_of_one(
    monkeypatch, free_port
):
    with process_group():
        assert not dist.is_initialized()
    for name, value in {
        "WORLD_SIZE": 1,
        "RANK": 0,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }.items():
        monkeypatch.setenv(name, str(value))
    with process_group("cpu"):
        assert dist.is_initialized()
        assert dist.get_backend() == "gloo"
        assert world() == (0, 1)
    assert not dist.is_initialized()


@pytest.fixture
def slurm(monkeypatch):
    """The environment of the second of two tasks, one on each node of Slurm's job 7."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = {
        "SLURM_JOB_ID": 7,
        "SLURM_STEP_ID": 0,
        "SLURM_JOB_NODELIST": "localhost,elsewhere",
        "SLURM_STEP_NUM_TASKS": 2,
        "SLURM_NTASKS": 2,
        "SLURM_JOB_NUM_NODES": 2,
        "SLURM_PROCID": 1,
        "SLURM_LOCALID": 0,
        "SLURM_NODEID": 1,
    }
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, str(value))
        yield patch


def meeting_point(patch, **environment):
    """Where the job's ranks would meet."""
    names = (
        "SUBMITIT_EXECUTOR",
        "MASTER_ADDR",
        "MASTER_PORT",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
    )
    with patch.context() as inner:
        for name, value in environment.items():
            inner.setenv(name, value)
        for name in names:
            inner.setenv(name, "")
            inner.delenv(name)
        ranks._find_ranks_of_job()
        return [os.environ[name] for name in names[1:]]


def test_the_ranks_of_a_job_meet_where_no_other_attempt_does(slurm):
    first = meeting_point(slurm)
    assert first[:1] + first[2:] == ["localhost", "1", "2", "0", "1"]
    assert meeting_point(slurm) == first
    others = [
        meeting_point(slurm, SLURM_RESTART_COUNT="1"),
        meeting_point(slurm, SLURM_STEP_ID="1"),
        meeting_point(slurm, SLURM_JOB_ID="8"),
    ]
    ports = {int(point[1]) for point in (first, *others)}
    assert len(ports) == 4
    assert all(15_000 <= port < 30_000 for port in ports)
    assert meeting_point(slurm, SLURM_RESTART_COUNT="1")[1] == others[0][1]


def test_a_first_node_that_has_no_address_here_is_named_at_once(slurm):
    with pytest.raises(
        ValueError, match=r"MASTER_ADDR='nowhere\.invalid', the job's first node, has no address on"
    ):
        meeting_point(slurm, SLURM_JOB_NODELIST="nowhere.invalid,localhost")


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(ValueError, match="LOCAL_RANK=1 has no GPU of its own among 1"),
        process_group(),
    ):
        pass


def over_nccl(rank, size):
    z = [z.chunk(size)[rank].cuda().requires_grad_() for z in logits()]
    terms = CrossJointEntropyLoss(**SETTINGS, gather_distributed=True)(*z)
    return torch.stack(terms).detach().cpu(), *(
        g.cpu() for g in torch.autograd.grad(terms.total, z)
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_gpus_over_nccl_give_the_loss_of_the_joined_batch(ranks):
    z = [z.requires_grad_() for z in logits()]
    terms = CrossJointEntropyLoss(**SETTINGS)(*z)
    results = ranks(over_nccl, 2, backend="nccl")
    for view, truth in enumerate(torch.autograd.grad(terms.total, z), start=1):
        joined = torch.cat([result[view] for result in results]) / 2
        assert (joined - truth).norm() < 1e-5 * truth.norm()
    torch.testing.assert_close(results[0][0], torch.stack(terms), rtol=1e-5, atol=1e-5)
