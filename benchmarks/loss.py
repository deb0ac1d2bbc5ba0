"""Time and memory of the loss, side by side in one run: the bare matrix products, the streaming
loss, the full matrix.

    python benchmarks/loss.py [--samples 2048] [--dim 8160] [--units 80] [--rounds 7] [--device
    cpu|cuda] [--json PATH]

Time: forward and backward, rounds interleaved, medians, equal threads; figures are ratios to the
three bare products of the same type that any exact method must do, and on a GPU milliseconds and
TFLOP/s of those 6ND² operations too. Memory beyond the inputs: on a CPU the peak resident set of a
process of its own, on a GPU the allocator's peak.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imsvd_core.loss import CrossJointEntropyLoss, cross_joint_entropy
from imsvd_core.results import provenance, write_result
from imsvd_core.variants import CollisionLoss


def logits(samples: int, dim: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(samples, dim, generator=generator).mul_(2).to(device).requires_grad_()
        for _ in range(2)
    ]


def bare_products(z1: Tensor, z2: Tensor, units: int, dtype: torch.dtype = torch.float32) -> None:
    """P = Z1ᵀZ2, then Z2Pᵀ and Z1P, in slabs of rows: what is left of the loss without its
    elementwise work.
    """
    a, b = z1.detach().to(dtype), z2.detach().to(dtype)
    slab = 480 if a.device.type == "cpu" else 4080
    cells, g1, g2 = a.new_empty(slab, a.shape[1]), torch.empty_like(a), torch.zeros_like(b)
    for start in range(0, a.shape[1], slab):
        rows = slice(start, min(start + slab, a.shape[1]))
        block = cells[: rows.stop - start]
        torch.mm(a[:, rows].T, b, out=block)
        torch.mm(b, block.T, out=g1[:, rows])
        g2.addmm_(a[:, rows], block)


def loss(z1: Tensor, z2: Tensor, units: int, make=CrossJointEntropyLoss, **settings) -> None:
    make(units, **settings)(z1, z2).total.backward()
    z1.grad = z2.grad = None


def full_matrix(z1: Tensor, z2: Tensor, units: int) -> None:
    cross_joint_entropy(z1, z2, units).total.backward()
    z1.grad = z2.grad = None


def lean_matrix(z1: Tensor, z2: Tensor, units: int) -> None:
    """A careful full-matrix version: one block mask, no boolean gather, autograd for the rest."""
    variables = z1.shape[1] // units
    p1, p2 = (z.unflatten(1, (variables, units)).softmax(-1).flatten(1) for z in (z1, z2))
    cells = (p1.T @ p2 / len(z1)).view(variables, units, variables, units)
    mask = 1 - torch.eye(variables, device=z1.device)[:, None, :, None]
    off_diagonal = (torch.special.xlogy(cells, cells) * mask).sum() / (variables * (variables - 1))
    occupancy = (p1 * p2).mean(0)
    diagonal = torch.special.xlogy(occupancy, occupancy).sum() / variables
    inner = (p1 * p2).unflatten(1, (variables, units)).sum(-1)
    (diagonal + off_diagonal - inner.log().mean()).backward()
    z1.grad = z2.grad = None


CONTENDERS: dict[str, Callable[..., Any]] = {
    "bare_products": bare_products,
    "bare_products_bf16": partial(bare_products, dtype=torch.bfloat16),
    "streaming": partial(loss, fused=False),
    "streaming_bf16": partial(loss, products="bf16", fused=False),
    "fused": partial(loss, fused=True),
    "fused_bf16": partial(loss, products="bf16", fused=True),
    "collision": partial(loss, make=CollisionLoss),
    "lean_matrix": lean_matrix,
    "full_matrix": full_matrix,
}
GPU_ONLY = ("fused", "fused_bf16")  # a CPU gains little and compiles for half a minute


def peak_bytes(name: str | None, args: argparse.Namespace) -> int:
    """Peak memory of one call, with its inputs; of the inputs alone for None."""
    if args.device == "cpu":
        command = [
            sys.executable,
            __file__,
            "--child",
            name or "inputs",
            "--samples",
            args.samples,
            "--dim",
            args.dim,
            "--units",
            args.units,
        ]
        return int(
            subprocess.run(
                list(map(str, command)), capture_output=True, text=True, check=True
            ).stdout
        )
    z = logits(args.samples, args.dim, args.device)
    torch.cuda.reset_peak_memory_stats()
    if name:
        CONTENDERS[name](*z, args.units)
    return torch.cuda.max_memory_allocated()


def timed(run: Callable[..., Any], z: list[Tensor], units: int) -> float:
    wait = torch.cuda.synchronize if z[0].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    run(*z, units)
    wait()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in (("samples", 2048), ("dim", 8160), ("units", 80), ("rounds", 7)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        z1, z2 = logits(args.samples, args.dim, "cpu")
        if args.child != "inputs":
            CONTENDERS[args.child](z1, z2, args.units)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return

    begin = time.perf_counter()
    names = [name for name in CONTENDERS if args.device == "cuda" or name not in GPU_ONLY]
    inputs = peak_bytes(None, args)  # before this process grows: a child inherits its parent's peak
    memory = {name: peak_bytes(name, args) - inputs for name in names}

    z = logits(args.samples, args.dim, args.device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(args.rounds + 1):
        for name in names:
            spent = timed(CONTENDERS[name], z, args.units)
            if round_:  # the first round warms up
                seconds[name].append(spent)
    figures = {name: _figures(name, seconds, memory, args) for name in names}
    setting = {"samples": args.samples, "dim": args.dim, "units": args.units, "rounds": args.rounds}
    print(json.dumps({"setting": setting, "figures": figures}, indent=1))
    if args.json:
        origin = provenance(
            config=setting,
            seed=0,
            device=args.device,
            dataset="random logits",
            seconds=time.perf_counter() - begin,
        )
        write_result(
            args.json,
            f"benchmark-loss-{args.device}",
            {"setting": setting, **figures},
            origin,
            overwrite=True,
        )


def _figures(
    name: str, seconds: dict[str, list[float]], memory: dict[str, int], args: argparse.Namespace
) -> dict[str, float]:
    median = {other: statistics.median(values) for other, values in seconds.items()}
    same_type = "bare_products_bf16" if name.endswith("bf16") else "bare_products"
    figures = {
        "time_over_fp32_products": median[name] / median["bare_products"],
        "time_over_products": median[name] / median[same_type],
        "paired_ratio": statistics.median(
            a / b for a, b in zip(seconds[name], seconds[same_type], strict=True)
        ),
        "peak_over_full_matrix": memory[name] / memory["full_matrix"],
        "peak_over_lean_matrix": memory[name] / memory["lean_matrix"],
        "extra_peak_MB": memory[name] / 1e6,
    }
    if args.device == "cuda":  # only there does an absolute time say something
        figures |= {
            "milliseconds": 1e3 * median[name],
            "TFLOP_per_s": 6e-12 * args.samples * args.dim**2 / median[name],
        }
    return {key: round(value, 3) for key, value in figures.items()}


if __name__ == "__main__":
    main()
