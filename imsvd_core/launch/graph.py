"""Graphs of runs: what a table or a figure of the paper needs, each piece once."""

import graphlib
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
    parts: tuple[float, ...]
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
    2: Runs("kNN of the three after all of the training, in miniature", METHODS, (1.0,), "knn"),
}
FIGURES = {
    3: Runs("IMSVD's joint matrix, which its pretraining keeps in joints/", METHODS[:1], (1.0,))
}
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
    """Tasks in an order in which each comes after those that it needs; `graph[name]` is one.

    Raises ValueError for two tasks of one name or one result, a need that is no task, and a circle.
    """

    def __init__(self, tasks: Iterable[Task]):
        self._tasks: dict[str, Task] = {}
        results: dict[Path, str] = {}
        for task in tasks:
            if task.name in self._tasks:
                raise ValueError(f"name={task.name!r} is that of two tasks: give each its own")
            if task.result in results:
                raise ValueError(
                    f"result={str(task.result)!r} is that of two tasks, {results[task.result]} and "
                    f"{task.name}: give each its own"
                )
            self._tasks[task.name] = task
            results[task.result] = task.name
        for task in self:
            if unknown := [need for need in task.needs if need not in self._tasks]:
                raise ValueError(
                    f"needs={unknown} of {task.name} are no tasks; "
                    f"there are: {', '.join(self._tasks)}"
                )
        needs = {task.name: task.needs for task in self}
        try:
            order = tuple(graphlib.TopologicalSorter(needs).static_order())
        except graphlib.CycleError as error:
            raise ValueError(
                f"needs go in a circle, {' → '.join(error.args[1])}: take one of them out"
            ) from None
        self._tasks = {name: self._tasks[name] for name in order}

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, name: str) -> Task:
        return self._tasks[name]

    def save(self, out: Path) -> None:
        """Write graph.json into `out`; what stands there of other tasks stays."""
        tasks = {task.name: task for task in self}
        if (out / GRAPH).exists():
            tasks = {task.name: task for task in Graph.load(out)} | tasks
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
    parts = [*_planned("table", tables, TABLES), *_planned("figure", figures, FIGURES)]
    if not parts:
        raise ValueError(f"neither a table nor a figure is asked for; there are {_catalogue()}")
    tasks: list[Task] = []
    data: dict[str, str] = {}
    for name in METHODS:
        whole = tyro.cli(
            Recipe, default=recipe(name, scale), args=list(settings), prog="imsvd reproduce"
        )
        evaluations: dict[int, list[str]] = {}
        for part in parts:
            for share in part.parts if name in part.recipes else ():
                epochs = max(1, int(share * whole.loop.epochs))
                kinds = evaluations.setdefault(epochs, [])
                if part.evaluation and part.evaluation not in kinds:
                    kinds.append(part.evaluation)
        if evaluations and whole.data not in data:
            data[whole.data] = sources.resolve(whole.data) if whole.data == "auto" else whole.data
        for epochs, kinds in sorted(evaluations.items()):
            trained = replace(whole, loop=replace(whole.loop, epochs=epochs), data=data[whole.data])
            options = [*settings, "--loop.epochs", str(epochs)]
            if whole.data == "auto":
                options += ["--data", trained.data]
            tasks += _tasks(name, scale, trained, options, kinds, out)
    return Graph(tasks)


def _tasks(
    name: str,
    scale: Scale,
    trained: Recipe,
    options: Sequence[str],
    evaluations: Iterable[str],
    out: Path,
) -> Iterator[Task]:
    """A pretraining of the recipe `name`, and evaluations of it."""
    epochs = trained.loop.epochs
    method = trained.method.name.replace("_", "-")
    folder = f"{method}-{epochs}-epoch{'s' if epochs > 1 else ''}"
    run, settings, first = out / folder, plain(trained), f"{folder}/pretrain"
    command = ("pretrain", name, "--scale", scale, "--run-dir", str(run))
    argv = (*command, *options, "--no-progress")
    yield Task(first, argv, run, run / "result.json", settings=settings)
    for kind in evaluations:
        argv = ("evaluate", kind, str(run))
        if kind == "linear":
            argv += ("--no-progress",)
        yield Task(f"{folder}/{kind}", argv, run, run / f"{kind}.json", (first,), settings)


def _planned(kind: str, numbers: Iterable[int], planned: Mapping[int, Runs]) -> list[Runs]:
    for number in numbers:
        if number not in planned:
            raise ValueError(f"{kind}={number} is not held here yet; there are {_catalogue()}")
    return [planned[number] for number in sorted(set(numbers))]


def _catalogue() -> str:
    return "; ".join(
        f"{kind} {number}: {runs.text}"
        for kind, planned in (("table", TABLES), ("figure", FIGURES))
        for number, runs in planned.items()
    )


def finished(task: Task) -> bool:
    """Whether the task's result is there.

    Raises ValueError, naming folder and remedy, if other settings gave the result, or gave what a
    pretraining has left there so far.
    """
    stored = _config(task)
    if stored is not None and task.settings:
        stored = complete(Recipe, stored)
        other = differences(
            essential(stored),
            essential(complete(Recipe, task.settings)),
            words=("there", "asked for"),
        )
        if other and (
            task.result.exists() or any((task.run_dir / "checkpoints").glob("step-*.pt"))
        ):
            raise ValueError(
                f"run_dir={str(task.run_dir)!r} holds a run with other settings ({other}): "
                "give the same ones, another --out, or remove that folder"
            )
    if not task.result.exists():
        return False
    if stored is not None and task.argv[0] == "evaluate":
        kind = task.argv[1]
        config = _config(task) or {}
        # Results from before the schemas are known by all values of the run's config.json.
        before = full_hash({"evaluation": config[kind], "pretraining": config})
        stored_hash = read_result(task.result)["provenance"]["config_hash"]
        if stored_hash not in (evaluation_hash(kind, config), before):
            raise ValueError(
                f"result={str(task.result)!r} was given by other settings than the run's own: "
                f"remove it, or evaluate again: `imsvd evaluate {kind} {task.run_dir} --overwrite`"
            )
    return True


def evaluation_hash(kind: str, config: Mapping[str, Any]) -> str:
    """The identity of an evaluation by a run's own settings; `config` is the run's config.json."""
    trained = from_plain(Recipe, config)
    return config_hash({"evaluation": getattr(trained, kind), "pretraining": trained})


def _config(task: Task) -> dict[str, Any] | None:
    try:
        return json.loads((task.run_dir / "config.json").read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        raise ValueError(
            f"{task.run_dir / 'config.json'} is not readable: remove that folder"
        ) from None
