"""Codes without a network: free tables and hard codes, driven to the least loss that is found."""

import itertools
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imsvd_core.arrays.bounds import check_counts
from imsvd_core.discretization import soft_discretize, split_variables
from imsvd_core.loss import cross_joint_entropy


class FreeTables(NamedTuple):
    """The best codes of a search, and the loss of every restart."""

    loss: float  #: of the best, in nats
    p1: Tensor  #: its codes of view 1, (N, V·B)
    p2: Tensor  #: its codes of view 2, (N, V·B)
    #: mean over samples, variables and views of the top probability; 1 for hard codes
    mean_top: float
    restarts: Tensor  #: final loss of every restart, (R,)


def optimise_tables(
    samples: int,
    units: int,
    variables: int,
    *,
    restarts: int = 32,
    steps: int = 1500,
    learning_rate: float = 0.1,
    scale: float = 2.0,
    seed: int = 0,
    **settings: Any,
) -> FreeTables:
    """Minimise the loss over the logits of both views: Adam, from many random starts at once.

    The result is an upper bound of the least value. The learning rate falls along a cosine;
    starts are normal with standard deviation `scale`, the two views near each other; `settings`
    go to `cross_joint_entropy`. All is float64, with `restarts` matrices of (V·B)² cells.
    Raises ValueError unless there are 1 sample, restart and step, 2 units and 2 variables.
    """
    check_counts(samples=samples, restarts=restarts, steps=steps)
    check_counts(least=2, units=units, variables=variables)
    generator = torch.Generator().manual_seed(seed)
    shape = restarts, samples, variables * units
    normal = partial(torch.randn, shape, generator=generator, dtype=torch.float64)
    common = scale * normal()
    views = [(common + 0.1 * scale * normal()).requires_grad_() for _ in range(2)]
    losses = torch.vmap(lambda z1, z2: cross_joint_entropy(z1, z2, units, **settings).total)
    _descend(views, lambda: losses(*views).sum(), steps, learning_rate)
    return _best([z.detach() for z in views], losses, units)


def _best(
    views: list[Tensor], losses: Callable[[Tensor, Tensor], Tensor], units: int
) -> FreeTables:
    final = losses(*views)
    best = final.argmin()
    p1, p2 = (soft_discretize(z[best], units) for z in views)
    tops = torch.stack([split_variables(p, units).amax(-1) for p in (p1, p2)])
    return FreeTables(final[best].item(), p1, p2, tops.mean().item(), final)


def _descend(
    parameters: list[Tensor], loss: Callable[[], Tensor], steps: int, learning_rate: float
) -> None:
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
        schedule.step()


def search_hard_codes(
    samples: int,
    units: int,
    variables: int,
    *,
    restarts: int = 20,
    sweeps: int = 400,
    seed: int = 0,
    target: float = -math.inf,
) -> tuple[float, Tensor]:
    """(loss, values (N, V)) of the best hard codes, the same in both views, by simulated annealing.

    Each move gives one variable of one sample another value; the temperature falls to zero over the
    sweeps. Stops early at `target` (say `hard_bound`, which nothing hard can beat). Meant for tens
    of samples.
    Raises ValueError unless there are at least 1 sample, 2 units, 2 variables, 1 restart and 1
    sweep.
    """
    check_counts(samples=samples, restarts=restarts, sweeps=sweeps)
    check_counts(least=2, units=units, variables=variables)
    chance = random.Random(seed)
    best, values = math.inf, torch.empty(0)
    for _ in range(restarts):
        counted = _CountedCodes(samples, units, variables, chance)
        for sweep in range(sweeps):
            heat = 0.5 * (1 - sweep / sweeps) ** 2
            for _ in range(samples * variables):
                n, v, b = map(chance.randrange, (samples, variables, units))
                change = counted.change(n, v, b)
                if change <= 0 or chance.random() < math.exp(-change / heat):
                    counted.make(n, v, b)
        if counted.loss() < best:
            best, values = counted.loss(), torch.tensor(counted.values).T.contiguous()
        if best <= target + 1e-12:
            break
    return best, values


class _CountedCodes:
    """Hard codes, and how many samples hold each value and each pair of values, move by move."""

    def __init__(self, samples: int, units: int, variables: int, chance: random.Random):
        self.values = [
            chance.sample([n % units for n in range(samples)], samples) for _ in range(variables)
        ]
        self.single = [[column.count(b) for b in range(units)] for column in self.values]
        self.pair = {}
        for v, j in itertools.permutations(range(variables), 2):
            table = [[0] * units for _ in range(units)]  # table[c][b]: X_j = c, X_v = b
            for b, c in zip(self.values[v], self.values[j], strict=True):
                table[c][b] += 1
            self.pair[v, j] = table
        self.xlogx = [0.0] + [count * math.log(count) for count in range(1, samples + 1)]

    def change(self, n: int, v: int, new: int) -> float:
        """Change of N·V times the loss if variable v of sample n took the value `new`."""
        old, pairs = self.values[v][n], 0.0
        for j, column in enumerate(self.values):
            if j != v:
                pairs += self._moved(self.pair[v, j][column[n]], old, new)
        return self._moved(self.single[v], old, new) + 2 * pairs / (len(self.values) - 1)

    def _moved(self, counts: list[int], old: int, new: int) -> float:
        """Change of Σ k log k over `counts` when one sample moves from cell `old` to cell `new`."""
        if old == new:
            return 0.0
        x, a, b = self.xlogx, counts[old], counts[new]
        return x[a - 1] - x[a] + x[b + 1] - x[b]

    def make(self, n: int, v: int, new: int) -> None:
        old, self.values[v][n] = self.values[v][n], new
        for step, b in ((-1, old), (1, new)):
            self.single[v][b] += step
            for j, column in enumerate(self.values):
                if j != v:
                    self.pair[v, j][column[n]][b] += step
                    self.pair[j, v][b][column[n]] += step

    def loss(self) -> float:
        """−H̄_1 − H̄_2: DE + OE of hard codes that agree, where TI is 0."""
        samples, tables = len(self.values[0]), self.pair.values()
        single = sum(self.xlogx[k] for counts in self.single for k in counts)
        pair = sum(self.xlogx[k] for table in tables for counts in table for k in counts)
        means = single / len(self.single) + pair / len(self.pair)
        return means / samples - 2 * math.log(samples)
