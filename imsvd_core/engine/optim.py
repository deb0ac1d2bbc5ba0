"""Optimizers and the learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from imsvd_core.system import checks


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer and its schedule: linear warm-up, then cosine decay, per step."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = 2e-3
    """Peak learning rate, reached when the warm-up ends."""
    weight_decay: float = 1e-4
    """Decay of weights; of biases and norms too, if `decay_all`."""
    momentum: float = 0.9
    """For sgd and lars."""
    warmup_epochs: float = 0.5
    """Length of the linear warm-up, a fraction allowed; cut to the run's length where it exceeds
    it."""
    final_lr_fraction: float = 0.001
    """Where the cosine ends, as a fraction of `lr`."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the rate drops tenfold instead of following the cosine; empty for the cosine.
    """
    decay_all: bool = False
    """Decay biases and norms as well."""

    def __post_init__(self) -> None:
        checks.literals(self)
        checks.finite(self, "lr", "weight_decay", "momentum", "warmup_epochs", "final_lr_fraction")
        if self.momentum >= 1:
            raise ValueError(
                f"momentum={self.momentum} must be below 1, or steps would grow for ever"
            )
        if self.name == "lars" and self.weight_decay == 0:
            raise ValueError(
                "weight_decay=0 would switch lars's adaptation off with the decay: "
                "give a small one (the paper's is 1e-6)"
            )


def learning_rate(config: OptimConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The rate of `step` (from 0): a straight rise, then a cosine to the final fraction.

    Any warm-up fits any number of epochs: it is cut to `total_steps`, and the cosine
    takes what is left.
    """
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.milestones:
        passed = sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
        return config.lr * 0.1**passed
    done = (step - warmup) / max(1, total_steps - warmup - 1)
    floor = config.final_lr_fraction
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """One optimizer over every trainable parameter; one-dimensional ones (biases, norms) are exempt
    from decay, unless `decay_all`.

    LARS is timm's, by the rule of You et al. (2017): g ← η·‖w‖ / (‖g‖ + λ‖w‖) · (g + λw), η =
    0.001, then momentum; what is exempt from decay is exempt from this adaptation too.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("module holds no trainable parameter: nothing to optimize")
    bound = 0 if config.decay_all else 2  # dimensions of what is decayed
    groups = [
        {"params": [p for p in parameters if p.ndim >= bound], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < bound], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.name == "lars":
        from timm.optim.lars import Lars  # slow to import

        return Lars(groups, lr=config.lr, momentum=config.momentum, trust_coeff=0.001)
    return torch.optim.AdamW(groups, lr=config.lr)
