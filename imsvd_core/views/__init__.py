"""Random views of every image in a batch: the augmentations of multi-view learning, on the device.

A view is, in this order: random resized crop, horizontal flip, colour jitter, greyscale, Gaussian
blur, solarisation (those of VICReg, which the paper uses), then normalisation. `config` says how
often and how strongly, `view` draws every image's parameters, `kernels` computes for whole batches.

Images too large or too many for the device are cropped where they are decoded (``draw_crops`` and
``crop``: one image at a time, uint8 to uint8), and ``finish`` does the rest for the batch.
"""

from imsvd_core.views.config import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Interpolation,
    TwoViewConfig,
    ViewConfig,
    cifar_multicrop_views,
    cifar_views,
    imagenet_views,
)
from imsvd_core.views.kernels import (
    BRIGHTNESS,
    CONTRAST,
    CROP_DRAWS,
    HUE,
    SATURATION,
    ViewParameters,
)
from imsvd_core.views.view import EvalView, TwoViews, View, Views

__all__ = [
    "BRIGHTNESS",
    "CIFAR_MEAN",
    "CIFAR_STD",
    "CONTRAST",
    "CROP_DRAWS",
    "HUE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SATURATION",
    "EvalView",
    "Interpolation",
    "TwoViewConfig",
    "TwoViews",
    "View",
    "ViewConfig",
    "ViewParameters",
    "Views",
    "cifar_multicrop_views",
    "cifar_views",
    "imagenet_views",
]
