"""Formulas of the chapter on the fast loss, each by another route than its function: loops,
autograd, counts, enumeration."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from ledger import of_chapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imsvd_core.discretization import soft_discretize
from imsvd_core.loss import CrossJointEntropyLoss, cross_joint_entropy
from imsvd_core.variants import log_mean_collision

CHAPTER = "07-fast-loss"
UNITS = 3


def codes(samples: int = 7, dim: int = 12, units: int = UNITS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        soft_discretize(torch.randn(samples, dim, generator=generator, dtype=torch.float64), units)
        for _ in "12"
    ]


def entropies(cells: Tensor) -> tuple[Tensor, Tensor]:
    """DE and OE by loops over the cells."""
    variables = len(cells) // UNITS
    diagonal = off_diagonal = torch.zeros((), dtype=cells.dtype)
    for row, column in product(range(len(cells)), repeat=2):
        cell = cells[row, column]
        if row // UNITS != column // UNITS:
            off_diagonal = off_diagonal + cell * cell.log() / (variables * (variables - 1))
        elif row == column:
            diagonal = diagonal + cell * cell.log() / variables
    return diagonal, off_diagonal


def table(p1: Tensor, p2: Tensor) -> Tensor:
    return torch.stack([torch.outer(a, b) for a, b in zip(p1, p2, strict=False)]).mean(0)


class Products(TorchDispatchMode):
    """Counts the multiplications and additions of matrix products."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.operations += 2 * args[0].numel() * args[1].shape[1]
        return function(*args, **(kwargs or {}))


def test_the_operations_are_those_of_the_textbook_versions_products() -> None:
    for samples, dim in ((5, 12), (7, 20)):
        z = [torch.randn(samples, dim, requires_grad=True) for _ in "12"]
        with Products() as counted:
            cross_joint_entropy(*z, 4).total.backward()
        assert of_chapter(CHAPTER, "loss_operations")(samples, dim) == counted.operations


def test_the_slope_in_the_matrix_is_that_of_autograd() -> None:
    cells = table(*codes()).requires_grad_()
    (truth,) = torch.autograd.grad(sum(entropies(cells)), cells)
    torch.testing.assert_close(of_chapter(CHAPTER, "matrix_slope")(cells.detach(), UNITS), truth)


def test_the_slopes_in_the_tables_are_those_of_autograd() -> None:
    p1, p2 = (p.requires_grad_() for p in codes())
    truth = torch.autograd.grad(sum(entropies(table(p1, p2))), (p1, p2))
    found = of_chapter(CHAPTER, "table_slopes")(p1.detach(), p2.detach(), UNITS)
    torch.testing.assert_close(tuple(found), truth)


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_the_stream_has_the_value_and_up_to_constants_the_slopes_of_the_whole_matrix(
    rows: int,
) -> None:
    p1, p2 = (p.requires_grad_() for p in codes())
    _, truth = entropies(table(p1, p2))
    value, *slopes = of_chapter(CHAPTER, "streamed")(p1.detach(), p2.detach(), UNITS, rows)
    torch.testing.assert_close(value, truth.detach())
    for slope, true in zip(slopes, torch.autograd.grad(truth, (p1, p2)), strict=False):
        constant = (true - slope).unflatten(1, (-1, UNITS))
        torch.testing.assert_close(constant, torch.full_like(constant, 1 / (len(p1) * 4)))


def test_the_costs_of_a_rank_are_what_its_exchanges_and_products_add_up_to() -> None:
    """Rank 0 of W, by a list of what it sends to each of the others and of the products that it
    forms."""
    for ranks, entry in ((2, 4), (4, 2)):
        samples, dim = 24, 40
        mine, columns = samples // ranks, dim // ranks
        others = range(1, ranks)

        def multiply(a: int, b: int, c: int) -> int:
            return 2 * a * b * c

        gathered = sum(2 * mine * dim for _ in others)
        everything = multiply(dim, samples, dim) + 2 * multiply(mine, dim, dim)
        ring = sum(
            2 * dim * dim / ranks for _ in others
        )  # a chunk of the sum to the next rank, in each round of two
        own_samples = multiply(dim, mine, dim) + 2 * multiply(mine, dim, dim)
        shared = sum(mine * columns + mine * dim + mine * columns + mine * dim for _ in others)
        own_rows = (
            multiply(columns, samples, dim)
            + multiply(samples, dim, columns)
            + multiply(samples, columns, dim)
        )
        assert of_chapter(CHAPTER, "costs")(samples, dim, ranks, entry) == {
            "all compute all": (everything, entry * gathered),
            "add matrices": (own_samples, entry * ring),
            "share rows": (own_rows, entry * shared),
        }


