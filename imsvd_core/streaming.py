"""The loss as a stream: Eq. 11 and its gradient without the matrix, on one process or many.

`StreamedLoss` is the autograd function behind `CrossJointEntropyLoss`. It sweeps over the matrix
slab by slab, and over the samples chunk by chunk.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from imsvd_core.discretization import Units, merge_variables, split_variables, unit_counts
from imsvd_core.distributed import Exchange, of_first_rank
from imsvd_core.system.devices import bf16_is_fast

Invariance = Literal["inner_product", "cross_entropy"]
Products = Literal["fp32", "bf16", "auto"]

LARGEST_LOGIT = 1e30
# A CPU is fast on what its caches hold; a GPU on much at once.
#: Cells of the matrix held at once, at most: 16 and 128 MB in float32
SLAB_CELLS, GPU_SLAB_CELLS = 4_000_000, 32_000_000
#: Cells of a slab whose logarithms a CPU takes at once: 2 MB in float32
BLOCK_CELLS = 500_000
#: Columns that fill a cache line in float32: products of slabs that end within one are slower
LINE = 16
#: Entries of an N×D table worked on at once
CHUNK_ENTRIES, GPU_CHUNK_ENTRIES = 250_000, 16_000_000


#: Rows and columns of the matrix
Block = tuple[slice, slice]


class Settings(NamedTuple):
    units: int | tuple[int, ...]
    diagonal_weight: float
    off_diagonal_weight: float
    invariance_weight: float
    invariance: Invariance
    temperature: float
    gather_distributed: bool
    sampled_variables: int | None
    products: Products
    fused: bool | None


class StreamedLoss(torch.autograd.Function):
    """Value and both gradients in one sweep; backward only scales what forward has found.

    Everything per sample runs over chunks of rows, everything per pair over slabs of the matrix.
    Four tables are held whole: codes and gradients of both views. On W ranks the first view's two
    hold a W-th of the columns, of all samples; the second view's hold all columns of all samples.
    """

    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor, s: Settings) -> tuple[Tensor, ...]:
        counts = unit_counts(s.units, z1.shape[1])
        drawn, columns = _draw(counts, s, z1.device)
        ranks = Exchange(z1, sum(counts[v] for v in drawn), s.gather_distributed)

        p1, p2, occupancy, values, disagreement = _codes_of_batch(z1, z2, s, ranks)
        log_occupancy = occupancy.clamp_min(torch.finfo(occupancy.dtype).tiny).log()
        diagonal = occupancy.dot(log_occupancy) / len(counts)

        p1, p2 = ranks.to_columns(p1[:, columns]), ranks.gather(p2)
        tracked = any(ctx.needs_input_grad)
        sloped = tracked and s.off_diagonal_weight != 0
        value, g1, g2 = _off_diagonal_sweep(p1, p2, counts, ranks.own, drawn, sloped, s.fused)
        del p1, p2
        off_diagonal = ranks.sum(value)
        if tracked:
            g1, g2 = ranks.to_samples(g1), ranks.scatter_sum(g2)
            if s.sampled_variables:
                part, g1 = g1, torch.zeros_like(g2)
                g1[:, columns] = part
            _to_logits_(g1, g2, z1, z2, values, log_occupancy, drawn, ranks, s)
            ctx.save_for_backward(_within(g1, z1.dtype), _within(g2, z1.dtype))
        ctx.dtype = z1.dtype
        ctx.mark_non_differentiable(diagonal, off_diagonal, disagreement)
        total = (
            s.diagonal_weight * diagonal
            + s.off_diagonal_weight * off_diagonal
            + s.invariance_weight * disagreement
        )
        return total, diagonal, off_diagonal, disagreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The saved tables stay wide until the upstream factor (a GradScaler's, say)
        # has lifted them out of fp16's dust.
        return *((g * grad_total).to(ctx.dtype) for g in ctx.saved_tensors), None


def _codes_of_batch(
    z1: Tensor, z2: Tensor, s: Settings, ranks: Exchange
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes of both views (n, D), the mean of p¹p² (D,), disagreements (n, V), and their mean.

    Means are those of all ranks; the codes have the type that the products take.
    """
    wide, counts = _compute_dtype(z1), unit_counts(s.units, z1.shape[1])
    bf16 = s.products == "bf16" or (s.products == "auto" and bf16_is_fast(z1.device))
    product = torch.bfloat16 if bf16 and wide is torch.float32 else wide
    p1, p2 = (z.new_empty(z.shape, dtype=product) for z in (z1, z2))
    values = z1.new_empty(len(z1), len(counts), dtype=wide)
    occupancy, disagreement = _start(z1, z2), values.new_zeros(())
    codes, _, _ = kernels(s.fused, z1.is_cuda)
    for chunk in _row_chunks(z1, s):
        p1[chunk], p2[chunk], values[chunk], both = codes(z1[chunk], z2[chunk], s)
        disagreement += values[chunk].sum() / (len(counts) * ranks.samples)
        occupancy += both / ranks.samples
    return p1, p2, ranks.sum(occupancy), values, ranks.sum(disagreement)


