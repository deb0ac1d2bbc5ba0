"""The laws of views: what happens to a picture, how often and how strongly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from imsvd_core.system import checks

Interpolation = Literal["bilinear", "bicubic"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ViewConfig:
    """The law of one view. The defaults crop, flip and normalise, and leave the colours alone.

    The crop takes a share of the area uniform in ``scale``, its width over height log-uniform in
    ``ratio``. ``brightness``, ``contrast`` and ``saturation`` of b mean a factor uniform in
    [max(0, 1 - b), 1 + b]; ``hue`` a shift uniform in [-hue, hue] turns. ``blur_sigma`` is in
    output pixels, and uniform; ``blur_kernel``, in pixels, is odd (23 is SimCLR's tenth of 224).
    ``solarize_threshold``, ``mean`` and ``std`` are on the scale where white is 1.
    Raises ValueError for a setting that is impossible.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 0.0
    gray_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 23
    solarize_probability: float = 0.0
    solarize_threshold: float = 128 / 255
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_output(self)
        checks.at_least(self, blur_kernel=1)
        checks.positive(self, "scale", "ratio", "blur_sigma")
        checks.finite(self, "brightness", "contrast", "saturation")
        checks.between(self, 0, 0.5, "hue")
        checks.between(self, 0, 1, "scale", "flip", "jitter_probability", "gray_probability")
        checks.between(self, 0, 1, "blur_probability", "solarize_probability", "solarize_threshold")
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            require(low <= high, name, (low, high), "give (low, high) with low <= high")
        kernel = self.blur_kernel
        require(kernel % 2 == 1, "blur_kernel", kernel, "give an odd number")
        # The border is reflected, and a reflection is at most as long as the image.
        fits = not self.blur_probability or kernel // 2 < self.size
        require(fits, "blur_kernel", kernel, f"give less than twice the size, {self.size}")


@dataclass(frozen=True)
class TwoViewConfig:
    """The laws of two views of one size, which may differ, and of small crops beside them.

    ``small_count`` views follow the law ``small``: the crops that SwAV's multi-crop adds.
    """

    first: ViewConfig
    second: ViewConfig
    small: ViewConfig | None = None
    small_count: int = 0

    def __post_init__(self) -> None:
        same = self.first.size == self.second.size
        require(same, "second.size", self.second.size, f"give the first view's, {self.first.size}")
        fits = (self.small_count > 0) if self.small else (self.small_count == 0)
        require(fits, "small_count", self.small_count, "give 0 without `small`, else 1 or more")

    @property
    def configs(self) -> tuple[ViewConfig, ...]:
        """The law of every view, in the order in which they are drawn."""
        small = (self.small,) * self.small_count if self.small else ()
        return self.first, self.second, *small


def _distorted(size: int, scale: tuple[float, float]) -> ViewConfig:
    """Crops under SimCLR's distortion of colours (Chen et al., 2020) at half its strength."""
    return ViewConfig(
        size=size,
        scale=scale,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        jitter_probability=0.8,
        gray_probability=0.2,
    )


def imagenet_views(size: int = 224) -> TwoViewConfig:
    """The paper's views for ImageNet, VICReg's: one always blurred, one at times solarised."""
    colored = replace(_distorted(size, (0.08, 1.0)), interpolation="bicubic", saturation=0.2)
    return TwoViewConfig(
        replace(colored, blur_probability=1.0),
        replace(colored, blur_probability=0.1, solarize_probability=0.2),
    )


def cifar_views(size: int = 32) -> TwoViewConfig:
    """The authors' views for CIFAR-10, both alike: no blur and no solarisation."""
    view = replace(_distorted(size, (0.2, 1.0)), mean=CIFAR_MEAN, std=CIFAR_STD)
    return TwoViewConfig(first=view, second=view)


def cifar_multicrop_views(
    size: int = 32, small_size: int = 16, small_count: int = 4
) -> TwoViewConfig:
    """SwAV's multi-crop in CIFAR-10's colours: small crops take smaller shares than `cifar_views`.

    The paper has none for CIFAR-10. A share of 5 % is a crop of 7 x 7 pixels.
    """
    large = cifar_views(size).first
    small = replace(large, size=small_size, scale=(0.05, large.scale[0]))
    return TwoViewConfig(large, large, small, small_count)


def check_output(law: Any) -> None:
    """Raise ValueError unless a view can have its size, resampling, mean and deviation."""
    checks.literals(law)
    checks.at_least(law, size=1)
    checks.positive(law, "std")
    for name in ("mean", "std"):
        value = getattr(law, name)
        require(len(value) == 3, name, value, "give one number a channel, 3")


def require(fits: bool, name: str, value: object, remedy: str) -> None:
    """Raise ValueError that names the setting, its value and the remedy, unless the value fits."""
    if not fits:
        raise ValueError(f"{name}={value!r}: {remedy}")
