"""`imsvd launch`, `reproduce` and `status`: jobs, graphs of them, and where they stand."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from imsvd_core.commands.common import wide_console
from imsvd_core.commands.words import look_over, peek
from imsvd_core.system.cluster import LaunchConfig, load_profile
from imsvd_core.system.looks import looks
from imsvd_core.system.scale import Scale, current_scale

if TYPE_CHECKING:  # the functions import what imports torch: help and refusals do not wait for it
    from imsvd_core.launch.graph import Task
    from imsvd_core.recipes import Recipe


@dataclass(frozen=True)
class _ClusterCommand:
    config: Annotated[LaunchConfig, tyro.conf.arg(name="")]
    profile: str | None = None
    """Which cluster of ~/.config/imsvd/clusters.toml (or of the file IMSVD_CLUSTERS) the options
    start from; by default the one that it names as default."""


@dataclass(frozen=True)
class LaunchCommand(_ClusterCommand):
    """Send a recipe's training as a job: stopped, it saves, is queued again, and goes on.

    All other settings are those of `imsvd pretrain RECIPE --help`."""

    dry_run: bool = False
    """Print the batch script and the plan (hours, cost, memory, disk, what would be refused), and
    send nothing."""


@dataclass(frozen=True)
class ReproduceCommand(_ClusterCommand):
    """Tables and figures of the paper as a graph of jobs: pretrainings, then their evaluations.

    A run that several need is made once. Call it again to go on: what is finished or on its way
    stays, what failed is done again.

    All other settings are those of `imsvd pretrain RECIPE --help`, for all pretrainings alike."""

    table: tuple[Literal[1, 2], ...] = ()
    figure: tuple[Literal[3], ...] = ()
    all: bool = False
    """Every table and figure that is held."""
    scale: Scale = "laptop"
    """Which version of the recipes; IMSVD_SCALE by default."""
    out: Path | None = None
    """Folder of the runs; runs/reproduce-SCALE by default."""
    dry_run: bool = False
    """Show what would be done, and do nothing."""
    wait: bool = False
    """Where the queue holds as many jobs as it may, wait for room and send the rest. Without it the
    exit status is then 1, and the same call sends more."""


@dataclass(frozen=True)
class StatusCommand:
    """Where what was launched stands: live until all has ended; once if this is no terminal."""

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder of `imsvd reproduce`, run folder of `imsvd launch`, or the folder that holds such
    folders."""
    once: bool = False
    """Show it once, on a terminal too."""


def launch_of_pretraining(recipe_name: str, argv: Sequence[str]) -> "tuple[Task, Recipe]":
    """A pretraining that is to be a job, and its recipe."""
    from imsvd_core.commands.training import parse_pretraining
    from imsvd_core.data.sources import resolve
    from imsvd_core.launch.graph import Task

    command = parse_pretraining([recipe_name, *argv], "imsvd launch")
    run_dir: Path = command.run_dir.absolute()
    # of an option that is given twice the last one counts
    data = ("--data", resolve(command.recipe.data)) if command.recipe.data == "auto" else ()
    place = ("--scale", command.scale, *data, "--run-dir", str(run_dir), "--no-progress")
    words = ("pretrain", recipe_name, *argv, *place)
    return Task(run_dir.name, words, run_dir, run_dir / "result.json"), command.recipe


def launch_of_evaluation(argv: Sequence[str]) -> "Task":
    """An evaluation that is to be a job."""
    from imsvd_core.commands.training import parse_evaluation
    from imsvd_core.data.sources import resolve
    from imsvd_core.launch.graph import Task
    from imsvd_core.runs.evaluate import result_path

    command, trained, default = parse_evaluation(argv, "imsvd launch evaluate")
    run_dir = trained.folder.absolute()
    data = resolve(command.data) if command.data == "auto" else command.data
    result = run_dir / result_path(argv[0], trained, data, default.data).name
    place = ("--scale", command.scale, "--data", data, "--out", str(run_dir), "--no-progress")
    words = ("evaluate", *argv, *place)
    return Task(f"{run_dir.name}/{result.stem}", words, run_dir, result)


