"""One random view of every image, several of them, and the view to test on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as TF

from imsvd_core.system import checks
from imsvd_core.views.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Interpolation,
    TwoViewConfig,
    ViewConfig,
    check_output,
    require,
)
from imsvd_core.views.kernels import (
    CROP_DRAWS,
    ViewParameters,
    between,
    blur_matrix,
    check_images,
    color_jitter_,
    draw_crop,
    flipped_crop,
    luma,
    needed,
    normalize,
    resampling_matrix,
    resized_crop,
    separable,
    to_float,
)

#: Output pixels that a CPU works on at a time: some 1.5 MB
CPU_CACHE_PIXELS = 2**17

Geometry = Callable[[Tensor, ViewParameters, ViewConfig], Tensor]


class View:
    """One random view of every image: ``View(config)(images, generator)``.

    Images are uint8 (N, 3, H, W); a view is float32 (N, 3, size, size), normalised. All chance
    comes from the generator: in the same state it gives the same bits. Draws happen on its device,
    which need not be the images'. Raises ValueError for images of another type or shape.
    """

    def __init__(self, config: ViewConfig) -> None:
        self.config = config

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        check_images(images)
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
        """Parameters for n images of height x width, drawn on the generator's device.

        They are moved to ``device``.
        """
        c = self.config
        # One row of uniform numbers an image, each column used once.
        uniform = torch.rand(n, CROP_DRAWS + 14, generator=generator, device=generator.device)
        crop, switches, ranks, strengths, sigma = uniform.split([CROP_DRAWS, 5, 4, 4, 1], 1)
        top, left, crop_height, crop_width = draw_crop(crop, height, width, c)
        flip, jitter, gray, blur, solarize = switches.unbind(1)
        ranges = [(max(0.0, 1 - b), 1 + b) for b in (c.brightness, c.contrast, c.saturation)]
        ranges.append((-c.hue, c.hue))
        factors = [between(low, high, strengths[:, i]) for i, (low, high) in enumerate(ranges)]
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
            sigma=between(*c.blur_sigma, sigma.squeeze(1)),
            solarize=solarize < c.solarize_probability,
        ).to(device)

    def apply(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        """The view of these parameters: uint8 (N, 3, H, W) -> float32 (N, 3, size, size)."""
        return self._in_parts(images, parameters, resized_crop)

    def draw_crops(self, uniform: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Crops (N, 4), int64, as top, left, height and width, of images of sizes (N,) each.

        uniform: (N, CROP_DRAWS), uniform in [0, 1). The law is ``draw``'s.
        """
        return torch.stack(draw_crop(uniform, height[:, None], width[:, None], self.config), dim=1)

    def crop(self, image: Tensor, box: Sequence[int]) -> Tensor:
        """One of ``draw_crops``' crops, antialiased: uint8 (3, H, W) -> uint8 (3, size, size)."""
        top, left, height, width = box
        part = image[None, :, top : top + height, left : left + width]
        # A decoder's rows of pixels stay rows of pixels: the resizing of bytes is fastest so.
        part = part.contiguous(memory_format=torch.channels_last)
        side = self.config.size
        return interpolate(part, (side, side), mode=self.config.interpolation, antialias=True)[0]

    def finish(self, crops: Tensor, generator: torch.Generator) -> Tensor:
        """All that follows the crop: uint8 -> normalised float32, both (N, 3, size, size).

        It draws as much as a call does; what it draws for the crop is idle. Raises ValueError for
        another size.
        """
        n, size = len(crops), self.config.size
        fits = tuple(crops.shape[2:]) == (size, size)
        require(fits, "crops", tuple(crops.shape), f"give crops of {size} x {size} pixels")
        parameters = self.draw(n, size, size, generator, crops.device)
        return self._in_parts(crops, parameters, flipped_crop)

    @torch.no_grad()
    def _in_parts(self, images: Tensor, parameters: ViewParameters, geometry: Geometry) -> Tensor:
        check_images(images)
        n, size, rows = len(images), self.config.size, len(parameters.top)
        require(rows == n, "rows of parameters", rows, f"give one for each of {n} images")
        out = torch.empty(n, 3, size, size, device=images.device)
        # A CPU is fastest on what its cache holds; an accelerator takes the whole batch at once.
        step = max(1, CPU_CACHE_PIXELS // size**2) if images.device.type == "cpu" else max(1, n)
        # Half precision would show in the picture.
        with torch.autocast(images.device.type, enabled=False):
            for start in range(0, n, step):
                part = slice(start, start + step)
                cropped = geometry(images[part], parameters[part], self.config)
                self._color(cropped, parameters[part], out[part])
        return out

    def _color(self, x: Tensor, p: ViewParameters, out: Tensor) -> None:
        c = self.config
        if c.jitter_probability and needed(p.jitter):
            color_jitter_(x, p)
        if c.gray_probability and needed(p.gray):
            x.lerp_(luma(x)[:, None], p.gray.float().view(-1, 1, 1, 1))
        if c.blur_probability and needed(p.blur):
            blur = blur_matrix(p, c.size, c.blur_kernel)
            x = separable(x, blur, blur)
        if c.solarize_probability and needed(p.solarize):
            x = torch.where(p.solarize.view(-1, 1, 1, 1) & (x >= c.solarize_threshold), 1 - x, x)
        normalize(x, c.mean, c.std, out)


class Views:
    """Any number of views, one drawn after the other: ``Views(configs)(images, generator)``.

    A call takes uint8 (N, 3, H, W) and gives one float32 (N, 3, size, size) a law, in their order.
    """

    def __init__(self, configs: Iterable[ViewConfig]) -> None:
        self.views = tuple(View(config) for config in configs)

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(view(images, generator) for view in self.views)

    def finish(self, crops: Iterable[Tensor], generator: torch.Generator) -> tuple[Tensor, ...]:
        """The views from one table of crops a law, made already: uint8 (N, 3, size, size) each."""
        pairs = zip(self.views, crops, strict=True)
        return tuple(view.finish(table, generator) for view, table in pairs)


class TwoViews(Views):
    """The two large views of a law: ``TwoViews(config)(images, generator) -> (x1, x2)``."""

    def __init__(self, config: TwoViewConfig) -> None:
        super().__init__((config.first, config.second))


@dataclass(frozen=True)
class EvalView:
    """The view to test on, without chance: shorter side to ``resize``, centre crop, normalise.

    uint8 (N, 3, H, W) -> float32 (N, 3, size, size); resizing is antialiased.
    Raises ValueError for a ``size`` above ``resize``.
    """

    resize: int
    size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        check_output(self)
        checks.at_least(self, resize=self.size)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        out = torch.empty(len(images), 3, self.size, self.size, device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            x = to_float(images)
            if images.shape[2:] != (self.resize, self.resize) or self.size != self.resize:
                shorter = min(images.shape[2:])
                rows, columns = (self._axis(side, shorter, x) for side in images.shape[2:])
                x = separable(x, rows, columns, clamp=self.interpolation == "bicubic")
            return normalize(x, self.mean, self.std, out)

    def crop(self, image: Tensor) -> Tensor:
        """The resized centre of one image: uint8 (3, H, W) -> (3, size, size), for ``finish``."""
        mode = TF.InterpolationMode(self.interpolation)
        resized = TF.resize(image, [self.resize], mode, antialias=True)
        return TF.center_crop(resized, [self.size, self.size])

    @torch.no_grad()
    def finish(self, crops: Tensor) -> Tensor:
        """Normalise: uint8 (N, 3, size, size) -> float32 (N, 3, size, size)."""
        check_images(crops)
        x = to_float(crops)
        return normalize(x, self.mean, self.std, x)

    def _axis(self, side: int, shorter: int, x: Tensor) -> Tensor:
        """(N, size, side): resize this side of the images, then keep the middle ``size`` of it."""
        resized = self.resize * side // shorter
        position = torch.arange(self.size, device=x.device)[None] + round((resized - self.size) / 2)
        start, length = x.new_zeros(1), x.new_full((1,), side)
        matrix = resampling_matrix(start, length, position, resized, side, self.interpolation)
        return matrix.expand(len(x), -1, -1)
