"""Recipes of evaluations, of whatever backbone. One more is one module and one line at the end."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.evaluation.base import Evaluation
from imsvd_core.evaluation.detection.detector import DetectorConfig
from imsvd_core.evaluation.detection.protocol import DetectionConfig
from imsvd_core.evaluation.linear import LinearConfig
from imsvd_core.evaluation.svm import SVMConfig
from imsvd_core.recipes.base import EvalViewConfig, Recipe, fast_here
from imsvd_core.recipes.imagenet import imagenet
from imsvd_core.system.scale import Scale, current_scale


@dataclass(frozen=True)
class EvaluationRecipe:
    """One evaluation, of whatever backbone."""

    config: Evaluation
    """Its settings, which run it."""
    data: str
    """Data set, as a pretraining's; voc:PATH and coco:PATH for the layouts of VOC and COCO."""
    eval_view: EvalViewConfig = field(default_factory=EvalViewConfig)
    """What kNN and the linear probe see of a test image."""


def evaluation(
    name: str,
    scale: str | None = None,
    trained: Recipe | None = None,
    needed: EvalViewConfig | None = None,
) -> EvaluationRecipe:
    """The evaluation `name` at a scale, of a backbone that was `trained` so: knn and linear as its
    recipe has them (by default ImageNet's), the others as the paper does, all with the
    normalisation of the backbone's images, and as large as those are `needed`.

    Raises ValueError naming the evaluations there are.
    """
    if name not in EVALUATIONS and name not in OWN:
        raise ValueError(f"evaluation={name!r} must be one of {', '.join((*OWN, *EVALUATIONS))}")
    size = current_scale(scale)
    own = trained or fast_here(imagenet(size), size)
    if name in OWN:
        return EvaluationRecipe(_sized(getattr(own, name), needed), own.data, own.eval_view)
    recipe = fast_here(EVALUATIONS[name](size), size)
    view = replace(needed or recipe.eval_view, mean=own.eval_view.mean, std=own.eval_view.std)
    config = _sized(recipe.config.normalised(view.mean, view.std), needed)
    return EvaluationRecipe(config, recipe.data, view)


def _sized(config: Evaluation, needed: EvalViewConfig | None) -> Evaluation:
    """The settings for images of the size that is needed; a detector has sizes of its own."""
    if needed and isinstance(config, LinearConfig):
        return replace(config, view=replace(config.view, size=needed.size))
    if needed and isinstance(config, SVMConfig):
        return replace(config, resize=needed.resize, size=needed.size)
    return config


def _imagenet_knn(scale: Scale) -> EvaluationRecipe:
    """kNN on ImageNet (Table II)."""
    own = imagenet(scale)
    data = "tree:imagenet" if scale == "full" else "tree:tiny-imagenet-40"
    return EvaluationRecipe(own.knn, data, own.eval_view)


def _imagenet_linear(scale: Scale) -> EvaluationRecipe:
    """Linear probe on ImageNet (Tables I and IV to IX)."""
    return replace(_imagenet_knn(scale), config=imagenet(scale).linear)


def _places205_linear(scale: Scale) -> EvaluationRecipe:
    """Linear probe on Places205 (Table III). The weight decay is VISSL's."""
    base, linear = _imagenet_linear(scale), imagenet(scale).linear
    config = replace(
        linear,
        optim=OptimConfig("sgd", lr=0.01, weight_decay=5e-4, warmup_epochs=0, milestones=(5, 10)),
        loop=replace(linear.loop, epochs=1 if scale == "smoke" else 14),
        view=replace(linear.view, scale=(0.08, 1.0)),
    )
    return replace(base, config=config, data="tree:places205" if scale == "full" else base.data)


def _voc07_svm(scale: Scale) -> EvaluationRecipe:
    """Support vector machines on VOC07 (Table III)."""
    if scale == "full":
        return EvaluationRecipe(SVMConfig(), "voc:voc07")
    # The last map has 7×7 places at 224 pixels only.
    small = SVMConfig(pool="mean", resize=128, size=128, jobs=1)
    if scale == "smoke":
        small = replace(small, costs=(0.1, 1.0), train_images=48, test_images=16)
    return EvaluationRecipe(small, "voc:voc-mini")


def _coco_detection(scale: Scale) -> EvaluationRecipe:
    """Mask R-CNN R50-C4 on COCO, 1× (Table III)."""
    if scale == "full":
        return EvaluationRecipe(DetectionConfig(), "coco:coco")
    detector = DetectorConfig(
        min_sizes=(192, 224, 256),
        test_size=224,
        max_size=384,
        anchors=(16, 32, 64, 128, 256),
        train_proposals=(1000, 200),
        test_proposals=(500, 100),
        rois=32,
        roi_size=8,
        mask_channels=64,
    )
    if scale == "laptop":
        laptop = DetectionConfig(
            detector,
            iterations=300,
            lr=0.02,
            drops=(200, 270),
            precise_bn=20,
            loop=LoopConfig(batch_size=4),
        )
        return EvaluationRecipe(laptop, "coco:coco-mini")
    smoke = DetectionConfig(
        replace(detector, min_sizes=(96,), test_size=96, max_size=160, rois=8),
        iterations=2,
        lr=0.02,
        warmup=1,
        drops=(),
        precise_bn=1,
        train_images=4,
        test_images=2,
        loop=LoopConfig(batch_size=2, precision="fp32", log_every=1),
    )
    return EvaluationRecipe(smoke, "coco:coco-mini")


OWN = ("knn", "linear")  #: evaluations that a run brings its own settings for
EVALUATIONS: dict[str, Callable[[Scale], EvaluationRecipe]] = {
    "imagenet-knn": _imagenet_knn,
    "imagenet-linear": _imagenet_linear,
    "places205-linear": _places205_linear,
    "voc07-svm": _voc07_svm,
    "coco-detection": _coco_detection,
}
