"""Orthogonal arrays and packings: hard codes as uniform and independent as a batch allows.

A table of hard codes is an integer tensor (N, V), values 0 … B − 1; `one_hot_codes` turns it into
soft codes p.
"""

from functools import lru_cache, reduce
from itertools import combinations
from typing import NamedTuple

import torch
from sympy import factorint
from sympy.ntheory import digits
from sympy.polys.domains import ZZ
from sympy.polys.galoistools import gf_irreducible_p, gf_mul, gf_rem, gf_strip
from torch import Tensor
from torch.nn.functional import one_hot

MAX_ENTRIES = 50_000_000  #: of an array that is built: 400 MB of integers
MAX_FIELD = 1024  #: elements of a field, whose two tables hold the square of it


class GaloisField(NamedTuple):
    """The field with q elements 0 … q − 1, by its tables; 0 and 1 are its zero and its one."""

    add: Tensor  #: add[x, y] = x + y, (q, q)
    multiply: Tensor  #: multiply[x, y] = x · y, (q, q)


@lru_cache(maxsize=16)
def galois_field(order: int) -> GaloisField:
    """GF(q) for a prime power q = pᵏ: polynomials over Z/p modulo an irreducible one of degree k.

    Element x stands for the polynomial whose coefficients are the digits of x to the base p.
    Raises ValueError if `order` is no prime power, or above `MAX_FIELD`.
    """
    factors = factorint(order) if isinstance(order, int) and 2 <= order <= MAX_FIELD else {}
    if len(factors) != 1:
        raise ValueError(
            f"order={order!r}: a field needs a prime power from 2 to {MAX_FIELD} "
            "(2, 3, 4, 5, 7, 8, 9, 11, …)"
        )
    ((prime, degree),) = factors.items()

    def polynomial(x: int) -> list[int]:
        """Coefficients, highest first, as sympy has them."""
        coefficients: list[int] = gf_strip(digits(x, prime)[1:])
        return coefficients

    monic = map(polynomial, range(order, 2 * order))
    modulus = next(poly for poly in monic if gf_irreducible_p(poly, prime, ZZ))
    place = prime ** torch.arange(degree)
    coefficients = torch.arange(order)[:, None] // place % prime
    add = ((coefficients[:, None] + coefficients) % prime * place).sum(-1)

    def product(x: int, y: int) -> int:
        result = gf_rem(gf_mul(polynomial(x), polynomial(y), prime, ZZ), modulus, prime, ZZ)
        return reduce(lambda number, digit: number * prime + int(digit), result, 0)

    elements = range(order)
    multiply = torch.tensor([[product(x, y) for y in elements] for x in elements])
    return GaloisField(add, multiply)


def orthogonal_array(units: int, strength: int = 2, variables: int | None = None) -> Tensor:
    """OA(Bᵏ, V, B, k): every k columns show every k-tuple of B = `units` values exactly once.

    Rows are the polynomials of degree < k over GF(B); columns are their values at the
    field's B elements, and the leading coefficient (Bush, 1952; for k = 2 the lines of an
    affine plane). Returns integers (Bᵏ, V), V = B + 1 unless fewer `variables` are asked for.
    Raises ValueError unless B is a prime power, 1 ≤ k ≤ V ≤ B + 1, and the array fits.
    """
    field = galois_field(units)
    variables = units + 1 if variables is None else variables
    if not 1 <= strength <= variables <= units + 1:
        raise ValueError(
            f"strength={strength}, variables={variables}: need "
            f"1 ≤ strength ≤ variables ≤ units + 1 = {units + 1}"
        )
    if units**strength * variables > MAX_ENTRIES:
        raise ValueError(
            f"units={units}, strength={strength}: {units**strength:,} rows are "
            f"too many; take smaller ones, up to {MAX_ENTRIES:,} entries"
        )
    polynomials = torch.cartesian_prod(*[torch.arange(units)] * strength).reshape(-1, strength)
    leading, *rest = polynomials[:, :, None].unbind(1)
    point, values = torch.arange(units), leading.expand(-1, units)
    for coefficient in rest:  # Horner's rule at every point at once
        values = field.add[field.multiply[values, point], coefficient]
    return torch.cat([values, leading], 1)[:, :variables]


def hard_packing(samples: int, units: int, variables: int) -> Tensor:
    """N ≤ B² samples of V variables, marginals uniform, no pair of values twice in two columns.

    Sample (a, b) has the values a + k·b over GF(B): a runs over the field, b over N / B of its
    elements, and every variable has its own k. Returns integers (N, V).
    Raises ValueError unless B = `units` is a prime power, B divides N ≤ B², and V ≤ B.
    """
    field = galois_field(units)
    if samples % units or not units <= samples <= units**2:
        raise ValueError(f"samples={samples}: need a multiple of units={units}, at most {units**2}")
    if not 1 <= variables <= units:
        raise ValueError(f"variables={variables}: this packing has 1 to {units}")
    a, b = torch.cartesian_prod(torch.arange(units), torch.arange(samples // units)).T
    return torch.stack([field.add[a, field.multiply[k, b]] for k in range(variables)], dim=1)


def one_hot_codes(values: Tensor, units: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Integers (N, V) from 0 to B − 1 → hard codes p (N, V·B), one-hot within each variable.

    Raises ValueError for values that are no such integers.
    """
    is_table = values.ndim == 2 and values.dtype == torch.int64 and values.numel()
    if not is_table or values.min() < 0 or values.max() >= units:
        raise ValueError(
            f"values of shape {tuple(values.shape)} and {values.dtype}: "
            f"need int64 (N, V) from 0 to {units - 1}"
        )
    return one_hot(values, units).flatten(1).to(dtype)


def strength(values: Tensor, units: int) -> int:
    """Largest k for which any k columns of integers (N, V) show all Bᵏ tuples equally often.

    0 if not even single columns do. Raises ValueError for values outside 0 … B − 1.
    """
    one_hot_codes(values, units)  # refuses what is no table of values
    samples, variables = values.shape
    for k in range(1, variables + 1):
        if samples % units**k:
            return k - 1
        place = units ** torch.arange(k)
        for subset in combinations(range(variables), k):
            counts = (values[:, subset] * place).sum(1).bincount(minlength=units**k)
            if not (counts == samples // units**k).all():
                return k - 1
    return variables
