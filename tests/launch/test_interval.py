"""How often to save: the chapter's formulas, by other routes than its functions."""

import math

import pytest
from ledger import of_chapter

CHAPTER = "14-jobs-that-survive"


@pytest.mark.parametrize(
    ("work", "save", "between", "restart"), [(60, 10, 500, 30), (5, 1, 2, 0), (1, 0.25, 40, 7)]
)
def test_an_interval_takes_its_work_and_all_failures_before_it_succeeds(
    work, save, between, restart
):
    """The mean number of failures, times what one costs: summed up and integrated by the midpoint
    rule."""
    length, slices = work + save, 100_000
    survives = math.exp(-length / between)
    failures = sum(number * survives * (1 - survives) ** number for number in range(1, 20_000))
    moments = [(k + 0.5) * length / slices for k in range(slices)]
    density = [math.exp(-moment / between) for moment in moments]
    lost = sum(moment * weight for moment, weight in zip(moments, density, strict=True)) / sum(
        density
    )
    expected = length + failures * (lost + restart)
    assert of_chapter(CHAPTER, "interval_seconds")(work, save, between, restart) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize(("save", "between"), [(1.0, 1e9), (10.0, 3e10)])
def test_youngs_interval_is_the_best_one_where_failures_are_rare(save, between):
    """Against the root of the derivative, T/M = 1 - exp(-(T + save)/M), by bisection."""
    low, high = 0.0, between
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if middle / between < -math.expm1(-(middle + save) / between)
            else (low, middle)
        )
    assert of_chapter(CHAPTER, "best_interval")(save, between) == pytest.approx(low, rel=2e-4)
