"""The house style: every figure of the book, light and dark, with a text that says what is seen.

A figure is a function of a theme. `show` draws it once in the light theme and once in the dark one,
and returns a `Picture`, which a notebook or the rendered book displays: both drawings are there,
and the page shows the one that fits. Nothing here needs pyplot, keeps global state or fetches
anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.rcsetup import cycler
from torchvision.utils import make_grid

#: Characters; a shorter text names a figure and does not say what it shows
SHORTEST_ALT = 30

#: Inches: the text column, that of a telephone, and what can still be read when it shrinks to that
COLUMN, NARROW, READABLE = 7.2, 3.8, 4.8


@dataclass(frozen=True)
class Theme:
    """Colours of one page background. `paper` is the background, which figures leave transparent.

    `colors` are Okabe and Ito's colour-blind-safe hues, each moved in lightness until it stands out
    from the paper (contrast of at least 3 to 1). `sequential` runs from the paper's tone (nothing)
    to the ink's (most), in perceptually even steps.
    """

    name: str
    ink: str
    paper: str
    muted: str
    colors: tuple[str, ...]
    sequential: Colormap

    def rc(self) -> dict[str, Any]:
        """Return matplotlib's settings for this theme."""
        labels = "axes.labelcolor", "axes.titlecolor", "legend.labelcolor", "text.color"
        ticks = "hatch.color", "xtick.labelcolor", "ytick.labelcolor"
        lines = "axes.edgecolor", "grid.color", "xtick.color", "ytick.color"
        return {
            **_HOUSE,
            **dict.fromkeys(labels + ticks, self.ink),
            **dict.fromkeys(lines, self.muted),
            "axes.prop_cycle": cycler(color=list(self.colors)),
            "patch.edgecolor": self.paper,
        }


_HOUSE = {
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.labelsize", "axes.titlesize", "font.size"), 10),
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 9),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "axes.grid", "legend.frameon"), False),
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so every machine draws the same
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "path",  # fonts travel as outlines, so every browser shows the same letters
    "svg.hashsalt": "imsvd",  # else every drawing gets random ids, and no two builds agree
}

LIGHT = Theme(
    name="light",
    ink="#222832",
    paper="#ffffff",
    muted="#6b7280",
    colors=("#0072b2", "#d55e00", "#008a64", "#b5548a", "#a67200", "#2e8bc0"),
    sequential=LinearSegmentedColormap.from_list(
        "light",
        [
            "#f7fbfd",
            "#bfe1fb",
            "#8dc6f6",
            "#64a7eb",
            "#4888d8",
            "#396abc",
            "#2f4e99",
            "#263472",
            "#1a1e4a",
        ],
    ),
)
DARK = Theme(
    name="dark",
    ink="#ced6dd",
    paper="#14181e",
    muted="#8b95a1",
    colors=("#4ba3e3", "#ff8a3d", "#2cc295", "#e49ac4", "#f0c24a", "#9ad2f5"),
    sequential=LinearSegmentedColormap.from_list(
        "dark",
        [
            "#181a24",
            "#19334f",
            "#005273",
            "#007586",
            "#009789",
            "#3eb383",
            "#92ca86",
            "#d1dea0",
            "#fff6d0",
        ],
    ),
)
THEMES = (LIGHT, DARK)

# The rendered book switches on its own attribute (book/_static/custom.css); notebooks carry their
# switch along.
_NOTEBOOK_SWITCH = (
    "<style>[data-jp-theme-light=false] .imsvd-light,.vscode-dark .imsvd-light"
    "{display:none!important}[data-jp-theme-light=false] .imsvd-dark,.vscode-dark .imsvd-dark"
    "{display:inline-block!important}</style>"
)


@dataclass(frozen=True)
class Picture:
    """A figure as HTML for notebooks and pages, and as its alternative text for everybody else."""

    html: str
    alt: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"[picture: {self.alt}]"


