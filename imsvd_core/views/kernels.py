"""What a view does to pictures, arranged for whole batches; laws and formulas are torchvision's.

* crop, flip and resize are one pair of matrices an image, ``rows @ image @ columns.T``; so is the
  blur;
* brightness, contrast, saturation and greyscale are one blend of each image with another;
* hue, as costly as several blends, is done once for the batch, wherever it stands in an image's
  order.

CPU, CUDA and MPS run the same code, in float32. On an accelerator nothing waits for a drawn value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from imsvd_core.views.config import Interpolation, ViewConfig, require

#: ITU-R 601, as in PIL and torchvision
LUMA = (0.299, 0.587, 0.114)
#: The numbers in `ViewParameters.order`, as in torchvision's ColorJitter
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
#: Crops drawn for an image, of which the first that fits is taken
CROP_TRIES = 10
#: Uniform numbers that decide an image's crop
CROP_DRAWS = 2 * CROP_TRIES + 2


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for N images: tensors of N rows.

    The crop (top, left, height, width) is int64, in pixels of the input; switches (flip, jitter,
    gray, blur, solarize) are bool. Where its switch is off, a factor or sigma is idle.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    jitter: Tensor
    #: (N, 4) int64: which of BRIGHTNESS, CONTRAST, SATURATION and HUE comes first, second, ...
    order: Tensor
    #: (N, 4), by operation, not by position; the last is the hue's shift in turns
    factors: Tensor
    gray: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor

    def to(self, device: torch.device | str) -> ViewParameters:
        """The same parameters on another device."""
        columns = (column.to(device, non_blocking=True) for column in vars(self).values())
        return ViewParameters(*columns)

    def __getitem__(self, images: slice) -> ViewParameters:
        """The parameters of some of the images."""
        return ViewParameters(*(column[images] for column in vars(self).values()))


def between(low: float, high: float, uniform: Tensor) -> Tensor:
    """Numbers uniform in [low, high] from numbers uniform in [0, 1]."""
    return low + (high - low) * uniform


def draw_crop(
    uniform: Tensor, height: int | Tensor, width: int | Tensor, c: ViewConfig
) -> tuple[Tensor, ...]:
    """torchvision's RandomResizedCrop.get_params for every row: top, left, height and width, int64.

    All tries are made at once. The first that fits in the image counts; else the fallback, a
    central crop. uniform: (N, CROP_DRAWS); height and width: one for all, or (N, 1).
    """
    area, log_ratio, place = uniform.split([CROP_TRIES, CROP_TRIES, 2], dim=1)
    area = height * width * between(*c.scale, area)
    ratio = between(math.log(c.ratio[0]), math.log(c.ratio[1]), log_ratio).exp()
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)

    # The fallback: the whole image, less what makes it too wide or too tall for the ratios.
    down, across = place.split(1, dim=1)
    zeros = torch.zeros_like(down)
    whole_height, whole_width = height + zeros, width + zeros
    fallback_width = torch.minimum(whole_width, (whole_height * c.ratio[1]).round())
    fallback_height = torch.minimum(whole_height, (whole_width / c.ratio[0]).round())
    succeeded = fits.any(dim=1, keepdim=True)
    crop_width = torch.where(succeeded, widths.gather(1, first), fallback_width)
    crop_height = torch.where(succeeded, heights.gather(1, first), fallback_height)
    rows, columns = height - crop_height, width - crop_width
    top = torch.where(succeeded, down * (rows + 1), rows / 2).floor()
    left = torch.where(succeeded, across * (columns + 1), columns / 2).floor()
    return tuple(side.squeeze(1).long() for side in (top, left, crop_height, crop_width))


# Geometry: one matrix for the rows and one for the columns of each image


def separable(x: Tensor, rows: Tensor, columns: Tensor, clamp: bool = False) -> Tensor:
    """rows @ x @ columns.T of every image and channel.

    (N, 3, H, W), (N, h, H), (N, w, W) -> (N, 3, h, w). Columns go first, and ``clamp`` keeps both
    results in [0, 1]: so does PIL, whose bicubic overshoots.
    """
    n, channels, height, _ = x.shape
    x = torch.bmm(x.reshape(n, channels * height, -1), columns.mT).unflatten(1, (channels, height))
    x = x.clamp_(0, 1) if clamp else x
    out = x.new_empty(channels, n, rows.shape[1], columns.shape[1])
    # A broadcast product would copy the matrices for every channel.
    for channel in range(channels):
        torch.bmm(rows, x[:, channel], out=out[channel])
    out = out.clamp_(0, 1) if clamp else out
    return out.transpose(0, 1)


def resized_crop(images: Tensor, p: ViewParameters, c: ViewConfig) -> Tensor:
    """Crop, flip and resize: uint8 (N, 3, H, W) -> float32 (N, 3, size, size) in [0, 1]."""
    position = torch.arange(c.size, device=images.device)[None]
    # A flip writes the columns in reverse.
    flipped = torch.where(p.flip[:, None], c.size - 1 - position, position)
    rows = resampling_matrix(p.top, p.height, position, c.size, images.shape[2], c.interpolation)
    columns = resampling_matrix(p.left, p.width, flipped, c.size, images.shape[3], c.interpolation)
    return separable(to_float(images), rows, columns, clamp=c.interpolation == "bicubic")


def flipped_crop(crops: Tensor, p: ViewParameters, c: ViewConfig) -> Tensor:
    """Flip crops that have their size already: uint8 (N, 3, size, size) -> float32 in [0, 1]."""
    # A decoder writes its bytes pixel by pixel; what follows works plane by plane.
    crops = crops.contiguous()
    return to_float(torch.where(p.flip.view(-1, 1, 1, 1), crops.flip(3), crops))


def resampling_matrix(
    start: Tensor,
    length: Tensor,
    position: Tensor,
    resized: int,
    side: int,
    interpolation: Interpolation,
) -> Tensor:
    """Weights (N, positions, side) of the pixels along a side, of which a crop gets a new length.

    PIL's antialiased resampling: a triangle or a Keys cubic (a = -1/2), which widens with the
    output's pixels where the crop shrinks; cut at the crop's border and normalised there. The crop
    is [start, start + length), (N,) each, and becomes ``resized`` long; position, of shape
    (N or 1, positions), numbers the output pixels.
    """
    start, length = start[:, None].float(), length[:, None].float()
    scale = length / resized
    stretch = scale.clamp_min(1)
    center = (start + scale * (position + 0.5)) / stretch
    pixel = torch.arange(side, device=start.device) + 0.5
    inside = (pixel > start) & (pixel < start + length)
    # A pixel outside is far from everything, so that its weight is zero.
    pixel = torch.where(inside, pixel / stretch, math.inf)
    distance = (pixel[:, None, :] - center[:, :, None]).abs_()
    if interpolation == "bilinear":
        weight = (1 - distance).clamp_min_(0)
    else:  # Keys' two cubic pieces, without a branch
        far, near = (2 - distance).clamp_min_(0), (1 - distance).clamp_min_(0)
        weight = far.square().mul_(far - 1).mul_(0.5).add_(near.square().mul_(1 - 2 * near))
    return weight.div_(weight.sum(dim=2, keepdim=True))


def blur_matrix(p: ViewParameters, size: int, kernel: int) -> Tensor:
    """(N, size, size): torchvision's gaussian_blur along a side; the identity where it is off."""
    taps = torch.arange(kernel // 2 + 1, device=p.sigma.device)
    weight = (-0.5 * (taps / p.sigma[:, None]).square()).exp()
    weight = torch.where(p.blur[:, None], weight, (taps == 0).float())
    # All taps but the middle one count twice.
    weight = weight / (2 * weight.sum(dim=1, keepdim=True) - weight[:, :1])
    return (weight @ _reflected_taps(size, kernel, p.sigma.device)).unflatten(1, (size, size))


@lru_cache(maxsize=8)
def _reflected_taps(size: int, kernel: int, device: torch.device) -> Tensor:
    """How often output i meets input j, itself or reflected, at distance t: (t, size * size)."""
    meetings = torch.zeros(kernel // 2 + 1, size, size)
    output = torch.arange(size)
    for offset in range(-(kernel // 2), kernel // 2 + 1):
        source = (output + offset).abs()
        source = size - 1 - (size - 1 - source).abs()
        meetings[abs(offset), output, source] += 1
    return meetings.flatten(1).to(device)


# Colour: float images (N, 3, H, W), values in [0, 1]


def color_jitter_(x: Tensor, p: ViewParameters) -> None:
    """Brightness, contrast, saturation and hue, each image in its own order, in place.

    Hue, the costly one, is done once for all images, in the middle. Three steps come before it and
    three after; an image takes as many of each as its own order says, and keeps still (factor 1)
    in the others.
    """
    step = torch.arange(4, device=x.device)
    hue_at = p.order.eq(HUE).int().argmax(dim=1, keepdim=True)
    active = torch.cat([step[:3] < hue_at, step[1:] > hue_at], dim=1) & p.jitter[:, None]  # (N, 6)
    order = torch.cat([p.order[:, :3], p.order[:, 1:]], dim=1)
    factor = torch.where(active, p.factors.gather(1, order), 1.0)
    turns = torch.where(p.jitter, p.factors[:, HUE], 0.0)
    saturate, contrast = (order == SATURATION).float(), (order == CONTRAST).float()
    for k in range(6):
        if k == 3 and needed(turns):
            _shift_hue_(x, turns)
        if needed(factor[:, k] != 1):
            # Each of the three blends with a picture: the pixel's grey, the mean grey, or black.
            gray = luma(x)
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
    # A hue's distance from cyan is one formula in all six sectors; green > blue says on which side.
    from_cyan = (red - green).sub_(blue).sub_(lowest).add_(highest, alpha=2)
    from_cyan.div_(chroma.clamp_min(1e-6))
    hue = from_cyan.copysign_(blue - green).div_(6).add_(turns.view(-1, 1, 1) + 0.5)

    center = torch.arange(3, device=x.device).view(3, 1, 1) / 3
    # Turns from this channel's own hue, going the shorter way round
    away = hue[:, None] - center
    away.sub_(away.round()).abs_()
    # trapezoid = clamp(2 - 6 away, 0, 1), with the clamp moved inside
    highest.add_(chroma)
    torch.addcmul(highest[:, None], chroma[:, None], away.clamp_(1 / 6, 1 / 3), value=-6, out=x)


def luma(x: Tensor) -> Tensor:
    """Each pixel's luma: (N, 3, H, W) -> (N, H, W)."""
    red, green, blue = x.unbind(dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def to_float(images: Tensor) -> Tensor:
    """Bytes -> float32 in [0, 1]."""
    return images.float().div_(255)


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...], out: Tensor) -> Tensor:
    """(x - mean) / std, channel by channel, written into ``out``."""
    center, deviation = _channels(tuple(mean), tuple(std), device=x.device)
    return torch.sub(x, center, out=out).div_(deviation)


@lru_cache(maxsize=16)
def _channels(*law: tuple[float, ...], device: torch.device) -> Tensor:
    """Mean and deviation, (2, 3, 1, 1), sent to the device once: each sending would wait for it."""
    return torch.tensor(law, device=device).view(2, 3, 1, 1)


def needed(step: Tensor) -> bool:
    """Whether any image needs this step. On an accelerator: yes, as a look would wait."""
    return step.device.type != "cpu" or bool(step.any())


def check_images(images: Tensor) -> None:
    """Raise ValueError unless these are bytes (N, 3, H, W)."""
    shape, kind = tuple(images.shape), images.dtype
    channels = len(shape) == 4 and shape[1] == 3
    fits = channels and kind == torch.uint8 and min(shape[2:]) > 0
    require(fits, "images", (kind, shape), "give a uint8 tensor of shape (N, 3, H, W)")
