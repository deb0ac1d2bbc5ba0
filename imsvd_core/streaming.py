"""The loss as a stream: Eq. 11 and its gradient without the matrix, on one process or many.

`StreamedLoss` is the autograd function behind `CrossJointEntropyLoss`. It sweeps over the matrix slab by slab,
and over the samples chunk by chunk.
"""

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from imsvd_core.discretization import Units, merge_variables, split_variables, unit_counts
from imsvd_core.distributed import Exchange, of_first_rank

Invariance = Literal["inner_product", "cross_entropy"]
Products = Literal["fp32", "bf16"]


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

    Everything per sample runs over chunks of rows, everything per pair over slabs of the matrix. What is held whole are
    four tables: codes and gradients of both views. On W ranks the first view's two hold the rank's columns alone, of all
    samples, and are W times smaller; the second view's two hold all columns of all samples.
    """

    @staticmethod
    def forward(ctx, z1, z2, s: Settings):
        counts = unit_counts(s.units, z1.shape[1])
        wide = _wide(z1)
        rounded = s.products == "bf16" and wide is torch.float32
        product = torch.bfloat16 if rounded else wide
        chunks = _row_chunks(z1, len(counts) * max(counts))
        fused = z1.is_cuda if s.fused is None else s.fused
        codes, gradient, information = kernels(fused)
        drawn, columns = _draw(counts, s, z1.device)
        shared = z1.shape[1] if columns is None else len(columns)
        ranks = Exchange(z1, columns=shared, active=s.gather_distributed)

        p1, p2 = (z.new_empty(z.shape, dtype=product) for z in (z1, z2))
        disagreement = z1.new_zeros((), dtype=wide)
        occupancy = _start(z1, z2)
        for chunk in chunks:
            p1[chunk], p2[chunk], value, both = codes(z1[chunk], z2[chunk], s)
            disagreement += value / (len(counts) * ranks.samples)
            occupancy += both / ranks.samples
        ranks.sum(occupancy)
        ranks.sum(disagreement)
        log_occupancy = occupancy.clamp_min(torch.finfo(wide).tiny).log()
        diagonal = occupancy.dot(log_occupancy) / len(counts)

        wants_gradient = any(ctx.needs_input_grad)
        p1 = ranks.to_columns(p1 if columns is None else p1[:, columns])
        p2 = ranks.gather(p2)
        off_diagonal, g1, g2 = _off_diagonal_sweep(
            p1,
            p2,
            counts,
            ranks.own,
            drawn,
            wants_gradient and s.off_diagonal_weight != 0,
            information,
        )
        del p1, p2
        ranks.sum(off_diagonal)

        if wants_gradient:
            g1 = ranks.to_samples(g1)
            g2 = ranks.scatter_sum(g2)
            g1 = g1 if columns is None else _among_all(g1, columns, g2)
            slope = s.diagonal_weight * (1 + log_occupancy)
            pairs = max(len(counts) - 1, 1) * (len(drawn) / len(counts) if drawn else 1)
            scales = (
                s.off_diagonal_weight / pairs,
                ranks.size / (len(counts) * ranks.samples * s.temperature),
            )
            for chunk in chunks:
                g1[chunk], g2[chunk] = gradient(
                    z1[chunk], z2[chunk], g1[chunk], g2[chunk], slope, scales, s
                )
            ctx.save_for_backward(_within(g1, z1.dtype), _within(g2, z1.dtype))
            ctx.dtype = z1.dtype

        total = (
            s.diagonal_weight * diagonal
            + s.off_diagonal_weight * off_diagonal
            + s.invariance_weight * disagreement
        )
        ctx.mark_non_differentiable(diagonal, off_diagonal, disagreement)
        return total, diagonal, off_diagonal, disagreement

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *_):
        # The saved tables stay wide until the upstream factor (a GradScaler's, say)
        # has lifted them out of fp16's dust.
        return *((g * grad_total).to(ctx.dtype) for g in ctx.saved_tensors), None


def _off_diagonal_sweep(
    p1: Tensor,
    p2: Tensor,
    counts: tuple[int, ...],
    own: range,
    drawn: list[int] | None = None,
    wants_gradient: bool = True,
    information: "Information | None" = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `own` rows of the matrix: their part of OE, and N·∂(V(V−1)·OE)/∂p for both
    views, zeros where not wanted.

    p1 holds the own rows' columns alone, p2 all columns; the rows are those of the
    `drawn` variables (None: of all). Gradients are up to constants that the softmax
    cannot feel: ∂(P log P)/∂P = 1 + log P; the 1 adds the same to every unit of a
    variable, so log P alone is carried. For bf16 it is carried from its value at uniform
    codes on, which is such a constant too: what is rounded is then near zero.
    """
    (samples, dim), wide = p2.shape, _wide(p2)
    information = information or _information_in_place
    value, g2 = p1.new_zeros((), dtype=wide), None
    g1 = p1.new_zeros(p1.shape, dtype=wide)
    variables = range(len(counts)) if drawn is None else drawn
    if len(counts) > 1:
        uniform = 2 * math.log(len(counts) / dim) if p1.dtype is torch.bfloat16 else 0.0
        edges = [0, *itertools.accumulate(counts)]
        tops = itertools.accumulate((counts[v] for v in variables), initial=0)
        blocks = [(top, edges[v], edges[v + 1]) for top, v in zip(tops, variables)]
        most = GPU_SLAB_CELLS if p1.is_cuda else SLAB_CELLS
        step = max(1, min(most // dim, dim // 8))
        room, spare = _slabs(p2, step)  # used again for every slab
        for first in range(own.start, own.stop, step):
            last = min(first + step, own.stop)
            mine = slice(first - own.start, last - own.start)
            codes = p1[:, mine]
            rows = last - first
            cells = _product(codes.T, p2, out=room.narrow(0, 0, rows)).div_(samples)
            diagonal = [
                (slice(max(top - first, 0), top + right - left - first), slice(left, right))
                for top, left, right in blocks
                if top < last and first < top + right - left
            ]
            for block in diagonal:  # what the slab has of these counts for nothing
                cells[block] = 0
            logs, part = information(cells, uniform, p1.dtype, spare.narrow(0, 0, rows))
            value += part
            if wants_gradient:
                for block in diagonal:
                    logs[block] = 0
                _product(p2, logs.T, out=g1[:, mine])
                g2 = _product(codes, logs) if g2 is None else _add_product(g2, codes, logs)
    g2 = p2.new_zeros(p2.shape, dtype=wide) if g2 is None else g2
    return value / (len(variables) * max(len(counts) - 1, 1)), g1, g2


def _draw(
    counts: tuple[int, ...], s: Settings, device: torch.device
) -> tuple[list[int] | None, Tensor | None]:
    """The variables whose block rows are swept, the same on all ranks, and their columns; None for all."""
    if s.sampled_variables is None:
        return None, None
    order = torch.randperm(len(counts)).to(device)
    drawn = sorted(
        (of_first_rank(order) if s.gather_distributed else order)[: s.sampled_variables].tolist()
    )
    variable = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return drawn, torch.isin(variable, torch.tensor(drawn)).nonzero()[:, 0].to(device)


def _slabs(table: Tensor, rows: int) -> list[Tensor]:
    """Memory for `rows` rows of the matrix, of cells and of their logarithms."""
    return [table.new_empty(rows, table.shape[1], dtype=_wide(table)) for _ in range(2)]


def _among_all(part: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    """A table as wide as `like` with `part` in its columns and zeros in the others."""
    return torch.zeros_like(like).index_copy_(1, columns, part)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, wide. For bf16 tables the sums inside the product are fp32; a CPU rounds them to bf16 once, at the end."""
    if a.dtype is not torch.bfloat16:
        return torch.mm(a, b, out=out)
    result = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b)
    return result.float() if out is None else out.copy_(result)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return total.addmm_(a, b) if a.dtype is total.dtype else total.add_(_product(a, b))


# Elementwise work: three functions, plain or, for a GPU, each compiled into few kernels

Information = Callable[[Tensor, float, torch.dtype, Tensor], tuple[Tensor, Tensor]]


@lru_cache(maxsize=2)
def kernels(fused: bool) -> tuple[Callable, Callable, Information]:
    """(`_codes`, `_gradient`, `_information`), the same numbers either way but for the order of sums."""
    if not fused:
        return _codes, _gradient, _information_in_place
    return tuple(torch.compile(function) for function in (_codes, _gradient, _information))


def _codes(z1: Tensor, z2: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of some samples, the sum of their disagreements, and the sum of p1·p2 (D,)."""
    log_p1, log_p2 = (_log_codes(z, s.units, s.temperature) for z in (z1, z2))
    p1, p2 = log_p1.exp(), log_p2.exp()
    value, *_ = INVARIANCES[s.invariance](log_p1, log_p2, p1, p2, s.units, gradient=False)
    return p1, p2, value.sum(), (p1 * p2).sum(0)


def _gradient(
    z1: Tensor,
    z2: Tensor,
    g1: Tensor,
    g2: Tensor,
    slope: Tensor,
    scales: tuple[float, float],
    s: Settings,
) -> tuple[Tensor, Tensor]:
    """∂(total)/∂z of some samples, from what the sweep found (g1, g2) and the slope of DE in its cells (D,)."""
    log_p1, log_p2 = (_log_codes(z, s.units, s.temperature) for z in (z1, z2))
    p1, p2 = log_p1.exp(), log_p2.exp()
    _, d1, d2 = INVARIANCES[s.invariance](log_p1, log_p2, p1, p2, s.units)
    of_pairs, of_all = scales
    return tuple(
        (
            _through_softmax(p, (g * of_pairs).addcmul_(other, slope), s.units)
            + s.invariance_weight * d
        ).mul_(of_all)
        for p, other, g, d in ((p1, p2, g1, d1), (p2, p1, g2, d2))
    )


def _information(
    cells: Tensor, uniform: float, dtype: torch.dtype, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """log P less `uniform`, in `dtype`, and Σ P log P, with 0 log 0 = 0."""
    logs = cells.clamp_min(torch.finfo(cells.dtype).tiny).log()
    return (logs - uniform).to(dtype), (cells * logs).sum()


def _information_in_place(
    cells: Tensor, uniform: float, dtype: torch.dtype, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """`_information`, which spoils `cells` and writes into `spare`: no slab is made."""
    logs = torch.clamp(cells, min=torch.finfo(cells.dtype).tiny, out=spare).log_()
    value = cells.mul_(logs).sum()
    return logs if dtype is logs.dtype else logs.sub_(uniform).to(dtype), value


Agreement = tuple[
    Tensor, Tensor | None, Tensor | None
]  # per sample and variable (N, V); gradients in both logits (N, D)


def _inner_product(
    log_p1: Tensor, log_p2: Tensor, p1: Tensor, p2: Tensor, units: Units, gradient: bool = True
) -> Agreement:
    """−log⟨p¹, p²⟩, in logarithms throughout."""
    both = split_variables(log_p1 + log_p2, units, fill=-torch.inf)
    log_inner = both.logsumexp(-1, keepdim=True)
    value = -log_inner.squeeze(-1)
    if not gradient:
        return value, None, None
    shared = merge_variables((both - log_inner).exp_(), units)
    return value, p1 - shared, p2 - shared


def _cross_entropy(
    log_p1: Tensor, log_p2: Tensor, p1: Tensor, p2: Tensor, units: Units, gradient: bool = True
) -> Agreement:
    """−Σ p¹ log p²."""
    value = split_variables(-p1 * log_p2, units).sum(-1)
    if not gradient:
        return value, None, None
    return value, _through_softmax(p1, -log_p2, units), p2 - p1


INVARIANCES = {"inner_product": _inner_product, "cross_entropy": _cross_entropy}


def _through_softmax(p: Tensor, g: Tensor, units: Units) -> Tensor:
    """∂/∂z from ∂/∂p, at temperature 1: p (g − ⟨p, g⟩) within every variable."""
    p, g = split_variables(p, units), split_variables(g, units)
    return merge_variables(p * (g - (p * g).sum(-1, keepdim=True)), units)


def _wide(x: Tensor) -> torch.dtype:
    """What is computed with: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _log_codes(z: Tensor, units: Units, temperature: float) -> Tensor:
    """log p of Eq. 1. Logits beyond ±1e30 are cut there, so that differences and sums of them stay finite."""
    scaled = (z.to(_wide(z)) / temperature).clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)
    return merge_variables(split_variables(scaled, units, fill=-torch.inf).log_softmax(-1), units)


def _within(g: Tensor, dtype: torch.dtype) -> Tensor:
    """g cut at what fp16 can hold, if that is what it goes to: TIC's gradient at extreme logits. (bf16 holds all.)"""
    largest = torch.finfo(dtype).max
    return g.clamp_(-largest, largest) if dtype is torch.float16 else g


def _start(z1: Tensor, z2: Tensor) -> Tensor:
    """(D,) zeros to sum up from; NaN if a logit is infinite or NaN: a network that overflowed
    must be seen, by a scaler too."""
    spoilt = sum(end - end for z in (z1, z2) for end in z.aminmax())
    return z1.new_zeros(z1.shape[1], dtype=_wide(z1)) + spoilt


LARGEST_LOGIT = 1e30
# A CPU is fast on what its caches hold; a GPU on much at once.
SLAB_CELLS, GPU_SLAB_CELLS = (
    4_000_000,
    32_000_000,
)  # cells of the matrix held at once, at most: 16 and 128 MB in float32
CHUNK_ENTRIES, GPU_CHUNK_ENTRIES = 250_000, 16_000_000  # entries of an N×D table worked on at once


def _row_chunks(z: Tensor, width: int) -> list[slice]:
    step = max(1, (GPU_CHUNK_ENTRIES if z.is_cuda else CHUNK_ENTRIES) // width)
    return [slice(start, start + step) for start in range(0, len(z), step)]
