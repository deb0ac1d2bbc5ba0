"""What every evaluation has in common."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from imsvd_core.data.streamed import StreamedImages
from imsvd_core.distributed import on_rank_0
from imsvd_core.engine.config import LoopConfig
from imsvd_core.evaluation.features import fingerprint, subset
from imsvd_core.system.config import essential, plain
from imsvd_core.views import EvalView

Color = tuple[float, float, float]  #: of red, green and blue


@dataclass(frozen=True)
class Setup:
    """How and where an evaluation runs, beside its own settings."""

    folder: Path
    """Keeps what is done so far, from which a call after a kill goes on."""
    view: EvalView = field(default_factory=lambda: EvalView(256, 224))
    """The view through which it sees a test image, unless its protocol has its own."""
    device: torch.device | str = "cpu"
    precision: torch.dtype | None = None
    """Of the backbone, by autocast."""
    progress: bool = False
    """Whether rank 0 shows bars."""

    @property
    def sight(self) -> dict[str, Any]:
        """How images are seen and embedded."""
        return {"view": self.view, "device": self.device, "precision": self.precision}


def unlabelled(train: Any, test: Any) -> str:
    """Why no labelled evaluation can be made of the data; nothing if one can."""
    for data, split in ((train, "train"), (test, "test")):
        if data is None:
            return "there is no test split; give one, PATH/test or PATH/val"
        if not data.classes:
            return (
                f"the {split} images of {data.title} are in no class folder; put them in "
                f"{data.home}/<class>/"
            )
    if len(train.classes) < 2:
        return f"all images of {train.title} are of one class, {train.classes[0]!r}; give several"
    return ""


def describe(resolution: int, train: Any, test: Any) -> dict[str, Any]:
    """What figures rest on, for their result: pixels, classes, and of each split what it is called,
    the images used, the unreadable ones skipped and what was passed over."""
    return {"resolution": resolution, "classes": len(train.classes)} | {
        name: {
            "split": images.part,
            "images": len(images),
            "skipped": images.skipped,
            "passed_over": dict(images.passed_over),
        }
        for name, images in (("train", train), ("test", test))
        if images is not None
    }


class Evaluation:
    """The settings of an evaluation: they say what it is, and run it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # each is a dataclass, of whatever fields
    evaluation: ClassVar[str]
    """Its name among the settings of what it keeps."""
    layout: ClassVar[str | None] = None
    """The scheme of the data that it needs, `voc` or `coco`; None for labelled images of any
    source."""
    loop: LoopConfig | None = None
    """The settings of its training; None where nothing is trained by steps."""
    sizes: ClassVar[tuple[str, str]] = ("train_images", "test_images")
    """Names of the settings that say how many images of (train, test) to use, None for all."""

    def check(self, train: Any, test: Any) -> None:
        """Raise ValueError, naming the setting, if the images cannot serve it."""

    def choose(self, *data: Any, ranks: bool = True, progress: bool = False) -> list[Any]:
        """The images of (train, test) that are used: the subsets, without what cannot be read and
        is to be skipped; for the `ranks` rank 0 tries. Raises ValueError, naming the setting, where
        there are not as many."""
        if not self.layout and (reason := unlabelled(*data)):
            raise ValueError(f"{self.evaluation} cannot be: {reason}")
        self.check(*data)
        chosen = []
        for images, name in zip(data, self.sizes, strict=True):
            images = subset(images, getattr(self, name), f"{self.evaluation}.{name}")
            if isinstance(images, StreamedImages):
                unsound = on_rank_0(images.unsound) if ranks else images.unsound
                images = images.without(unsound(progress))
            chosen.append(images)
        return chosen

    def identity(self, backbone: nn.Module) -> dict[str, Any]:
        """Its settings, but those that a resumption may change, and the backbone: with the data,
        what fixes its figures."""
        weights = fingerprint(*backbone.state_dict().values())
        settings = {"evaluation": self.evaluation, **plain(self), "backbone": weights}
        return essential(settings)

    def normalised(self, mean: Color, std: Color) -> Self:
        """The same for a backbone whose images were normalised so."""
        return self

    def resolution(self, setup: Setup) -> int:
        """Pixels of the side at which it sees a test image, of the shorter one if they differ."""
        return setup.view.size

    def run(self, backbone: nn.Module, data: tuple[Any, Any], setup: Setup) -> dict[str, Any]:
        """The figures of a backbone on what is chosen of (train, test). On several ranks all call
        this."""
        train, test = self.choose(*data)
        return self.judge(backbone, (train, test), setup)

    def judge(self, backbone: nn.Module, data: tuple[Any, Any], setup: Setup) -> dict[str, Any]:
        """The figures of a backbone on all of (train, test). On several ranks all call this."""
        raise NotImplementedError
