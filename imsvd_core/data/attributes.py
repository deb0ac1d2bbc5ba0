"""`attributes`: 32 x 32 pictures drawn here, of which every factor is known.

One shape on a background. What it is (shape, texture, colour), how large it is, where it stands and
what is behind it are seven independent, uniform factors; its rotation, the light, a jitter of place
and size, and pixel noise are nuisances. It needs no file and no network, and it tells what no
photograph does: which attribute a learned variable has found.

A shape is a signed distance function: negative inside, positive outside, its size the distance to
the outline. One distance then gives the shape, its anti-aliased edge, its rim and its shadow.

The arithmetic on pixels uses correctly rounded operations only (+ - * / sqrt floor, comparisons),
and the random numbers come from a CPU generator: the same seed gives the same bytes on any number
of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 56, 58),
    "orange": (245, 140, 36),
    "yellow": (248, 212, 58),
    "green": (62, 168, 84),
    "cyan": (46, 188, 200),
    "blue": (52, 96, 214),
    "violet": (136, 74, 196),
    "pink": (243, 128, 178),
}
GROUND_PALETTE: dict[
    str, tuple[int, int, int]
] = {  # muted, so that the shape stands out from all of them
    "sand": (214, 203, 182),
    "sage": (158, 174, 158),
    "slate": (104, 112, 126),
    "night": (44, 46, 60),
}
FACTORS: dict[str, tuple[str, ...]] = {
    "shape": ("disc", "square", "triangle", "star", "heart", "cross", "ring", "moon"),
    "texture": ("plain", "stripes", "dots", "checks"),
    "colour": tuple(PALETTE),
    "size": ("small", "medium", "large"),
    "place": (
        "top left",
        "top",
        "top right",
        "left",
        "centre",
        "right",
        "bottom left",
        "bottom",
        "bottom right",
    ),
    "background": ("flat", "gradient", "clouds", "weave"),
    "ground": tuple(GROUND_PALETTE),
}
"""The discrete factors and the names of their values, in the order of the integers that stand for
them.
"""

CLASSES: tuple[str, ...] = tuple(
    f"{texture} {shape}" for shape in FACTORS["shape"] for texture in FACTORS["texture"]
)
"""The label: shape and texture together, whatever the colour, size, place and background."""

_RADII = (0.40, 0.52, 0.66)  # of half the picture's width
_STEP = 0.31  # between the nine places
_BLOCK = 128  # pictures drawn at once: small enough for the processor's cache


def sample(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the factors of `n` pictures, every one uniform and independent of the others.

    Returns a dict of (n,) tensors: int64 for each name in `FACTORS`, float32 for the nuisances
    (lengths in half picture widths, angles in radians). Raises ValueError for `n` < 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}: at least one picture is needed")

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    factors = {
        name: torch.randint(len(values), (n,), generator=generator)
        for name, values in FACTORS.items()
    }
    place, radius = factors["place"], torch.tensor(_RADII)[factors["size"]]
    factors["x"] = (place % 3 - 1) * _STEP + uniform(-0.05, 0.05)
    factors["y"] = (place // 3 - 1) * _STEP + uniform(-0.05, 0.05)
    factors["radius"] = radius * uniform(0.95, 1.05)
    factors["rotation"] = uniform(-math.pi / 7, math.pi / 7)
    factors["texture_angle"] = uniform(0, math.pi)
    factors["texture_shift"] = uniform(0, 1)
    factors["light_angle"] = uniform(0, 2 * math.pi)
    factors["light"] = uniform(0.0, 0.25)
    factors["ground_shift"] = uniform(0, 16)
    return factors


def label(factors: dict[str, Tensor]) -> Tensor:
    """The class of each picture, (N,) int64: an index into `CLASSES`."""
    return factors["shape"] * len(FACTORS["texture"]) + factors["texture"]


def draw(
    factors: dict[str, Tensor], *, size: int = 32, noise: torch.Generator | None = None
) -> Tensor:
    """Draw the pictures that `factors` (as `sample` returns them) describe: uint8 (N, 3, size,
    size).

    `noise` adds pixel noise of at most 9 grey levels; without it a picture is a function of its
    factors. Raises ValueError for a size below 8, at which no texture can be told from another.
    """
    if size < 8:
        raise ValueError(f"size is {size}: draw at 8 pixels or more")
    n = len(factors["shape"])
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the blocks are small: threads would wait for each other longer than they draw
    try:
        for start in range(0, n, _BLOCK):
            picture = _picture(
                {name: values[start : start + _BLOCK] for name, values in factors.items()}, size
            )
            if noise is not None:
                picture += torch.rand(picture.shape, generator=noise) * 18 - 9
            images[start : start + _BLOCK] = (picture + 0.5).clamp_(0, 255).to(torch.uint8)
    finally:
        torch.set_num_threads(threads)
    return images


def _picture(factors: dict[str, Tensor], size: int) -> Tensor:
    """One block of pictures, float32 (N, 3, size, size) in grey levels: background, shadow, shape,
    light.
    """
    f = {name: values[:, None, None] for name, values in factors.items()}
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    x, y = axis.expand(1, size, size), axis[:, None].expand(1, size, size)
    pixel = 2 / size

    across, down = _turn(x - f["x"], y - f["y"], f["rotation"])
    distance = (
        _choose(_SHAPES, factors["shape"], across / f["radius"], down / f["radius"]) * f["radius"]
    )
    inside = (0.5 - distance / pixel).clamp(0, 1)
    shadow = (1 - distance / 0.22).clamp(0, 1)
    rim = (1 + distance / 0.09).clamp(0, 1)

    turned = _turn(x - f["x"], y - f["y"], f["texture_angle"])
    ink = _choose(_TEXTURES, factors["texture"], *turned, f["texture_shift"])
    ground = _choose(
        _GROUNDS, factors["background"], x.expand_as(ink), y.expand_as(ink), f["ground_shift"]
    )
    back = _colours(GROUND_PALETTE)[factors["ground"]][:, :, None, None] * ground[:, None]
    back = back * (1 - 0.4 * shadow * shadow)[:, None]
    front = _colours(PALETTE)[factors["colour"]][:, :, None, None]
    front = front * (1 - 0.22 * rim)[:, None]
    # The texture's second tone is the colour mixed with white: the hue stays what the factor says.
    front = front + (255 - front) * (0.72 * ink)[:, None]
    picture = back + (front - back) * inside[:, None]
    light = 1 + f["light"] * (x * torch.cos(f["light_angle"]) + y * torch.sin(f["light_angle"]))
    return picture * light[:, None]


def _colours(palette: dict[str, tuple[int, int, int]]) -> Tensor:
    return torch.tensor(list(palette.values()), dtype=torch.float32)


def _turn(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    c, s = torch.cos(angle), torch.sin(angle)
    return x * c + y * s, y * c - x * s


def _choose(kinds: tuple[Callable[..., Tensor], ...], kind: Tensor, *planes: Tensor) -> Tensor:
    """Apply `kinds[k]` to the pictures whose `kind` is k, and to no others."""
    result = torch.empty_like(planes[0])
    for k, function in enumerate(kinds):
        rows = (kind == k).nonzero()[:, 0]
        result[rows] = function(*(plane[rows] for plane in planes))
    return result


# Shapes: signed distance at (x, y), y downwards, of a shape about one unit in radius.


def _disc(x: Tensor, y: Tensor, radius: float = 0.88) -> Tensor:
    return torch.sqrt(x * x + y * y) - radius


def _box(x: Tensor, y: Tensor, width: float = 0.8, height: float = 0.8) -> Tensor:
    dx, dy = x.abs() - width, y.abs() - height
    corner = torch.sqrt(dx.clamp(min=0).square() + dy.clamp(min=0).square())
    return corner + torch.maximum(dx, dy).clamp(max=0)


def _star(
    x: Tensor,
    y: Tensor,
    points: int = 5,
    tip: float = 1.05,
    hollow: float = 0.47,
    drop: float = 0.04,
) -> Tensor:
    """A star whose points reach out to `tip` and whose hollows reach in to `hollow`; with 3 or 5
    points.
    """
    x, y = x.abs(), drop - y
    for angle in (
        2 * math.pi / points,
        math.pi / points,
    ):  # two mirrors fold all points on half of one
        nx, ny = math.cos(angle), -math.sin(angle)
        beyond = (x * nx + y * ny).clamp(min=0) * 2
        x, y = (x - beyond * nx).abs(), y - beyond * ny
    # What is left is one edge, from the tip (0, tip) to the hollow.
    right, down = hollow * math.sin(math.pi / points), tip - hollow * math.cos(math.pi / points)
    length = math.hypot(right, down)
    right, down, y = right / length, down / length, tip - y
    along = (x * right + y * down).clamp(0, length)
    distance = torch.sqrt((x - along * right).square() + (y - along * down).square())
    return torch.where(x * down - y * right > 0, distance, -distance)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return _star(x, y, points=3, tip=1.16, hollow=0.58, drop=0.14)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    side, half = 0.56, math.sqrt(0.5)
    y = y - 0.1
    u, v = (
        (x + y) * half,
        (y - x) * half,
    )  # a square on its corner, and a disc on each of its two upper sides
    discs = torch.minimum(_disc(u, v + side, side), _disc(u + side, v, side))
    return torch.minimum(_box(u, v, side, side), discs)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.95, 0.34), _box(x, y, 0.34, 0.95))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return _disc(x, y, 0.68).abs() - 0.27


def _moon(x: Tensor, y: Tensor) -> Tensor:
    x, y = x + 0.1, y.abs()
    outer, bite = _disc(x, y, 0.98), _disc(x - 0.52, y, 0.74)
    horn_x, horn_y = (
        0.6569,
        0.7272,
    )  # where the circles meet: what is nearest beyond it, from either centre
    centre = torch.where(outer > 0, 0.0, 0.52)
    horn = torch.sqrt((x - horn_x).square() + (y - horn_y).square())
    return torch.where(
        (x - centre) * horn_y > y * (horn_x - centre), horn, torch.maximum(outer, -bite)
    )


_SHAPES = (_disc, _box, _triangle, _star, _heart, _cross, _ring, _moon)


# Textures: how much of the second tone there is at (x, y), from 0 to 1; about five pixels to a
# period at 32.


def _wave(t: Tensor) -> Tensor:
    """A triangle wave of period 1 between -1 and 1, the cheap and exactly rounded cousin of the
    cosine.
    """
    return 4 * (t - torch.floor(t) - 0.5).abs() - 1


def _plain(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _stripes(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    return (_wave(x / 0.3 + shift) * 1.5 + 0.5).clamp(0, 1)


def _dots(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    u, v = x / 0.36 + shift, y / 0.36 + shift
    u, v = u - torch.floor(u) - 0.5, v - torch.floor(v) - 0.5
    return ((0.3 - torch.sqrt(u * u + v * v)) * 6 + 0.5).clamp(0, 1)


def _checks(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    return (_wave(x / 0.5 + shift) * _wave(y / 0.5 + shift) * 4 + 0.5).clamp(0, 1)


_TEXTURES = (_plain, _stripes, _dots, _checks)


# Backgrounds: brightness relative to the ground's colour at (x, y).


def _flat(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    return torch.ones_like(x)


def _gradient(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    return 1 + 0.3 * y


def _clouds(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    """Smooth noise: a fixed 16 x 16 table of heights, entered at a place of the picture's own."""
    heights = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    u, v = x * 2.2 + shift, y * 2.2 + shift * 5
    left, top = torch.floor(u), torch.floor(v)
    u, v = u - left, v - top
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j = left.long() % 16, top.long() % 16
    upper = heights[j, i] * (1 - u) + heights[j, (i + 1) % 16] * u
    lower = heights[(j + 1) % 16, i] * (1 - u) + heights[(j + 1) % 16, (i + 1) % 16] * u
    return 0.72 + 0.56 * (upper * (1 - v) + lower * v)


def _weave(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    return 1 + 0.12 * (_wave(x / 0.25 + shift) + _wave(y / 0.25 + shift))


_GROUNDS = (_flat, _gradient, _clouds, _weave)