def _off_diagonal_sweep(
    p1: Tensor,
    p2: Tensor,
    counts: tuple[int, ...],
    own: range,
    drawn: Sequence[int] | None = None,
    sloped: bool = True,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `own` rows' part of OE, and N·∂(V(V−1)·OE)/∂p of both views, zeros unless `sloped`.

    p1 holds the own rows' columns, of the `drawn` variables (None: all); p2 all columns.
    """
    variables = range(len(counts)) if drawn is None else drawn
    *_, information = kernels(fused, p2.is_cuda)
    shift = _shift(p2, counts)
    value = p2.new_zeros((), dtype=_compute_dtype(p2))
    g1, g2 = (p.new_zeros(p.shape, dtype=_compute_dtype(p)) for p in (p1, p2))
    for rows, cells, logs, diagonal in _slabs(p2, counts, own, variables):
        _product(p1[:, rows].T, p2, out=cells)
        for block in diagonal:
            cells[block] = 0
        part, slopes = information(cells, logs, len(p2), shift, p2.dtype)
        value += part
        if sloped:
            for block in diagonal:
                slopes[block] = 0
            _product(p2, slopes.T, out=g1[:, rows])
            _add_product(g2, p1[:, rows], slopes)
    return value / (len(variables) * max(len(counts) - 1, 1)), g1, g2


def _slabs(
    table: Tensor, counts: tuple[int, ...], own: range, variables: Sequence[int]
) -> Iterator[tuple[slice, Tensor, Tensor, list[Block]]]:
    """The `own` rows slab by slab: their place, memory for cells and logarithms, diagonal blocks.

    The memory is used again for every slab. `table` holds all D columns.
    """
    dim = table.shape[1]
    step = max(1, min((GPU_SLAB_CELLS if table.is_cuda else SLAB_CELLS) // dim, dim // 8))
    step -= step % LINE if step > LINE else 0
    cells, logs = (table.new_empty(step, dim, dtype=_compute_dtype(table)) for _ in range(2))
    for first in range(own.start, own.stop, step):
        last = min(first + step, own.stop)
        rows, height = slice(first - own.start, last - own.start), last - first
        blocks = _diagonal_blocks(counts, variables, first, last)
        yield rows, cells[:height], logs[:height], blocks


def _diagonal_blocks(
    counts: tuple[int, ...], variables: Sequence[int], first: int, last: int
) -> list[Block]:
    """Where a slab of the block rows of `variables`, [first, last), meets their own columns."""
    edges = [0, *itertools.accumulate(counts)]
    tops = itertools.pairwise([0, *itertools.accumulate(counts[v] for v in variables)])
    return [
        (slice(max(top - first, 0), bottom - first), slice(edges[v], edges[v + 1]))
        for v, (top, bottom) in zip(variables, tops, strict=True)
        if top < last and first < bottom
    ]


def _shift(p: Tensor, counts: tuple[int, ...]) -> float:
    """log P at uniform codes, which bf16 slopes are carried from: what is rounded is then near 0.

    The softmax feels no constant: the reason, too, why slopes are log P and not 1 + log P.
    """
    return 2 * math.log(len(counts) / p.shape[1]) if p.dtype is torch.bfloat16 else 0.0


def _to_logits_(
    g1: Tensor,
    g2: Tensor,
    z1: Tensor,
    z2: Tensor,
    values: Tensor,
    log_occupancy: Tensor,
    drawn: Sequence[int],
    ranks: Exchange,
    s: Settings,
) -> None:
    """Turn OE's slopes in the codes into W times the total's gradients in the logits, in place."""
    variables = values.shape[1]
    of_pairs = s.off_diagonal_weight / (max(variables - 1, 1) * (len(drawn) / variables))
    of_all = ranks.size / (variables * ranks.samples * s.temperature)
    slope = s.diagonal_weight * (1 + log_occupancy)
    _, gradient_, _ = kernels(s.fused, z1.is_cuda)
    for chunk in _row_chunks(z1, s):
        tables = (table[chunk] for table in (g1, g2, z1, z2, values))
        gradient_(*tables, slope, of_pairs, of_all, s)


def _draw(
    counts: tuple[int, ...], s: Settings, device: torch.device
) -> tuple[Sequence[int], Tensor | slice]:
    """The variables whose block rows are swept, the same on all ranks, and their columns."""
    if s.sampled_variables is None:
        return range(len(counts)), slice(None)
    order = torch.randperm(len(counts)).to(device)
    order = of_first_rank(order) if s.gather_distributed else order
    drawn = sorted(order[: s.sampled_variables].tolist())
    columns = torch.arange(sum(counts)).split(counts)
    return drawn, torch.cat([columns[v] for v in drawn]).to(device)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, wide. Of bf16 tables the sums inside are fp32; a CPU rounds them to bf16."""
    if a.dtype is not torch.bfloat16:
        return torch.mm(a, b, out=out)
    result = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b)
    return result.float() if out is None else out.copy_(result)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return total.addmm_(a, b) if a.dtype is total.dtype else total.add_(_product(a, b))