def launch(argv: Sequence[str]) -> None:
    """Send a training or an evaluation as a job."""
    default = LaunchCommand(load_profile(peek(argv, "--profile")))
    command, rest = tyro.cli(
        LaunchCommand,
        prog="imsvd launch RECIPE",
        args=argv[1:],
        default=default,
        return_unknown_args=True,
    )
    if argv[0] == "evaluate":
        look_over(["evaluate", *rest])  # now without the cluster's options
    from imsvd_core import launch as launcher
    from imsvd_core.data.sources import data_root
    from imsvd_core.launch.graph import Graph
    from imsvd_core.launch.status import standings_of

    config, recipe = command.config, None
    if argv[0] == "evaluate":
        job = launch_of_evaluation(rest)
    else:
        job, recipe = launch_of_pretraining(argv[0], rest)
    standing = standings_of(Graph([job]))[job.name]
    if standing.live or standing.state == "unknown":
        raise ValueError(
            f"run_dir={str(job.run_dir)!r} has a job on its way, {standing.job} "
            f"({standing.words}): wait for its end, stop it, or give another folder"
        )
    code = job.run_dir / "code"
    if command.dry_run and config.executor == "slurm":
        print(launcher.batch_script(job.name, job.folder, config, code))
    # how long evaluations take is not known
    disk = 0.0
    if recipe:
        plan = launcher.plan(argv[0], recipe, config, job.run_dir)
        if plan.refused and not command.dry_run:
            raise ValueError("not sent:\n  " + "\n  ".join(plan.refused))
        print(plan)
        disk = plan.disk_gb
    if command.dry_run:
        print(*looks(job.run_dir, data_root(), disk), sep="\n")
        print(f"would send: imsvd {shlex.join(job.argv)}")
        return
    submission = launcher.submit(
        job.argv, name=job.name, folder=job.folder, config=config, code=launcher.snapshot(code)
    )
    print(
        f"job {submission.job_id} sent; its logs are in {job.folder}; "
        f"imsvd status {shlex.quote(str(job.run_dir))} tells how it stands"
    )
    if config.executor == "debug" and submission.job:
        submission.job.result()


def reproduce(argv: Sequence[str]) -> None:
    """Bring tables and figures of the paper about."""
    scale = current_scale(peek(argv, "--scale"))
    default = ReproduceCommand(load_profile(peek(argv, "--profile")), scale=scale)
    command, options = tyro.cli(
        ReproduceCommand,
        prog="imsvd reproduce",
        args=argv,
        default=default,
        return_unknown_args=True,
    )
    from imsvd_core.launch import graph as graphs
    from imsvd_core.launch.reproduce import reproduce as bring_about

    tables: tuple[int, ...] = command.table
    figures: tuple[int, ...] = command.figure
    if command.all:
        tables, figures = tuple(graphs.TABLES), tuple(graphs.FIGURES)
    out = (command.out or Path("runs") / f"reproduce-{command.scale}").absolute()
    graph = graphs.build(tables, figures, command.scale, out, options)
    ends = {"dry_run": command.dry_run, "wait": command.wait}
    if not bring_about(graph, out, command.config, wide_console(), **ends):
        raise SystemExit(1)


def status(argv: Sequence[str]) -> None:
    """Show where jobs stand."""
    command = tyro.cli(StatusCommand, prog="imsvd status", args=argv)
    if not command.folder.is_dir():
        raise ValueError(
            f"folder={str(command.folder)!r} is not there: give that of a launched run"
        )
    from imsvd_core.launch.status import graphs_under, standings_of, watch

    launched = graphs_under(command.folder)

    def look() -> list[Any]:
        return [standing for graph in launched for standing in standings_of(graph).values()]

    watch(look, wide_console(), once=command.once)
