"""One evaluation, from its name and a backbone to its result file."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from imsvd_core.data import memory as datasets
from imsvd_core.data.coco import open_coco
from imsvd_core.data.memory import OnCorrupt
from imsvd_core.data.voc import open_voc
from imsvd_core.distributed import on_rank_0, rank_0_first, world
from imsvd_core.evaluation import knn, linear, svm
from imsvd_core.evaluation.detection import protocol as detection
from imsvd_core.evaluation.features import fingerprint
from imsvd_core.recipes import EvaluationRecipe, Recipe
from imsvd_core.results import provenance, read_result, write_result
from imsvd_core.runs import pretrain as training
from imsvd_core.runs.backbones import TrainedBackbone
from imsvd_core.system import signals
from imsvd_core.system.config import config_hash, full_hash
from imsvd_core.system.devices import PRECISIONS, pick_device
from imsvd_core.views import EvalView

LAYOUTS = {"voc": open_voc, "coco": open_coco}  #: of data sets whose images are in no class folders
WANTED = {
    svm.SVMConfig: "voc",
    detection.DetectionConfig: "coco",
}  #: which of them an evaluation needs; the others need none


def result_path(name: str, trained: TrainedBackbone, data: str, default_data: str) -> Path:
    """The file of an evaluation's result: NAME.json, or NAME-DATA.json for data other than the default."""
    other = "" if data == default_data else "-" + data.replace("/", "_")
    return trained.folder / f"{name}{other}.json"


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
    """Judge a backbone; returns the path of the result (`result_path`).

    On several ranks all share the work, and what was cut off goes on where it was, by the same call. `device` is that of
    the settings by default. Raises FileExistsError if other settings gave the result that stands there, unless
    `overwrite`; `signals.Stopped` after a notice.
    """
    layout, wanted = recipe.data.partition(":")[0], WANTED.get(type(recipe.config))
    if wanted != (layout if layout in LAYOUTS else None):
        raise ValueError(
            f"data={recipe.data!r} does not serve {name}: give {wanted or 'tree'}:PATH"
            + ("" if wanted else ", folder:PATH or a data set's name")
        )
    path = result_path(
        name, trained, recipe.data, recipe.data if default_data is None else default_data
    )
    pretraining = replace(trained.recipe, eval_view=recipe.eval_view)
    whose = (
        pretraining
        if trained.is_ours
        else [fingerprint(*trained.backbone.state_dict().values()), recipe.eval_view]
    )
    config = {"evaluation": recipe.config, "pretraining": whose}
    seen = datasets.resolve(recipe.data) if recipe.data == "auto" else recipe.data
    config |= {} if seen == pretraining.data else {"data": seen}
    config |= {} if on_corrupt == pretraining.on_corrupt else {"on_corrupt": on_corrupt}

    @on_rank_0
    def refuse_to_replace() -> None:
        if (
            path.exists()
            and not overwrite
            and read_result(path)["provenance"]["config_hash"]
            not in (config_hash(config), full_hash(config))
        ):
            raise FileExistsError(
                f"{path} was given by other settings: pass --overwrite to replace it"
            )

    refuse_to_replace()

    start, settings = time.perf_counter(), recipe.config
    if device and hasattr(settings, "loop"):
        settings = replace(settings, loop=replace(settings.loop, device=device))
    loop = getattr(settings, "loop", pretraining.loop)
    shown = progress and world()[0] == 0
    data = rank_0_first(
        lambda: load_data(
            replace(pretraining, data=recipe.data, on_corrupt=on_corrupt), progress=shown
        )
    )
    common = {"run_dir": trained.folder / name, "progress": progress}
    view = EvalView(**asdict(recipe.eval_view))
    embedded = {
        "device": pick_device(device or loop.device),
        "precision": PRECISIONS[loop.precision],
    }
    with signals.handle_stop_signals():
        match settings:
            case knn.KNNConfig():
                with signals.interruptible():
                    figures = knn.evaluate(
                        trained.backbone,
                        data,
                        settings,
                        ranks=True,
                        view=view,
                        **embedded,
                        **common | {"run_dir": trained.folder},
                    )
            case linear.LinearConfig():
                figures = linear.evaluate(trained.backbone, data, settings, view=view, **common)
            case svm.SVMConfig():
                figures = svm.evaluate(trained.backbone, data, settings, **embedded, **common)
            case detection.DetectionConfig():
                figures = detection.evaluate(trained.backbone, data, settings, **common)
    seconds = max(
        time.perf_counter() - start, figures.get("seconds", 0)
    )  # of training before a kill, too
    origin = provenance(
        config=config,
        device=embedded["device"],
        seed=loop.seed,
        dataset=data[0].title,
        seconds=seconds,
        world_size=world()[1],
    )
    refuse_to_replace()  # what another call has left there meanwhile
    return on_rank_0(write_result)(path, name, figures, origin, overwrite=True)


def load_data(recipe: Recipe, *, progress: bool = False) -> tuple[Any, Any]:
    """(train, test) of a recipe's data set: as `training.load_data`, and voc:PATH and coco:PATH."""
    if layout := LAYOUTS.get(recipe.data.partition(":")[0]):
        shown = (
            {"progress": progress} if layout is open_coco else {}
        )  # whose annotations take long to read
        train, test = (
            layout(recipe.data, split, on_corrupt=recipe.on_corrupt, **shown)
            for split in ("train", "test")
        )
        return train, test
    return training.load_data(recipe, progress=progress)
