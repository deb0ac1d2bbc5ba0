"""What a step costs: whole steps, waiting included, the warm-up not; among ranks the mean time and
the greatest memory."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imsvd_core.data.memory import ImageData
from imsvd_core.engine.trainer import Trainer
from imsvd_core.recipes import Recipe, recipe
from imsvd_core.runs import bench as efficiency
from imsvd_core.runs.bench import bench_step
from imsvd_core.system import signals


def images(split: str, n: int) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    return ImageData(
        "drawn",
        "drawn",
        split,
        torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8),
        torch.arange(n) % 2,
        ("a", "b"),
    )


def small() -> tuple[Recipe, dict]:
    """Three steps an epoch, for one epoch."""
    smoke = recipe("cifar10", "smoke")
    knn = replace(smoke.knn, neighbors=(5,), gallery=None, queries=None)
    loop = replace(smoke.loop, epochs=1, batch_size=8, precision="fp32", device="cpu")
    network = replace(smoke.network, cifar_stem=False)
    return (
        replace(smoke, samples=None, network=network, knn=knn, watch=knn, loop=loop),
        {"data": (images("train", 30), images("test", 10)), "progress": False},
    )


def clock(monkeypatch, *marks: float) -> None:
    told = iter(marks)
    monkeypatch.setattr(
        efficiency,
        "_clock",
        lambda device: (lambda: next(told), lambda before, after: after - before),
    )


def test_the_figures_are_those_of_the_counted_steps(monkeypatch):
    clock(monkeypatch, 10, 11, 12, 14, 20)  # steps of 1, 1, 2 and 6 seconds
    one, rest = small()
    found = bench_step(one, steps=4, warmup=3, **rest)
    assert (found["step_seconds"], found["step_seconds_quartiles"], found["step_seconds_mean"]) == (
        1.5,
        [1, 3],
        2.5,
    )
    assert found["images_per_second"] == 8 / 2.5
    assert found["hours_per_100_epochs"] == pytest.approx(100 * 3 * 2.5 / 3600, rel=1e-3)
    assert found["steps_per_epoch"] == 3
    assert (found["steps"], found["warmup"], found["ranks"], found["train_images"]) == (4, 3, 1, 30)
    assert (found["method"], found["backbone"], found["data"], found["streamed"]) == (
        "imsvd",
        "narrow",
        "drawn",
        False,
    )


def test_a_step_is_whole_with_its_wait_for_the_input(monkeypatch):
    views, now = ImageData.views, [0]

    def waiting(self, *args, **kwargs):
        for number, batch in enumerate(views(self, *args, **kwargs)):
            now[0] += 2 if number else 1000  # the first decodes much
            yield batch

    monkeypatch.setattr(ImageData, "views", waiting)
    monkeypatch.setattr(
        efficiency, "_clock", lambda device: (lambda: now[0], lambda before, after: after - before)
    )
    one, rest = small()
    found = bench_step(one, steps=3, warmup=1, **rest)
    assert found["step_seconds_quartiles"] == [2, 2]
    assert found["step_seconds_mean"] == 2


def test_a_clock_counts_seconds():
    mark, between = efficiency._clock(torch.device("cpu"))
    before = mark()
    time.sleep(0.05)
    assert 0.05 <= between(before, mark()) < 5


def test_nothing_is_saved_and_nothing_left(monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "_write_checkpoint", lambda self: 1 / 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one, rest = small()
    bench_step(one, steps=5, warmup=2, **rest)
    assert not list(tmp_path.iterdir())


def test_the_process_tells_its_own_peak_of_memory():
    one, rest = small()
    found = bench_step(one, steps=2, warmup=1, **rest)
    peak = (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        * 1024
        / 1e9
    )
    assert found["peak_resident_GB"] == pytest.approx(peak, abs=0.02)


def on_a_rank(rank: int, size: int) -> dict:
    told = iter([0, 1, 2] if rank == 0 else [0, 3, 6])
    efficiency._clock = lambda device: (lambda: next(told), lambda before, after: after - before)
    efficiency._memory = lambda device: {"peak_resident_GB": 1.0 + rank}
    one, rest = small()
    return bench_step(one, steps=2, warmup=1, **rest)


def test_ranks_tell_their_mean_time_and_their_greatest_memory(ranks):
    first, second = ranks(on_a_rank, 2)
    assert first == second
    assert first["ranks"] == 2
    assert first["step_seconds"] == first["step_seconds_mean"] == 2
    assert first["images_per_second"] == 4
    assert first["peak_resident_GB"] == 2


def test_told_to_stop_it_measured_nothing(monkeypatch):
    train_one = Trainer.take_step

    def told(self, batches):
        if self.step == 3:
            os.kill(os.getpid(), signals._SIGNALS[0])
        return train_one(self, batches)

    monkeypatch.setattr(Trainer, "take_step", told)
    one, rest = small()
    with signals.handle_stop_signals(), pytest.raises(signals.Stopped, match="after 2 of 8 steps"):
        bench_step(one, steps=8, warmup=2, **rest)


@pytest.mark.parametrize("settings", [{"steps": 1}, {"warmup": 0}])
def test_too_few_steps_are_refused(settings):
    one, rest = small()
    with pytest.raises(ValueError, match=r"steps=.* must be at least 2, and warmup=.* at least 1"):
        bench_step(one, **settings, **rest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_by_its_own_clock():
    one, rest = small()
    start = time.perf_counter()
    one = replace(one, loop=replace(one.loop, device="cuda"))
    found = bench_step(one, steps=10, warmup=3, **rest)
    assert 0 < 10 * found["step_seconds_mean"] < time.perf_counter() - start
    assert 0 < found["peak_allocated_GB"] <= found["peak_reserved_GB"]
