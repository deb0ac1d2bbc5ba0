"""BYOL: a squared distance of unit vectors, and a target that follows without a gradient."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from imsvd_core.data.batch import Batch
from imsvd_core.methods import BYOL
from imsvd_core.networks import NetworkConfig

NETWORK = NetworkConfig(hidden=(8,), dim=4)


def batch():
    views = torch.randn(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(tuple(views), torch.zeros(6, dtype=torch.int64), torch.arange(6))


def test_the_loss_is_the_squared_distance_of_unit_vectors_in_both_directions():
    tables = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(1)).double()
    p1, p2, t1, t2 = normalize(tables, dim=2)
    distance = (p1 - t2).square().sum(1).mean() + (p2 - t1).square().sum(1).mean()
    loss = BYOL().build(NETWORK).loss(*(3 * tables))["loss"]
    torch.testing.assert_close(loss.double(), distance, rtol=1e-6, atol=1e-6)


def test_the_gradient_reaches_network_and_predictor_and_not_the_target():
    method = BYOL(predictor_hidden=8).build(NETWORK)
    method.loss(*method.embed(batch()))["loss"].backward()
    trained = {name for name, weight in method.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in method.named_parameters() if "target" not in name}


def test_the_target_starts_as_the_network_and_follows_by_a_momentum_that_rises_to_one():
    method = BYOL(momentum=0.9, predictor_hidden=8).build(NETWORK)
    fast, slow = method.network.projector[0].weight, method.target.projector[0].weight
    start = slow.clone()
    assert torch.equal(fast, start)
    with torch.no_grad():
        fast += 1
    for progress in (0.25, 1.0):
        momentum = 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
        expected = momentum * slow + (1 - momentum) * fast
        method.after_step(progress)
        torch.testing.assert_close(slow, expected)
    assert momentum == 1


@pytest.mark.parametrize("setting", [{"momentum": 1.1}, {"predictor_hidden": 0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        BYOL(**setting)
