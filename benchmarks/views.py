"""CPU time an image of CIFAR's two views: the usual PIL pipeline against ``imsvd_core.views``.

    python benchmarks/views.py [--batch 512] [--rounds 15] [--json PATH]

Both run in turn in one process on one thread, on the same 32x32 images; the figures are medians
over rounds of process CPU time. PIL starts from decoded PIL images and is not charged for
collating its tensors into a batch; ours starts from a uint8 batch and draws its parameters within
the time. The ratio is PIL's over ours. Without ``--json`` nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision import transforms

from imsvd_core.views import CIFAR_MEAN, CIFAR_STD, TwoViews, cifar_views


def pil_view() -> Callable[[Image.Image], torch.Tensor]:
    """One CIFAR view as a tutorial writes it."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(32, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
            transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
        ]
    )


def make_images(count: int) -> np.ndarray:
    """(count, 32, 32, 3) uint8: smooth random colours with a little noise."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 5)).astype(np.float32))
    smooth = (
        torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").permute(0, 2, 3, 1).numpy()
    )
    return (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)


def cpu_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=512, help="images a batch")
    parser.add_argument("--rounds", type=int, default=15, help="rounds; each times both once")
    parser.add_argument(
        "--json", type=Path, default=None, help="also write the figures to this file"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    array = make_images(arguments.batch)
    pictures = [Image.fromarray(image) for image in array]
    batch = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
    one_view, two_views, generator = (
        pil_view(),
        TwoViews(cifar_views()),
        torch.Generator().manual_seed(0),
    )
    contestants: dict[str, Callable[[], object]] = {
        "pil": lambda: [(one_view(picture), one_view(picture)) for picture in pictures],
        "ours": lambda: two_views(batch, generator),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(arguments.rounds + 1):
        for name, work in contestants.items():
            seconds = cpu_time(work)
            if round_number:  # the first round warms up
                times[name].append(1000 * seconds / arguments.batch)

    pil, ours = (statistics.median(times[name]) for name in ("pil", "ours"))
    ratios = sorted(p / o for p, o in zip(times["pil"], times["ours"], strict=True))
    result = {
        "pil_ms_per_image": pil,
        "ours_ms_per_image": ours,
        "ratio": pil / ours,
        "ratio_of_one_round": [ratios[0], ratios[-1]],
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "threads": 1,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
    }
    print(
        f"CPU time of two CIFAR views of an image: median of {arguments.rounds} rounds, "
        f"batch {arguments.batch}, one thread"
    )
    print(f"  torchvision on PIL {pil:8.4f} ms")
    print(f"  imsvd_core.views   {ours:8.4f} ms")
    spread = f"(in one round {ratios[0]:.1f} to {ratios[-1]:.1f})"
    print(f"  ratio              {pil / ours:8.1f}  {spread}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
