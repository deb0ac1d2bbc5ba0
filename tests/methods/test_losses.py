"""Losses of the methods, and their gradients, are those of plain versions in float64."""

import pytest
import torch
from torch.nn.functional import normalize

from imsvd_core.data.batch import Batch
from imsvd_core.methods import (
    DISSL,
    IIC,
    MMCR,
    NPID,
    SEM,
    TWIST,
    WMSE,
    CorInfoMax,
    FroSSL,
    LeJEPA,
    MoCo,
    SimCLR,
    SimSiam,
    Supervised,
)
from imsvd_core.methods.iic import IICLoss
from imsvd_core.networks import NetworkConfig

NETWORK = NetworkConfig(hidden=(8,), dim=6)


def simclr(method, z1, z2):
    """Sample by sample, as the paper writes it."""
    z, n = normalize(torch.cat([z1, z2]), dim=1), len(z1)
    losses = []
    for i in range(2 * n):
        similar = [(z[i] @ z[k] / 0.3).exp() for k in range(2 * n) if k != i]
        losses.append(-((z[i] @ z[(i + n) % (2 * n)] / 0.3).exp() / sum(similar)).log())
    return sum(losses) / len(losses)


def moco(method, q1, q2, k1, k2):
    losses = []
    for queries, keys in ((q1, k2), (q2, k1)):
        for q, k in zip(queries, keys.detach(), strict=True):
            others = sum((q @ old / 0.3).exp() for old in method.queue)
            same = (q @ k / 0.3).exp()
            losses.append(-(same / (same + others)).log())
    return sum(losses) / len(losses)


def simsiam(method, p1, p2, z1, z2):
    p1, p2, z1, z2 = (z / z.square().sum(1, keepdim=True).sqrt() for z in (p1, p2, z1, z2))
    return -((p1 * z2.detach()).sum(1) + (p2 * z1.detach()).sum(1)).mean() / 2


def iic(method, z1, z2):
    information = 0
    for v in (0, 3):
        p1, p2 = ((z[:, v : v + 3] / 0.5).softmax(1) for z in (z1, z2))
        table = sum(torch.outer(a, b) for a, b in zip(p1, p2, strict=True)) / len(p1)
        table = (table + table.T) / 2
        independent = torch.outer(table.sum(1), table.sum(0))
        information = information + (table * (table / independent).log()).sum()
    return -information / 2


def byol(method, p1, p2, t1, t2):
    p1, p2, t1, t2 = (normalize(z, dim=1) for z in (p1, p2, t1.detach(), t2.detach()))
    return (p1 - t2).square().sum(1).mean() + (p2 - t1).square().sum(1).mean()


def frossl(method, z1, z2):
    views = [z / z.square().sum(0).sqrt() for z in (z1, z2)]
    mean, loss = (views[0] + views[1]) / 2, 0
    for z in views:
        spectrum = torch.linalg.eigvalsh(z.T @ z)
        loss = loss + (spectrum / spectrum.sum()).square().sum().log()
        loss = loss + 1.4 * 2 * (z - mean).square().sum() / len(z)
    return loss


def mmcr(method, z1, z2):
    z1, z2 = normalize(z1, dim=1), normalize(z2, dim=1)
    mean, cosine = (z1 + z2) / 2, (z1 * z2).sum(1)
    nuclear = torch.linalg.eigvalsh(mean.T @ mean).sqrt().sum()
    return -nuclear + 0.3 * ((1 + cosine).sqrt() + (1 - cosine).sqrt()).mean()


def lejepa(method, z1, z2):
    directions = normalize(torch.randn(6, 5, dtype=torch.float64), dim=0)
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    normal = (-t.square() / 2).exp()
    statistics = []
    for z in (z1, z2):
        characteristic = (1j * (z @ directions)[..., None] * t).exp().mean(0)
        distance = (characteristic - normal).abs().square() * normal
        statistics.append(len(z) * torch.trapezoid(distance, t).mean())
    return 0.2 * sum(statistics) / 2 + 0.8 * ((z1 - z2) / 2).square().mean()


def twist(method, z1, z2):
    p1, p2 = (
        ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()).softmax(1) for z in (z1, z2)
    )
    loss = 0
    for p, q in ((p1, p2), (p2, p1)):
        loss = loss + (p * (p / q).log()).sum(1).mean() - 0.5 * (p * p.log()).sum(1).mean()
        loss = loss + 2 * (p.mean(0) * p.mean(0).log()).sum()
    return loss / 2


def corinfomax(method, z1, z2):
    loss = 250 * (normalize(z1, dim=1) - normalize(z2, dim=1)).square().mean()
    for z in (normalize(z1, dim=1), normalize(z2, dim=1)):
        z = z - 0.99 * z.mean(0)
        covariance = 0.01 * torch.eye(6) + 0.99 * z.T @ z / len(z) + 1e-8 * torch.eye(6)
        loss = loss - torch.linalg.eigvalsh(covariance).log().sum() / 6
    return loss


