"""What a batch of N samples can show of variables with B units: bounds, biases, and a choice of B.

Natural logarithms throughout. The loss is that of Eq. 11: DE + OE + λ·TI.
"""

import bisect
import math
from collections.abc import Callable
from math import comb, log

import torch

#: The smallest agreement that is tried: f is infinite, or 0, at 0
SMALLEST = 1e-12


def population_bound(units: int, invariance_weight: float = 1.0, strength: int = 2) -> float:
    """Least value of DE + OE + λ·TI over all batches; −3 log B if λ ≥ 1 − log B (Theorem 1).

    No batch goes below, and not every batch attains it (`rao_bound`, `hard_bound`, `fano_bound`).

    With `strength` K it bounds the loss that has the joint entropy of K variables in place of that
    of pairs. Below 1 − log B, which needs B = 2, softer codes win, and the value is min f(s) − K
    log B over 0 < s ≤ 1 with f(s) = s log(s/B) − λ log s.
    Raises ValueError unless B ≥ 2, λ ≥ 0 and K ≥ 2.
    """
    check_counts(units=units, least=2)
    if strength < 2 or not invariance_weight >= 0:
        raise ValueError(
            f"strength={strength}, invariance_weight={invariance_weight}: "
            "need strength ≥ 2 and a weight ≥ 0"
        )
    _, cost = _least(lambda s: agreement_cost(s, units, invariance_weight), SMALLEST, 1.0)
    return cost - strength * log(units)


def agreement_cost(s: float, units: int, invariance_weight: float = 1.0) -> float:
    """f(s) = s log(s/B) − λ log s: least DE + λ·TI of a variable whose views agree with chance s.

    Raises ValueError unless 0 < s ≤ 1.
    """
    if not 0 < s <= 1:
        raise ValueError(f"s={s} must be a probability above 0")
    return s * log(s / units) - invariance_weight * log(s)


def hard_bound(samples: int, units: int) -> float:
    """−H_bal(N, B) − H_bal(N, B²): no lower DE + OE + λ·TI have hard codes that agree.

    Attained by `hard_packing`, and by orthogonal arrays; not by every N, B and V (`plotkin_bound`).
    """
    return -balanced_entropy(samples, units) - balanced_entropy(samples, units**2)


def balanced_entropy(samples: int, cells: int) -> float:
    """Largest entropy of N counted samples in M cells, in nats: of counts as equal as can be.

    Raises ValueError unless N, M ≥ 1.
    """
    check_counts(samples=samples, cells=cells)
    low, fuller = divmod(samples, cells)
    crowd = (cells - fuller) * _xlogx(low) + fuller * _xlogx(low + 1)
    return log(samples) - crowd / samples


def rao_bound(samples: int, units: int) -> int:
    """V ≤ (N − 1) / (B − 1): most variables of an array of strength 2 with N rows (Rao, 1947)."""
    _check_batch(samples, units)
    return (samples - 1) // (units - 1)


def plotkin_bound(samples: int, units: int) -> float:
    """Most variables of N hard samples of which any two agree in at most one variable.

    Balanced marginals, and pairs that occur at most once each, need that; B(N − 1)/(N − B) if B
    divides N. Infinite for N ≤ B, where no two samples need ever agree.
    """
    _check_batch(samples, units)
    low, fuller = divmod(samples, units)
    agreeing = (units - fuller) * comb(low, 2) + fuller * comb(low + 1, 2)
    return comb(samples, 2) / agreeing if agreeing else math.inf


def fano_entropy(agreement: float, units: int) -> float:
    """F_B(s): largest entropy of a distribution on B units that agrees with another, in nats.

    They agree with probability s or more. The top probability is at least s, and so
    F_B(s) = −s log s − (1 − s) log((1 − s)/(B − 1)) for s ≥ 1/B, log B below.
    Raises ValueError unless B ≥ 2 and 0 ≤ s ≤ 1.
    """
    check_counts(units=units, least=2)
    if not 0 <= agreement <= 1 + 1e-9:
        raise ValueError(f"agreement={agreement} must be a probability")
    s = min(max(agreement, 1 / units), 1.0)
    return -_xlogx(s) - _xlogx(1 - s) + (1 - s) * log(units - 1)


def fano_bound(samples: int, units: int, invariance_weight: float = 1.0) -> float:
    """A bound of the loss of N samples' codes, soft or hard; it is not always attained.

    min over s of f(s) − min(2 log B, log N + 2 F_B(s)): a pair tells at most the sample, and the
    noise of its two codes.
    """
    _check_batch(samples, units)

    def bound(s: float) -> float:
        pair = min(2 * log(units), log(samples) + 2 * fano_entropy(s, units))
        return agreement_cost(s, units, invariance_weight) - pair

    return _least(bound, SMALLEST, 1.0)[1]


def smoothed_packing_loss(
    theta: float, samples: int, units: int, invariance_weight: float = 1.0
) -> float:
    """Loss of a hard packing's codes smoothed to p = a·one-hot + (1 − a)/B, θ = a², for any V.

    Exact for the codes of `hard_packing`. Raises ValueError unless 0 ≤ θ ≤ 1 and N ≤ B².
    """
    _check_batch(samples, units)
    if not 0 <= theta <= 1:
        raise ValueError(f"theta={theta} must be between 0 (uniform codes) and 1 (hard codes)")
    if samples > units**2:
        raise ValueError(f"samples={samples}: a packing has at most units² = {units**2}")
    cells = units**2
    empty = (1 - theta) / cells
    off_diagonal = samples * _xlogx(theta / samples + empty) + (cells - samples) * _xlogx(empty)
    return agreement_cost(theta + (1 - theta) / units, units, invariance_weight) + off_diagonal


