"""Losses of the methods, and their gradients, are those of plain versions in float64."""

import pytest
import torch
from torch.nn.functional import normalize

from imsvd_core.methods import MoCo, SimCLR, SimSiam
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


@pytest.mark.parametrize(
    ("config", "plain", "tables"),
    [
        (SimCLR(temperature=0.3), simclr, 2),
        (MoCo(queue=20, temperature=0.3), moco, 4),
        (SimSiam(predictor_hidden=4), simsiam, 4),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_value_and_gradient_are_those_of_a_plain_version(config, plain, tables):
    torch.manual_seed(0)
    method = config.build(NETWORK).double()
    z = torch.randn(tables, 10, 6, dtype=torch.float64)
    values, gradients = [], []
    for loss in (lambda *tables: method.loss(*tables)["loss"], lambda *z: plain(method, *z)):
        torch.manual_seed(1)
        leaves = [table.clone().requires_grad_() for table in z]
        values.append(loss(*leaves))
        values[-1].backward()
        gradients.append(torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)
    assert len(gradients[0]) == 2  # of the two views; what is a target has none
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (SimCLR, {"temperature": 0.0}),
        (MoCo, {"queue": 0}),
        (MoCo, {"temperature": -1.0}),
        (MoCo, {"momentum": 1.5}),
        (SimSiam, {"predictor_hidden": 0}),
    ],
)
def test_impossible_settings_are_refused(config, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        config(**setting)


def test_a_queue_shorter_than_a_step_is_refused():
    with pytest.raises(ValueError, match="queue=7 is too short for the 8 keys"):
        MoCo(queue=7).build(NETWORK).loss(*torch.randn(4, 4, 6))


def test_new_keys_replace_the_oldest():
    method = MoCo(queue=10).build(NETWORK)
    tables = torch.randn(3, 4, 3, 6)
    for step, queries_and_keys in enumerate(tables):
        method.loss(*queries_and_keys)
        method.after_step((step + 1) / 3)
    keys = tables[:, 2:].reshape(18, 6)
    torch.testing.assert_close(method.queue, torch.cat([keys[10:], keys[8:10]]))
