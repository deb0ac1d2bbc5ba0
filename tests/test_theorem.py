"""What chapter 06 computes in its own cells."""

import math

import pytest
from ledger import of_chapter

from imsvd_core.arrays import hard_packing, visible_share

CHAPTER = "06-finite-batches"


def test_a_step_towards_an_empty_cell_pays_with_the_slope_of_its_logarithm():
    step = of_chapter(CHAPTER, "step")
    samples, variables = 20, 3
    values = hard_packing(samples, 5, variables).tolist()
    new = next(b for b in range(5) if all(x[:2] != [b, values[7][1]] for x in values))
    grown = sum(
        all((x[0], x[j]) != (new, values[7][j]) for x in values) for j in (1, 2)
    )  # cells of X_1 that were empty
    slope = grown / (samples * variables * (variables - 1))
    for small in (1e-6, 1e-5):
        rise = step(10 * small) / (10 * small) - step(small) / small
        assert rise == pytest.approx(slope * math.log(10), rel=3e-4)
        assert step(small) < 0
    # the whole change, by counting: DE loses ε of one cell, OE moves ε from two cells to two
    # others, TI pays −log(1 − ε)
    epsilon = 1e-3

    def cell(mass):
        return mass * math.log(mass) if mass > 0 else 0.0

    def moved(before, change):
        return cell(before + change) - cell(before)

    diagonal = moved(4 / samples, -epsilon / samples) / variables
    pairs = sum(
        moved(
            sum(x[0] == b and x[j] == values[7][j] for x in values) / samples,
            sign * epsilon / samples,
        )
        for j in (1, 2)
        for sign, b in ((-1, values[7][0]), (1, new))
    ) / (variables * (variables - 1))
    agreement = -math.log(1 - epsilon) / (samples * variables)
    assert step(epsilon) == pytest.approx(diagonal + pairs + agreement, abs=1e-12)


def test_the_limit_of_the_visible_share_is_the_slope_of_the_crowding():
    visible_limit = of_chapter(CHAPTER, "visible_limit")

    def crowding(occupancy):
        """E log(1 + Y) of a Poisson variable, as a plain sum."""
        return sum(
            math.exp(-occupancy + k * math.log(occupancy) - math.lgamma(k + 1)) * math.log(1 + k)
            for k in range(120)
        )

    for occupancy in (0.15, 0.43, 1.09, 5.0):
        slope = (crowding(occupancy + 1e-4) - crowding(occupancy - 1e-4)) / 2e-4
        assert visible_limit(occupancy) == pytest.approx(occupancy * slope, abs=1e-7)
    assert visible_limit(20_000 / 200.5**2) == pytest.approx(visible_share(20_000, 201), abs=2e-3)
