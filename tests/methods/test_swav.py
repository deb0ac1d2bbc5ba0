"""SwAV: each view predicts the balanced clusters of the large ones."""

import pytest
import torch
from torch.nn.functional import log_softmax, normalize

from imsvd_core.data.batch import Batch
from imsvd_core.methods import SwAV
from imsvd_core.networks import NetworkConfig

NETWORK = NetworkConfig(hidden=(8,), dim=4)


def balanced(scores, rounds, epsilon=0.05):
    """Rows and columns of exp(scores / ε) scaled in turn, so that every prototype gets as much."""
    plan = (scores / epsilon).exp()
    for _ in range(rounds):
        plan = plan / plan.sum(0)
        plan = plan / plan.sum(1, keepdim=True)
    return plan


def test_the_loss_is_the_cross_entropy_of_swapped_clusters_over_large_and_small_views():
    scores = torch.randn(4, 10, 5, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    wide = scores.double()
    expected = 0
    for large in (0, 1):
        clusters = balanced(wide[large], rounds=3)
        for view in {0, 1, 2, 3} - {large}:
            log_share = log_softmax(wide[view] / 0.1, 1)
            expected = expected - (clusters * log_share).sum(1).mean() / 3 / 2
    loss = SwAV(prototypes=5).build(NETWORK).loss(*scores)["loss"]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_of_views_of_any_size_are_cosines_to_the_prototypes():
    method = SwAV(prototypes=5).build(NETWORK).eval()
    large, small = torch.randn(2, 6, 3, 32, 32), torch.randn(2, 6, 3, 16, 16)
    batch = Batch((*large, *small), torch.zeros(6), torch.arange(6))
    tables = method.embed(batch)
    assert [table.shape for table in tables] == [(6, 5)] * 4
    z = normalize(method.network.embed(small[1]), dim=1)
    torch.testing.assert_close(tables[3], z @ method.prototypes.weight.T)


def test_prototypes_have_unit_length_after_every_step():
    method = SwAV(prototypes=5).build(NETWORK)
    for factor in (1, 3):
        with torch.no_grad():
            method.prototypes.weight *= factor
        method.after_step(0.5)
        torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    "setting",
    [{"prototypes": 0}, {"temperature": 0.0}, {"epsilon": 0.0}, {"sinkhorn_iterations": 0}],
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SwAV(**setting)
