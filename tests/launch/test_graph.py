"""What a table needs, each piece once; what is finished stays, what is lost is done again, what is
on its way goes on."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from imsvd_core.commands.training import parse_pretraining
from imsvd_core.launch import queue
from imsvd_core.launch import reproduce as reproducing
from imsvd_core.launch.graph import Graph, Task, build, evaluation_hash, finished
from imsvd_core.launch.plan import plan, refusals
from imsvd_core.launch.reproduce import job_name, reproduce
from imsvd_core.launch.status import standings_of
from imsvd_core.launch.submit import NoRoom, Submission
from imsvd_core.recipes import recipe
from imsvd_core.results import write_json
from imsvd_core.system.cluster import LaunchConfig
from imsvd_core.system.config import full_hash, plain

DATA = ("--data", "attributes")


def task(name: str, *needs: str, out: Path = Path("out"), result: str | None = None) -> Task:
    run, kind = name.split("/")
    argv = ("pretrain", "cifar10") if kind == "pretrain" else ("evaluate", kind, str(out / run))
    return Task(name, argv, out / run, out / (result or f"{name}.json"), needs)


@pytest.mark.slow  # reads fifteen commands
def test_everything_is_fifteen_tasks_and_a_pretraining_that_several_need_is_one():
    graph = build((1, 2), (3,), "smoke", Path("out"), DATA)
    names = [one.name for one in graph]
    assert len(graph) == 15
    assert sum(name.endswith("/pretrain") for name in names) == 6
    assert (
        graph["imsvd-2-epochs/linear"].needs
        == graph["imsvd-2-epochs/knn"].needs
        == ("imsvd-2-epochs/pretrain",)
    )
    assert "vicreg-1-epoch/linear" in names
    assert "vicreg-1-epoch/knn" not in names
    assert len(build((2,), (), "smoke", Path("out"), DATA)) == 6
    assert [one.name for one in build((), (3,), "smoke", Path("out"), DATA)] == [
        "imsvd-2-epochs/pretrain"
    ]


def test_lengths_are_half_and_all_of_the_epochs_and_one_if_they_are_the_same():
    runs = {one.run_dir.name for one in build((1,), (), "full", Path("out"), DATA)}
    assert runs == {
        f"{method}-{epochs}-epochs"
        for method in ("imsvd", "vicreg", "barlow-twins")
        for epochs in (400, 800)
    }
    assert len(build((1, 2), (), "full", Path("out"), (*DATA, "--loop.epochs", "1"))) == 9


@pytest.mark.slow  # reads four commands
def test_a_pretraining_reads_its_command_as_the_settings_that_its_result_must_have(monkeypatch):
    monkeypatch.setenv("IMSVD_DATASET", "attributes")
    for one in build((1,), (), "smoke", Path("out"), ("--optim.lr", "0.003", "--loop.epochs", "6")):
        if one.argv[0] == "pretrain":
            command = parse_pretraining(one.argv[1:], "imsvd")
            assert plain(command.recipe) == one.settings
            assert command.run_dir == one.run_dir
            assert one.settings["optim"]["lr"] == 0.003
            assert one.settings["loop"]["epochs"] in (3, 6)
            assert (
                one.settings["data"] == "attributes"
            )  # what auto stands for is settled once, for all


@pytest.mark.parametrize(
    ("tables", "figures", "message"),
    [
        ((3,), (), "table=3 is not held here yet; there are table 1: "),
        ((), (9,), "figure=9 is not held"),
        ((), (), "neither a table nor a figure"),
    ],
)
def test_what_is_not_held_is_refused(tables, figures, message):
    with pytest.raises(ValueError, match=message):
        build(tables, figures, "smoke", Path("out"), DATA)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task("a/x", "b/x"), task("b/x", "a/x")], r"needs=\['b/x'\] of a/x are no tasks before"),
        (
            [task("b/x"), task("a/x", "c/x")],
            r"needs=\['c/x'\] of a/x are no tasks before it; there are: b/x",
        ),
        ([task("a/x"), task("a/x", result="other")], "name='a/x' is that of two tasks"),
        (
            [task("a/x", result="r"), task("b/x", result="r")],
            "result='out/r' is that of two tasks",
        ),
    ],
)
def test_a_graph_that_cannot_be_is_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        Graph(tasks)


def test_a_task_comes_after_what_it_needs():
    graph = build((1, 2), (3,), "smoke", Path("out"), DATA)
    order = [one.name for one in graph]
    assert all(order.index(need) < order.index(one.name) for one in graph for need in one.needs)


def test_a_graph_keeps_the_tasks_of_other_calls_in_its_file(tmp_path):
    build((2,), (), "smoke", tmp_path, DATA).save(tmp_path)
    whole = build((1, 2), (), "smoke", tmp_path, DATA)
    build((1,), (), "smoke", tmp_path, DATA).save(tmp_path)
    read = Graph.load(tmp_path)
    assert {one.name: one for one in read} == {one.name: one for one in whole}


def test_a_result_counts_if_its_run_had_the_settings_asked_for(tmp_path):
    first = next(iter(build((), (3,), "smoke", tmp_path, DATA)))
    assert not finished(first)
    write_json(
        first.run_dir / "config.json",
        {**first.settings, "loop": first.settings["loop"] | {"keep": 9}},
    )
    assert not finished(first)
    write_json(first.result, {})
    assert finished(first)  # how many checkpoints were kept is no matter
    write_json(
        first.run_dir / "config.json",
        {name: value for name, value in first.settings.items() if name != "on_corrupt"},
    )
    assert finished(first)  # nor is a setting that the run did not know yet
    write_json(first.run_dir / "config.json", {**first.settings, "samples": 99})
    with pytest.raises(
        ValueError,
        match=r"samples: 99 there, 256 asked for\): give the same ones, another --out, or remove",
    ):
        finished(first)
    first.result.unlink()
    assert not finished(first)  # a run that has left nothing is no loss
    (first.run_dir / "checkpoints").mkdir()
    (first.run_dir / "checkpoints" / "step-000000004.pt").touch()
    with pytest.raises(ValueError, match="samples: 99 there"):
        finished(first)


def test_an_evaluation_by_other_settings_is_refused(tmp_path):
    knn = build((2,), (), "smoke", tmp_path, DATA)["imsvd-2-epochs/knn"]
    write_json(knn.run_dir / "config.json", knn.settings)
    write_result(knn)
    assert finished(knn)
    write_result(knn, {**knn.settings, "knn": knn.settings["knn"] | {"neighbors": [7]}})
    with pytest.raises(
        ValueError, match=r"knn.json' was given by other settings than the run's own: remove it"
    ):
        finished(knn)


def test_an_evaluation_that_was_launched_by_itself_may_have_any_settings(tmp_path):
    svm = task("a/voc07-svm", out=tmp_path)
    write_json(svm.run_dir / "config.json", {"method": {"name": "imsvd"}})
    write_json(svm.result, {})
    assert finished(svm)


def test_an_evaluation_from_before_the_schemas_counts_while_its_settings_are_the_runs(tmp_path):
    knn = build((2,), (), "smoke", tmp_path, DATA)["imsvd-2-epochs/knn"]
    config = dict(knn.settings)
    del config["on_corrupt"]  # as if it had come later
    write_json(knn.run_dir / "config.json", config)
    for evaluation, ends in ((config["knn"], True), (config["knn"] | {"neighbors": [7]}, False)):
        origin = {"config_hash": full_hash({"evaluation": evaluation, "pretraining": config})}
        result = {"name": "x", "figures": {}, "provenance": origin}
        write_json(knn.result, result)
        if ends:
            assert finished(knn)
        else:
            with pytest.raises(ValueError, match="was given by other settings"):
                finished(knn)


# Submission, with a queue that answers as Slurm does


def write_result(one: Task, settings=None) -> None:
    origin = {
        "config_hash": evaluation_hash("knn", settings or one.settings) if one.settings else "",
        "seconds": 1,
    }
    write_json(one.result, {"name": "x", "figures": {}, "provenance": origin})


class Slurm:
    """Jobs {id: [name, state, reason]}, and what was sent and cancelled."""

    def __init__(self):
        self.jobs, self.sent, self.cancelled = {}, [], []

    def submit(self, argv, *, name, folder, config, code, after=()):
        number = str(100 + len(self.jobs))
        self.jobs[number] = [name, "PENDING", "Dependency" if after else "Priority"]
        self.sent.append(
            (name.split("@")[0], tuple(self.jobs[job][0].split("@")[0] for job in after), config)
        )
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{number}_submitted.pkl").touch()
        submission = Submission(
            name, tuple(argv), number, "slurm", str(folder), 1, "2026-01-01T00:00:00+00:00"
        )
        write_json(
            Path(folder) / "submission.json",
            {key: value for key, value in vars(submission).items() if key != "job"},
        )
        return submission

    def ask(self, jobs, names=()):
        return {
            number: queue.Entry(number, *facts)
            for number, facts in self.jobs.items()
            if facts[0] in names or jobs.get(number) == facts[0]
        }

    def number(self, name):
        return next(
            number
            for number, facts in reversed(self.jobs.items())
            if facts[0].startswith(f"{name}@")
        )

    def end(self, one, state):
        self.jobs[self.number(one.name)][1:] = [state, ""]
        if state == "COMPLETED":
            write_result(one)


@pytest.fixture
def slurm(monkeypatch):
    slurm = Slurm()
    monkeypatch.setattr(reproducing, "submit", slurm.submit)
    monkeypatch.setattr(queue, "ask", slurm.ask)
    monkeypatch.setattr(queue, "cancel", slurm.cancelled.append)
    return slurm


@pytest.fixture
def graph(tmp_path):
    return Graph(
        [
            task("a/pretrain", out=tmp_path),
            task("b/pretrain", out=tmp_path),
            task("a/linear", "a/pretrain", out=tmp_path),
            task("a/knn", "a/pretrain", out=tmp_path),
            task("b/knn", "b/pretrain", out=tmp_path),
        ]
    )


@pytest.fixture
def again(graph, tmp_path, slurm):
    """Call `reproduce` once more; what it sent then: {task: needs whose jobs it waits for}."""

    def call(**settings) -> dict[str, tuple[str, ...]]:
        before = len(slurm.sent)
        call.console = Console(record=True, width=200, file=io.StringIO())
        reproduce(graph, tmp_path, LaunchConfig(**settings), call.console)
        return {name: after for name, after, _ in slurm.sent[before:]}

    return call


def test_a_second_call_submits_what_failed_and_what_waited_for_it_alone(
    graph, slurm, again, tmp_path
):
    assert again() == {
        "a/pretrain": (),
        "b/pretrain": (),
        "a/linear": ("a/pretrain",),
        "a/knn": ("a/pretrain",),
        "b/knn": ("b/pretrain",),
    }
    assert again() == {}  # all is on its way
    slurm.end(graph["a/pretrain"], "FAILED")
    for name in ("a/linear", "a/knn"):
        slurm.end(graph[name], "CANCELLED")
    slurm.end(graph["b/pretrain"], "COMPLETED")
    (graph["a/pretrain"].folder / f"{slurm.number('a/pretrain')}_0_log.err").write_text(
        "it was so cold\n"
    )
    assert again() == {"a/pretrain": (), "a/linear": ("a/pretrain",), "a/knn": ("a/pretrain",)}
    assert (
        "it was so cold" in again.console.export_text()
        or "it was so cold" in (tmp_path / "said").read_text()
    )
    for one in graph:
        slurm.end(one, "COMPLETED")
    assert again() == {}
    assert "nothing left to do" in again.console.export_text()


def test_a_task_waits_for_the_job_that_is_on_its_way_already(graph, slurm, again):
    again()
    slurm.end(graph["a/knn"], "FAILED")
    slurm.jobs[slurm.number("a/pretrain")][1:] = ["RUNNING", ""]
    assert again() == {"a/knn": ("a/pretrain",)}
    slurm.end(graph["a/pretrain"], "COMPLETED")
    slurm.end(graph["a/knn"], "TIMEOUT")
    assert again() == {"a/knn": ()}


def test_a_job_that_we_were_cut_off_from_recording_is_replaced(graph, slurm, again):
    again()
    (graph["b/knn"].folder / "submission.json").unlink()
    number = slurm.number("b/knn")
    assert again() == {"b/knn": ("b/pretrain",)}
    assert slurm.cancelled == [number]


def test_a_job_that_waits_for_what_has_failed_is_replaced(graph, slurm, again):
    again()
    slurm.end(graph["b/pretrain"], "FAILED")
    number = slurm.number("b/knn")
    assert again() == {"b/pretrain": (), "b/knn": ("b/pretrain",)}
    assert slurm.cancelled == [number]


def test_an_evaluation_gets_one_process_and_one_gpu(slurm, again):
    again(nodes=4, gpus_per_node=8)
    configs = {name: config for name, _, config in slurm.sent}
    assert (configs["a/pretrain"].ranks, configs["a/knn"].ranks, configs["a/knn"].gpus) == (
        32,
        1,
        1,
    )


def test_what_is_on_its_way_otherwise_is_left_alone(graph, slurm, again, tmp_path):
    again()
    with pytest.raises(
        ValueError, match=r"executor='local': a/pretrain is on its way by slurm \(job 100\)"
    ):
        again(executor="local")
    other = Graph([replace(one, argv=(*one.argv, "--more")) for one in graph])
    with pytest.raises(ValueError, match="a/pretrain is on its way with other settings: stop it"):
        reproduce(other, tmp_path, LaunchConfig(), Console())


def test_nothing_is_submitted_while_another_call_is_at_work_or_slurm_is_silent(
    graph, slurm, again, monkeypatch, tmp_path
):
    def silent(*_):
        raise queue.NoAnswer("squeue failed: nobody there")

    def taken(folder):
        raise ValueError("in use")

    with monkeypatch.context() as patch:
        patch.setattr(queue, "ask", silent)
        with pytest.raises(ValueError, match="squeue failed: nobody there; nothing was submitted"):
            again()
    with monkeypatch.context() as patch:
        patch.setattr(reproducing, "RunFolder", taken)
        with pytest.raises(ValueError, match="in use"):
            again()
    assert not slurm.sent


def test_a_dry_run_does_nothing(graph, slurm, tmp_path):
    console = Console(record=True, width=200)
    reproduce(graph, tmp_path / "new", LaunchConfig(), console, dry_run=True)
    assert "would submit 5: a/pretrain" in console.export_text()
    assert not slurm.sent
    assert not (tmp_path / "new").exists()


def test_a_dry_run_sums_its_plans_up_in_words_and_says_what_would_be_refused(tmp_path):
    graph = build((1,), (), "smoke", tmp_path, (*DATA, "--loop.save-minutes", "60"))
    console = Console(record=True, width=200, file=io.StringIO())
    reproduce(graph, tmp_path, LaunchConfig(time="30"), console, dry_run=True)
    told = console.export_text()
    assert "6 trainings, on 1 process without GPU each" in told
    assert "steps     36" in told
    assert "time      unknown" in told
    assert re.search(r"disk +0\.\d GB for all, [\d,.]+ GB free", told)
    assert told.count("refused: time='30' leaves 28.0 minutes") == 1
    assert "Plan(" not in told
    for look in ("/dev/shm", "run folder", "disk", "data root", "inherited", "submission", "NCCL"):
        assert f"\n{look}: " in told


def test_runs_that_fit_the_disk_only_one_by_one_are_refused_together(graph, tmp_path):
    one = plan("cifar10", recipe("cifar10", "smoke"), LaunchConfig(), tmp_path)
    plans = [replace(one, disk_gb=6.0, disk_free_gb=10.0, refused=())] * 2
    assert refusals(plans) == ["all runs together need 12.0 GB, and 10.0 are free: make room"]
    assert not refusals(plans[:1])


def test_a_queue_that_holds_no_more_is_filled_and_the_rest_sent_later(
    graph, slurm, again, monkeypatch, tmp_path
):
    send, room = slurm.submit, 2

    def limited(argv, **settings):
        if sum(facts[1] == "PENDING" for facts in slurm.jobs.values()) >= room:
            raise NoRoom("the queue has no room (AssocMaxSubmitJobLimit): call again")
        return send(argv, **settings)

    monkeypatch.setattr(reproducing, "submit", limited)
    assert list(again()) == ["a/pretrain", "b/pretrain"]
    said = again.console.export_text()
    assert "2 submitted" in said
    assert (
        "3 wait: the queue has no room (AssocMaxSubmitJobLimit): call again, or give --wa" in said
    )
    assert again() == {}

    def one_ends(seconds):  # while it waits for room
        ends = next(one for one in graph if slurm.jobs[slurm.number(one.name)][1] == "PENDING")
        slurm.end(ends, "FAILED" if ends.name == "b/pretrain" else "COMPLETED")

    monkeypatch.setattr(reproducing.time, "sleep", one_ends)
    console = Console(record=True, width=200, file=io.StringIO())
    before = len(slurm.sent)
    assert reproduce(graph, tmp_path, LaunchConfig(), console, wait=True)
    sent = {name: after for name, after, _ in slurm.sent[before:]}
    assert sent == {"a/linear": (), "a/knn": ()}  # b/knn lacks what has failed


def test_a_job_s_name_is_its_task_s_and_its_folder_s_alone(graph, tmp_path):
    names = {job_name(one, out) for one in graph for out in (tmp_path, tmp_path / "other")}
    assert len(names) == 10
    assert not any("," in name for name in names)


# And for once in earnest, on this machine


@pytest.fixture
def pictures(tmp_path):
    """Two classes of drawn noise, 48 images each to train on and 16 to test."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 16)):
        for label in ("dark", "light"):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 160, (32, 32, 3), dtype=np.uint8) + 90 * (
                    label == "light"
                )
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


