"""Graphs of runs: what a table or a figure of the paper needs, each piece once."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from imsvd_core.data import sources
from imsvd_core.recipes import Recipe, Scale, recipe
from imsvd_core.results import read_result, write_json
from imsvd_core.system.config import (
    complete,
    config_hash,
    differences,
    essential,
    from_plain,
    full_hash,
    plain,
)


@dataclass(frozen=True)
class Runs:
    """The pretrainings that a table or a figure rests on, and how each is evaluated."""

    text: str
    recipes: tuple[str, ...]
    #: How much of a recipe's epochs: a pretraining for each.
    parts: tuple[float, ...] = (1.0,)
    evaluation: str | None = None


METHODS = ("cifar10", "cifar10-vicreg", "cifar10-barlow-twins")
TABLES = {
    1: Runs(
        "linear probe of IMSVD, VICReg and Barlow Twins after half and all of the training, "
        "in miniature",
        METHODS,
        (0.5, 1.0),
        "linear",
    ),
    2: Runs("kNN of the three after all of the training, in miniature", METHODS, evaluation="knn"),
}
FIGURES = {3: Runs("IMSVD's joint matrix, which its pretraining keeps in joints/", METHODS[:1])}
PLANNED = {"table": TABLES, "figure": FIGURES}
#: A graph's own file, in its folder.
GRAPH = "graph.json"


@dataclass(frozen=True)
class Task:
    """One `imsvd` command that leaves one result file."""

    #: Such as imsvd-2-epochs/knn.
    name: str
    #: What follows `imsvd`.
    argv: tuple[str, ...]
    run_dir: Path
    result: Path
    #: Tasks that must be done before.
    needs: tuple[str, ...] = ()
    #: The recipe of the pretraining; {} for any.
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the task's job leaves its submission and its logs."""
        return self.run_dir.joinpath("jobs", *self.name.split("/")[1:])


class Graph:
    """Tasks, each after those that it needs; `graph[name]` is one.

    Raises ValueError for two tasks of one name or one result, and a need that is no task before.
    """

    def __init__(self, tasks: Iterable[Task]):
        self._tasks: dict[str, Task] = {}
        for task in tasks:
            for kind in ("name", "result"):
                value = getattr(task, kind)
                if value in [getattr(other, kind) for other in self]:
                    raise ValueError(f"{kind}={str(value)!r} is that of two tasks: give another")
            if unknown := sorted(set(task.needs) - self._tasks.keys()):
                raise ValueError(
                    f"needs={unknown} of {task.name} are no tasks before it; "
                    f"there are: {', '.join(self._tasks)}"
                )
            self._tasks[task.name] = task

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, name: str) -> Task:
        return self._tasks[name]

    def save(self, out: Path) -> None:
        """Write graph.json into `out`; what stands there of other tasks stays."""
        stored = Graph.load(out) if (out / GRAPH).exists() else ()
        tasks = {task.name: task for task in (*stored, *self)}
        rows = [
            asdict(task)
            | {name: str(getattr(task, name).relative_to(out)) for name in ("run_dir", "result")}
            for task in tasks.values()
        ]
        write_json(out / GRAPH, {"tasks": rows})

    @classmethod
    def load(cls, out: Path) -> "Graph":
        """The graph whose folder is `out`. Raises ValueError for a file that is none."""
        try:
            rows = json.loads((out / GRAPH).read_text())["tasks"]
            for row in rows:
                row |= {name: out / row[name] for name in ("run_dir", "result")}
            tasks = [from_plain(Task, row) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{out / GRAPH} is not a graph: remove it, `imsvd reproduce` writes it anew"
            ) from error
        return cls(tasks)


