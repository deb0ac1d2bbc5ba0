"""The command line: `imsvd pretrain`, `evaluate`, `export`, `bench`, `launch`, `reproduce`, `status` and `data`, generated
from the dataclasses."""

import argparse
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import tyro
from rich.console import Console

from imsvd_core import export as exporting
from imsvd_core import launch as launcher
from imsvd_core.data import check as prepared
from imsvd_core.data.memory import OnCorrupt
from imsvd_core.distributed import world
from imsvd_core.engine import checkpoints
from imsvd_core.engine.trainer import NonFiniteError
from imsvd_core.launch import graph as graphs
from imsvd_core.launch.reproduce import reproduce as bring_about
from imsvd_core.launch.status import graphs_under, standings_of, watch
from imsvd_core.recipes import (
    EVALUATIONS,
    OWN,
    RECIPES,
    EvaluationRecipe,
    EvalViewConfig,
    Recipe,
    Scale,
    current_scale,
    evaluation,
    recipe,
)
from imsvd_core.results import provenance, read_result, write_result
from imsvd_core.runs import evaluate as evaluations
from imsvd_core.runs import pretrain as training
from imsvd_core.runs.backbones import TrainedBackbone, open_backbone
from imsvd_core.runs.bench import bench_step
from imsvd_core.system import signals
from imsvd_core.system.devices import pick_device
from imsvd_core.system.files import Superseded, atomic_write
from imsvd_core.system.ranks import first_to_say, process_group

USAGE = """usage: imsvd COMMAND ...

commands:
  pretrain RECIPE        train a recipe; a run that was cut off goes on where its last checkpoint stands.
                         SIGTERM and SIGUSR2 let it save and stop (exit status 143).
                         On several processes: torchrun --nproc-per-node 2 -m imsvd_core.cli pretrain RECIPE
  evaluate NAME RUN      judge a run's backbone, or a file of weights: knn and linear on its own data; imagenet-knn,
                         imagenet-linear, places205-linear, voc07-svm and coco-detection as the paper does
  export RUN --to FORM   its backbone as torchvision, timm, detectron2 or safetensors read it
  bench step RECIPE      time of a training step, hours of 100 epochs, peak memory, on the device at hand
  launch RECIPE          the same training as a job of a cluster (Slurm), queued again whenever it is stopped; --dry-run
                         tells what it will take
  launch evaluate NAME RUN ...   an evaluation as such a job
  reproduce              a table of the paper, a figure, or all: what it needs as a graph of jobs, the finished left alone
  status [FOLDER]        where what was launched stands: waiting, running, done, failed
  data check NAME ROOT   whether a data root (imagenet, places205, voc07, coco) is whole, or how to prepare one

`imsvd COMMAND --help` lists every setting. Environment: IMSVD_SCALE (smoke, laptop, full), IMSVD_DATA (data root),
IMSVD_DATASET (auto, cifar10, attributes, ...)."""

Settings, Command = TypeVar("Settings"), TypeVar("Command")


