"""Where a training step's time goes: views, network, loss; on a GPU also two-view images a second.

    python benchmarks/training.py [--recipe cifar10] [--scale laptop] [--steps 8] [--rounds 3]
                                  [--compile] [--json PATH]

Whole steps run through the trainer, as in `imsvd pretrain`; the parts are timed apart, forward
and backward, on the same batch, rounds interleaved, medians. Shares are of the parts' sum; the
trainer's own work is what a step takes beyond it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from imsvd_core.data import ImageData
from imsvd_core.recipes import recipe
from imsvd_core.results import provenance, write_result
from imsvd_core.runs.pretrain import Pretraining
from imsvd_core.system.devices import PRECISIONS, pick_device


def timed(work: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def parts(run: Pretraining) -> dict[str, Callable[[], object]]:
    """Views, network and loss of one batch, each by itself."""
    if not isinstance(run.train, ImageData):
        raise SystemExit(f"{run.train.title} is streamed: take a recipe with images in memory")
    device, precision = run.device, PRECISIONS[run.recipe.loop.precision]
    generator = torch.Generator(device).manual_seed(0)
    images = run.train.images[: run.recipe.loop.batch_size].to(device)
    x1, x2 = run.views(images, generator)

    def network() -> None:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            z1, z2 = run.network(x1, x2)
        torch.autograd.backward((z1, z2), (torch.ones_like(z1), torch.ones_like(z2)))
        run.network.zero_grad(set_to_none=True)

    with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision is not None):
        z = run.network(x1, x2)
    logits = [part.detach().requires_grad_() for part in z]
    return {
        "views": lambda: run.views(images, generator),
        "network": network,
        "loss": lambda: run.method.loss(*logits)["loss"].backward(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--scale", default="laptop")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the network")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    begin = time.perf_counter()
    config = recipe(args.recipe, args.scale)
    config = replace(config, loop=replace(config.loop, compile=args.compile, log_every=10**6))
    device = pick_device(config.loop.device)
    with tempfile.TemporaryDirectory() as folder:
        run = Pretraining(config, folder, progress=False)
        steps = iter(run)
        list(islice(steps, max(2, args.steps // 4)))  # warms up
        seconds: dict[str, list[float]] = {
            name: [] for name in ("step", "views", "network", "loss")
        }
        for _ in range(args.rounds):
            seconds["step"].append(
                timed(lambda: list(islice(steps, args.steps)), device) / args.steps
            )
            for name, work in parts(run).items():
                work()  # compiles and fills caches
                seconds[name].append(min(timed(work, device) for _ in range(3)))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    whole = sum(median[name] for name in ("views", "network", "loss"))
    figures: dict[str, float | str] = {
        f"{name}_share": round(median[name] / whole, 4) for name in ("views", "network", "loss")
    }
    figures |= {
        "step_over_parts": round(median["step"] / whole, 3),
        "batch_size": config.loop.batch_size,
        "backbone": config.network.backbone,
        "dim": config.network.dim,
    }
    if device.type == "cuda":  # only there does an absolute time say something
        figures |= {
            "two_view_images_per_second": round(config.loop.batch_size / median["step"]),
            "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }
    setting = {
        "recipe": args.recipe,
        "scale": args.scale,
        "compile": args.compile,
        "steps": args.steps,
        "rounds": args.rounds,
    }
    print(json.dumps({"setting": setting, "figures": figures}, indent=1))
    if args.json:
        origin = provenance(
            config=config,
            seed=config.loop.seed,
            device=device,
            dataset=run.train.title,
            seconds=time.perf_counter() - begin,
        )
        write_result(
            args.json,
            f"benchmark-training-{device.type}",
            {"setting": setting, **figures},
            origin,
            overwrite=True,
        )


if __name__ == "__main__":
    main()
