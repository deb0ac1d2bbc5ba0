"""One batch in pieces and on ranks has the gradient of the batch as a whole."""

import itertools
import tempfile
from dataclasses import replace

import pytest
import torch
from torch import nn

from imsvd_core.engine.gradients import Gradients
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.engine.trainer import Loop, LoopConfig
from imsvd_core.methods import IMSVD, BarlowTwins, VICReg

METHODS = [IMSVD(units=4, temperature=0.5), VICReg(), BarlowTwins()]
CONFIG = LoopConfig(epochs=3, batch_size=16, precision="fp32", log_every=1, device="cpu")
SAMPLES = 32


def train(run_dir, method, accumulate=1, config=CONFIG, norm=False, noise=0.1, draws=None):
    """A small twin network on two noisy views, all noise the sample's own: trained parameters, and the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12) if norm else nn.Tanh(), nn.Linear(12, 8)
    )
    x = torch.randn(SAMPLES, 6)
    views = x + noise * torch.randn(2, SAMPLES, 6)

    def step(indices, generator):
        if draws is not None:
            draws.append((torch.rand(1, generator=generator).item(), torch.rand(1).item()))
        return model(views[0, indices]), model(views[1, indices])

    loop = Loop(
        step,
        {"model": model},
        SAMPLES,
        replace(config, accumulate=accumulate),
        OptimConfig(name="sgd", lr=0.05, warmup_epochs=0),
        run_dir,
        objective=method.build(8),
        progress=False,
    )
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
    assert state["1.num_batches_tracked"] == 2 * 6  # views, steps


@pytest.mark.parametrize("joint", [True, False])
def test_running_statistics_forget_as_much_over_pieces_as_over_the_whole_batch(joint):
    norms = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model, piece = (
            nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 8)),
            torch.randn(8, 6),
        )
        model[1].running_mean.fill_(1000)
        gradients = Gradients(
            lambda x, g: (model(x), model(-x)) if joint else {"loss": model(x).square().mean()},
            METHODS[0].build(8) if joint else None,
            [model],
            torch.device("cpu"),
            torch.amp.GradScaler("cpu", enabled=False),
            None,
            accumulate,
        )
        gradients(
            piece.repeat(4, 1).chunk(accumulate), 0
        )  # every piece has the statistics of the whole
        norms.append(model[1])
    whole, pieces = norms
    assert whole.running_mean.mean() < 910 and pieces.momentum == whole.momentum == 0.1
    torch.testing.assert_close(
        pieces.running_mean, whole.running_mean, rtol=1e-6, atol=0.3 if joint else 1e-3
    )  # views take turns
    assert pieces.num_batches_tracked == whole.num_batches_tracked


def test_both_passes_draw_alike(tmp_path):
    draws = []
    train(tmp_path, METHODS[0], accumulate=4, draws=draws)
    for step in range(6):
        first, again = draws[8 * step : 8 * step + 4], draws[8 * step + 4 : 8 * step + 8]
        assert first == again and len(set(first)) == 4


def test_fp16_scales_the_loss_of_the_whole(tmp_path):
    """The embeddings' gradients are float16: unscaled, they would lose what lies under 6e-8."""
    ends = [
        train(
            tmp_path / str(accumulate),
            VICReg(1e-4, 1e-4, 1e-4),
            accumulate,
            replace(CONFIG, precision="fp16"),
        )[0]
        for accumulate in (1, 4)
    ]
    start, _ = train(tmp_path / "start", VICReg(0, 0, 0))
    moved, alike = (
        (ends[0]["0.weight"] - start["0.weight"]).norm(),
        (ends[0]["0.weight"] - ends[1]["0.weight"]).norm(),
    )
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
        return [
            train(f"{folder}/{method.name}-{accumulate}", method, accumulate)
            for method, accumulate in itertools.product(METHODS, (1, 2))
        ]


def test_ranks_train_as_one_process(ranks):
    alone, (first, second) = trained(0, 1), ranks(trained, 2)
    for (state, losses), (state_1, losses_1), (state_2, _) in zip(
        alone, first, second, strict=True
    ):
        torch.testing.assert_close(losses_1, losses, rtol=1e-5, atol=1e-5)
        for name in state:
            assert torch.equal(state_1[name], state_2[name])
            torch.testing.assert_close(state_1[name], state[name], rtol=1e-5, atol=1e-6)