@dataclass(frozen=True)
class PretrainCommand:
    """Train a recipe. Leaves config.json, metrics.jsonl, checkpoints/, backbone.safetensors and result.json."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """Folder of the run; runs/RECIPE-SCALE-seedSEED by default. A run found there is resumed."""
    scale: Scale = "laptop"
    """Which version of the recipe the other settings start from; IMSVD_SCALE by default."""
    progress: bool = True


@dataclass(frozen=True)
class LaunchCommand:
    """Send a recipe's training as a job: it saves when it is told to stop, is queued again, and goes on.

    All other settings are those of `imsvd pretrain RECIPE --help`."""

    config: Annotated[launcher.LaunchConfig, tyro.conf.arg(name="")]
    profile: str | None = None
    """Which cluster of ~/.config/imsvd/clusters.toml (or of the file IMSVD_CLUSTERS) the options start from; by default
    the one that it names as default."""
    dry_run: bool = False
    """Print the batch script and the plan (hours, cost, memory, disk, what would be refused), and send nothing."""


@dataclass(frozen=True)
class EvaluateCommand(Generic[Settings]):
    """Judge a backbone; the settings start from the run's own (knn, linear) or from the paper's (the others), and NAME.json
    is written into the run's folder (NAME-DATA.json for data other than the evaluation's)."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run, or a file of anybody's weights: a state dict of torchvision's names (.pth, .pt, .safetensors)."""
    config: Annotated[Settings, tyro.conf.arg(name="")]
    eval_view: EvalViewConfig = field(default_factory=EvalViewConfig)
    data: str = "auto"
    """Data set: those of `imsvd pretrain`; voc:PATH and coco:PATH for the layouts of VOC and COCO."""
    scale: Scale = "laptop"
    """Which version of the evaluation the settings start from; IMSVD_SCALE by default."""
    device: str | None = None
    """auto, cuda, mps or cpu; by default that of the settings."""
    on_corrupt: OnCorrupt = "error"
    """An unreadable image file ends the evaluation, or is passed over."""
    out: Path | None = None
    """Folder of the result; the run's own by default, runs/FILE for a file of weights."""
    progress: bool = True
    overwrite: bool = False
    """Replace a result that other settings have given."""


@dataclass(frozen=True)
class ExportCommand:
    """Write a run's backbone as others read it."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run, or a file of weights."""
    to: exporting.Format
    out: Path | None = None
    """The file; by default backbone-TO with its suffix, in the run's folder."""


@dataclass(frozen=True)
class BenchStepCommand:
    """Time whole training steps of a recipe on the device at hand: hours for 100 epochs and peak memory (Table IV)."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    scale: Scale = "laptop"
    """Which version of the recipe the other settings start from; IMSVD_SCALE by default."""
    steps: int = 20
    """Steps that are timed."""
    warmup: int = 3
    """Steps before them that are not."""
    json: Path | None = None
    """Also write the figures to this file."""
    progress: bool = True


@dataclass(frozen=True)
class DataCheckCommand:
    """Verify a prepared data root: classes, counts, annotations, unreadable files. Exits with 0 if all is well, else
    with 2; leaves its report in the root as .imsvd-checked.json. Without a root it says how to prepare one."""

    name: tyro.conf.Positional[str]
    """imagenet, places205, voc07 or coco."""
    root: tyro.conf.Positional[Path]
    """Folder of the data set."""
    decode: prepared.Decode = "header"
    """What to read of every image: nothing; its two ends, which shows what is cut short or no image; or all of it,
    which shows what cannot be decoded too. A JPEG spoilt inside, both ends whole, decodes, partly grey: none sees it."""
    workers: int | None = None
    """Threads that read; as many as cores by default."""
    classes: int | None = None
    """Expected classes, where the root holds a subset."""
    counts: dict[str, int] = field(default_factory=dict)
    """Expected images of a split, where the root holds a subset: --counts train 500 val 50."""
    json: Path | None = None
    """Also write the report to this file."""
    progress: bool = True


@dataclass(frozen=True)
class ReproduceCommand:
    """Tables and figures of the paper as a graph of jobs: pretrainings, then their evaluations; a run that several need is
    made once. Call it again to go on: what is finished or on its way stays, what failed is done again.

    All other settings are those of `imsvd pretrain RECIPE --help`, for all pretrainings alike."""

    config: Annotated[launcher.LaunchConfig, tyro.conf.arg(name="")]
    table: tuple[int, ...] = ()
    """Such as 1 2."""
    figure: tuple[int, ...] = ()
    all: bool = False
    """Every table and figure that is held."""
    scale: Scale = "laptop"
    """Which version of the recipes; IMSVD_SCALE by default."""
    out: Path | None = None
    """Folder of the runs; runs/reproduce-SCALE by default."""
    profile: str | None = None
    """Which cluster of ~/.config/imsvd/clusters.toml (or of the file IMSVD_CLUSTERS) the options start from; by default
    the one that it names as default."""
    dry_run: bool = False
    """Show what would be done, and do nothing."""


@dataclass(frozen=True)
class StatusCommand:
    """Where what was launched stands: live until everything has ended, once where this is no terminal."""

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder of `imsvd reproduce`, run folder of `imsvd launch`, or the folder that holds such folders."""
    once: bool = False
    """Show it once, on a terminal too."""