def test_debugging_goes_on_after_a_failure_in_this_process(tmp_path, pictures):
    first, knn = (
        one
        for one in build((2,), (), "smoke", tmp_path, ("--data", f"folder:{pictures}"))
        if one.name.startswith("imsvd")
    )
    (first.run_dir / "checkpoints").mkdir(parents=True)
    (first.run_dir / "checkpoints" / "step-000000001.pt").write_text("torn")
    console = Console(record=True, width=200, file=io.StringIO())
    assert not reproduce(Graph([first, knn]), tmp_path, LaunchConfig(executor="debug"), console)
    assert "2 tasks: 1 failed, 1 not run" in console.export_text()


@pytest.mark.slow  # five processes, one after the other, that import torch
def test_a_graph_that_runs_here_goes_on_where_a_failure_left_it(tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = (
        "--data",
        f"folder:{pictures}",
        "--samples",
        "64",
        "--loop.epochs",
        "1",
        "--knn.neighbors",
        "5",
        "--knn.gallery",
        "96",
        "--knn.queries",
        "32",
        "--watch.gallery",
        "32",
        "--watch.queries",
        "32",
        "--look",
        "32",
    )
    whole = build((2,), (), "smoke", tmp_path / "out", small)
    graph = Graph([one for one in whole if not one.name.startswith("barlow")])
    torn = graph["vicreg-1-epoch/pretrain"].run_dir / "checkpoints" / "step-000000001.pt"
    torn.parent.mkdir(parents=True)
    torn.write_text("torn")

    def call() -> dict[str, tuple[str, str]]:
        reproduce(graph, tmp_path / "out", LaunchConfig(executor="local"), Console())
        return {
            name: (one.state, one.words, " ".join(one.log), one.job)
            for name, one in standings_of(graph).items()
        }

    first = call()
    assert [first[one.name][0] for one in graph] == ["done", "done", "failed", "not run"]
    assert "none of the 1 checkpoints" in first["vicreg-1-epoch/pretrain"][2]
    assert first["vicreg-1-epoch/knn"][1] == "vicreg-1-epoch/pretrain failed"
    assert first["imsvd-1-epoch/knn"][1].startswith("kNN-5 ")
    torn.unlink()
    second = call()
    assert {state for state, *_ in second.values()} == {"done"}
    assert all(
        second[name] == first[name] for name in first if name.startswith("imsvd")
    )  # not run again
    assert second["vicreg-1-epoch/pretrain"][3] != first["vicreg-1-epoch/pretrain"][3]