# Elementwise work: three functions, plain or, for a GPU, each compiled into few kernels


@lru_cache(maxsize=6)
def kernels(fused: bool | None, is_cuda: bool) -> tuple[Callable[..., Any], ...]:
    """`_codes`, `_gradient_` and `_information`: the same numbers but for the order of sums."""
    if is_cuda if fused is None else fused:
        return tuple(torch.compile(kernel) for kernel in (_codes, _gradient_, _information))
    return _codes, _gradient_, _information_in_place


def _codes(z1: Tensor, z2: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some samples: codes of both views, disagreements (n, V), and the sum of p¹p² (D,)."""
    log_p1, log_p2, p1, p2 = _both_codes(z1, z2, s)
    disagreement = _inner_product if s.invariance == "inner_product" else _cross_entropy
    return p1, p2, disagreement(log_p1, log_p2, p1, s.units), (p1 * p2).sum(0)


def _gradient_(
    g1: Tensor,
    g2: Tensor,
    z1: Tensor,
    z2: Tensor,
    value: Tensor,
    slope: Tensor,
    of_pairs: float,
    of_all: float,
    s: Settings,
) -> None:
    """∂(total)/∂z of some samples, written over the sweep's slopes g.

    value: their disagreements (n, V); slope: of DE in its cells (D,).
    """
    log_p1, log_p2, p1, p2 = _both_codes(z1, z2, s)
    if s.invariance == "inner_product":
        d1, d2 = _inner_product_slopes(log_p1, log_p2, p1, p2, value, s.units)
    else:
        d1, d2 = _cross_entropy_slopes(log_p2, p1, p2, s.units)
    for g, d, p, other in ((g1, d1, p1, p2), (g2, d2, p2, p1)):
        g.mul_(of_pairs).addcmul_(other, slope)
        torch.add(_through_softmax(p, g, s.units), d.mul_(s.invariance_weight), out=g).mul_(of_all)


def _information(
    cells: Tensor, logs: Tensor, samples: int, shift: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Σ P log P with 0 log 0 = 0, and log P less `shift`, in `dtype`; P = cells / samples."""
    cells = cells / samples
    logs = cells.clamp_min(torch.finfo(cells.dtype).tiny).log()
    return (cells * logs).sum(), (logs - shift).to(dtype)


def _information_in_place(
    cells: Tensor, logs: Tensor, samples: int, shift: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`_information` block by block, which spoils `cells` and writes into `logs`: no new slab."""
    rows = len(cells) if cells.is_cuda else max(1, BLOCK_CELLS // cells.shape[1])
    value = cells.new_zeros(())
    for first in range(0, len(cells), rows):
        part, log = cells[first : first + rows], logs[first : first + rows]
        torch.clamp(part.div_(samples), min=torch.finfo(part.dtype).tiny, out=log).log_()
        value += part.mul_(log).sum()
    return value, logs if dtype is logs.dtype else logs.sub_(shift).to(dtype)


# The two forms of TI: values (n, V), and slopes in the logits of both views (n, D)


def _inner_product(log_p1: Tensor, log_p2: Tensor, p1: Tensor, units: Units) -> Tensor:
    """−log⟨p¹, p²⟩, in logarithms throughout."""
    return -split_variables(log_p1 + log_p2, units, fill=-torch.inf).logsumexp(-1)


def _inner_product_slopes(
    log_p1: Tensor, log_p2: Tensor, p1: Tensor, p2: Tensor, value: Tensor, units: Units
) -> tuple[Tensor, Tensor]:
    both = split_variables(log_p1 + log_p2, units, fill=-torch.inf)
    shared = merge_variables(both.add_(value[..., None]).exp_(), units)
    return p1 - shared, p2 - shared


def _cross_entropy(log_p1: Tensor, log_p2: Tensor, p1: Tensor, units: Units) -> Tensor:
    """−Σ p¹ log p²."""
    return split_variables(-p1 * log_p2, units).sum(-1)


def _cross_entropy_slopes(
    log_p2: Tensor, p1: Tensor, p2: Tensor, units: Units
) -> tuple[Tensor, Tensor]:
    return _through_softmax(p1, -log_p2, units), p2 - p1


def _through_softmax(p: Tensor, g: Tensor, units: Units) -> Tensor:
    """∂/∂z from ∂/∂p, at temperature 1: p (g − ⟨p, g⟩) within every variable."""
    p, g = split_variables(p, units), split_variables(g, units)
    return merge_variables((g - (p * g).sum(-1, keepdim=True)).mul_(p), units)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What is computed with: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _both_codes(z1: Tensor, z2: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p of Eq. 1 for both views, and p."""
    log_p1, log_p2 = _log_codes(z1, s), _log_codes(z2, s)
    return log_p1, log_p2, log_p1.exp(), log_p2.exp()


def _log_codes(z: Tensor, s: Settings) -> Tensor:
    """Logits beyond ±1e30 are cut there: differences and sums stay finite."""
    scaled = z.to(_compute_dtype(z))
    scaled = scaled if s.temperature == 1 else scaled / s.temperature
    scaled = scaled.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    split = split_variables(scaled, s.units, fill=-torch.inf)
    return merge_variables(split.log_softmax(-1), s.units)


def _within(g: Tensor, dtype: torch.dtype) -> Tensor:
    """g cut at what fp16 holds, where it goes to fp16: TIC's gradient at extreme logits."""
    largest = torch.finfo(dtype).max
    return g.clamp_(-largest, largest) if dtype is torch.float16 else g


def _start(z1: Tensor, z2: Tensor) -> Tensor:
    """(D,) zeros to sum up from, or NaN if a logit is infinite or NaN.

    A network that overflowed must be seen, by a gradient scaler too.
    """
    overflow = sum(end - end for z in (z1, z2) for end in z.aminmax())
    return z1.new_zeros(z1.shape[1], dtype=_compute_dtype(z1)) + overflow


def _row_chunks(z: Tensor, s: Settings) -> list[slice]:
    """Rows worked on at once; a row is as wide as variables of the largest number of units."""
    counts = unit_counts(s.units, z.shape[1])
    entries = GPU_CHUNK_ENTRIES if z.is_cuda else CHUNK_ENTRIES
    step = max(1, entries // (len(counts) * max(counts)))
    return [slice(start, start + step) for start in range(0, len(z), step)]