def pretrain(argv: Sequence[str]) -> Path:
    with process_group(_peek(argv, "--loop.device") or "auto"):
        if world()[0]:
            logging.getLogger().setLevel(logging.ERROR)  # rank 0 tells
        return _pretrain(argv)


def _pretrain(argv: Sequence[str]) -> Path:
    command = _parse_pretrain(argv, "imsvd pretrain")
    return _tell(training.pretrain(command.recipe, command.run_dir, progress=command.progress))


def _parse_pretrain(argv: Sequence[str], prog: str) -> PretrainCommand:
    """The settings, with their run folder."""
    command, name = _parse_recipe(argv, PretrainCommand, prog)
    run_dir = (
        command.run_dir or Path("runs") / f"{name}-{command.scale}-seed{command.recipe.loop.seed}"
    )
    return replace(command, run_dir=run_dir)


def _parse_recipe(
    argv: Sequence[str], kind: Callable[..., Command], prog: str
) -> tuple[Command, str]:
    """A command whose settings start from the recipe that its words name, and that name."""
    scale = _peek(argv, "--scale") or current_scale()
    defaults = {
        name: (build.__doc__ or name, kind(recipe(name, scale), scale=scale))
        for name, build in RECIPES.items()
    }
    command = tyro.extras.overridable_config_cli(
        defaults,
        prog=prog,
        args=argv,
        description=f"`{prog} RECIPE --help` lists its settings.\n\n{kind.__doc__}",
    )
    return command, next(word for word in argv if word in RECIPES)


def launch(argv: Sequence[str]) -> None:
    default = LaunchCommand(launcher.load_profile(_peek(argv, "--profile")))
    if not argv or argv[0] in ("-h", "--help"):
        tyro.cli(LaunchCommand, prog="imsvd launch RECIPE", args=["--help"], default=default)
    name = argv[0]
    if name not in (*RECIPES, "evaluate"):
        raise ValueError(
            f"recipe={name!r} is unknown; the recipe comes first, one of: {', '.join(RECIPES)}; or evaluate NAME RUN"
        )
    command, rest = tyro.cli(
        LaunchCommand,
        prog="imsvd launch RECIPE",
        args=argv[1:],
        default=default,
        return_unknown_args=True,
    )
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--scale", "--out" if name == "evaluate" else "--run-dir"):
        given.add_argument(option)
    told, taken = given.parse_known_args(rest)[1], None
    if name == "evaluate":
        asked, trained, usual = _parse_evaluation(rest, "imsvd launch evaluate")
        run_dir, what = (
            trained.folder.absolute(),
            evaluations.result_path(rest[0], trained, asked.data, usual.data).stem,
        )
        folder, job_name = run_dir / "jobs" / what, f"{run_dir.name}-{what}"
        told[told.index(str(asked.run))] = str(asked.run.absolute())
        words = ["evaluate", *told, "--scale", asked.scale, "--out", str(run_dir), "--no-progress"]
    else:
        pretraining = _parse_pretrain([name, *rest], "imsvd launch")
        run_dir = pretraining.run_dir.absolute()
        folder, job_name = run_dir / "jobs", run_dir.name
        taken = launcher.plan(name, pretraining.recipe, command.config, run_dir)
        words = [
            "pretrain",
            name,
            "--scale",
            pretraining.scale,
            "--run-dir",
            str(run_dir),
            "--no-progress",
            *told,
        ]
    known = graphs_under(run_dir) if (folder / "submission.json").exists() else []
    for standing in (
        one for graph in known for one in standings_of(graph).values() if one.task.folder == folder
    ):
        if standing.live or standing.state == "unknown":
            raise ValueError(
                f"run_dir={str(run_dir)!r} has a job on its way, {standing.job} ({standing.words or standing.state}): "
                "wait for its end, stop it, or give another folder"
            )
    if command.dry_run and command.config.executor == "slurm":
        print(launcher.batch_script(job_name, folder, command.config, run_dir / "code"))
    if taken and taken.refused and not command.dry_run:
        raise ValueError("not sent:\n  " + "\n  ".join(taken.refused))
    if taken:
        print(taken)
    if command.dry_run:
        print(f"would send: imsvd {shlex.join(words)}")
        return
    sent = launcher.submit(
        words,
        name=job_name,
        folder=folder,
        config=command.config,
        code=launcher.snapshot(run_dir / "code"),
    )
    print(
        f"job {sent.job_id} sent; its logs are in {folder}; imsvd status {run_dir} tells how it stands"
    )
    if command.config.executor == "debug":
        sent.job.result()