def test_at_the_break_even_bandwidth_both_ways_take_equally_long() -> None:
    for ranks, dim, rate, entry in ((2, 40, 1e9, 4), (8, 64, 3e6, 2)):
        bandwidth = of_chapter(CHAPTER, "break_even_bandwidth")(rate, dim, ranks, entry)
        seconds = {
            way: operations / rate + sent / bandwidth
            for way, (operations, sent) in of_chapter(CHAPTER, "costs")(
                24, dim, ranks, entry
            ).items()
        }
        assert seconds["all compute all"] == pytest.approx(seconds["share rows"], rel=1e-12)


def test_block_rows_are_sums_over_their_cells() -> None:
    p1, p2 = codes()
    cells = table(p1, p2)
    for v, row in enumerate(of_chapter(CHAPTER, "block_rows")(p1, p2, UNITS).tolist()):
        mine = [
            cells[v * UNITS + b, c].item()
            for b in range(UNITS)
            for c in range(12)
            if c // UNITS != v
        ]
        assert row == pytest.approx(sum(x * math.log(x) for x in mine) / 3, abs=1e-12)


@pytest.mark.parametrize("drawn", [1, 2, 4, 5])
def test_the_variance_of_drawing_is_that_of_all_draws(drawn: int) -> None:
    x = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = [
        (x[list(chosen)].mean(0) - x.mean(0)).square().sum().item()
        for chosen in combinations(range(5), drawn)
    ]
    assert of_chapter(CHAPTER, "sampling_variance")(x, drawn).item() == pytest.approx(
        sum(draws) / len(draws), abs=1e-14
    )


def test_the_scatter_of_view_ones_gradient_is_known_beforehand() -> None:
    z = [
        torch.randn(
            7,
            12,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(seed),
            requires_grad=True,
        )
        for seed in (0, 1)
    ]
    rows = of_chapter(CHAPTER, "block_rows")(*(soft_discretize(view, UNITS) for view in z), UNITS)
    x = torch.stack([torch.autograd.grad(row, z[0], retain_graph=True)[0] for row in rows])
    for drawn in (1, 2, 3, 4):
        expected = (4 - drawn) / drawn * x.mean(0).square().sum()
        torch.testing.assert_close(
            of_chapter(CHAPTER, "sampling_variance")(x, drawn), expected, rtol=1e-12, atol=1e-18
        )


def test_the_collision_bound_is_the_log_of_the_mean_sum_of_squares_and_exact_for_even_cells() -> (
    None
):
    for p1, p2 in (codes(), [torch.full((4, 12), 1 / UNITS, dtype=torch.float64)] * 2):
        cells = table(p1, p2)
        squares = [
            cells[row, column].item() ** 2
            for row, column in product(range(12), repeat=2)
            if row // UNITS != column // UNITS
        ]
        bound = log_mean_collision(p1, p2, UNITS).item()
        assert bound == pytest.approx(math.log(sum(squares) / 12), abs=1e-12)
        assert bound >= entropies(cells)[1].item() - 1e-12
    assert bound == pytest.approx(entropies(cells)[1].item(), abs=1e-12)


def test_two_passes_leave_the_gradient_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 12)
    ).double()
    x1, x2 = torch.randn(2, 10, 5, dtype=torch.float64)
    loss = CrossJointEntropyLoss(UNITS)
    whole = loss(network(x1), network(x2)).total
    truth = torch.autograd.grad(whole, list(network.parameters()))
    value = of_chapter("15-full-scale", "two_passes")(
        network, list(zip(x1.split(4), x2.split(4), strict=False)), loss
    )
    torch.testing.assert_close(value, whole.detach())
    torch.testing.assert_close(tuple(weight.grad for weight in network.parameters()), truth)
