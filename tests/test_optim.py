"""The schedule and the groups of the optimizer."""

import pytest
from torch import nn

from imsvd_core.optim import OptimConfig, build_optimizer, learning_rate


@pytest.mark.parametrize("epochs, warmup", [(1, 10), (3, 0), (3, 0.5), (100, 10), (1, 1), (2, 1.99)])
def test_the_rate_rises_to_its_peak_then_falls_to_its_floor_for_any_warmup_and_length(epochs, warmup):
    config = OptimConfig(lr=0.4, warmup_epochs=warmup, final_lr_fraction=0.01)
    per_epoch = 20
    rates = [learning_rate(config, step, epochs * per_epoch, per_epoch) for step in range(epochs * per_epoch)]
    top = min(round(warmup * per_epoch), len(rates))
    assert rates[max(top - 1, 0)] == pytest.approx(0.4)
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    if len(rates) > top + 1:
        assert rates[-1] == pytest.approx(0.004)


def test_milestones_drop_tenfold():
    config = OptimConfig(lr=30, warmup_epochs=0, milestones=(60, 80))
    assert [learning_rate(config, epoch * 10, 1000, 10) for epoch in (0, 59, 60, 80)] == pytest.approx([30, 30, 3, 0.3])


def test_biases_and_norms_are_not_decayed():
    optimizer = build_optimizer(OptimConfig(weight_decay=0.1), [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))])
    assert {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]} == {2: 0.1, 1: 0.0}


def test_nothing_to_train_and_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(OptimConfig(), [nn.Linear(2, 2).requires_grad_(False)])
    with pytest.raises(ValueError, match="name='lion'"):
        OptimConfig(name="lion")
    with pytest.raises(ValueError, match="lr=-1"):
        OptimConfig(lr=-1)
