"""One batch in pieces and on ranks has the gradient of the batch as a whole."""

import copy
import io
import itertools
import tempfile
from dataclasses import replace

import pytest
import torch
from torch import nn

from imsvd_core.data.batch import Batch
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.gradients import Gradients
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.engine.trainer import Trainer
from imsvd_core.methods import (
    BYOL,
    DISSL,
    IIC,
    IMSVD,
    MMCR,
    NPID,
    SEM,
    TWIST,
    WMSE,
    BarlowTwins,
    CorInfoMax,
    FroSSL,
    LeJEPA,
    MoCo,
    SimCLR,
    SimSiam,
    Supervised,
    SwAV,
    VICReg,
)
from imsvd_core.methods.base import Method
from imsvd_core.methods.sem import SoftCodes
from imsvd_core.networks import NetworkConfig

NETWORK = NetworkConfig(hidden=(16,), dim=8)
METHODS = [
    IMSVD(units=4, temperature=0.5),
    VICReg(),
    BarlowTwins(),
    BYOL(predictor_hidden=12),
    SwAV(prototypes=6),
    SimCLR(),
    MoCo(queue=40),
    SimSiam(predictor_hidden=12),
    IIC(units=4, temperature=0.1),
    SEM(units=4, projector=(12, 8), predictor_hidden=12),
    FroSSL(),
    MMCR(local_weight=0.1),
    LeJEPA(slices=16),
    TWIST(),
    CorInfoMax(invariance_weight=10),
    WMSE(whitened=16),
    Supervised(),
    NPID(samples=32),
    DISSL(),
]
#: whose loss is of two tables, the samples of all ranks
JOINT = [
    config
    for config in METHODS
    if config.name
    in (
        "imsvd",
        "vicreg",
        "barlow_twins",
        "simclr",
        "iic",
        "frossl",
        "mmcr",
        "lejepa",
        "twist",
        "corinfomax",
        "wmse",
    )
]
CONFIG = LoopConfig(epochs=3, batch_size=16, precision="fp32", log_every=1, device="cpu")
SAMPLES = 32
FIRST = "network.layers.0.weight"


class Features(nn.Module):
    """In place of a backbone and a projector: rows of six numbers → tables of eight columns."""

    def __init__(self, norm, dropout, draws):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 12),
            nn.BatchNorm1d(12) if norm else nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(12, 8),
        )
        self.draws = draws

    @property
    def backbone(self):
        return self.layers[:-1]

    @property
    def projector(self):
        return self.layers[-1]

    def embed(self, x):
        if self.draws is not None:
            self.draws.append(torch.rand(1).item())
        return self.layers(x)

    def forward(self, x1, x2):
        return self.embed(x1), self.embed(x2)


def small(config, norm=False, dropout=0.0, draws=None):
    """A method on a tiny network; without batch-norm its samples are independent."""
    torch.manual_seed(0)
    method = config.build(NETWORK)
    method.network = Features(norm, dropout, draws)
    if isinstance(config, SEM):
        method.network.layers.extend([SoftCodes(4, 1.0), nn.Linear(8, 8)])
    if isinstance(config, DISSL):
        method.student = nn.Linear(12, 8)
    if hasattr(method, "predictor"):
        method.predictor = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    if hasattr(method, "target"):
        method.target = copy.deepcopy(method.network).requires_grad_(False)
    return method


def train(run_dir, method, accumulate=1, config=CONFIG, norm=False, noise=0.1, draws=None):
    """A small method on two noisy views, all noise the sample's own: what it remembers, and the
    losses."""
    module = small(method, norm, draws=draws)
    trainer = Trainer(
        module,
        SAMPLES,
        replace(config, accumulate=accumulate),
        OptimConfig(name="sgd", lr=0.05, warmup_epochs=0),
        run_dir,
        progress=False,
        saves=False,
    )
    x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(3))
    views = x + noise * torch.randn(2, SAMPLES, 6, generator=torch.Generator().manual_seed(4))
    batches = (Batch(tuple(views[:, rows]), rows % 8, rows) for _, rows in trainer.order)
    losses = torch.stack([progressed.metrics["loss"] for progressed in trainer.train(batches)])
    return module.state_dict(), losses


def rounding(method):
    """Of weights after six steps; whitening by few samples magnifies it."""
    return 1e-5 if method.name == "wmse" else 1e-6


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_pieces_train_as_the_whole_batch(tmp_path, method, accumulate):
    whole, losses = train(tmp_path / "whole", method)
    pieces, losses_of_pieces = train(tmp_path / "pieces", method, accumulate)
    exact = {"rtol": 1e-6, "atol": rounding(method)}
    torch.testing.assert_close(losses_of_pieces, losses, **exact)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], **exact)
    start = small(method).state_dict()[FIRST]
    assert (whole[FIRST] - start).abs().max() > 1e-3  # it was trained at all


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.name)
def test_a_method_remembers_in_its_state_all_that_it_goes_on_from(config):
    """Three steps, and three of a new method that has read its state, are six bit by bit."""
    whole, before, after = small(config), small(config), small(config)
    walk(whole, range(6))
    walk(before, range(3))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True))
    walk(after, range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name


def walk(method, steps):
    """Steps of plain gradient descent, all chance from a step's number."""
    for step in steps:
        torch.manual_seed(step)
        batch = Batch(tuple(torch.randn(2, 16, 6)), torch.arange(16) % 8, torch.arange(16))
        method.zero_grad()
        method.loss(*method(batch))["loss"].backward()
        with torch.no_grad():
            for weight in method.parameters():
                if weight.grad is not None:
                    weight -= 0.05 * weight.grad
        method.after_step((step + 1) / 6)


def test_running_statistics_see_every_piece_once(tmp_path):
    """Where the views do not change and the rate is 0, one step more or less of the running mean
    would show."""
    state, _ = train(tmp_path, METHODS[0], accumulate=4, norm=True)
    assert state["network.layers.1.num_batches_tracked"] == 2 * 6  # views, steps


class Pieces(Method):
    """A norm between two maps, under the cross-joint loss of the batch or the mean square of each
    piece."""

    def __init__(self, whole):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 8))
        self.model[1].running_mean.fill_(1000)
        self.whole_batch, self.joint = whole, small(METHODS[0])

    def embed(self, batch):
        (x,) = batch.views
        return (self.model(x), self.model(-x)) if self.whole_batch else (self.model(x),)

    def loss(self, *embeddings):
        if self.whole_batch:
            return self.joint.loss(*embeddings)
        return {"loss": embeddings[0].square().mean()}


