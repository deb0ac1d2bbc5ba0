"""One evaluation, from its name and a backbone to its result file."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchvision.models.resnet import ResNet

from imsvd_core.data import memory as datasets
from imsvd_core.data.coco import open_coco
from imsvd_core.data.memory import OnCorrupt
from imsvd_core.data.voc import open_voc
from imsvd_core.distributed import on_rank_0, rank_0_first, world
from imsvd_core.evaluation import knn, linear, svm
from imsvd_core.evaluation.detection import protocol as detection
from imsvd_core.evaluation.features import fingerprint
from imsvd_core.export import read_state_dict
from imsvd_core.networks import build_backbone
from imsvd_core.recipes import EvaluationRecipe, Recipe, Scale, recipe
from imsvd_core.results import provenance, read_result, write_result
from imsvd_core.runs import pretrain as training
from imsvd_core.system import signals
from imsvd_core.system.config import config_hash, plain
from imsvd_core.system.devices import PRECISIONS, pick_device
from imsvd_core.views import EvalView

LAYOUTS = {"voc": open_voc, "coco": open_coco}  #: of data sets whose images are in no class folders
WANTED = {
    svm.SVMConfig: "voc",
    detection.DetectionConfig: "coco",
}  #: which of them an evaluation needs; the others need none


@dataclass(frozen=True)
class Judged:
    """A backbone that is to be judged, and what is known of it."""

    backbone: ResNet
    trained: Recipe
    """How it was trained; of a file of weights, the recipe whose settings its evaluations start from."""
    folder: Path
    """Where its results go."""
    known: bool
    """Whether `trained` is what it was trained by."""


def load(path: Path | str, scale: Scale | None = None) -> Judged:
    """The backbone of a finished run's folder, or of a file of weights under torchvision's names (.pth, .pt, .safetensors).

    A file's evaluations start from ImageNet's recipe, or from CIFAR-10's if its first convolution is of that kind, and
    their results go to runs/FILE. Raises FileNotFoundError or ValueError for what is neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"run={str(path)!r} is not there: give the folder of a finished `imsvd pretrain`, or a file of "
            "weights (.pth, .pt, .safetensors)"
        )
    if path.is_dir():
        trained, backbone = training.load_run(path)
        _refuse_spoilt(path, backbone)
        return Judged(backbone, trained, path, known=True)
    name, cifar_stem, state = read_state_dict(path)
    backbone = build_backbone(name, cifar_stem)
    backbone.load_state_dict(state)
    _refuse_spoilt(path, backbone)
    like = recipe("cifar10" if cifar_stem else "imagenet-100", scale)
    return Judged(
        backbone,
        replace(like, network=replace(like.network, backbone=name, cifar_stem=cifar_stem)),
        Path("runs") / path.stem,
        known=False,
    )


def _refuse_spoilt(path: Path, backbone: ResNet) -> None:
    spoilt = [name for name, value in backbone.state_dict().items() if not value.isfinite().all()]
    if spoilt:
        raise ValueError(
            f"run={str(path)!r} holds {len(spoilt)} tensors with what is no number, first {spoilt[0]}: give another "
            "checkpoint; these weights cannot be judged"
        )


def result_path(name: str, judged: Judged, data: str, usual: str) -> Path:
    """Where the result of an evaluation goes: NAME.json, or NAME-DATA.json for data other than the `usual`."""
    other = "" if data == usual else "-" + data.replace("/", "_")
    return judged.folder / f"{name}{other}.json"


def evaluate(
    name: str,
    judged: Judged,
    asked: EvaluationRecipe,
    *,
    usual: str | None = None,
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
    layout, wanted = asked.data.partition(":")[0], WANTED.get(type(asked.config))
    if wanted != (layout if layout in LAYOUTS else None):
        raise ValueError(
            f"data={asked.data!r} does not serve {name}: give {wanted or 'tree'}:PATH"
            + ("" if wanted else ", folder:PATH or a data set's name")
        )
    path = result_path(name, judged, asked.data, asked.data if usual is None else usual)
    trained = replace(judged.trained, eval_view=asked.eval_view)
    whose = (
        plain(trained)
        if judged.known
        else [fingerprint(*judged.backbone.state_dict().values()), plain(asked.eval_view)]
    )
    config = {"evaluation": plain(asked.config), "pretraining": whose}
    seen = datasets.resolve(asked.data) if asked.data == "auto" else asked.data
    config |= {} if seen == trained.data else {"data": seen}
    config |= {} if on_corrupt == trained.on_corrupt else {"on_corrupt": on_corrupt}

    @on_rank_0
    def refuse_to_replace() -> None:
        if (
            path.exists()
            and not overwrite
            and read_result(path)["provenance"]["config_hash"] != config_hash(config)
        ):
            raise FileExistsError(
                f"{path} was given by other settings: pass --overwrite to replace it"
            )

    refuse_to_replace()

    start, settings = time.perf_counter(), asked.config
    if device and hasattr(settings, "loop"):
        settings = replace(settings, loop=replace(settings.loop, device=device))
    loop = getattr(settings, "loop", trained.loop)
    shown = progress and world()[0] == 0
    data = rank_0_first(
        lambda: load_data(replace(trained, data=asked.data, on_corrupt=on_corrupt), progress=shown)
    )
    common = {"run_dir": judged.folder / name, "progress": progress}
    view = EvalView(**asdict(asked.eval_view))
    embedded = {
        "device": pick_device(device or loop.device),
        "precision": PRECISIONS[loop.precision],
    }
    with signals.heed():
        match settings:
            case knn.KNNConfig():
                with signals.interruptible():
                    figures = knn.evaluate(
                        judged.backbone,
                        data,
                        settings,
                        ranks=True,
                        view=view,
                        **embedded,
                        **common | {"run_dir": judged.folder},
                    )
            case linear.LinearConfig():
                figures = linear.evaluate(judged.backbone, data, settings, view=view, **common)
            case svm.SVMConfig():
                figures = svm.evaluate(judged.backbone, data, settings, **embedded, **common)
            case detection.DetectionConfig():
                figures = detection.evaluate(judged.backbone, data, settings, **common)
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