def dissl(method, t1, t2, s1, s2):
    loss = 0
    for own, other, student in ((t1, t2, s2), (t2, t1, s1)):
        p, q, told = ((z / tau).softmax(1) for z, tau in ((own, 0.3), (other, 0.3), (student, 0.6)))
        loss = loss - (p * told.log()).sum(1).mean() - 0.8 * (p * q.log()).sum(1).mean()
        loss = loss + 2.3 * (p.mean(0) * p.mean(0).log()).sum()
    return loss / 2


def wmse(method, z1, z2):
    order, white = torch.randperm(24), []
    for z in (z1, z2):
        for rows in order.chunk(2):
            part = z[rows] - z[rows].mean(0)
            factor = torch.linalg.cholesky(torch.cov(part.T))
            white.append(normalize(part @ torch.linalg.inv(factor).T, dim=1))
    return (torch.cat(white[:2]) - torch.cat(white[2:])).square().sum(1).mean()


@pytest.mark.parametrize(
    ("config", "plain", "tables"),
    [
        (SimCLR(temperature=0.3), simclr, 2),
        (MoCo(queue=20, temperature=0.3), moco, 4),
        (SimSiam(predictor_hidden=4), simsiam, 4),
        (IIC(units=3, temperature=0.5), iic, 2),
        (SEM(units=3, projector=(4, 6), predictor_hidden=4), byol, 4),
        (FroSSL(), frossl, 2),
        (MMCR(local_weight=0.3), mmcr, 2),
        (LeJEPA(normality_weight=0.2, slices=5), lejepa, 2),
        (TWIST(sharpness_weight=0.5, diversity_weight=2.0), twist, 2),
        (CorInfoMax(), corinfomax, 2),
        (WMSE(whitened=12), wmse, 2),
        (DISSL(temperature=0.6), dissl, 4),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_value_and_gradient_are_those_of_a_plain_version(config, plain, tables):
    torch.manual_seed(0)
    method = config.build(NETWORK).double()
    z = torch.randn(tables, 24 if plain is wmse else 10, 6, dtype=torch.float64)
    values, gradients = [], []
    for loss in (lambda *tables: method.loss(*tables)["loss"], lambda *z: plain(method, *z)):
        torch.manual_seed(1)
        leaves = [table.clone().requires_grad_() for table in z]
        values.append(loss(*leaves))
        values[-1].backward()
        gradients.append(torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)
    # what is a target has none; DISSL's teacher is taught
    assert len(gradients[0]) == (4 if plain is dissl else 2)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (SimCLR, {"temperature": 0.0}),
        (MoCo, {"queue": 0}),
        (MoCo, {"temperature": -1.0}),
        (MoCo, {"momentum": 1.5}),
        (SimSiam, {"predictor_hidden": 0}),
        (IIC, {"temperature": 0.0}),
        (IIC, {"entropy_weight": -1.0}),
        (SEM, {"temperature": 0.0}),
        (SEM, {"momentum": 1.5}),
        (SEM, {"projector": (0, 4)}),
        (FroSSL, {"invariance_weight": -1.0}),
        (MMCR, {"local_weight": -1.0}),
        (LeJEPA, {"normality_weight": 1.5}),
        (LeJEPA, {"slices": 0}),
        (TWIST, {"diversity_weight": -1.0}),
        (CorInfoMax, {"memory": 1.5}),
        (NPID, {"samples": 0}),
        (DISSL, {"temperature": 0.0}),
        (DISSL, {"diversity_weight": -1.0}),
        (NPID, {"memory": -0.5}),
        (CorInfoMax, {"epsilon": 0.0}),
    ],
)
def test_impossible_settings_are_refused(config, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        config(**setting)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (IIC(units=4), "units=4 does not divide"),
        (SEM(units=4), "units=4 does not divide"),
        (WMSE(whitened=11), "whitened=11 samples cannot whiten dim=6"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        config.check(NETWORK)


def test_a_batch_that_cannot_be_cut_for_whitening_is_refused():
    with pytest.raises(ValueError, match="whitened=12 does not divide the batch of 18"):
        WMSE(whitened=12).build(NETWORK).loss(*torch.randn(2, 18, 6))


def test_units_may_differ_among_the_variables_of_iic():
    z1, z2 = torch.randn(2, 8, 6, requires_grad=True)
    loss = IICLoss((4, 2), 1.0, 1.0)(z1, z2)
    parts = (
        IICLoss(units, 1.0, 1.0)(z1[:, columns], z2[:, columns])
        for units, columns in ((4, slice(4)), (2, slice(4, 6)))
    )
    torch.testing.assert_close(loss, sum(parts) / 2)
    assert torch.autograd.grad(loss, z1)[0].isfinite().all()


def test_information_of_hard_codes_is_that_of_their_labels_and_has_a_slope():
    z = 1e4 * torch.eye(3).repeat(4, 2).requires_grad_()
    loss = IIC(units=3).build(NETWORK).loss(z, z)["loss"]
    torch.testing.assert_close(loss, -torch.tensor(3.0).log())
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_sem_predicts_from_soft_codes():
    method = SEM(units=3, temperature=0.5, projector=(4, 5)).build(NETWORK).eval()
    inner, norm, _, head = method.network.projector
    x = torch.randn(4, method.backbone.features)
    codes = (norm(inner(x)).view(4, 2, 3) / 0.5).softmax(2).view(4, 6)
    torch.testing.assert_close(method.network.projector(x), head(codes))
    assert head(codes).shape == (4, 5)
    names = dict(method.target.named_parameters())
    assert names.keys() == dict(method.network.named_parameters()).keys()
    assert not any(weight.requires_grad for weight in names.values())


def test_corinfomax_remembers_a_share_of_what_was_before():
    method = CorInfoMax(memory=0.25).build(NETWORK)
    z = torch.randn(2, 2, 10, 6)
    mean, covariance = torch.zeros(2, 6), torch.eye(6).repeat(2, 1, 1)
    for step, views in enumerate(z):
        method.loss(*views)
        method.after_step((step + 1) / 2)
        views = normalize(views, dim=2)
        mean = 0.25 * mean + 0.75 * views.mean(1)
        centred = views - mean[:, None]
        covariance = 0.25 * covariance + 0.75 * centred.mT @ centred / 10
    torch.testing.assert_close(method.means.float(), mean)
    torch.testing.assert_close(method.covariances.float(), covariance)


def test_npid_tells_every_image_from_the_whole_bank():
    method = NPID(samples=20, temperature=0.3).build(NETWORK).double()
    z, places = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.arange(3, 8)
    similar = (z @ method.bank.T / 0.3).exp()
    plain = -(similar[range(5), places] / similar.sum(1)).log().mean()
    loss = method.loss(z, places)["loss"]
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    slopes = (torch.autograd.grad(value, z)[0] for value in (loss, plain))
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-6)


def test_an_image_s_entry_moves_towards_its_embedding_and_no_other_does():
    method = NPID(samples=4, memory=0.25).build(NETWORK)
    before, z = method.bank.clone(), normalize(torch.randn(2, 6), dim=1)
    method.loss(z[:1], torch.tensor([3]))
    method.loss(z[1:], torch.tensor([1]))
    method.after_step(1.0)
    for place, embedding in ((3, z[0]), (1, z[1])):
        before[place] = normalize(0.25 * before[place] + 0.75 * embedding, dim=0)
    torch.testing.assert_close(method.bank, before)


def test_an_image_beyond_the_bank_is_refused():
    batch = Batch((torch.randn(2, 3, 8, 8),), torch.zeros(2), torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="samples=4 entries are too few for image 4"):
        NPID(samples=4).build(NETWORK).embed(batch)


def test_the_gradient_of_dissl_reaches_teacher_and_student():
    method = DISSL().build(NETWORK)
    images = torch.randn(2, 4, 3, 8, 8)
    method.loss(*method(Batch(tuple(images), torch.zeros(4), torch.arange(4))))["loss"].backward()
    assert all(weight.grad is not None for weight in method.parameters())


def test_supervised_is_the_cross_entropy_of_both_views():
    z, labels = torch.randn(2, 10, 6, dtype=torch.float64), torch.arange(10) % 6
    loss = Supervised().build(NETWORK).loss(*z, labels)["loss"]
    chances = z.softmax(2)[:, torch.arange(10), labels]
    torch.testing.assert_close(loss, -chances.log().mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("label", [-1, 6])
def test_labels_that_do_not_fit_the_classifier_are_refused(label):
    batch = Batch(tuple(torch.randn(2, 2, 3, 8, 8)), torch.tensor([0, label]), torch.arange(2))
    with pytest.raises(ValueError, match="do not fit dim=6"):
        Supervised().build(NETWORK).embed(batch)


def test_a_queue_shorter_than_a_step_is_refused():
    with pytest.raises(ValueError, match="queue=7 is too short for the 8 keys"):
        MoCo(queue=7).build(NETWORK).loss(*torch.randn(4, 4, 6))


def test_the_network_of_keys_is_not_trained_and_follows_by_one_momentum():
    method = MoCo(queue=10, momentum=0.75).build(NETWORK)
    assert not any(weight.requires_grad for weight in method.target.parameters())
    fast, slow = (twin.projector[0].weight for twin in (method.network, method.target))
    with torch.no_grad():
        fast += 1
    for progress in (0.5, 1.0):
        expected = 0.75 * slow + 0.25 * fast
        method.after_step(progress)
        torch.testing.assert_close(slow, expected)


def test_new_keys_replace_the_oldest():
    method = MoCo(queue=10).build(NETWORK)
    tables = torch.randn(3, 4, 3, 6)
    for step, queries_and_keys in enumerate(tables):
        method.loss(*queries_and_keys)
        method.after_step((step + 1) / 3)
    keys = tables[:, 2:].reshape(18, 6)
    torch.testing.assert_close(method.queue, torch.cat([keys[10:], keys[8:10]]))