@pytest.mark.parametrize("joint", [True, False])
def test_running_statistics_forget_as_much_over_pieces_as_over_the_whole_batch(joint):
    norms = []
    for accumulate in (1, 4):
        method, device = Pieces(joint), torch.device("cpu")
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        gradients = Gradients(method, device, scaler, None, accumulate)
        piece = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        # every piece has the statistics of the whole
        x = piece.repeat(4, 1).chunk(accumulate)
        gradients([Batch((rows,), rows, rows) for rows in x], 0)
        norms.append(method.model[1])
    whole, pieces = norms
    assert whole.running_mean.mean() < 910
    assert pieces.momentum == whole.momentum == 0.1
    atol = 0.3 if joint else 1e-3  # views take turns
    torch.testing.assert_close(pieces.running_mean, whole.running_mean, rtol=1e-6, atol=atol)
    assert pieces.num_batches_tracked == whole.num_batches_tracked


def test_both_passes_draw_alike_and_every_piece_draws_its_own(tmp_path):
    draws = []
    train(tmp_path, METHODS[0], accumulate=4, draws=draws)
    for step in range(6):
        views = draws[16 * step : 16 * step + 16]  # two passes of four pieces of two views
        assert views[:8] == views[8:]
        assert len(set(views[:8])) == 8


def test_dropout_of_two_passes_trains_as_itself(tmp_path):
    """Under other masks the second pass would differ from plain autograd."""
    method = small(METHODS[1], dropout=0.5)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    batch = [Batch((part, part + 0.1), part, part) for part in x.chunk(2)]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    Gradients(method, torch.device("cpu"), scaler, None, 2)(batch, 5)
    gradient = method.network.layers[0].weight.grad.clone()
    method.zero_grad()
    embeddings = []
    for number, piece in enumerate(batch):
        with torch.random.fork_rng([]):
            torch.manual_seed(5 + number)
            embeddings.append(method.embed(piece))
    z1, z2 = (torch.cat(parts) for parts in zip(*embeddings, strict=True))
    method.loss(z1, z2)["loss"].backward()
    torch.testing.assert_close(gradient, method.network.layers[0].weight.grad)


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
        (ends[0][FIRST] - start[FIRST]).norm(),
        (ends[0][FIRST] - ends[1][FIRST]).norm(),
    )
    assert alike < 0.02 * moved


# On ranks


def value_and_gradient(rank, size):
    """Of the methods whose loss joins the ranks, on this rank's share of 32 samples."""
    results = []
    for config in JOINT:
        z = 2 * torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0))
        z1, z2 = (view.chunk(size)[rank].clone().requires_grad_() for view in z)
        method = small(config)
        torch.manual_seed(rank)  # every rank has draws of its own
        loss = method.loss(z1, z2)["loss"]
        loss.backward()
        results.append((loss.detach(), torch.stack([z1.grad, z2.grad])))
    return results


def test_every_method_takes_the_batch_of_all_ranks(ranks):
    """Its mean over ranks, which DDP takes, is the joined batch's gradient: no factor of the world
    size either way."""
    alone = value_and_gradient(0, 1)
    shares = ranks(value_and_gradient, 2)
    for number, (method, (loss, gradient)) in enumerate(zip(JOINT, alone, strict=True)):
        mean = (shares[0][number][0] + shares[1][number][0]) / 2
        torch.testing.assert_close(mean, loss, rtol=1e-6, atol=1e-6, msg=method.name)
        averaged = torch.cat([share[number][1] for share in shares], dim=1) / 2
        torch.testing.assert_close(averaged, gradient, rtol=1e-5, atol=1e-8, msg=method.name)


RUNS = list(itertools.product(METHODS, (1, 2)))


def trained(rank, size):
    with tempfile.TemporaryDirectory() as folder:  # only rank 0 writes to its own
        return [
            train(f"{folder}/{method.name}-{accumulate}", method, accumulate)
            for method, accumulate in RUNS
        ]


def test_ranks_train_as_one_process(ranks):
    alone, (first, second) = trained(0, 1), ranks(trained, 2)
    for (method, _), (state, losses), (state_1, losses_1), (state_2, _) in zip(
        RUNS, alone, first, second, strict=True
    ):
        torch.testing.assert_close(losses_1, losses, rtol=1e-5, atol=1e-5)
        for name in state:
            assert torch.equal(state_1[name], state_2[name])
            torch.testing.assert_close(
                state_1[name], state[name], rtol=1e-5, atol=rounding(method), msg=method.name
            )
