"""VOC 2007 with one linear support vector machine a class on frozen representations, scored by
VOC's average precision."""

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from imsvd_core.data.voc import VOCImages
from imsvd_core.data.workers import share_of_cores
from imsvd_core.distributed import on_rank_0
from imsvd_core.evaluation.base import Color, Evaluation, Setup
from imsvd_core.evaluation.features import fingerprint, write_tensors
from imsvd_core.networks import represent
from imsvd_core.results import write_json
from imsvd_core.system import checks, signals
from imsvd_core.system.config import config_hash
from imsvd_core.system.progress import bar
from imsvd_core.system.run_folder import RunFolder
from imsvd_core.views import IMAGENET_MEAN, IMAGENET_STD, EvalView

if TYPE_CHECKING:  # slow to import: every command would wait for it
    from sklearn.svm import LinearSVC

BLOCK = 1024  # images whose features are kept together
LEAST = 3  # positives of a class that can be trained and validated on

Array = Tensor | np.ndarray

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SVMConfig(Evaluation):
    """VISSL's `eval_resnet_8gpu_transfer_voc07_svm`, with which PIRL's and VICReg's figures, and
    the paper's, were made."""

    costs: tuple[float, ...] = (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    """C of LIBLINEAR: for each class that of the best cross-validated AP, the first of equal ones.
    """
    folds: int = 3
    """Of the training images, in their order, each with its share of the class (stratified,
    unshuffled)."""
    positive_weight: float = 2.0
    """What a missed positive costs; a missed negative costs 1."""
    difficult: Literal["negative", "omit"] = "negative"
    """Training images that show a class only as difficult objects: VISSL's lists make them
    negatives; else they are left out for that class. Of the test images they are always left
    out."""
    pool: Literal["vissl", "mean"] = "vissl"
    """vissl: means over the four windows of 6×6 in the last 7×7 map, four times the features (8192
    of ResNet-50), as published figures have it; mean: the backbone's own output (2048)."""
    resize: int = 256
    """Pixels of the shorter side, first."""
    size: int = 224
    """Pixels of both sides, then: nothing is cropped, the aspect ratio is lost."""
    mean: Color = IMAGENET_MEAN
    """That the backbone's images were normalised by."""
    std: Color = IMAGENET_STD
    """That the backbone's images were normalised by."""
    tol: float = 1e-4
    """LIBLINEAR's tolerance."""
    max_iter: int = 2000
    """LIBLINEAR's iterations; fits that want more are counted."""
    seed: int = 0
    """Of the order in which LIBLINEAR visits the images."""
    train_images: int | None = None
    """Training images to use, drawn at random; all of them by default."""
    test_images: int | None = None
    """Test images to use, drawn at random; all of them by default."""
    jobs: int | None = None
    """Processes, a class to each at a time, by default as many as cores; the figures do not depend
    on it."""

    evaluation = "voc07-svm"
    layout = "voc"

    def __post_init__(self) -> None:
        if not self.costs or len(set(self.costs)) < len(self.costs):
            raise ValueError(f"costs={self.costs} must be different (VISSL's: {SVMConfig.costs})")
        checks.positive(self, "costs", "positive_weight", "tol")
        checks.at_least(self, folds=2, max_iter=1, seed=0)
        checks.at_least(self, jobs=1, train_images=1, test_images=1)
        checks.literals(self)
        _ = self.view  # refuses impossible sizes

    @property
    def view(self) -> EvalView:
        """It normalises what `VOCImages.images` has resized; nothing is cropped."""
        return EvalView(self.resize, self.size, self.mean, self.std)

    def normalised(self, mean: Color, std: Color) -> "SVMConfig":
        return replace(self, mean=mean, std=std)

    def resolution(self, setup: Setup) -> int:
        return self.size

    @on_rank_0
    def judge(
        self, backbone: nn.Module, data: tuple[VOCImages, VOCImages], setup: Setup
    ) -> dict[str, Any]:
        """VOC's mean average precision in percent over the classes that can be evaluated: {"svm":
        …, "classes": {name: AP}, …}.

        Each combination of backbone, data and settings has a folder of its own under
        `setup.folder`, with features (float32) and every class that is done: a killed call goes on
        there. Both splits' features are in memory as float64, once for all processes; each of these
        copies the training share of a fold. Among ranks rank 0 does all, while the others wait.

        See `fit` for what is returned and raised beside; raises ValueError too for splits that
        differ in classes or share images, and for a map that `pool` does not fit.
        """
        train, test = data
        if train.classes != test.classes:
            names = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(f"the splits differ in classes {names}: give both of one data set")
        if shared := set(train.stems) & set(test.stems):
            raise ValueError(
                f"{len(shared)} images are in both splits, {min(shared)!r} for example: a test "
                "image must not be trained on"
            )
        settings = self.identity(backbone)
        del settings["jobs"]
        settings |= {
            "images": [_identity(train), _identity(test)],
            "precision": str(setup.precision),
        }
        setup = replace(setup, folder=setup.folder / config_hash(settings))
        with RunFolder(setup.folder) as run, signals.interruptible():
            x, rows = embed(backbone, train, self, setup)
            test_x, test_rows = embed(backbone, test, self, setup)
            figures = fit(
                x,
                train.labels[rows],
                test_x,
                test.labels[test_rows],
                train.classes,
                self,
                folder=setup.folder,
                progress=setup.progress,
            )
            run.check()
        return figures | {"pool": self.pool, "difficult": self.difficult}


@dataclass(frozen=True)
class ClassResult:
    """How one class went."""

    cost: float
    """The one that cross-validates best, the first of equal ones."""
    cross_validated: list[float]
    """Average precision at each cost, the mean over folds."""
    not_converged: int
    """Fits of LIBLINEAR that reached `max_iter`."""
    ap: float = 0.0
    """Average precision on the test images, between 0 and 1; 0 before the test."""


def embed(
    backbone: nn.Module, data: VOCImages, config: SVMConfig, setup: Setup
) -> tuple[Tensor, Tensor]:
    """Representations (n, F), float32, of the images that can be read, and their indices (n,),
    int64.

    They are kept in `setup.folder`, in blocks; those that are there are not computed again.
    """
    if config.pool == "vissl":
        if not hasattr(backbone, "avgpool"):
            raise ValueError(
                f"pool='vissl' needs a ResNet with its `avgpool`, not {type(backbone).__name__}: "
                "take pool='mean'"
            )
        backbone = copy.deepcopy(backbone)
        backbone.avgpool = _Windows(6, stride=1)
    backbone.to(setup.device)
    blocks = []
    with bar(f"{data.split} images", len(data), setup.progress) as advance:
        for start in range(0, len(data), BLOCK):
            indices = range(len(data))[start : start + BLOCK]
            path = setup.folder / f"{data.split}-{start // BLOCK:05d}.safetensors"
            if path.exists():
                advance(len(indices))
            else:
                features, rows = [], []
                for readable, images in data.images(
                    config.resize, config.size, indices=indices, device=setup.device
                ):
                    batch = config.view.finish(images)
                    features.append(represent(backbone, [batch], setup.device, setup.precision))
                    rows += readable
                    advance(len(readable))
                block = {"features": torch.cat(features), "rows": torch.tensor(rows)}
                write_tensors(path, block)
            blocks.append(safetensors.torch.load_file(path))
    return (
        torch.cat([block["features"] for block in blocks]),
        torch.cat([block["rows"] for block in blocks]),
    )


def fit(
    features: Array,
    labels: Array,
    test_features: Array,
    test_labels: Array,
    classes: Sequence[str],
    config: SVMConfig,
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """One classifier a class on features (N, F), with labels (N, classes) of 1, 0 (difficult) and
    -1; scored on test ones.

    A class with fewer than three training positives (or than folds), or no test positive, is named
    and not scored. Costs are chosen on training images alone. What is done is kept in `folder`,
    which belongs to these data and settings.

    Returns {"svm": mean AP in percent, "classes": {name: AP in percent}, "costs": {name: C},
    "not_evaluable": [names], "not_converged": {name: of its fits}, "train_images": N,
    "test_images": …, "features": F}. Raises ValueError where shapes or labels are wrong, a feature
    is not finite, or no class can be evaluated.
    """
    x, y = _checked(features, labels, classes, "train")
    test_x, test_y = _checked(test_features, test_labels, classes, "test")
    if x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f"features have {x.shape[1]} columns and test_features {test_x.shape[1]}: embed both "
            "by one backbone"
        )
    least = max(LEAST, config.folds)
    numerous = np.minimum((y == 1).sum(0), (y == -1).sum(0)) >= least
    columns = np.flatnonzero(numerous & (test_y == 1).any(0)).tolist()
    if not columns:
        raise ValueError(
            f"none of the {len(classes)} classes has {least} positives and negatives to train on "
            "and 1 to test: take more images"
        )
    paths = {
        column: folder and folder / "classes" / f"{classes[column]}.json" for column in columns
    }
    work = {
        classes[column]: partial(
            _fit_class, x, y[:, column], test_x, test_y[:, column], config, path, os.getpid()
        )
        for column, path in paths.items()
    }
    results = _fit_classes(work, config, progress)
    return {
        "svm": round(100 * float(np.mean([result.ap for result in results.values()])), 2),
        "classes": {name: round(100 * result.ap, 2) for name, result in results.items()},
        "costs": {name: result.cost for name, result in results.items()},
        "not_evaluable": [name for name in classes if name not in results],
        "not_converged": {
            name: result.not_converged for name, result in results.items() if result.not_converged
        },
        "train_images": len(x),
        "test_images": len(test_x),
        "features": x.shape[1],
    }


def _fit_classes(
    work: Mapping[str, Callable[[], ClassResult]], config: SVMConfig, progress: bool
) -> dict[str, ClassResult]:
    """The results of the classes, by name; each is done by one process."""
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor

    jobs, results = min(config.jobs or share_of_cores(), len(work)), {}
    calls = (delayed(fit_class)() for fit_class in work.values())
    with bar("support vector machines", len(work), progress) as advance:
        for name, result in zip(work, Parallel(jobs, return_as="generator")(calls), strict=True):
            if result.not_converged:
                log.warning(
                    "%s: %d fits of LIBLINEAR did not converge in max_iter=%d",
                    name,
                    result.not_converged,
                    config.max_iter,
                )
            results[name] = result
            advance(1)
    if jobs > 1:
        # Else they would idle for minutes, with the memory that they hold.
        get_reusable_executor().shutdown()
    return results


def train_class(
    features: np.ndarray, labels: np.ndarray, config: SVMConfig
) -> tuple["LinearSVC", ClassResult]:
    """The classifier of one class at the cost that cross-validates best on these images, and how
    that went.

    features: normalised, float64 (N, F); labels (N,) of 1, 0 (difficult) and -1.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import LinearSVC

    rows = labels != 0 if config.difficult == "omit" else slice(None)
    x, y = features[rows], np.where(labels[rows] == 1, 1, -1)
    classifier = LinearSVC(
        dual=True,
        class_weight={1: config.positive_weight},
        tol=config.tol,
        max_iter=config.max_iter,
        random_state=config.seed,
    )
    search = GridSearchCV(
        classifier, {"C": config.costs}, cv=config.folds, scoring="average_precision"
    )
    with warnings.catch_warnings(record=True, action="always") as caught:
        search.fit(x, y)
    unfinished = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    curve = search.cv_results_["mean_test_score"].tolist()
    return search.best_estimator_, ClassResult(search.best_params_["C"], curve, unfinished)


def voc_average_precision(scores: Array, labels: Array) -> float:
    """Area under the envelope of precision over recall, between 0 and 1: at each recall the best
    precision there or beyond.

    Images labelled 0, which show the class only as difficult objects, are left out. Images of equal
    score count together, so their order plays no part. Since 2010 VOC does so; its own code of 2007
    looked at eleven recalls only. scores (N,), labels (N,) of 1, 0 and -1. Raises ValueError
    without a positive or for a score that is no number.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if np.isnan(scores).any() or not (labels == 1).any():
        raise ValueError(
            f"{np.isnan(scores).sum()} of the scores are no numbers and {(labels == 1).sum()} of "
            "the labels are positive: give 0 and at least 1"
        )
    scores, positive = scores[labels != 0], labels[labels != 0] == 1
    order = np.argsort(-scores, kind="stable")
    # Where each run of equal scores ends.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    true = positive[order].cumsum()[ends]
    precision = np.maximum.accumulate((true / (ends + 1))[::-1])[::-1]
    return float((np.diff(true, prepend=0) / true[-1] * precision).sum())


def _fit_class(
    x: np.ndarray,
    y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    config: SVMConfig,
    path: Path | None,
    parent: int,
) -> ClassResult:
    """Train one class and score the test images, for the process `parent`; or read what `path`,
    which receives the result, holds already."""
    from threadpoolctl import threadpool_limits

    if path and path.exists():
        return ClassResult(**json.loads(path.read_text()))
    if os.getpid() != parent:
        signals.end_with(parent)
    with threadpool_limits(1):  # sums in one order, however many processes there are
        classifier, result = train_class(x, y, config)
        scores = classifier.decision_function(test_x)
    result = replace(result, ap=voc_average_precision(scores, test_y))
    if path:
        write_json(path, result)
    return result


def _checked(
    features: Array, labels: Array, classes: Sequence[str], split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Features as float64 of unit length, or nearly, and labels."""
    x, y = np.asarray(features, np.float64), np.asarray(labels)
    if x.ndim != 2 or y.shape != (len(x), len(classes)) or not np.isin(y, (-1, 0, 1)).all():
        raise ValueError(
            f"{split}: features {x.shape} and labels {y.shape} must be (N, F) and "
            f"(N, {len(classes)}), the labels 1, 0 or -1"
        )
    if not np.isfinite(x).all():
        raise ValueError(
            f"{split}: {np.count_nonzero(~np.isfinite(x))} features are not finite: the backbone "
            "is spoilt, or its precision too low"
        )
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5), y


class _Windows(nn.AvgPool2d):
    """VISSL's pooling, which is for maps of 7×7."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (7, 7):
            raise ValueError(
                f"pool='vissl' needs a last map of 7×7, not {x.shape[2]}×{x.shape[3]}: take "
                "pool='mean', or size=224 with a backbone that has ImageNet's stem"
            )
        return super().forward(x)


def _identity(data: VOCImages) -> list[Any]:
    """What changes with the images and their labels."""
    names = config_hash(list(data.stems))
    return [data.title, data.classes, names, data.contents().hex(), fingerprint(data.labels)]