def build(
    tables: Sequence[int],
    figures: Sequence[int],
    scale: Scale,
    out: Path,
    settings: Sequence[str] = (),
) -> Graph:
    """What tables and figures of the paper need, at a scale, in run folders under `out`.

    `settings` are options of `imsvd pretrain`, such as ("--loop.epochs", "4"), for all pretrainings
    alike. The data `auto` are resolved here, once for all. Raises ValueError for a table or figure
    that is not planned, naming those that are.
    """
    planned = [*_planned("table", tables), *_planned("figure", figures)]
    if not planned:
        raise ValueError(f"neither a table nor a figure is asked for; there are {_catalogue()}")
    tasks: dict[str, Task] = {}
    for name in METHODS:
        whole, options = recipe(name, scale), list(settings)
        whole = tyro.cli(Recipe, default=whole, args=options, prog="imsvd reproduce")
        if whole.data == "auto":
            whole = replace(whole, data=sources.resolve())
            options += ["--data", whole.data]
        for runs in planned:
            for part in runs.parts if name in runs.recipes else ():
                epochs = max(1, int(part * whole.loop.epochs))
                trained = replace(whole, loop=replace(whole.loop, epochs=epochs))
                command = (
                    "pretrain",
                    name,
                    "--scale",
                    scale,
                    *options,
                    "--loop.epochs",
                    str(epochs),
                )
                for task in _tasks(command, trained, runs.evaluation, out):
                    tasks.setdefault(task.name, task)
    return Graph(tasks.values())


def _tasks(
    command: Sequence[str], trained: Recipe, evaluation: str | None, out: Path
) -> Iterator[Task]:
    """A pretraining, and an evaluation of it."""
    epochs, settings = trained.loop.epochs, plain(trained)
    method = trained.method.name.replace("_", "-")
    folder = f"{method}-{epochs}-epoch{'s' if epochs > 1 else ''}"
    run, first = out / folder, f"{folder}/pretrain"
    argv = (*command, "--run-dir", str(run), "--no-progress")
    yield Task(first, argv, run, run / "result.json", settings=settings)
    if evaluation:
        argv = ("evaluate", evaluation, str(run), "--no-progress")
        result = run / f"{evaluation}.json"
        yield Task(f"{folder}/{evaluation}", argv, run, result, (first,), settings)


def _planned(kind: str, numbers: Iterable[int]) -> list[Runs]:
    for number in numbers:
        if number not in PLANNED[kind]:
            raise ValueError(f"{kind}={number} is not held here yet; there are {_catalogue()}")
    return [PLANNED[kind][number] for number in sorted(set(numbers))]


def _catalogue() -> str:
    return "; ".join(
        f"{kind} {number}: {runs.text}"
        for kind, planned in PLANNED.items()
        for number, runs in planned.items()
    )


def finished(task: Task) -> bool:
    """Whether the task's result is there.

    Raises ValueError, naming folder and remedy, if other settings gave the result, or gave what a
    pretraining has left there so far.
    """
    stored, has_result = stored_config(task), task.result.exists()
    if not (stored and task.settings):
        return has_result
    run, asked_for = (essential(complete(Recipe, config)) for config in (stored, task.settings))
    other = differences(run, asked_for, words=("there", "asked for"))
    if other and (has_result or any((task.run_dir / "checkpoints").glob("step-*.pt"))):
        raise ValueError(
            f"run_dir={str(task.run_dir)!r} holds a run with other settings ({other}): "
            "give the same ones, another --out, or remove that folder"
        )
    if has_result and task.argv[0] == "evaluate":
        kind = task.argv[1]
        # Results from before the schemas are known by all values of the run's config.json.
        old_hash = full_hash({"evaluation": stored[kind], "pretraining": stored})
        stored_hash = read_result(task.result)["provenance"]["config_hash"]
        if stored_hash not in (evaluation_hash(kind, stored), old_hash):
            raise ValueError(
                f"result={str(task.result)!r} was given by other settings than the run's own: "
                f"remove it, or evaluate again: `imsvd evaluate {kind} {task.run_dir} --overwrite`"
            )
    return has_result


def evaluation_hash(kind: str, config: Mapping[str, Any]) -> str:
    """The identity of an evaluation by a run's own settings; `config` is the run's config.json."""
    trained = from_plain(Recipe, config)
    return config_hash({"evaluation": getattr(trained, kind), "pretraining": trained})


def stored_config(task: Task) -> dict[str, Any]:
    """The settings that a task's run has left; {} before it begins."""
    path = task.run_dir / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError:
        raise ValueError(f"{path} is not readable: remove that folder") from None
