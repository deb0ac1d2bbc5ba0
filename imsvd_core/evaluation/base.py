"""What every evaluation has in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import nn

from imsvd_core.views import EvalView

Color = tuple[float, float, float]  #: of red, green and blue


@dataclass(frozen=True)
class Setup:
    """How and where an evaluation runs, beside its own settings."""

    view: EvalView
    """The view through which it sees a test image, unless its protocol has its own."""
    device: torch.device
    precision: torch.dtype | None
    """Of the backbone, by autocast."""
    folder: Path
    """Keeps what is done so far, from which a call after a kill goes on."""
    progress: bool


class Evaluation(Protocol):
    """The settings of an evaluation: they say what it is, and run it."""

    evaluation: ClassVar[str]
    """Its name among the settings of what it keeps."""
    layout: ClassVar[str | None]
    """The scheme of the data that it needs, `voc` or `coco`; None for labelled images of any
    source."""
    loop: Any
    """The settings of its training; None where nothing is trained by steps."""

    def normalised(self, mean: Color, std: Color) -> Self:
        """The same for a backbone whose images were normalised so."""
        ...

    def run(self, backbone: nn.Module, data: tuple[Any, Any], setup: Setup) -> dict[str, Any]:
        """The figures of a backbone on (train, test). On several ranks all call this."""
        ...
