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

import math
from collections.abc import Callable

import torch
from PIL import ImageColor
from torch import Tensor

PALETTE: dict[str, str] = {
    "red": "#de383a",
    "orange": "#f58c24",
    "yellow": "#f8d43a",
    "green": "#3ea854",
    "cyan": "#2ebcc8",
    "blue": "#3460d6",
    "violet": "#884ac4",
    "pink": "#f380b2",
}
# Muted, so that the shape stands out from all of them.
GROUND_PALETTE: dict[str, str] = {
    "sand": "#d6cbb6",
    "sage": "#9eae9e",
    "slate": "#68707e",
    "night": "#2c2e3c",
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

NUISANCES: dict[str, tuple[float, float]] = {
    "x": (-0.05, 0.05),
    "y": (-0.05, 0.05),
    "radius": (0.95, 1.05),
    "rotation": (-math.pi / 7, math.pi / 7),
    "texture_angle": (0, math.pi),
    "texture_shift": (0, 1),
    "light_angle": (0, 2 * math.pi),
    "light": (0, 0.25),
    "ground_shift": (0, 16),
}
"""The ranges of the continuous factors, in the order of their draws; place shifts x and y, and size
scales the radius.
"""

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

    factors = {
        name: torch.randint(len(values), (n,), generator=generator)
        for name, values in FACTORS.items()
    }
    for name, (low, high) in NUISANCES.items():
        factors[name] = torch.rand(n, generator=generator) * (high - low) + low
    factors["x"] += (factors["place"] % 3 - 1) * _STEP
    factors["y"] += (factors["place"] // 3 - 1) * _STEP
    factors["radius"] *= torch.tensor(_RADII)[factors["size"]]
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
    images = []
    threads = torch.get_num_threads()
    # The blocks are small: threads would wait for each other longer than they draw.
    torch.set_num_threads(1)
    try:
        blocks = [values.split(_BLOCK) for values in factors.values()]
        for block in zip(*blocks, strict=True):
            picture = _picture(dict(zip(factors, block, strict=True)), size)
            if noise is not None:
                picture += torch.rand(picture.shape, generator=noise) * 18 - 9
            images.append((picture + 0.5).clamp_(0, 255).to(torch.uint8))
    finally:
        torch.set_num_threads(threads)
    return torch.cat(images)


def _picture(factors: dict[str, Tensor], size: int) -> Tensor:
    """One block of pictures, float32 (N, 3, size, size) in grey levels: background, shadow, shape,
    light.
    """
    f = {name: values[:, None, None, None] for name, values in factors.items()}
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    x, y = axis.expand(1, 1, size, size), axis[:, None].expand(1, 1, size, size)
    dx, dy = x - f["x"], y - f["y"]

    across, down = _turn(dx, dy, f["rotation"])
    across, down = across / f["radius"], down / f["radius"]
    distance = torch.empty_like(across)
    for kind, shape in enumerate(_SHAPES):
        rows = factors["shape"] == kind
        distance[rows] = shape(across[rows], down[rows])
    distance *= f["radius"]
    inside = (0.5 - distance / (2 / size)).clamp(0, 1)
    shadow = (1 - distance / 0.22).clamp(0, 1)
    rim = (1 + distance / 0.09).clamp(0, 1)

    turned = _turn(dx, dy, f["texture_angle"])
    ink = _choose(factors["texture"], *_textures(*turned, f["texture_shift"]))
    ground = _choose(factors["background"], *_grounds(x, y, f["ground_shift"]))
    back = _colours(GROUND_PALETTE, factors["ground"]) * ground * (1 - 0.4 * shadow * shadow)
    front = _colours(PALETTE, factors["colour"]) * (1 - 0.22 * rim)
    # The texture's second tone is the colour mixed with white: the hue stays what the factor says.
    front = front + (255 - front) * (0.72 * ink)
    picture = back + (front - back) * inside
    return picture * (1 + f["light"] * _turn(x, y, f["light_angle"])[0])


def _colours(palette: dict[str, str], colour: Tensor) -> Tensor:
    """The colour of each picture, (N, 3, 1, 1), in grey levels."""
    levels = torch.tensor([ImageColor.getrgb(code) for code in palette.values()])
    return levels[colour, :, None, None].float()


def _turn(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    c, s = torch.cos(angle), torch.sin(angle)
    return x * c + y * s, y * c - x * s


def _choose(kind: Tensor, *pictures: Tensor) -> Tensor:
    """Of each picture the one of `pictures` that `kind` (N,) says; each broadcasts to all N."""
    return torch.stack(torch.broadcast_tensors(*pictures))[kind, torch.arange(len(kind))]


# Shapes: signed distance at (x, y), y downwards, of a shape about one unit in radius.


def _disc(x: Tensor, y: Tensor, radius: float = 0.88) -> Tensor:
    return torch.sqrt(x * x + y * y) - radius


def _box(x: Tensor, y: Tensor, width: float = 0.8, height: float = 0.8) -> Tensor:
    dx, dy = x.abs() - width, y.abs() - height
    return _disc(dx.clamp(min=0), dy.clamp(min=0), 0) + torch.maximum(dx, dy).clamp(max=0)


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
    # Two mirrors fold all points on half of one.
    for angle in (2 * math.pi / points, math.pi / points):
        nx, ny = math.cos(angle), -math.sin(angle)
        beyond = (x * nx + y * ny).clamp(min=0) * 2
        x, y = (x - beyond * nx).abs(), y - beyond * ny
    # What is left is one edge, from the tip (0, tip) to the hollow.
    right, down = hollow * math.sin(math.pi / points), tip - hollow * math.cos(math.pi / points)
    length = math.hypot(right, down)
    right, down, y = right / length, down / length, tip - y
    along = (x * right + y * down).clamp(0, length)
    distance = _disc(x - along * right, y - along * down, 0)
    return torch.where(x * down - y * right > 0, distance, -distance)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return _star(x, y, points=3, tip=1.16, hollow=0.58, drop=0.14)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    side, half = 0.56, math.sqrt(0.5)
    y = y - 0.1
    # A square on its corner, and a disc on each of its two upper sides.
    u, v = (x + y) * half, (y - x) * half
    discs = torch.minimum(_disc(u, v + side, side), _disc(u + side, v, side))
    return torch.minimum(_box(u, v, side, side), discs)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.95, 0.34), _box(x, y, 0.34, 0.95))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return _disc(x, y, 0.68).abs() - 0.27


def _moon(x: Tensor, y: Tensor) -> Tensor:
    x, y = x + 0.1, y.abs()
    outer, bite = _disc(x, y, 0.98), _disc(x - 0.52, y, 0.74)
    # Where the circles meet: what is nearest beyond it, from either centre.
    horn_x, horn_y = 0.6569, 0.7272
    centre = torch.where(outer > 0, 0.0, 0.52)
    beyond = (x - centre) * horn_y > y * (horn_x - centre)
    return torch.where(beyond, _disc(x - horn_x, y - horn_y, 0), torch.maximum(outer, -bite))


_SHAPES: tuple[Callable[..., Tensor], ...] = (
    _disc,
    _box,
    _triangle,
    _star,
    _heart,
    _cross,
    _ring,
    _moon,
)


def _textures(x: Tensor, y: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """How much of the second tone there is at (x, y), from 0 to 1, in each texture; about five
    pixels to a period at 32.
    """
    stripes = _wave(x / 0.3 + shift) * 1.5 + 0.5
    u, v = x / 0.36 + shift, y / 0.36 + shift
    dots = (0.3 - _disc(u - torch.floor(u) - 0.5, v - torch.floor(v) - 0.5, 0)) * 6 + 0.5
    checks = _wave(x / 0.5 + shift) * _wave(y / 0.5 + shift) * 4 + 0.5
    return torch.zeros(1), stripes.clamp(0, 1), dots.clamp(0, 1), checks.clamp(0, 1)


def _grounds(x: Tensor, y: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """Brightness relative to the ground's colour at (x, y), of each background."""
    weave = 1 + 0.12 * (_wave(x / 0.25 + shift) + _wave(y / 0.25 + shift))
    return torch.ones(1), 1 + 0.3 * y, _clouds(x, y, shift), weave


def _wave(t: Tensor) -> Tensor:
    """A triangle wave of period 1 between -1 and 1, the cheap and exactly rounded cousin of the
    cosine.
    """
    return 4 * (t - torch.floor(t) - 0.5).abs() - 1


def _clouds(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    """Smooth noise: a fixed 16 x 16 table of heights, entered at a place of the picture's own."""
    heights = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    u, v = x * 2.2 + shift, y * 2.2 + shift * 5
    left, top = torch.floor(u), torch.floor(v)
    u, v = u - left, v - top
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j = left.long() % 16, top.long() % 16

    def across(table: Tensor) -> Tensor:
        return table[j, i] * (1 - u) + table.roll(-1, 1)[j, i] * u

    return 0.72 + 0.56 * (across(heights) * (1 - v) + across(heights.roll(-1, 0)) * v)
