"""The schedule and the groups of the optimizer."""

import io

import pytest
import torch
from torch import nn

from imsvd_core.engine.optim import OptimConfig, build_optimizer, learning_rate


@pytest.mark.parametrize(
    ("epochs", "warmup"), [(1, 10), (3, 0), (3, 0.5), (100, 10), (1, 1), (2, 1.99)]
)
def test_the_rate_rises_to_its_peak_then_falls_to_its_floor_for_any_warmup_and_length(
    epochs, warmup
):
    config = OptimConfig(lr=0.4, warmup_epochs=warmup, final_lr_fraction=0.01)
    per_epoch = 20
    rates = [
        learning_rate(config, step, epochs * per_epoch, per_epoch)
        for step in range(epochs * per_epoch)
    ]
    top = min(round(warmup * per_epoch), len(rates))
    assert rates[max(top - 1, 0)] == pytest.approx(0.4)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    if len(rates) > top + 1:
        assert rates[-1] == pytest.approx(0.004)


def test_milestones_drop_tenfold():
    config = OptimConfig(lr=30, warmup_epochs=0, milestones=(60, 80))
    assert [
        learning_rate(config, epoch * 10, 1000, 10) for epoch in (0, 59, 60, 80)
    ] == pytest.approx([30, 30, 3, 0.3])


def test_biases_and_norms_are_not_decayed():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = build_optimizer(OptimConfig(weight_decay=0.1), network)
    assert {
        p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    } == {2: 0.1, 1: 0.0}


def test_biases_and_norms_are_decayed_where_that_is_asked_for():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = build_optimizer(OptimConfig(weight_decay=0.1, decay_all=True), network)
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], len(group["params"])) == (0.1, 4)


def lars_by_hand(weights, gradients, lr, decay=1e-6, momentum=0.9, trust=0.001, joint_norm=False):
    """You et al. (2017), and with `joint_norm` as in the code of Barlow Twins: the norm of what is
    applied."""
    velocities = [torch.zeros_like(w) for w in weights]
    for step in gradients:
        for w, g, velocity in zip(weights, step, velocities, strict=True):
            if w.ndim > 1:
                decayed = g + decay * w
                norm = decayed.norm() if joint_norm else g.norm() + decay * w.norm()
                g = trust * w.norm() / norm * decayed
            velocity.mul_(momentum).add_(g)
            w.sub_(lr * velocity)
    return weights


def test_lars_follows_its_rule_and_leaves_biases_and_norms_to_sgd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(OptimConfig(name="lars", lr=2.0, weight_decay=1e-6), model)
    start = [p.detach().clone() for p in model.parameters()]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(4)]
    for step in gradients[:2]:
        apply(optimizer, model, step)
    memory = io.BytesIO()
    torch.save(optimizer.state_dict(), memory)
    memory.seek(0)
    optimizer = build_optimizer(OptimConfig(name="lars", lr=2.0, weight_decay=1e-6), model)
    optimizer.load_state_dict(torch.load(memory, weights_only=True))
    for step in gradients[2:]:
        apply(optimizer, model, step)
    paper, authors = (
        lars_by_hand([w.clone() for w in start], gradients, 2.0, joint_norm=joint)
        for joint in (False, True)
    )
    for p, by_paper, by_authors in zip(model.parameters(), paper, authors, strict=True):
        torch.testing.assert_close(p.detach(), by_paper, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            p.detach(), by_authors, rtol=1e-5, atol=1e-6
        )  # at a decay of 1e-6 the two are one


def apply(optimizer, model, gradients):
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient.clone()
    optimizer.step()


def test_lars_without_decay_is_refused():
    """The implementation takes a decay of 0 for an exemption from the adaptation as well."""
    with pytest.raises(ValueError, match="weight_decay=0 would switch lars's adaptation off"):
        OptimConfig(name="lars", weight_decay=0)


def test_nothing_to_train_and_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(OptimConfig(), nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match=r"momentum=1.0 must be below 1"):
        OptimConfig(momentum=1.0)
    with pytest.raises(ValueError, match="name='lion'"):
        OptimConfig(name="lion")
    with pytest.raises(ValueError, match="lr=-1"):
        OptimConfig(lr=-1)