def smoothed_packing_optimum(
    samples: int, units: int, invariance_weight: float = 1.0
) -> tuple[float, float]:
    """(θ, loss) at the best smoothing of a packing: 0 < θ < 1 whenever N < B², to about 1e-8 in θ.

    Where 1 − θ is smaller than that (N near B²), 1 may be returned. The top probability of its
    codes is √θ + (1 − √θ)/B. Raises ValueError as `smoothed_packing_loss` does.
    """
    return _least(
        lambda theta: smoothed_packing_loss(theta, samples, units, invariance_weight), 0.0, 1.0
    )


def expected_entropy(samples: int, cells: int) -> float:
    """Exact mean of the plug-in entropy of N independent samples, uniform on M cells, in nats.

    log N − (M/N) Σ_k Binomial(k; N, 1/M) k log k; its difference to log M is the bias.
    Raises ValueError unless N, M ≥ 1.
    """
    check_counts(samples=samples, cells=cells)
    if cells == 1:
        return 0.0
    count = torch.arange(2, samples + 1, dtype=torch.float64)
    ways = math.lgamma(samples + 1) - torch.lgamma(count + 1) - torch.lgamma(samples - count + 1)
    chance = (ways - count * log(cells) + (samples - count) * math.log1p(-1 / cells)).exp()
    return log(samples) - cells / samples * (chance * torch.xlogy(count, count)).sum().item()


def simulated_entropy(
    samples: int, cells: int, draws: int = 100, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard error) of the plug-in entropy over simulated batches.

    The mean estimates what `expected_entropy` gives exactly.
    Raises ValueError unless N, M ≥ 1 and draws ≥ 2.
    """
    check_counts(samples=samples, cells=cells)
    check_counts(draws=draws, least=2)
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(cells, (samples,), generator=generator) for _ in range(draws)]
    counts = torch.stack([batch.bincount(minlength=cells) for batch in batches]).double()
    entropies = log(samples) - torch.xlogy(counts, counts).sum(1) / samples
    return entropies.mean().item(), (entropies.std() / math.sqrt(draws)).item()


def visible_share(samples: int, units: int) -> float:
    """Share that a batch of N shows, on average, of the entropy that the last unit adds to a pair.

    Going from B − 1 to B units adds 2 log B − 2 log(B − 1) to the entropy of a uniform independent
    pair, and less to the mean of its plug-in estimate. Near 1 for B² ≪ N, near 0 for B² ≫ N. Raises
    ValueError unless B ≥ 2.
    """
    _check_batch(samples, units)
    shown = expected_entropy(samples, units**2) - expected_entropy(samples, (units - 1) ** 2)
    return shown / (2 * log(units) - 2 * log(units - 1))


def suggest_units(batch_size: int, *, dim: int | None = None, visible: float = 0.25) -> int:
    """A number of units B for a (global) batch of N: the largest whose last unit still shows.

    More units let a variable say more, up to log B, but the loss sees a pair's B² cells
    through N samples. The rule adds units while at least the share `visible` of the pair
    entropy that each adds shows up in a batch (`visible_share`); a half, a quarter, a tenth
    are about N/B² = 1.09, 0.43, 0.15 samples a cell. B is never below 2. With `dim` it is
    the divisor of D nearest to that, by ratio, among those that leave two variables.

    Limits: derived for hard, uniform, independent variables and for pairs; soft codes hide
    less, so more units can pay. The default, a quarter, lies between the authors' settings,
    (2048, 80) and (512, 32); it is not derived, and knows nothing of images or networks.
    Raises ValueError unless N ≥ 2, 0 < visible < 1, and D has a divisor to offer.
    """
    check_counts(batch_size=batch_size, least=2)
    if not 0 < visible < 1:
        raise ValueError(f"visible={visible} must lie between 0 and 1 (0.25 is the default)")
    candidates = range(3, int(batch_size / visible) + 3)
    # the share falls with B, and is below `visible` at the last candidate
    best = 2 + bisect.bisect(candidates, -visible, key=lambda B: -visible_share(batch_size, B))
    if dim is None:
        return best
    divisors = [units for units in range(2, dim // 2 + 1) if dim % units == 0]
    if not divisors:
        raise ValueError(f"dim={dim} has no divisor between 2 and dim/2: take one that has")
    return min(divisors, key=lambda units: (abs(log(units / best)), units))


def _xlogx(x: float) -> float:
    return x * log(x) if x > 0 else 0.0


def _least(function: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """(place, least value) of a convex function on [low, high], ends included: golden section."""
    ends = [(function(x), x) for x in (low, high)]
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 1e-10:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    value, place = min([(at_left, left), (at_right, right), *ends])
    return place, value


def _check_batch(samples: int, units: int) -> None:
    check_counts(samples=samples)
    check_counts(units=units, least=2)


def check_counts(least: int = 1, **counts: int) -> None:
    """Raise ValueError unless all are integers from `least` on."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer ≥ {least}")
