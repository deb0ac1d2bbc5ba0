"""The trainer: resumes exactly, stops on what is not finite, records what it did."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import chain

import pytest
import torch
from torch import nn

from imsvd_core.data.batch import Batch
from imsvd_core.engine import checkpoints
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.engine.order import stream_seed
from imsvd_core.engine.trainer import NonFiniteError, Trainer
from imsvd_core.methods.base import Method
from imsvd_core.system import devices, watchdog
from imsvd_core.system.config import plain
from imsvd_core.system.devices import pick_device
from imsvd_core.system.run_folder import RunFolder

CONFIG = LoopConfig(epochs=3, batch_size=4, precision="fp32", log_every=2, device="cpu")
SAMPLES = 22  # five steps an epoch, two samples left over
OPTIM = OptimConfig(lr=0.05)


class Regression(Method):
    """A small model with batch-norm and dropout that learns the sum of its inputs."""

    whole_batch = False

    def __init__(self, spoil=None):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(5, 1)
        )
        self.spoil, self.seen = spoil, []

    def embed(self, batch):
        self.seen.append(batch.indices.tolist())
        noisy, x = batch.views
        return self.model(noisy).squeeze(1), x.sum(1)

    def loss(self, predicted, truth):
        loss = (predicted - truth).square().mean()
        return {"loss": loss * (torch.nan if self.spoil == len(self.seen) - 1 else 1.0)}


class OneWeight(Method):
    """A single weight under a loss that a test gives."""

    whole_batch = False

    def __init__(self, model, loss_of):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def embed(self, batch):
        return (self.loss_of(self.model, batch.indices),)

    def loss(self, loss):
        return {"loss": loss}


def indices_alone(trainer):
    for _, indices in trainer.order.since(trainer.step):
        yield Batch((), indices, indices)


def make(run_dir, config=CONFIG, spoil=None, settings=None, **schedule):
    torch.manual_seed(0)
    method = Regression(spoil)
    trainer = Trainer(
        method, SAMPLES, config, OPTIM, run_dir, settings=settings, progress=False, **schedule
    )
    return trainer, method.model, method.seen


def noisy_batches(trainer):
    x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(7))
    for step, indices in trainer.order.since(trainer.step):
        noise = torch.randn(len(indices), 3, generator=trainer.order.generator(step))
        yield Batch((x[indices] + 0.1 * noise, x[indices]), indices, indices)


def steps(trainer):
    return trainer.train(noisy_batches(trainer))


def run(*args, stop_after=None, **kwargs):
    trainer, model, seen = make(*args, **kwargs)
    for count, _ in enumerate(steps(trainer), 1):
        if count == stop_after:
            break
    return trainer, model, seen


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def identical(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("save_every", [0, 1, 3])
@pytest.mark.parametrize("stop_after", [1, 4, 5, 9, 14])
def test_a_run_left_at_any_step_and_resumed_ends_bit_identical(tmp_path, save_every, stop_after):
    config = replace(CONFIG, save_every=save_every)
    _, whole, _ = run(tmp_path / "whole", config)
    run(tmp_path / "cut", config, stop_after=stop_after)
    torch.manual_seed(stop_after)  # what the process did in between must not matter
    trainer, resumed, _ = run(tmp_path / "cut", config)
    assert trainer.step == trainer.order.steps == 15
    assert identical(weights(whole), weights(resumed))

    def record(name):
        return [
            (line["step"], line["loss"])
            for line in map(json.loads, open(tmp_path / name / "metrics.jsonl"))
        ]

    assert record("cut") == record("whole")


def test_chance_without_a_generator_is_the_steps_own_too(tmp_path):
    """The model has dropout; a run killed before its first checkpoint starts over with the same
    masks."""
    ends = []
    for name, noise in (("first", 1), ("again", 2)):
        trainer, model, _ = make(tmp_path / name)
        torch.manual_seed(noise)
        list(steps(trainer))
        ends.append(weights(model))
    assert identical(*ends)


def test_more_data_do_not_resume_a_run(tmp_path, monkeypatch):
    run(tmp_path, stop_after=6)
    monkeypatch.setitem(globals(), "SAMPLES", 40)
    with pytest.raises(ValueError, match="samples: 22 before, 40 now"):
        make(tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train_and_resume_alike(tmp_path, precision):
    config = replace(CONFIG, precision=precision)
    undisturbed, whole, _ = run(tmp_path / "whole", config)
    run(tmp_path / "cut", config, stop_after=7)
    trainer, resumed, _ = run(tmp_path / "cut", config)
    assert identical(weights(whole), weights(resumed))
    assert (
        trainer.scaler.state_dict() == undisturbed.scaler.state_dict()
    )  # its count of good steps, too
    assert all(value.isfinite().all() for value in weights(whole).values())
    assert trainer.scaler.is_enabled() == (precision == "fp16")


def test_the_position_in_the_data_survives_a_torn_newest_checkpoint(tmp_path):
    config = replace(CONFIG, save_every=2, keep=3)
    _, whole, _ = run(tmp_path / "whole", config)
    run(tmp_path / "cut", config, stop_after=9)
    checkpoints.paths(tmp_path / "cut" / "checkpoints")[0].write_bytes(b"torn")
    _, resumed, _ = run(tmp_path / "cut", config)
    assert identical(weights(whole), weights(resumed))


def test_a_finished_run_trains_no_further_and_keeps_its_seconds(tmp_path):
    before, _, _ = run(tmp_path)
    assert make(tmp_path)[0].seconds == before.seconds > 0
    _, _, seen = run(tmp_path)
    assert seen == []


HOLDER = """
import sys
from imsvd_core.system.run_folder import RunFolder
run = RunFolder(sys.argv[1])
run.acquire()
print('held', flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_train_in_one_folder_and_a_killed_one_leaves_it_free(tmp_path):
    trainer, _, _ = run(
        tmp_path
    )  # its iteration has ended: the folder is free, though the trainer lives
    before = (tmp_path / "metrics.jsonl").read_text()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            ValueError, match=rf"{tmp_path.name}' is in use by process {other.pid} on "
        ):
            make(tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == before
        other.kill()
    training = make(tmp_path / "new")
    under_way = steps(training[0])
    next(under_way)
    refused = subprocess.run(
        [sys.executable, "-c", HOLDER, str(tmp_path / "new")],
        capture_output=True,
        text=True,
        input="",
    )
    assert f"in use by process {os.getpid()} on " in refused.stderr
    assert make(tmp_path)[0].step == trainer.step


def test_fp16_records_its_scale_and_the_steps_it_skipped(tmp_path):
    def make_fp16():
        def loss_of(model, indices):
            loss = model(torch.ones(4, 1)).float().square().mean()
            no_slope = (model.weight * 0).abs().sqrt().sum()  # 0, whose gradient is not finite
            return loss + no_slope if trainer.step in (0, 3) else loss

        method = OneWeight(nn.Linear(1, 1, bias=False), loss_of)
        config = replace(CONFIG, precision="fp16", log_every=1)
        trainer = Trainer(method, 8, config, OptimConfig(), tmp_path, progress=False)
        return trainer

    first = make_fp16()
    for progressed in first.train(indices_alone(first)):
        if progressed.step == 4:
            break
    again = make_fp16()
    list(again.train(indices_alone(again)))
    assert first.step == 4
    assert [line["skipped"] for line in again.records()] == [1, 1, 1, 2, 2, 2]
    assert [line["scale"] for line in again.records()] == [2.0**15] * 3 + [2.0**14] * 3


def test_every_epoch_visits_each_sample_once_in_a_new_order(tmp_path):
    _, _, seen = run(tmp_path)
    epochs = [[*chain(*seen[start : start + 5])] for start in (0, 5, 10)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("step", [0, 6, 14])
def test_nan_stops_with_its_step_and_the_last_good_checkpoint(tmp_path, step):
    with pytest.raises(NonFiniteError, match=rf"step {step} ") as error:
        run(tmp_path, spoil=step)
    saved = checkpoints.paths(tmp_path / "checkpoints")
    assert (saved[0].name in str(error.value)) if step > 5 else "no checkpoint" in str(error.value)
    assert all(
        torch.isfinite(value).all()
        for path in saved
        for value in checkpoints.load(path)["method"].values()
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_no_number_stops_too(tmp_path, precision):
    """At once in fp32; in fp16 when the scaler has searched in vain. What was logged until then is
    valid JSON."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    method = OneWeight(model, lambda model, _: model(torch.ones(4, 1)).abs().sqrt().sum())
    config = replace(CONFIG, batch_size=4, precision=precision, epochs=50)
    trainer = Trainer(method, 8, config, OptimConfig(), tmp_path, progress=False)
    with pytest.raises(NonFiniteError, match=r"step 0 " if precision == "fp32" else r"step 1\d "):
        list(trainer.train(indices_alone(trainer)))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))


@pytest.mark.parametrize(
    ("precision", "warmup", "spoil", "advice"),
    [
        ("bf16", 1, 3, "Lower the learning rate (optim.lr=0.05), or use precision='fp32'"),
        ("fp32", 1, 3, ". Lower the learning rate (optim.lr=0.05)"),
        (
            "fp32",
            0,
            3,
            "Lower the learning rate (optim.lr=0.05), or warm up (optim.warmup_epochs=0)",
        ),
        ("fp32", 1, 0, "No weight has moved yet: look at images and settings"),
        ("bf16", 1, 0, "Use precision='fp32'"),
    ],
)
def test_what_is_advised_against_nan_is_not_done_already(
    tmp_path, monkeypatch, precision, warmup, spoil, advice
):
    monkeypatch.setitem(globals(), "OPTIM", replace(OPTIM, warmup_epochs=warmup))
    with pytest.raises(NonFiniteError) as error:
        run(tmp_path, replace(CONFIG, precision=precision), spoil=spoil)
    assert str(error.value).endswith(advice)


def test_a_precision_that_this_cpu_would_emulate_is_warned_of(tmp_path, monkeypatch, caplog):
    for units, remedy in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(devices, "bf16_is_fast", lambda device, units=units: units)
        make(tmp_path / remedy, replace(CONFIG, precision="fp16"))
        assert "precision='fp16' has no units of its own on this cpu and takes" in caplog.text
        assert f"use precision='{remedy}'" in caplog.text
    caplog.clear()
    make(tmp_path / "fast", replace(CONFIG, precision="fp32"))
    assert "units" not in caplog.text


def test_a_training_that_hangs_ends_with_a_trace_and_a_slow_one_goes_on(
    tmp_path, monkeypatch, capfd
):
    ends = []
    monkeypatch.setattr(watchdog, "LINGER", 0)
    monkeypatch.setattr(watchdog.os, "_exit", ends.append)

    def hang_here(model, indices):
        time.sleep(0.1)
        if trainer.step == 7:
            assert not ends  # so slow, and yet on its way
            time.sleep(0.8)
        return model(torch.ones(4, 1)).square().mean()

    config = replace(CONFIG, epochs=4, patience_minutes=0.4 / 60)
    method, folder = OneWeight(nn.Linear(1, 1), hang_here), tmp_path / "run"
    trainer = Trainer(method, 8, config, OptimConfig(), folder, progress=False)
    list(trainer.train(indices_alone(trainer)))
    assert ends[0] == 1
    told = capfd.readouterr().err
    assert "rank 0 of 1 has made no progress for 0.00" in told
    assert "loop.patience_minutes is its patience" in told
    assert "in hang_here" in told


def test_accumulated_gradients_are_the_mean_over_the_pieces(tmp_path):
    ends = []
    means = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 1), torch.randn(8, 3)
        config = replace(CONFIG, batch_size=8, accumulate=accumulate)
        method = OneWeight(model, lambda model, i, x=x: model(x[i]).square().mean())
        optim, folder = OptimConfig(name="sgd", lr=0.1), tmp_path / str(accumulate)
        trainer = Trainer(method, 8, config, optim, folder, progress=False)
        progress = list(trainer.train(indices_alone(trainer)))
        means.append([progressed.metrics["loss"] for progressed in progress])
        ends.append(weights(model)["weight"])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-7)


def test_other_settings_do_not_resume_a_run(tmp_path):
    run(tmp_path, settings={"optim": {"lr": 1}}, stop_after=6)
    with pytest.raises(ValueError, match=r"optim.lr: 1 before, 2 now"):
        make(tmp_path, settings={"optim": {"lr": 2}})


@dataclass(frozen=True)
class Setting:
    shape: str = "round"
    added_later: int = 7


def test_a_setting_that_a_checkpoint_lacks_has_its_default(tmp_path):
    run(tmp_path, settings={"shape": "square"}, kind=Setting, stop_after=6)
    assert make(tmp_path, settings=plain(Setting("square")), kind=Setting)[0].step == 5
    with pytest.raises(ValueError, match="added_later: 7 before, 8 now"):
        make(tmp_path, settings=plain(Setting("square", 8)), kind=Setting)


def test_metrics_hold_step_epoch_rate_and_what_the_caller_records(tmp_path):
    trainer, _, _ = run(tmp_path)
    trainer.record(knn_20=51.5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 15]
    assert {"epoch", "lr", "loss", "grad_norm", "samples_per_second"} <= set(lines[0])
    assert lines[-1]["knn_20"] == 51.5
    assert trainer.records()[-1]["step"] == 15
    assert trainer.records("knn_20") == lines[-1:]


def test_what_the_caller_recorded_at_a_checkpoint_survives_and_a_torn_line_does_not(tmp_path):
    trainer, _, _ = run(tmp_path, stop_after=5)
    trainer.record(knn_20=51.5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    trainer, _, _ = make(tmp_path)
    assert [line["step"] for line in trainer.records("step")] == [2, 4, 5, 5]
    assert trainer.records("knn_20")


def test_tensorboard_has_every_point_once_over_a_resumption(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(CONFIG, log_every=1, save_every=2, epochs=1, tensorboard=True)
    run(tmp_path, config, stop_after=3)
    run(tmp_path, config)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_compiled_and_plain_runs_share_their_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: setattr(self, "compiled", True))
    trainer, _, _ = run(tmp_path, replace(CONFIG, epochs=1, compile=True))
    newest = checkpoints.newest(tmp_path / "checkpoints")
    assert trainer.method.compiled
    assert "model.0.weight" in checkpoints.load(newest)["method"]


def test_convolutions_are_laid_out_channels_last(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 1))
    Trainer(OneWeight(model, None), 8, CONFIG, OptimConfig(), tmp_path, progress=False)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_checkpoint_of_one_process_from_before_there_were_ranks_resumes(tmp_path):
    run(tmp_path, stop_after=6)
    path = checkpoints.newest(tmp_path / "checkpoints")
    state = checkpoints.load(path)
    del state["settings"]["world_size"]
    checkpoints.save(RunFolder(tmp_path), 5, state)
    assert make(tmp_path)[0].step == 5


def test_a_checkpoint_whose_parts_stood_by_name_resumes(tmp_path):
    run(tmp_path / "now", stop_after=6)
    _, whole, _ = run(tmp_path / "whole")
    path = checkpoints.newest(tmp_path / "now" / "checkpoints")
    state = checkpoints.load(path)
    parts = {name.removeprefix("model."): value for name, value in state.pop("method").items()}
    checkpoints.save(RunFolder(tmp_path / "then"), 5, state | {"modules": {"model": parts}})
    _, resumed, _ = run(tmp_path / "then")
    assert identical(weights(whole), weights(resumed))


def test_what_a_method_does_after_a_step_and_before_an_epoch_comes_in_its_place(tmp_path):
    calls = []
    trainer, _, seen = make(tmp_path, embed_all=lambda: torch.arange(22))
    trainer.method.after_step = lambda progress: calls.append((len(seen), round(15 * progress)))
    trainer.method.before_epoch = lambda embed_all: calls.append((len(seen), len(embed_all())))
    list(steps(trainer))
    after = [(step, step) for step in range(1, 16)]
    assert calls == [(0, 22), *after[:5], (5, 22), *after[5:10], (10, 22), *after[10:]]


def test_without_saving_nothing_is_left_to_resume(tmp_path):
    run(tmp_path, saves=False)
    assert make(tmp_path)[0].step == 0


def test_seeds_of_streams_differ_and_are_fixed():
    seeds = {
        stream_seed(seed, stream, number)
        for seed in range(5)
        for stream in ("order", "step")
        for number in range(50)
    }
    assert len(seeds) == 500
    assert stream_seed(0, "step", 1) == stream_seed(0, "step", 1)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(epochs=0),
        dict(batch_size=0),
        dict(batch_size=6, accumulate=4),
        dict(precision="fp8"),
        dict(keep=0),
        dict(log_every=0),
        dict(seed=-1),
        dict(epochs=2.5),
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoopConfig(**wrong)


def test_a_batch_larger_than_the_data_and_a_device_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size=23"):
        make(tmp_path, replace(CONFIG, batch_size=23))
    with pytest.raises(ValueError, match="device='tpu'"):
        pick_device("tpu")


def test_one_gpu_for_all_ranks_is_refused(monkeypatch):
    monkeypatch.setattr("imsvd_core.system.devices.world", lambda: (1, 2))
    with pytest.raises(
        ValueError, match="device='cuda:0' would put 2 ranks on one GPU: use 'cuda'"
    ):
        pick_device("cuda:0")


def test_steps_and_rate_of_a_schedule_that_counts_no_epochs(tmp_path):
    """12 steps of 5 an epoch: the last epoch is cut short, its end is saved, and the rate is what
    was asked for."""
    trainer, _, _ = make(tmp_path, steps=12, rate=lambda step: 0.5 / (step + 1))
    list(steps(trainer))
    assert trainer.step == 12
    assert (
        next(path.name for path in checkpoints.paths(tmp_path / "checkpoints"))
        == "step-000000012.pt"
    )
    assert trainer.records()[-1]["lr"] == pytest.approx(0.5 / 12)