def evaluate(argv: Sequence[str]) -> Path:
    if argv and argv[0] in ("-h", "--help"):
        print(
            f"usage: imsvd evaluate NAME RUN ...\n\nNAME is one of {', '.join((*OWN, *EVALUATIONS))}; `imsvd evaluate NAME "
            "--help` lists its settings."
        )
        raise SystemExit(0)
    with process_group(_peek(argv, "--device") or _peek(argv, "--loop.device") or "auto"):
        if world()[0]:
            logging.getLogger().setLevel(logging.ERROR)  # rank 0 tells
        command, trained, usual = _parse_evaluation(argv, "imsvd evaluate")
        asked = EvaluationRecipe(command.config, command.data, command.eval_view)
        return _tell(
            evaluations.evaluate(
                argv[0],
                trained,
                asked,
                default_data=usual.data,
                device=command.device,
                on_corrupt=command.on_corrupt,
                progress=command.progress,
                overwrite=command.overwrite,
            )
        )


def _parse_evaluation(
    argv: Sequence[str], prog: str
) -> tuple[EvaluateCommand, TrainedBackbone, EvaluationRecipe]:
    """The settings, whom they are to judge, and what they would have been."""
    name, rest = (argv[0] if argv else ""), argv[1:]
    scale = _peek(rest, "--scale") or current_scale()
    usual = evaluation(name, scale)
    parse = partial(tyro.cli, EvaluateCommand[type(usual.config)], prog=f"{prog} {name}", args=rest)
    run = parse(
        default=EvaluateCommand(tyro.MISSING, usual.config, usual.eval_view, usual.data, scale)
    ).run
    trained = open_backbone(run, scale)  # it decides what the other settings start from
    usual = evaluation(name, scale, trained.recipe)
    command = parse(default=EvaluateCommand(run, usual.config, usual.eval_view, usual.data, scale))
    return command, replace(trained, folder=command.out or trained.folder), usual


def export(argv: Sequence[str]) -> None:
    command = tyro.cli(ExportCommand, prog="imsvd export", args=argv)
    trained = open_backbone(command.run)
    network = trained.recipe.network
    out = (
        command.out or trained.folder / f"backbone-{command.to}{exporting.SUFFIXES[command.to][0]}"
    )
    print(
        f"written to {exporting.export(trained.backbone, network.backbone, network.cifar_stem, command.to, out)}"
    )


def bench(argv: Sequence[str]) -> None:
    if argv[:1] != ["step"]:
        print(
            "usage: imsvd bench step RECIPE ...\n\n`imsvd bench step RECIPE --help` lists its settings."
        )
        raise SystemExit(0 if argv and argv[0] in ("-h", "--help") else 2)
    with process_group(_peek(argv, "--loop.device") or "auto"):
        command, name = _parse_recipe(argv[1:], BenchStepCommand, "imsvd bench step")
        start, one = time.perf_counter(), command.recipe
        with signals.handle_stop_signals():
            figures = bench_step(
                one, steps=command.steps, warmup=command.warmup, progress=command.progress
            )
        if world()[0] == 0:
            Console().print(figures)
            if command.json:
                origin = provenance(
                    config=one,
                    seed=one.loop.seed,
                    device=pick_device(one.loop.device),
                    dataset=figures["data"],
                    seconds=time.perf_counter() - start,
                    world_size=figures["ranks"],
                )
                write_result(command.json, f"bench-step-{name}", figures, origin, overwrite=True)


