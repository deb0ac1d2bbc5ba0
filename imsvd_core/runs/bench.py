"""What a pretraining costs on the device at hand: real steps of the loop, timed (the columns of
Table IV)."""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from imsvd_core.data.tree import FolderImages
from imsvd_core.distributed import Exchange
from imsvd_core.recipes import Recipe
from imsvd_core.runs.pretrain import Images, Pretraining
from imsvd_core.system.devices import device_name
from imsvd_core.system.progress import bar
from imsvd_core.system.signals import Stopped


def bench_step(
    recipe: Recipe,
    *,
    steps: int = 20,
    warmup: int = 5,
    data: tuple[Images, Images] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Time `steps` steps of a recipe's pretraining on its own data, after `warmup` that are not
    counted.

    A step is all of it: waiting for the input, views, network, loss, gradients exchanged, update.
    What compiles, is decoded ahead or fills caches at first belongs to the warm-up: let it be
    longer than what workers have ready. Nothing is saved. On a GPU the device's own clock tells,
    and the CPU may run ahead as ever. Among ranks all call this together; times are means over
    ranks, memory is of the rank that needs most.

    Args:
        data: (train, test), to spare loading them; by default the recipe's.

    Returns step_seconds, the median, with its quartiles and the mean; images_per_second, of all
    ranks, and hours_per_100_epochs of this data set, both from the mean; the greatest memory: on
    CUDA peak_allocated_GB and peak_reserved_GB of one GPU, elsewhere peak_resident_GB of one
    process since it started, without its workers; and what was timed. Raises ValueError unless
    steps >= 2 and warmup >= 1; `signals.Stopped` if it was told to stop.
    """
    if steps < 2 or warmup < 1:
        raise ValueError(f"steps={steps} must be at least 2, and warmup={warmup} at least 1")
    loop, length = replace(recipe.loop, log_every=10**9, save_every=0), warmup + steps
    quiet = replace(recipe, loop=loop)
    with tempfile.TemporaryDirectory() as folder:
        run = Pretraining(quiet, folder, data=data, progress=False, steps=length, saves=False)
        seconds = _time_steps(run, steps, warmup, progress)
    times = [*statistics.quantiles(seconds, n=4, method="inclusive"), statistics.fmean(seconds)]
    memory = _memory(run.device)
    row = torch.tensor([[*times, *memory.values()]], device=run.device)
    rows, order = Exchange(row).gather(row), run.trainer.order
    low, median, high, mean = rows.mean(0)[:4].tolist()
    peaks = rows.max(0).values[4:].tolist()
    return {
        "step_seconds": _digits(median),
        "step_seconds_quartiles": [_digits(low), _digits(high)],
        "step_seconds_mean": _digits(mean),
        "images_per_second": _digits(loop.batch_size / mean),
        "hours_per_100_epochs": _digits(100 * order.steps_per_epoch * mean / 3600),
        **{name: round(peak, 2) for name, peak in zip(memory, peaks, strict=True)},
        "device": device_name(run.device),
        "ranks": order.ranks,
        "steps": steps,
        "warmup": warmup,
        "method": recipe.method.name,
        "backbone": recipe.network.backbone,
        "batch_size": loop.batch_size,
        "precision": loop.precision,
        "data": run.train.title,
        "train_images": len(run.train),
        "steps_per_epoch": order.steps_per_epoch,
        "streamed": isinstance(run.train, FolderImages),
    }


def _time_steps(run: Pretraining, steps: int, warmup: int, progress: bool) -> list[float]:
    """The seconds of each step after the warm-up."""
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    mark, between = _clock(run.device)
    marks = []
    with bar("steps", warmup + steps, progress) as advance:
        for progressed in run:
            if progressed.step >= warmup:
                marks.append(mark())
            advance(1)
    if len(marks) <= steps:
        timed = max(0, len(marks) - 1)
        raise Stopped(f"stopped after {timed} of {steps} steps: nothing was measured")
    return [between(start, end) for start, end in pairwise(marks)]


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What marks the end of a step on the device, and what gives the seconds between two marks."""
    if device.type == "cuda":

        def mark() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            return event

        def between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1000

        return mark, between
    wait = torch.mps.synchronize if device.type == "mps" else lambda: None
    return lambda: wait() or time.perf_counter(), lambda start, end: end - start


def _memory(device: torch.device) -> dict[str, float]:
    """The most memory that was taken so far, in GB of 1e9 bytes."""
    if device.type == "cuda":
        return {
            "peak_allocated_GB": torch.cuda.max_memory_allocated(device) / 1e9,
            "peak_reserved_GB": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of macOS, kilobytes of Linux
    return {"peak_resident_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def _digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
