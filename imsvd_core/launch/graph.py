"""Graphs of runs: what a table or a figure of the paper needs, each piece once."""

import graphlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from imsvd_core.data import memory as datasets
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

METHODS = {
    "imsvd": "cifar10",
    "vicreg": "cifar10-vicreg",
    "barlow-twins": "cifar10-barlow-twins",
}  #: → recipe
TABLES = {
    1: "linear probe of IMSVD, VICReg and Barlow Twins after half and all of the training, in miniature",
    2: "kNN of the three after all of the training, in miniature",
}
FIGURES = {3: "IMSVD's joint matrix, which its pretraining keeps in joints/"}
GRAPH = "graph.json"  #: a graph's own file, in its folder


@dataclass(frozen=True)
class Task:
    """One `imsvd` command that leaves one result file."""

    name: str  #: such as imsvd-2-epochs/knn
    argv: tuple[str, ...]  #: what follows `imsvd`
    run_dir: Path
    result: Path
    needs: tuple[str, ...] = ()  #: tasks that must be done before
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  #: recipe of the pretraining; {} for whatever is found

    @property
    def folder(self) -> Path:
        """Where the task's job leaves its submission and its logs."""
        return self.run_dir.joinpath("jobs", *self.name.split("/")[1:])


class Graph:
    """Tasks in an order in which each comes after those that it needs: iterate it, or ask for one by its name.

    Raises ValueError for two tasks of one name or one result, a need that is no task, and a circle.
    """

    def __init__(self, tasks: Iterable[Task]):
        tasks = list(tasks)
        self._tasks = {task.name: task for task in tasks}
        for what in ("name", "result"):
            seen: dict[Any, str] = {}
            for task in tasks:
                if (value := getattr(task, what)) in seen:
                    raise ValueError(
                        f"{what}={str(value)!r} is that of two tasks, {seen[value]} and {task.name}: "
                        "give each its own"
                    )
                seen[value] = task.name
        for task in tasks:
            if unknown := [need for need in task.needs if need not in self._tasks]:
                raise ValueError(
                    f"needs={unknown} of {task.name} are no tasks; there are: {', '.join(self._tasks)}"
                )
        try:
            order = graphlib.TopologicalSorter(
                {task.name: task.needs for task in tasks}
            ).static_order()
            self._tasks = {name: self._tasks[name] for name in order}
        except graphlib.CycleError as error:
            raise ValueError(
                f"needs go in a circle, {' → '.join(error.args[1])}: take one of them out"
            ) from None

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
            return cls(
                Task(
                    **{
                        **row,
                        "argv": tuple(row["argv"]),
                        "needs": tuple(row["needs"]),
                        "run_dir": out / row["run_dir"],
                        "result": out / row["result"],
                    }
                )
                for row in rows
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{out / GRAPH} is not a graph: remove it, `imsvd reproduce` writes it anew"
            ) from error


def build(
    tables: Sequence[int],
    figures: Sequence[int],
    scale: Scale,
    out: Path,
    settings: Sequence[str] = (),
) -> Graph:
    """What tables and figures of the paper need, at a scale, in run folders under `out`.

    `settings` are options of `imsvd pretrain`, such as ("--loop.epochs", "4"), for all pretrainings alike. `auto`
    data are what it stands for here, for all. Raises ValueError for what is not held, naming what is.
    """
    for kind, numbers, held in (("table", tables, TABLES), ("figure", figures, FIGURES)):
        for number in numbers:
            if number not in held:
                raise ValueError(f"{kind}={number} is not held here yet; there are {_held()}")
    if not tables and not figures:
        raise ValueError(f"neither a table nor a figure is asked for; there are {_held()}")
    tasks: list[Task] = []
    data: dict[str, str] = {}  # asked for, once → found
    for method, name in METHODS.items():
        whole = tyro.cli(
            Recipe, default=recipe(name, scale), args=list(settings), prog="imsvd reproduce"
        )
        if whole.data not in data:
            data[whole.data] = datasets.resolve(whole.data) if whole.data == "auto" else whole.data
        for epochs in sorted({max(1, whole.loop.epochs // 2), whole.loop.epochs}):
            trained = replace(whole, loop=replace(whole.loop, epochs=epochs), data=data[whole.data])
            full = epochs == whole.loop.epochs
            kinds = ["linear"] * (1 in tables) + ["knn"] * (2 in tables and full)
            if not kinds and not (3 in figures and full and method == "imsvd"):
                continue
            folder = f"{method}-{epochs}-epoch{'s' if epochs > 1 else ''}"
            run, first = out / folder, f"{folder}/pretrain"
            argv = (
                "pretrain",
                name,
                "--scale",
                scale,
                "--run-dir",
                str(run),
                *settings,
                "--loop.epochs",
                str(epochs),
                *(("--data", trained.data) if whole.data == "auto" else ()),
                "--no-progress",
            )
            tasks.append(Task(first, argv, run, run / "result.json", settings=plain(trained)))
            for kind in kinds:
                argv = ("evaluate", kind, str(run), *["--no-progress"] * (kind == "linear"))
                tasks.append(
                    Task(
                        f"{folder}/{kind}",
                        argv,
                        run,
                        run / f"{kind}.json",
                        (first,),
                        plain(trained),
                    )
                )
    return Graph(tasks)


def _held() -> str:
    return "; ".join(
        f"{kind} {number}: {text}"
        for kind, held in (("table", TABLES), ("figure", FIGURES))
        for number, text in held.items()
    )


def finished(task: Task) -> bool:
    """Whether the task's result is there. Raises ValueError, naming folder and remedy, if other settings gave it, or
    gave what a pretraining has left there so far."""
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
        config = _config(task)
        # Results from before the schemas are known by all values of the run's config.json.
        before = full_hash({"evaluation": config[kind], "pretraining": config})
        stored_hash = read_result(task.result)["provenance"]["config_hash"]
        if stored_hash not in (evaluation_hash(kind, config), before):
            raise ValueError(
                f"result={str(task.result)!r} was given by other settings than the run's own: "
                f"remove it, or evaluate again with `imsvd evaluate {kind} {task.run_dir} --overwrite`"
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
