"""Two random views of every image in a batch: the augmentations of multi-view learning, on the device.

A view is, in this order: random resized crop, horizontal flip, colour jitter, greyscale, Gaussian blur,
solarisation (those of VICReg, which the paper uses), then normalisation. Every image draws its own parameters
and its own order of the four jitter operations. Laws and formulas are torchvision's; only the arithmetic is
arranged for whole batches:

* crop, flip and resize are one pair of matrices an image, ``rows @ image @ columns.T``; so is the blur;
* brightness, contrast, saturation and greyscale are one blend of each image with another;
* hue, as costly as several blends, is done once for the batch, wherever it stands in an image's order.

CPU, CUDA and MPS run the same code, in float32. On an accelerator nothing waits for a drawn value.

Images too large or too many for the device are cropped where they are decoded (``draw_crops`` and ``crop``:
one image at a time, uint8 to uint8), and ``finish`` does the rest for the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as TF

Interpolation = Literal["bilinear", "bicubic"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in PIL and torchvision
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(
    4
)  # the numbers in ViewParameters.order, as in ColorJitter
CROP_TRIES = 10
CROP_DRAWS = 2 * CROP_TRIES + 2  # uniform numbers that decide an image's crop
CPU_CACHE_PIXELS = 2**17  # output pixels that a CPU works on at a time: some 1.5 MB


@dataclass(frozen=True)
class ViewConfig:
    """The law of one view. The defaults crop, flip and normalise, and leave the colours alone.

    The crop takes a share of the area uniform in ``scale``, its width over height log-uniform in ``ratio``.
    ``brightness``, ``contrast`` and ``saturation`` of b mean a factor uniform in [max(0, 1 - b), 1 + b];
    ``hue`` a shift uniform in [-hue, hue] turns. ``blur_sigma`` is in output pixels, and uniform;
    ``blur_kernel``, in pixels, is odd (23 is SimCLR's tenth of 224). ``solarize_threshold``, ``mean`` and
    ``std`` are on the scale where white is 1. Raises ValueError for a setting that is impossible.
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
        _check_output(self.size, self.interpolation, self.mean, self.std)
        for name, highest in (("scale", 1.0), ("ratio", math.inf), ("blur_sigma", math.inf)):
            value = getattr(self, name)
            ordered = (
                len(value) == 2 and 0 < value[0] <= value[1] <= highest and value[1] < math.inf
            )
            _require(ordered, name, value, f"give (low, high) with 0 < low <= high <= {highest}")
        for name in (
            "flip",
            "jitter_probability",
            "gray_probability",
            "blur_probability",
            "solarize_probability",
            "solarize_threshold",
        ):
            value = getattr(self, name)
            _require(0 <= value <= 1, name, value, "give a number from 0 to 1")
        for name, highest in (
            ("brightness", math.inf),
            ("contrast", math.inf),
            ("saturation", math.inf),
            ("hue", 0.5),
        ):
            value = getattr(self, name)
            good = 0 <= value <= highest and value < math.inf
            _require(good, name, value, f"give a strength from 0 to {highest}")
        odd = self.blur_kernel >= 1 and self.blur_kernel % 2 == 1
        _require(odd, "blur_kernel", self.blur_kernel, "give an odd number of pixels")
        if (
            self.blur_probability
        ):  # the border is reflected, and a reflection is as long as the image at most
            fits = self.blur_kernel // 2 < self.size
            _require(
                fits, "blur_kernel", self.blur_kernel, f"give less than twice the size, {self.size}"
            )


@dataclass(frozen=True)
class TwoViewConfig:
    """The laws of the two views, which may differ; both have one size."""

    first: ViewConfig
    second: ViewConfig

    def __post_init__(self) -> None:
        same = self.first.size == self.second.size
        _require(same, "second.size", self.second.size, f"give the first view's, {self.first.size}")


def imagenet_views(size: int = 224) -> TwoViewConfig:
    """The paper's ImageNet views, VICReg's: always blurred in the first, at times solarised in the second."""
    first = ViewConfig(
        size=size,
        scale=(0.08, 1.0),
        interpolation="bicubic",
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        jitter_probability=0.8,
        gray_probability=0.2,
        blur_probability=1.0,
    )
    return TwoViewConfig(first, replace(first, blur_probability=0.1, solarize_probability=0.2))


def cifar_views(size: int = 32) -> TwoViewConfig:
    """The authors' views for CIFAR-10, both alike: no blur and no solarisation."""
    view = ViewConfig(
        size=size,
        scale=(0.2, 1.0),
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        jitter_probability=0.8,
        gray_probability=0.2,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    )
    return TwoViewConfig(first=view, second=view)


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for N images: tensors of N rows. Where its switch is off, a factor or sigma is idle."""

    top: Tensor  # the crop, in pixels of the input: int64
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor  # switches: bool
    jitter: Tensor
    order: Tensor  # (N, 4) int64: which of BRIGHTNESS, CONTRAST, SATURATION and HUE comes first, second, ...
    factors: Tensor  # (N, 4): by operation, not by position; the last is the hue's shift in turns
    gray: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor

    def to(self, device: torch.device | str) -> ViewParameters:
        """The same parameters on another device."""
        return ViewParameters(
            *(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self))
        )

    def __getitem__(self, images: slice) -> ViewParameters:
        """The parameters of some of the images."""
        return ViewParameters(*(getattr(self, f.name)[images] for f in fields(self)))


class View:
    """One random view of every image: ``View(config)(images, generator)``.

    Images are uint8 (N, 3, H, W); a view is float32 (N, 3, size, size), normalised. All chance comes from the
    generator: in the same state it gives the same bits. Draws happen on its device, which need not be the
    images'. Raises ValueError for images of another type or shape.
    """

    def __init__(self, config: ViewConfig) -> None:
        self.config = config

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        _check_images(images)
        n, _, height, width = images.shape
        return self.apply(images, self.draw(n, height, width, generator, images.device))

    @torch.no_grad()
    def draw(
        self,
        n: int,
        height: int,
        width: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> ViewParameters:
        """Parameters for n images of height x width, drawn on the generator's device, moved to ``device``."""
        c = self.config
        # One row of uniform numbers an image, each column used once.
        uniform = torch.rand(n, CROP_DRAWS + 14, generator=generator, device=generator.device)
        crop, switches, ranks, strengths, sigma = uniform.split([CROP_DRAWS, 5, 4, 4, 1], 1)
        top, left, crop_height, crop_width = _draw_crop(crop, height, width, c)
        flip, jitter, gray, blur, solarize = switches.unbind(1)
        ranges = [(max(0.0, 1 - b), 1 + b) for b in (c.brightness, c.contrast, c.saturation)]
        ranges.append((-c.hue, c.hue))
        factors = [_between(low, high, strengths[:, i]) for i, (low, high) in enumerate(ranges)]
        return ViewParameters(
            top=top,
            left=left,
            height=crop_height,
            width=crop_width,
            flip=flip < c.flip,
            jitter=jitter < c.jitter_probability,
            order=ranks.argsort(dim=1),
            factors=torch.stack(factors, dim=1),
            gray=gray < c.gray_probability,
            blur=blur < c.blur_probability,
            sigma=_between(*c.blur_sigma, sigma.squeeze(1)),
            solarize=solarize < c.solarize_probability,
        ).to(device)

    def apply(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        """The view these parameters say: uint8 (N, 3, H, W) -> float32 (N, 3, size, size), normalised."""
        return self._in_parts(images, parameters, _resized_crop)

    def draw_crops(self, uniform: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Crops (N, 4), int64, as top, left, height and width, of images of sizes (N,) each.

        uniform: (N, CROP_DRAWS), uniform in [0, 1). The law is ``draw``'s.
        """
        return torch.stack(_draw_crop(uniform, height[:, None], width[:, None], self.config), dim=1)

    def crop(self, image: Tensor, box: Sequence[int]) -> Tensor:
        """One of ``draw_crops``' crops of an image: uint8 (3, H, W) -> uint8 (3, size, size), antialiased."""
        top, left, height, width = box
        part = image[None, :, top : top + height, left : left + width]
        # A decoder's rows of pixels stay rows of pixels: the resizing of bytes is fastest so.
        part = part.contiguous(memory_format=torch.channels_last)
        side = self.config.size
        return interpolate(part, (side, side), mode=self.config.interpolation, antialias=True)[0]

    def finish(self, crops: Tensor, generator: torch.Generator) -> Tensor:
        """All that follows the crop: uint8 (N, 3, size, size) -> float32 (N, 3, size, size), normalised.

        Draws as much as a call does; what it draws for the crop is idle. Raises ValueError for another size.
        """
        _check_images(crops)
        n, size = len(crops), self.config.size
        fits = tuple(crops.shape[2:]) == (size, size)
        _require(fits, "crops", tuple(crops.shape), f"give crops of {size} x {size} pixels")
        return self._in_parts(crops, self.draw(n, size, size, generator, crops.device), _flipped)

    @torch.no_grad()
    def _in_parts(
        self,
        images: Tensor,
        parameters: ViewParameters,
        geometry: Callable[[Tensor, ViewParameters, ViewConfig], Tensor],
    ) -> Tensor:
        _check_images(images)
        p, n, size = parameters, len(images), self.config.size
        _require(
            len(p.top) == n, "rows of parameters", len(p.top), f"give one for each of {n} images"
        )
        out = torch.empty(n, 3, size, size, device=images.device)
        # A CPU is fastest on what its cache holds; an accelerator takes the whole batch at once.
        part = max(1, CPU_CACHE_PIXELS // size**2) if images.device.type == "cpu" else max(1, n)
        with torch.autocast(
            images.device.type, enabled=False
        ):  # half precision would show in the picture
            for start in range(0, n, part):
                some = slice(start, start + part)
                self._colour(geometry(images[some], p[some], self.config), p[some], out[some])
        return out

    def _colour(self, x: Tensor, p: ViewParameters, out: Tensor) -> None:
        c = self.config
        if c.jitter_probability and _needed(p.jitter):
            _color_jitter_(x, p)
        if c.gray_probability and _needed(p.gray):
            x.lerp_(_gray(x)[:, None], p.gray.float().view(-1, 1, 1, 1))
        if c.blur_probability and _needed(p.blur):
            blur = _blur_matrix(p, c.size, c.blur_kernel)
            x = _separable(x, blur, blur)
        if c.solarize_probability and _needed(p.solarize):
            x = torch.where(p.solarize.view(-1, 1, 1, 1) & (x >= c.solarize_threshold), 1 - x, x)
        _normalize(x, c.mean, c.std, out)


class TwoViews:
    """Two views, one drawn after the other: ``TwoViews(config)(images, generator) -> (x1, x2)``."""

    def __init__(self, config: TwoViewConfig) -> None:
        self.config = config
        self.first, self.second = View(config.first), View(config.second)

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.first(images, generator), self.second(images, generator)

    def finish(
        self, crops1: Tensor, crops2: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Two views (x1, x2) from crops that are made already, uint8 (N, 3, size, size) each."""
        return self.first.finish(crops1, generator), self.second.finish(crops2, generator)


class EvalView:
    """The view to test on, without chance: shorter side to ``resize`` (antialiased), centre crop, normalise.

    uint8 (N, 3, H, W) -> float32 (N, 3, size, size). Raises ValueError for a ``size`` above ``resize``.
    """

    def __init__(
        self,
        resize: int,
        size: int,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        _check_output(size, interpolation, mean, std)
        enough = isinstance(resize, int) and resize >= size
        _require(enough, "resize", resize, f"give a whole number, at least the size, {size}")
        self.resize, self.size, self.mean, self.std = resize, size, mean, std
        self.interpolation = interpolation

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        _check_images(images)
        out = torch.empty(len(images), 3, self.size, self.size, device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            x = _to_float(images)
            if images.shape[2:] != (self.resize, self.resize) or self.size != self.resize:
                rows, columns = (
                    self._axis(side, min(images.shape[2:]), x) for side in images.shape[2:]
                )
                x = _separable(x, rows, columns, clamp=self.interpolation == "bicubic")
            return _normalize(x, self.mean, self.std, out)

    def crop(self, image: Tensor) -> Tensor:
        """The resized centre of one image: uint8 (3, H, W) -> uint8 (3, size, size), for ``finish``."""
        resized = TF.resize(
            image, [self.resize], TF.InterpolationMode(self.interpolation), antialias=True
        )
        return TF.center_crop(resized, [self.size, self.size])

    @torch.no_grad()
    def finish(self, crops: Tensor) -> Tensor:
        """Normalise: uint8 (N, 3, size, size) -> float32 (N, 3, size, size)."""
        _check_images(crops)
        x = _to_float(crops)
        return _normalize(x, self.mean, self.std, x)

    def _axis(self, side: int, shorter: int, x: Tensor) -> Tensor:
        """(N, size, side): resize this side of the images, then keep the middle ``size`` of it."""
        resized = self.resize * side // shorter
        position = torch.arange(self.size, device=x.device)[None] + round((resized - self.size) / 2)
        start, length = x.new_zeros(1), x.new_full((1,), side)
        matrix = _resampling_matrix(start, length, position, resized, side, self.interpolation)
        return matrix.expand(len(x), -1, -1)


def _between(low: float, high: float, uniform: Tensor) -> Tensor:
    return low + (high - low) * uniform


def _draw_crop(
    uniform: Tensor, height: int | Tensor, width: int | Tensor, c: ViewConfig
) -> tuple[Tensor, ...]:
    """torchvision's RandomResizedCrop.get_params for every row: top, left, height, width, each (N,) int64.

    All tries are made at once. The first that fits in the image counts; else the fallback, a central crop.
    uniform: (N, CROP_DRAWS); height and width: one for all, or (N, 1).
    """
    area, log_ratio, place = uniform.split([CROP_TRIES, CROP_TRIES, 2], dim=1)
    area = height * width * _between(*c.scale, area)
    ratio = _between(math.log(c.ratio[0]), math.log(c.ratio[1]), log_ratio).exp()
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    earliest = (fits * torch.arange(CROP_TRIES, 0, -1, device=fits.device)).argmax(
        dim=1, keepdim=True
    )

    # The fallback: the whole image, less what makes it too wide or too tall for the ratios.
    none = torch.zeros_like(place[:, :1])
    whole_height, whole_width = height + none, width + none
    fallback_width = torch.minimum(whole_width, (whole_height * c.ratio[1]).round())
    fallback_height = torch.minimum(whole_height, (whole_width / c.ratio[0]).round())
    found = fits.any(dim=1, keepdim=True)
    crop_width = torch.where(found, widths.gather(1, earliest), fallback_width)
    crop_height = torch.where(found, heights.gather(1, earliest), fallback_height)
    free_rows, free_columns = height - crop_height, width - crop_width
    top = torch.where(found, (place[:, :1] * (free_rows + 1)).floor(), (free_rows / 2).floor())
    left = torch.where(
        found, (place[:, 1:] * (free_columns + 1)).floor(), (free_columns / 2).floor()
    )
    return tuple(side.squeeze(1).long() for side in (top, left, crop_height, crop_width))


# Geometry: one matrix for the rows and one for the columns of each image


def _separable(x: Tensor, rows: Tensor, columns: Tensor, clamp: bool = False) -> Tensor:
    """rows @ x @ columns.T for every image and channel: (N, 3, H, W), (N, h, H), (N, w, W) -> (N, 3, h, w).

    Columns go first, and ``clamp`` keeps both results in [0, 1]: so does PIL, whose bicubic overshoots.
    """
    n, channels, height, _ = x.shape
    x = torch.bmm(x.reshape(n, channels * height, -1), columns.mT).unflatten(1, (channels, height))
    x = x.clamp_(0, 1) if clamp else x
    out = x.new_empty(channels, n, rows.shape[1], columns.shape[1])
    for channel in range(channels):  # a broadcast product would copy the matrices for every channel
        torch.bmm(rows, x[:, channel], out=out[channel])
    out = out.clamp_(0, 1) if clamp else out
    return out.transpose(0, 1)


def _resized_crop(images: Tensor, p: ViewParameters, c: ViewConfig) -> Tensor:
    position = torch.arange(c.size, device=images.device)[None]
    # A flip writes the columns in reverse.
    flipped = torch.where(p.flip[:, None], c.size - 1 - position, position)
    rows = _resampling_matrix(p.top, p.height, position, c.size, images.shape[2], c.interpolation)
    columns = _resampling_matrix(p.left, p.width, flipped, c.size, images.shape[3], c.interpolation)
    return _separable(_to_float(images), rows, columns, clamp=c.interpolation == "bicubic")


def _flipped(crops: Tensor, p: ViewParameters, c: ViewConfig) -> Tensor:
    crops = crops.contiguous()  # colours are by planes, and a decoder's bytes by pixels
    return _to_float(torch.where(p.flip.view(-1, 1, 1, 1), crops.flip(3), crops))


def _resampling_matrix(
    start: Tensor,
    length: Tensor,
    position: Tensor,
    resized: int,
    side: int,
    interpolation: Interpolation,
) -> Tensor:
    """Weights (N, positions, side) of the pixels along one side, where a crop of it becomes ``resized`` long.

    PIL's antialiased resampling: a triangle or a Keys cubic (a = -1/2), which widens with the output's pixels
    where the crop shrinks; cut at the crop's border and normalised there. The crop is [start, start + length)
    of (N,) each; position, (N or 1, positions), says which output pixels are wanted.
    """
    start, length = start[:, None].float(), length[:, None].float()
    scale = length / resized
    stretch = scale.clamp_min(1)
    center = (start + scale * (position + 0.5)) / stretch
    pixel = torch.arange(side, device=start.device) + 0.5
    inside = (pixel > start) & (pixel < start + length)
    pixel = torch.where(
        inside, pixel / stretch, math.inf
    )  # far from everything, so its weight is zero
    distance = (pixel[:, None, :] - center[:, :, None]).abs_()
    if interpolation == "bilinear":
        weight = (1 - distance).clamp_min_(0)
    else:  # Keys' two cubic pieces, without a branch
        far, near = (2 - distance).clamp_min_(0), (1 - distance).clamp_min_(0)
        weight = far.square().mul_(far - 1).mul_(0.5).add_(near.square().mul_(1 - 2 * near))
    return weight.div_(weight.sum(dim=2, keepdim=True))


def _blur_matrix(p: ViewParameters, size: int, kernel: int) -> Tensor:
    """(N, size, size): torchvision's gaussian_blur along one side; the identity where ``p.blur`` is off."""
    taps = torch.arange(kernel // 2 + 1, device=p.sigma.device)
    weight = (-0.5 * (taps / p.sigma[:, None]).square()).exp()
    weight = torch.where(p.blur[:, None], weight, (taps == 0).float())
    weight = weight / (
        2 * weight.sum(dim=1, keepdim=True) - weight[:, :1]
    )  # all but the middle count twice
    return (weight @ _reflected_taps(size, kernel, p.sigma.device)).unflatten(1, (size, size))


@lru_cache(maxsize=8)
def _reflected_taps(size: int, kernel: int, device: torch.device) -> Tensor:
    """(kernel // 2 + 1, size * size): how often output i meets input j at distance t, itself or reflected."""
    met = torch.zeros(kernel // 2 + 1, size, size)
    output = torch.arange(size)
    for offset in range(-(kernel // 2), kernel // 2 + 1):
        source = (output + offset).abs()
        source = size - 1 - (size - 1 - source).abs()
        met[abs(offset), output, source] += 1
    return met.flatten(1).to(device)


# Colour: float images (N, 3, H, W), values in [0, 1]


def _color_jitter_(x: Tensor, p: ViewParameters) -> None:
    """Brightness, contrast, saturation and hue, each image in its own order, in place.

    Hue is the costly one. It is done once for all images, in the middle: an image whose hue has k operations
    before it does them in the first steps and the others after, and stands still (factor 1) in the rest.
    """
    step = torch.arange(4, device=x.device)
    hue_at = p.order.eq(HUE).int().argmax(dim=1, keepdim=True)
    own = torch.cat([step[:3] < hue_at, step[1:] > hue_at], dim=1) & p.jitter[:, None]  # (N, 6)
    order = torch.cat([p.order[:, :3], p.order[:, 1:]], dim=1)
    factor = torch.where(own, p.factors.gather(1, order), 1.0)
    turns = torch.where(p.jitter, p.factors[:, HUE], 0.0)
    saturate, contrast = (order == SATURATION).float(), (order == CONTRAST).float()
    for k in range(6):
        if k == 3 and _needed(turns):
            _shift_hue_(x, turns)
        if _needed(factor[:, k] != 1):
            # Each of the three blends with another picture: the pixel's own grey, the mean grey, or black.
            gray = _gray(x)
            mean_gray = contrast[:, k] * gray.mean(dim=(1, 2))
            other = gray.mul_(saturate[:, k].view(-1, 1, 1)).add_(mean_gray.view(-1, 1, 1))
            torch.lerp(other[:, None], x, factor[:, k].view(-1, 1, 1, 1), out=x).clamp_(0, 1)


def _shift_hue_(x: Tensor, turns: Tensor) -> None:
    """Turn the hue of each image at fixed HSV saturation and value, in place. turns: (N,).

    Red, green and blue are one trapezoid of the hue, a third of a turn apart:
    lowest + chroma trapezoid(hue - channel / 3).
    """
    red, green, blue = x.unbind(dim=1)
    highest = torch.maximum(red, green).clamp_min_(blue)
    lowest = torch.minimum(red, green).clamp_max_(blue)
    chroma = highest - lowest
    # How far a hue is from cyan is one formula in all six sectors; green > blue says on which side of it.
    from_cyan = (
        (red - green).sub_(blue).sub_(lowest).add_(highest, alpha=2).div_(chroma.clamp_min(1e-6))
    )
    hue = from_cyan.copysign_(blue - green).div_(6).add_(turns.view(-1, 1, 1) + 0.5)

    center = torch.arange(3, device=x.device).view(3, 1, 1) / 3
    away = hue[:, None] - center
    away.sub_(away.round()).abs_()  # turns from this channel's own hue, going the shorter way round
    # trapezoid = clamp(2 - 6 away, 0, 1), with the clamp moved inside
    highest.add_(chroma)
    torch.addcmul(highest[:, None], chroma[:, None], away.clamp_(1 / 6, 1 / 3), value=-6, out=x)


def _gray(x: Tensor) -> Tensor:
    """Each pixel's luma: (N, 3, H, W) -> (N, H, W)."""
    red, green, blue = x.unbind(dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _to_float(images: Tensor) -> Tensor:
    return images.float().div_(255)


def _normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...], out: Tensor) -> Tensor:
    mean_and_std = _constant((tuple(mean), tuple(std)), x.device).view(2, 3, 1, 1)
    return torch.sub(x, mean_and_std[0], out=out).div_(mean_and_std[1])


@lru_cache(maxsize=16)
def _constant(values: tuple, device: torch.device) -> Tensor:
    """A small tensor that is sent to the device once: sending it every time would wait for the device."""
    return torch.tensor(values, device=device)


def _needed(step: Tensor) -> bool:
    """Does any image need this step? On an accelerator to ask would be to wait: there the answer is yes."""
    return step.device.type != "cpu" or bool(step.any())


# Checks


def _require(good: bool, name: str, value: object, remedy: str) -> None:
    if not good:
        raise ValueError(f"{name} = {value!r}: {remedy}")


def _check_output(
    size: int, interpolation: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    _require(
        isinstance(size, int) and size >= 1,
        "size",
        size,
        "give a whole number of pixels, 1 or more",
    )
    known = interpolation in ("bilinear", "bicubic")
    _require(known, "interpolation", interpolation, "give 'bilinear' or 'bicubic'")
    _require(len(mean) == 3, "mean", mean, "give one number a channel, 3")
    _require(len(std) == 3 and min(std) > 0, "std", std, "give one number above 0 a channel, 3")


def _check_images(images: Tensor) -> None:
    shape, kind = tuple(images.shape), images.dtype
    good = (
        images.ndim == 4
        and images.shape[1] == 3
        and kind == torch.uint8
        and min(images.shape[2:]) > 0
    )
    _require(good, "images", (kind, shape), "give a uint8 tensor of shape (N, 3, H, W)")