def data(argv: Sequence[str]) -> None:
    if argv[:1] != ["check"]:
        print(
            f"usage: imsvd data check {'|'.join(prepared.SPECS)} ROOT\n\n`imsvd data check --help` lists its settings."
        )
        raise SystemExit(0 if argv and argv[0] in ("-h", "--help") else 2)
    command = tyro.cli(DataCheckCommand, prog="imsvd data check", args=argv[1:])
    spec = prepared.find_spec(command.name)
    spec = replace(
        spec, classes=command.classes or spec.classes, counts={**spec.counts, **command.counts}
    )
    report = prepared.check(
        command.name,
        command.root,
        decode=command.decode,
        workers=command.workers,
        spec=spec,
        progress=command.progress,
    )
    print(report if report.ok else f"{report}\n\n{prepared.how_to(spec, command.root)}")
    if command.json:
        with atomic_write(command.json) as file:
            file.write(json.dumps(asdict(report) | {"ok": report.ok}, indent=2).encode() + b"\n")
    raise SystemExit(0 if report.ok else 2)


def reproduce(argv: Sequence[str]) -> None:
    scale = _peek(argv, "--scale") or current_scale()
    recipe("cifar10", scale)  # refuses a scale that is none
    default = ReproduceCommand(launcher.load_profile(_peek(argv, "--profile")), scale=scale)
    command, settings = tyro.cli(
        ReproduceCommand,
        prog="imsvd reproduce",
        args=argv,
        default=default,
        return_unknown_args=True,
    )
    wanted = (
        (tuple(graphs.TABLES), tuple(graphs.FIGURES))
        if command.all
        else (command.table, command.figure)
    )
    out = (command.out or Path("runs") / f"reproduce-{command.scale}").absolute()
    graph = graphs.build(*wanted, command.scale, out, settings)
    if not bring_about(graph, out, command.config, _wide(), dry_run=command.dry_run):
        raise SystemExit(1)


def status(argv: Sequence[str]) -> None:
    command = tyro.cli(StatusCommand, prog="imsvd status", args=argv)
    found = graphs_under(command.folder)
    watch(
        lambda: [standing for graph in found for standing in standings_of(graph).values()],
        _wide(),
        once=command.once,
    )


COMMANDS: dict[str, Callable[[Sequence[str]], Path | None]] = {
    "pretrain": pretrain,
    "evaluate": evaluate,
    "export": export,
    "bench": bench,
    "launch": launch,
    "reproduce": reproduce,
    "status": status,
    "data": data,
}


def _peek(argv: Sequence[str], option: str) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value")
    return parser.parse_known_args(argv)[0].value


def _wide() -> Console:
    """For tables: as wide as the terminal, wider where they are read later."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _tell(path: Path) -> Path:
    if world()[0]:
        return path
    figures = read_result(path)["figures"]  # whole curves stay in the file
    shown = {
        name: value
        for name, value in figures.items()
        if not (isinstance(value, list) and value and isinstance(value[0], dict))
    }
    Console().print(shown)
    Console().print(f"written to {path}", highlight=False)
    return path


def run(argv: Sequence[str]) -> None:
    """Do one command. Exits with 2 and one line for anything that the user can mend; raises `signals.Stopped` where a
    notice ended it before its end, with all that it had done saved."""
    try:
        COMMANDS[argv[0]](argv[1:])
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        checkpoints.CheckpointError,
        NonFiniteError,
        Superseded,
    ) as error:
        if first_to_say(str(error)):
            print(f"imsvd {argv[0]}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: `run`, and exit with 143 where a signal stopped it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        print(USAGE)
        raise SystemExit(0 if argv and argv[0] in ("-h", "--help") else 2)
    try:
        run(argv)
    except signals.Stopped as stopped:
        if world()[0] == 0:  # the launcher, which keeps the count of who has said what, may be gone
            print(f"imsvd {argv[0]}: {stopped}", file=sys.stderr)
        raise SystemExit(signals.STOPPED) from None


if __name__ == "__main__":
    main()
