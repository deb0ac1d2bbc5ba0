"""Time and memory of the loss, side by side in one run: the bare matrix products, the streaming loss, the full matrix.

    python benchmarks/loss.py [--samples 2048] [--dim 8160] [--units 80] [--rounds 7] [--json PATH]

Time: forward and backward, rounds interleaved, medians, equal threads; figures are ratios to the three bare products
that any exact method must do. Memory: peak resident set of a process of its own beyond one that holds the inputs only.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from imsvd_core.loss import CrossJointEntropyLoss, cross_joint_entropy


def logits(samples: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, dim, generator=generator).mul_(2).requires_grad_() for _ in range(2)]


def bare_products(z1: torch.Tensor, z2: torch.Tensor, units: int, slab: int = 480) -> None:
    """P = Z1ᵀZ2, then Z2Pᵀ and Z1P, in slabs of rows: what is left of the loss without its elementwise work."""
    a, b = z1.detach(), z2.detach()
    cells, g1, g2 = a.new_empty(slab, a.shape[1]), torch.empty_like(a), torch.zeros_like(b)
    for start in range(0, a.shape[1], slab):
        rows = slice(start, min(start + slab, a.shape[1]))
        block = cells[:rows.stop - start]
        torch.mm(a[:, rows].T, b, out=block)
        torch.mm(b, block.T, out=g1[:, rows])
        g2.addmm_(a[:, rows], block)


def streaming(z1: torch.Tensor, z2: torch.Tensor, units: int) -> None:
    CrossJointEntropyLoss(units)(z1, z2).total.backward()
    z1.grad = z2.grad = None


def full_matrix(z1: torch.Tensor, z2: torch.Tensor, units: int) -> None:
    cross_joint_entropy(z1, z2, units).total.backward()
    z1.grad = z2.grad = None


def lean_matrix(z1: torch.Tensor, z2: torch.Tensor, units: int) -> None:
    """A careful full-matrix version: one block mask, no boolean gather, autograd for the rest."""
    variables = z1.shape[1] // units
    p1, p2 = (z.unflatten(1, (variables, units)).softmax(-1).flatten(1) for z in (z1, z2))
    cells = (p1.T @ p2 / len(z1)).view(variables, units, variables, units)
    mask = 1 - torch.eye(variables)[:, None, :, None]
    off_diagonal = (torch.special.xlogy(cells, cells) * mask).sum() / (variables * (variables - 1))
    occupancy = (p1 * p2).mean(0)
    diagonal = torch.special.xlogy(occupancy, occupancy).sum() / variables
    inner = (p1 * p2).unflatten(1, (variables, units)).sum(-1)
    (diagonal + off_diagonal - inner.log().mean()).backward()
    z1.grad = z2.grad = None


CONTENDERS = {f.__name__: f for f in (bare_products, streaming, lean_matrix, full_matrix)}


def peak_bytes(name: str | None, args: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--child", name or "inputs", "--samples", args.samples, "--dim", args.dim,
               "--units", args.units]
    return int(subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("samples", 2048), ("dim", 8160), ("units", 80), ("rounds", 7)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        z1, z2 = logits(args.samples, args.dim)
        if args.child != "inputs":
            CONTENDERS[args.child](z1, z2, args.units)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return

    inputs = peak_bytes(None, args)  # before this process grows: a child inherits its parent's peak
    memory = {name: peak_bytes(name, args) - inputs for name in CONTENDERS}

    z1, z2 = logits(args.samples, args.dim)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for round_ in range(args.rounds + 1):
        for name, run in CONTENDERS.items():
            start = time.perf_counter()
            run(z1, z2, args.units)
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    floor = statistics.median(seconds["bare_products"])
    figures = {name: {"time_over_products": round(statistics.median(seconds[name]) / floor, 3),
                      "paired_ratio": round(statistics.median(a / b for a, b in zip(seconds[name], seconds["bare_products"])), 3),
                      "peak_over_full_matrix": round(memory[name] / memory["full_matrix"], 3),
                      "peak_over_lean_matrix": round(memory[name] / memory["lean_matrix"], 3),
                      "extra_peak_MB": round(memory[name] / 1e6)} for name in CONTENDERS}
    setting = {"samples": args.samples, "dim": args.dim, "units": args.units, "threads": torch.get_num_threads(),
               "rounds": args.rounds, "torch": torch.__version__}
    print(json.dumps({"setting": setting, "figures": figures}, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
