"""ImageNet's input, from files to a batch: the usual PIL pipeline against ``imsvd_core.data.tree``.

    python benchmarks/input.py [--root ROOT] [--images 128] [--rounds 7] [--workers 2] [--json PATH]

First the CPU time of a worker, an image, in turn in one process on one thread, on the same files
of original size: PIL reads, decodes and makes both views up to normalised tensors; ours reads,
decodes once and makes both crops as bytes. What ours leaves to the device, ``TwoViews.finish``,
is timed beside it. Then the throughput of both whole pipelines, a DataLoader each with equally
many workers, to float views on the device; "crops" is ours unfinished, which is what the workers
alone can feed to a device that is not their own CPU. Figures are medians over rounds; ratios are
PIL's time over ours, or our images per second over PIL's. ROOT holds JPEGs at any depth
($IMSVD_DATA/imagenet-samples by default). Without ``--json`` nothing is written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import transforms

from imsvd_core.data import sources
from imsvd_core.data.decoding import decode
from imsvd_core.data.tree import FolderImages
from imsvd_core.results import provenance, write_result
from imsvd_core.system.devices import pick_device
from imsvd_core.views import IMAGENET_MEAN, IMAGENET_STD, TwoViews, imagenet_views

VIEWS = TwoViews(imagenet_views())


class Blur:
    """Gaussian blur on a PIL image, as two-view pipelines write it."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=np.random.uniform(0.1, 2.0)))


def pil_view(blur: float, solarize: float) -> Callable[[Image.Image], torch.Tensor]:
    """One of VICReg's ImageNet views in torchvision's transforms of PIL images."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([Blur()], p=blur),
            transforms.RandomSolarize(128, p=solarize),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class PILViews(torch.utils.data.Dataset):
    """The pipeline to compare with: every image opened, converted and transformed twice."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.first, self.second = pil_view(1.0, 0.0), pil_view(0.1, 0.2)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with open(self.files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        return self.first(image), self.second(image)


def cpu_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, work in contestants.items():
            seconds = work()
            if number:
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]]) -> dict[str, float | list[float]]:
    each = sorted(p / o for p, o in zip(times["pil"], times["ours"], strict=True))
    return {
        "ratio": statistics.median(times["pil"]) / statistics.median(times["ours"]),
        "ratio_of_one_round": [each[0], each[-1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=sources.data_root() / "imagenet-samples",
        help="folder of JPEGs",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=128,
        help="images a round; files are repeated where there are fewer",
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds; each times everything once")
    parser.add_argument("--workers", type=int, default=2, help="processes of either DataLoader")
    parser.add_argument("--device", default="auto", help="where views are finished")
    parser.add_argument(
        "--json", type=Path, default=None, help="also write the figures to this file"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, n, rounds = pick_device(arguments.device), arguments.images, arguments.rounds

    begin = time.perf_counter()
    names = list(sources.scan(arguments.root)) if arguments.root.is_dir() else []
    if not names:
        print(
            f"{arguments.root} holds no JPEG, so nothing was timed: "
            "give --root, a folder with images of original size"
        )
        return
    names = [
        names[i * len(names) // n] if n <= len(names) else names[i % len(names)] for i in range(n)
    ]
    ours = FolderImages(
        "tree:samples",
        "samples",
        "train",
        arguments.root,
        np.array([os.fsencode(name) for name in names]),
        torch.zeros(n, dtype=torch.int64),
        ("",),
    )
    pil = PILViews([ours.file(i) for i in range(n)])
    files = [str(file) for file in pil.files]
    every, generator = list(range(n)), torch.Generator(device).manual_seed(0)
    crops = [
        crop.to(device)
        for crop in next(ours.crops(VIEWS, [(0, torch.arange(n))], seed=0, workers=0))
    ]
    finish = lambda: VIEWS.finish(crops, generator)  # noqa: E731

    worker = in_turn(
        {
            "pil": lambda: cpu_time(lambda: [pil[i] for i in every]),
            "ours": lambda: cpu_time(lambda: ours._read_crops(VIEWS.views, 0, (0, every))),
            "decode": lambda: cpu_time(lambda: [decode(file) for file in files]),
            "finish": lambda: wall_time(finish) if device.type != "cpu" else cpu_time(finish),
        },
        rounds,
    )

    # PIL's main process only waits; ours has the views to finish
    torch.set_num_threads(os.cpu_count() or 1)

    def run_ours(finished: bool = True) -> None:
        plan = enumerate(torch.arange(n).repeat(4).split(64))
        for pair in ours.crops(VIEWS, plan, seed=0, workers=arguments.workers, device=device):
            VIEWS.finish(pair, generator) if finished else pair

    def run_pil() -> None:
        loader = DataLoader(
            pil,
            64,
            sampler=every * 4,
            num_workers=arguments.workers,
            pin_memory=device.type == "cuda",
        )
        for x1, x2 in loader:
            x1.to(device, non_blocking=True), x2.to(device, non_blocking=True)

    whole = in_turn(
        {
            "pil": lambda: wall_time(run_pil),
            "ours": lambda: wall_time(run_ours),
            "crops": lambda: wall_time(lambda: run_ours(finished=False)),
        },
        rounds,
    )
    ms = {name: 1000 * statistics.median(times) / n for name, times in worker.items()}
    speed = {name: 4 * n / statistics.median(times) for name, times in whole.items()}
    result = {
        "worker": ratio(worker),
        "decode_share_of_ours": ms["decode"] / ms["ours"],
        "finish_over_worker": ms["finish"] / ms["ours"],
        "throughput": ratio(whole),
        "unfinished_over_pil": speed["crops"] / speed["pil"],
    }
    if device.type == "cuda":  # only there does an absolute figure say something
        result |= {"images_per_second": speed, "finish_ms_per_image": ms["finish"]}
    spread = "in one round {:.1f} to {:.1f}".format
    print(
        f"Two 224-pixel views of an image: median of {rounds} rounds, {n} images, "
        "one thread a worker"
    )
    print(
        f"  CPU time of a worker: PIL {ms['pil']:.2f} ms, ours {ms['ours']:.2f} ms "
        f"(decoding {ms['decode']:.2f} ms), "
        f"ratio {result['worker']['ratio']:.1f} ({spread(*result['worker']['ratio_of_one_round'])})"
    )
    print(f"  finishing both views on {device}: {ms['finish']:.2f} ms")
    print(
        f"  whole pipeline, {arguments.workers} workers: PIL {speed['pil']:.0f}, "
        f"ours {speed['ours']:.0f} images/s (unfinished {speed['crops']:.0f}), "
        f"ratio {result['throughput']['ratio']:.1f} "
        f"({spread(*result['throughput']['ratio_of_one_round'])})"
    )
    if arguments.json:
        setting = {
            "workers": arguments.workers,
            "images": n,
            "distinct_files": len(set(names)),
            "rounds": rounds,
        }
        origin = provenance(
            config=setting,
            seed=0,
            device=device,
            dataset=f"{len(set(names))} JPEGs of original size",
            seconds=time.perf_counter() - begin,
        )
        write_result(
            arguments.json,
            f"benchmark-input-{device.type}",
            {"setting": setting, **result},
            origin,
            overwrite=True,
        )


if __name__ == "__main__":
    main()
