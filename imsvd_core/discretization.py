"""Soft variable discretization: from logits to probabilities, and on to joint matrices.

An embedding of D logits is read as V variables; each owns a run of consecutive columns, its
*units*. `units` is everywhere an int (every variable has that many) or a sequence with one count
per variable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Units = int | Sequence[int]


def unit_counts(units: Units, dim: int) -> tuple[int, ...]:
    """One count of units per variable, checked against the `dim` columns that they share.

    Raises ValueError if a count is not an integer ≥ 1, or if the counts do not fill `dim` exactly.
    """
    check_units(units)
    if isinstance(units, int):
        if dim % units or dim == 0:
            raise ValueError(
                f"units={units} does not divide the embedding dimension {dim}: "
                f"take a divisor of {dim}, or one count per variable"
            )
        return (units,) * (dim // units)
    if sum(units) != dim:
        raise ValueError(
            f"units={tuple(units)} sum to {sum(units)}, but the embedding has {dim} dimensions"
        )
    return tuple(units)


def check_units(units: Units) -> None:
    """Raise ValueError unless `units` is an int ≥ 1 or a non-empty sequence of them."""
    counts = units if isinstance(units, Sequence) else [units]
    if not counts or not all(type(count) is int and count >= 1 for count in counts):
        raise ValueError(
            f"units={units!r}: need an integer ≥ 1, or a non-empty sequence of them, one a variable"
        )


def split_variables(x: Tensor, units: Units, fill: float = 0.0) -> Tensor:
    """(…, D) → (…, V, B): one row per variable.

    Where the numbers of units differ, B is the largest, and `fill` pads the other rows.
    """
    counts = unit_counts(units, x.shape[-1])
    if len(set(counts)) == 1:
        return x.reshape(*x.shape[:-1], len(counts), counts[0])
    columns, present = _padding(counts, x.device)
    return x[..., columns].masked_fill(~present, fill)


def merge_variables(x: Tensor, units: Units) -> Tensor:
    """(…, V, B) → (…, D): the inverse of `split_variables`; padding is dropped."""
    if isinstance(units, int) or len(set(units)) == 1:
        return x.flatten(-2)
    return x[..., _padding(tuple(units), x.device)[1]]


@lru_cache(maxsize=32)
def _padding(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Column of each (variable, unit), and whether that unit exists; both (V, B)."""
    # The tables are kept: training must be able to use those that inference made.
    with torch.inference_mode(False):
        count = torch.tensor(counts, device=device)
        unit = torch.arange(max(counts), device=device)
        present = unit < count[:, None]
        return torch.where(present, (count.cumsum(0) - count)[:, None] + unit, 0), present


def soft_discretize(logits: Tensor, units: Units, temperature: float = 1.0) -> Tensor:
    """Turn logits (…, D) into soft codes p (…, D): a softmax within each variable (Eq. 1).

    `temperature` > 0 divides the logits; small values harden the code.
    The result keeps shape and dtype.
    Raises ValueError if `units` do not fill D, or the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive (1.0 is the paper's)")
    scaled = split_variables(widen(logits) / temperature, units, fill=-torch.inf)
    return merge_variables(scaled.softmax(-1), units).to(logits.dtype)


def marginals(p: Tensor) -> Tensor:
    """Distribution of every variable, side by side: soft codes (N, D) → (D,) (Eq. 2)."""
    return widen(_table(p, "p")).mean(0)


def joint(p_a: Tensor, p_b: Tensor | None = None) -> Tensor:
    """Joint matrix P_aᵀP_b / N of soft codes: (N, D_a), (N, D_b) → (D_a, D_b) (Eq. 3, 10).

    Without `p_b` it is the self-joint matrix of `p_a`. Each block sums to 1. Half-precision
    input is accumulated in float32, under autocast too: cells are as small as 1/N times a
    product of probabilities.
    Raises ValueError if the two do not hold the same samples.
    """
    p_b = p_a if p_b is None else p_b
    if len(_table(p_a, "p_a")) != len(_table(p_b, "p_b")):
        raise ValueError(
            f"p_a has {len(p_a)} samples, p_b has {len(p_b)}: both must describe the same batch"
        )
    with torch.autocast(p_a.device.type, enabled=False):
        return widen(p_a).T @ (widen(p_b) / len(p_b))


def _table(p: Tensor, name: str) -> Tensor:
    if p.ndim != 2 or len(p) == 0:
        raise ValueError(
            f"{name} has shape {tuple(p.shape)}: need a non-empty table (samples, dimensions)"
        )
    return p


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, other types as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def hard_codes(p: Tensor, units: Units) -> Tensor:
    """The most probable unit of every variable: soft codes (…, D) → int64 (…, V)."""
    return split_variables(p, units, fill=-1.0).argmax(-1)


@dataclass(frozen=True)
class Hardness:
    """How close soft codes are to one-hot (Sec. V-C of the paper reports 91.18 % and 81.25 %)."""

    above_90: float  #: share of (sample, variable) pairs whose top probability exceeds 0.9
    above_99: float  #: the same for 0.99
    mean_top: float  #: mean top probability; 1 means that every code is hard


def hardness(p: Tensor, units: Units) -> Hardness:
    """Hardness statistics of soft codes p (N, D)."""
    top = widen(split_variables(_table(p, "p"), units)).amax(-1)
    above_90, above_99 = ((top > least).float().mean().item() for least in (0.9, 0.99))
    return Hardness(above_90, above_99, mean_top=top.mean().item())