def figure(
    width: float = 6.4,
    height: float = 3.2,
    rows: int = 1,
    cols: int = 1,
    **subplots: Any,
) -> tuple[Figure, Any]:
    """Return a figure of `width` by `height` inches (the text column is 7.2 wide) and its axes.

    The axes are one `Axes` if there is one panel, else an array, as in `plt.subplots`, whose other
    arguments (`sharex`, `width_ratios`, `subplot_kw`, ...) are taken too. On a telephone, for which
    `show` draws what is wide once more, the panels stand below each other.
    """
    column = matplotlib.rcParams["figure.figsize"][0]
    if column > NARROW or width <= READABLE:
        drawing = Figure(figsize=(width, height), layout="constrained")
        return drawing, drawing.subplots(rows, cols, **subplots)
    across = max(1, int(cols * column / width + 0.01))
    down = -(-rows * cols // across)
    for name in "width_ratios", "height_ratios":
        subplots.pop(name, None)
    for name in "sharex", "sharey":  # of rows and columns that are no more
        subplots[name] = subplots.get(name) is True
    drawing = Figure(figsize=(column, height * down / rows), layout="constrained")
    axes = drawing.subplots(down, across, squeeze=False, **subplots).ravel()
    for spare in axes[rows * cols :]:
        spare.remove()
    axes = axes[: rows * cols].reshape(rows, cols).squeeze()
    return drawing, axes if axes.size > 1 else axes.item()


def show(draw: Callable[[Theme], Figure], alt: str) -> Picture:
    """Draw in the light and in the dark theme and return what a notebook displays.

    `draw` gets a `Theme` and returns the figure it drew; it is called twice, or four times if it is
    too wide for a telephone, and must draw the same every time. `alt` says in a sentence what is
    seen, for those who do not see it. Raises `ValueError` if it is too short.
    """
    _check_alt(alt)
    images = "".join(_both_widths(draw, theme, alt) for theme in THEMES)
    return Picture(f'{_NOTEBOOK_SWITCH}<div class="imsvd-figure">{images}</div>', alt)


def animate(
    draw_frame: Callable[[Any, Theme], Figure],
    frames: int | Iterable[Any],
    alt: str,
    labels: Sequence[str] | None = None,
    interval: int = 200,
) -> Picture:
    """Return a slider with a play button over frames that all travel inside the page.

    `draw_frame(frame, theme)` returns the figure of one frame, where `frame` runs through `frames`
    (a number counts from 0). `labels` name the frames for the reader ("step 40"); `interval` is the
    time of a frame in milliseconds. Without scripts the last frame is shown. All figures must have
    the same size. Raises `ValueError` for a short `alt`, no frames, or labels that do not match
    them.
    """
    _check_alt(alt)
    items = list(range(frames) if isinstance(frames, int) else frames)
    names = list(labels or (f"{i + 1} of {len(items)}" for i in range(len(items))))
    if not items:
        raise ValueError("frames is empty: an animation needs at least one frame")
    if len(names) != len(items):
        raise ValueError(
            f"labels has {len(names)} entries for {len(items)} frames: give one label to each frame"
        )
    drawn = [
        [_render(partial(draw_frame, item), theme, "webp") for theme in THEMES] for item in items
    ]
    uris = [[uri for uri, _ in pair] for pair in drawn]
    last = "".join(
        _img(theme, alt, *picture) for theme, picture in zip(THEMES, drawn[-1], strict=True)
    )
    name = "imsvd-" + hashlib.sha256("".join(map("".join, uris)).encode()).hexdigest()[:12]
    player = files("imsvd_core").joinpath("animation.js").read_text(encoding="utf-8")
    page = (
        f'{_NOTEBOOK_SWITCH}<div class="imsvd-figure imsvd-animation" id="{name}" role="group" '
        f'aria-label="{html.escape(alt)}">{last}<div class="imsvd-controls" '
        'style="display:none;gap:.75em;align-items:center">'
        '<button type="button" aria-label="Play">&#9654;&#xFE0E;</button>'
        f'<input type="range" min="0" max="{len(items) - 1}" value="{len(items) - 1}" '
        f'aria-label="Frame" style="flex:1"><output aria-live="off">{html.escape(names[-1])}'
        f"</output></div></div><script>{player.strip()}({json.dumps(name)},{_script_json(uris)},"
        f"{_script_json(names)},{interval});</script>"
    )
    return Picture(page, alt)


def draw_joint(
    ax: Axes,
    joint: Any,
    units: int | Sequence[int],
    theme: Theme,
    *,
    norm: Normalize | None = None,
    colorbar: bool = True,
    label: str = r"$\hat P$",
) -> AxesImage:
    """Draw a (cross-)joint matrix (D, D) of Eq. 10 as an image, with lines between its blocks.

    `units` is the number of units of every variable, or one number for each. The shades go with the
    square root of the probability, unless `norm` says otherwise: the diagonal blocks of a hard code
    hold 1/B, the others 1/B², and both should be seen. Returns the image. Raises `ValueError` where
    shape and units do not agree.
    """
    table = _array(joint).astype(float)
    dim = len(table)
    if table.shape != (dim, dim):
        raise ValueError(f"joint has shape {table.shape}; a square matrix (D, D) is needed")
    sizes = [units] * (dim // max(units, 1)) if isinstance(units, int) else list(units)
    if min(sizes, default=0) < 1 or sum(sizes) != dim:
        raise ValueError(f"units={units} does not divide the {dim} rows of joint into variables")
    if norm is None:
        norm = PowerNorm(0.5, vmin=0.0, vmax=max(float(table.max()), 1e-12))
    pixels = "none" if dim <= 256 else "auto"
    image = ax.imshow(table, cmap=theme.sequential, norm=norm, interpolation=pixels)
    edges = np.concatenate([[0], np.cumsum(sizes)]) - 0.5
    if len(sizes) <= 40:
        width = 0.5 if len(sizes) <= 16 else 0.25
        for rule in (ax.hlines, ax.vlines):
            rule(edges[1:-1], edges[0], edges[-1], color=theme.muted, linewidth=width, alpha=0.7)
    centers = list((edges[1:] + edges[:-1]) / 2) if len(sizes) <= 12 else []
    names = [f"$X_{{{v + 1}}}$" for v in range(len(centers))]
    ax.set_xticks(centers, names)
    ax.set_yticks(centers, names)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(True)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, label=label, shrink=0.85, pad=0.02)
        bar.outline.set_linewidth(0.5)
    return image


def gallery(images: Any, alt: str, *, columns: int = 8, scale: int = 2, gap: int = 2) -> Picture:
    """Return a contact sheet of uint8 images (N, 3, H, W), each pixel `scale` times as large.

    The gaps are transparent, so one sheet serves both themes. Raises `ValueError` for other shapes
    or types.
    """
    _check_alt(alt)
    sheet = contact_sheet(images, columns=columns, gap=gap, scale=scale)
    stream = io.BytesIO()
    PIL.Image.fromarray(sheet, "RGBA").save(stream, format="PNG", optimize=True)
    img = (
        f'<img class="dark-light imsvd-pixels" src="{_uri("image/png", stream)}" '
        f'alt="{html.escape(alt)}" width="{sheet.shape[1]}" '
        'style="max-width:100%;height:auto;image-rendering:pixelated">'
    )
    return Picture(f'<div class="imsvd-figure">{img}</div>', alt)


def draw_gallery(ax: Axes, images: Any, *, columns: int = 8, gap: int = 2) -> AxesImage:
    """Draw a contact sheet of uint8 images (N, 3, H, W) into `ax`, which loses its axes."""
    ax.set_axis_off()
    return ax.imshow(contact_sheet(images, columns=columns, gap=gap), interpolation="none")


def contact_sheet(images: Any, *, columns: int = 8, gap: int = 2, scale: int = 1) -> np.ndarray:
    """Return images (N, 3, H, W) of uint8 as one RGBA array, row by row, elsewhere transparent.

    Every pixel becomes `scale` by `scale` pixels; `gap` pixels of the sheet lie between images.
    """
    stack = _array(images)
    if stack.ndim != 4 or stack.shape[1] != 3 or stack.dtype != np.uint8 or not len(stack):
        raise ValueError(
            f"images has shape {stack.shape} and type {stack.dtype}: "
            "uint8 of shape (N, 3, H, W), N >= 1, is needed"
        )
    opaque = np.insert(stack, 3, 255, axis=1)
    pixels = opaque.repeat(scale, axis=2).repeat(scale, axis=3)
    cells = np.pad(pixels, ((0, 0), (0, 0), (0, gap), (0, gap)))
    sheet = make_grid(torch.from_numpy(cells), columns, padding=0).numpy().transpose(1, 2, 0)
    return sheet[: len(sheet) - gap, : sheet.shape[1] - gap]


def _check_alt(alt: str) -> None:
    if len(alt.strip()) < SHORTEST_ALT:
        raise ValueError(
            f"alt={alt!r} is too short: say in a sentence of at least {SHORTEST_ALT} characters "
            "what the picture shows, for a reader who cannot see it"
        )


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _img(theme: Theme, alt: str, uri: str, width: float) -> str:
    # A notebook with no style of ours shows the light one. "dark-light" tells the book's theme to
    # leave it as it is.
    display = "none" if theme.name == "dark" else "inline-block"
    return (
        f'<img class="imsvd-{theme.name} dark-light" src="{uri}" alt="{html.escape(alt)}" '
        f'width="{width:.0f}" style="display:{display};max-width:100%;height:auto">'
    )


def _both_widths(draw: Callable[[Theme], Figure], theme: Theme, alt: str) -> str:
    uri, width = _render(draw, theme, "svg")
    img = _img(theme, alt, uri, width)
    if width <= 96 * READABLE:
        return img
    narrow, _ = _render(draw, theme, "svg", NARROW)
    source = f'<source media="(max-width: 575.98px)" srcset="{narrow}">'
    return f"<picture>{source}{img}</picture>"


def _render(
    draw: Callable[[Theme], Figure], theme: Theme, kind: str, column: float = COLUMN
) -> tuple[str, float]:
    """Return a drawing as a data URI, and its width on a page, where an inch has 96 pixels."""
    options: dict[str, Any] = {"dpi": 2 * 96, "pil_kwargs": {"lossless": True, "method": 4}}
    if kind == "svg":
        # No metadata: a date would differ daily.
        options = {"dpi": 200, "metadata": dict.fromkeys(("Date", "Creator", "Format", "Type"))}
    stream = io.BytesIO()
    # Matplotlib's types name every setting; a theme's are words like any others.
    settings: Any = theme.rc() | {"figure.figsize": (column, column)}
    with matplotlib.rc_context(settings):
        drawing = draw(theme)
        if not isinstance(drawing, Figure):
            raise ValueError(
                f"draw returned {type(drawing).__name__}: it must return the Figure that it drew"
            )
        drawing.savefig(stream, format=kind, transparent=True, **options)
    media = "image/svg+xml" if kind == "svg" else "image/webp"
    return _uri(media, stream), 96 * drawing.get_figwidth()


def _uri(kind: str, stream: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _script_json(value: Any) -> str:
    return json.dumps(value).replace("</", "<\\/")  # nothing inside a script may look like its end
