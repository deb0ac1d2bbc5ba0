"""One evaluation, from its name and a backbone to its result file."""

import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from imsvd_core.data import open_data, resolve
from imsvd_core.data.sources import OnCorrupt
from imsvd_core.distributed import on_rank_0, rank_0_first, world
from imsvd_core.evaluation.base import Setup, describe
from imsvd_core.evaluation.features import fingerprint
from imsvd_core.recipes import EvaluationRecipe
from imsvd_core.results import provenance, read_result, write_result
from imsvd_core.runs.backbones import TrainedBackbone
from imsvd_core.system import signals
from imsvd_core.system.config import config_hash, full_hash
from imsvd_core.system.devices import PRECISIONS, pick_device, warn_of_emulation
from imsvd_core.views import EvalView


def result_path(name: str, trained: TrainedBackbone, data: str, default_data: str) -> Path:
    """The file of an evaluation's result: NAME.json, or NAME-DATA.json for data other than the
    default."""
    suffix = "" if data == default_data else "-" + data.replace("/", "_")
    return trained.folder / f"{name}{suffix}.json"


def evaluate(
    name: str,
    trained: TrainedBackbone,
    recipe: EvaluationRecipe,
    *,
    default_data: str | None = None,
    device: str | None = None,
    on_corrupt: OnCorrupt = "error",
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Evaluate a backbone; returns the path of the result (`result_path`).

    On several ranks all share the work. The same call resumes one that was cut off. `device` is
    that of the settings by default. Raises ValueError for data of another layout than the
    evaluation needs; FileExistsError if the result in that place comes from other settings, unless
    `overwrite`, which does all anew that led to the result there; `signals.Stopped` after a notice.
    """
    _check_layout(name, recipe)
    default_data = recipe.data if default_data is None else default_data
    path = result_path(name, trained, recipe.data, default_data)
    origin = _settings(trained, recipe, on_corrupt)

    _refuse_to_replace(path, origin, overwrite)
    if overwrite:
        _forget(path)
    start, config = time.perf_counter(), recipe.config
    if device and config.loop:
        config = replace(config, loop=replace(config.loop, device=device))
    loop = config.loop or trained.recipe.loop
    setup = Setup(
        view=EvalView(**asdict(recipe.eval_view)),
        device=pick_device(device or loop.device),
        precision=PRECISIONS[loop.precision],
        folder=path.with_suffix(""),
        progress=progress,
    )
    if not config.loop:  # else its trainer says so
        warn_of_emulation(loop.precision, pick_device(device or loop.device))
    open_split = partial(open_data, recipe.data, on_corrupt=on_corrupt, progress=progress)
    data = rank_0_first(lambda: (open_split("train"), open_split("test")))
    with signals.handle_stop_signals():
        train, test = config.choose(*data, progress=progress)
        figures = config.judge(trained.backbone, (train, test), setup)
    figures["data"] = describe(config.resolution(setup), train, test)
    # The seconds of a training include those before a kill.
    seconds = max(time.perf_counter() - start, figures.get("seconds", 0))
    about = provenance(
        config=origin,
        device=setup.device,
        seed=loop.seed,
        dataset=data[0].title,
        seconds=seconds,
        world_size=world()[1],
    )
    # another call may have written a result meanwhile
    _refuse_to_replace(path, origin, overwrite)
    return on_rank_0(write_result)(path, name, figures, about, overwrite=True)


@on_rank_0
def _refuse_to_replace(path: Path, settings: dict[str, Any], overwrite: bool) -> None:
    if overwrite or not path.exists():
        return
    stored = read_result(path)["provenance"]["config_hash"]
    # Results from before the schemas are known by all values.
    if stored not in (config_hash(settings), full_hash(settings)):
        raise FileExistsError(f"{path} comes from other settings: pass --overwrite to replace it")


@on_rank_0
def _forget(path: Path) -> None:
    """Remove a result and what was kept for it; what has led to none yet is resumed."""
    if path.exists():
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink()


def _check_layout(name: str, recipe: EvaluationRecipe) -> None:
    """Raise ValueError for data of another layout than the evaluation needs, before any work."""
    layout = recipe.config.layout
    scheme = recipe.data.partition(":")[0] if ":" in recipe.data else ""
    if scheme not in ((layout,) if layout else ("", "folder", "tree")):
        remedy = f"{layout}:PATH" if layout else "tree:PATH, folder:PATH or a data set's name"
        raise ValueError(f"data={recipe.data!r} does not serve {name}: give {remedy}")


def _settings(
    trained: TrainedBackbone, recipe: EvaluationRecipe, on_corrupt: OnCorrupt
) -> dict[str, Any]:
    """What fixes the result. Data are named where they differ from those of the pretraining."""
    pretraining = replace(trained.recipe, eval_view=recipe.eval_view)
    settings: dict[str, Any] = {"evaluation": recipe.config, "pretraining": pretraining}
    if not trained.is_ours:
        weights = fingerprint(*trained.backbone.state_dict().values())
        settings["pretraining"] = [weights, recipe.eval_view]
    data = resolve(recipe.data) if recipe.data == "auto" else recipe.data
    if data != pretraining.data:
        settings["data"] = data
    if on_corrupt != pretraining.on_corrupt:
        settings["on_corrupt"] = on_corrupt
    return settings
