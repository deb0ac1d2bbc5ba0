"""Figures: two themes, a text for those who cannot see, the same bytes every time, nothing from
elsewhere.
"""

from __future__ import annotations

import base64
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from imsvd_core import plots

ALT = "A line that rises from the lower left to the upper right."


def line(theme: plots.Theme) -> plots.Figure:
    drawing, ax = plots.figure(3, 2)
    ax.plot([0, 1], label="line")
    ax.set(xlabel="$x$", title="A line")
    ax.legend()
    return drawing


def sources(picture: plots.Picture) -> list[str]:
    return re.findall(r'<img[^>]* src="([^"]+)"', picture.html)


def decoded(uri: str) -> str:
    return base64.b64decode(uri.split(",", 1)[1]).decode()


def linear(color: object) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one: object, other: object) -> float:
    """The contrast ratio of WCAG 2: (L1 + 0.05) / (L2 + 0.05), luminances of sRGB."""
    bright, dark = sorted(
        (linear(c) @ [0.2126, 0.7152, 0.0722] + 0.05 for c in (one, other)), reverse=True
    )
    return bright / dark


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB under D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = np.clip(rgb, 0, 1) @ np.array(to_xyz).T / [0.9505, 1.0, 1.089]
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )


def test_a_figure_is_drawn_in_both_themes_and_shows_one() -> None:
    picture = plots.show(line, ALT)
    light, dark = re.findall(r"<img[^>]+>", picture.html)
    assert 'class="imsvd-light' in light
    assert "display:inline-block" in light
    assert 'class="imsvd-dark' in dark
    assert "display:none" in dark
    inks = [plots.LIGHT.ink, plots.DARK.ink]
    for uri, ink, other in zip(sources(picture), inks, reversed(inks), strict=True):
        assert ink in decoded(uri)
        assert other not in decoded(uri)


def test_every_image_says_what_is_seen() -> None:
    alt = 'A "quoted" line that rises & falls, from left to right.'
    for picture in (
        plots.show(line, alt),
        plots.animate(lambda _, theme: line(theme), range(2), alt),
    ):
        assert picture.html.count('alt="A &quot;quoted&quot; line that rises &amp; falls') == 2
        assert alt in repr(picture)
    assert (
        'alt="A &quot;quoted&quot; line'
        in plots.gallery(np.zeros((1, 3, 2, 2), np.uint8), alt).html
    )


@pytest.mark.parametrize("alt", ["", "A plot.", " " * 40])
def test_a_short_alt_is_refused_with_the_remedy(alt: str) -> None:
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    for call in (
        lambda: plots.show(line, alt),
        lambda: plots.animate(lambda _, theme: line(theme), range(2), alt),
        lambda: plots.gallery(images, alt),
    ):
        with pytest.raises(ValueError, match=r"alt=.*too short: say in a sentence"):
            call()


def test_the_same_figure_is_the_same_bytes() -> None:
    assert plots.show(line, ALT) == plots.show(line, ALT)


def test_figures_are_vectors_on_no_background_with_letters_as_outlines() -> None:
    for uri in sources(plots.show(line, ALT)):
        svg = decoded(uri)
        assert uri.startswith("data:image/svg+xml;base64,")
        assert "<text" not in svg
        assert "<dc:date>" not in svg
        background = re.search(r'<g id="patch_1">\s*<path[^>]*style="([^"]*)"', svg)
        assert background is None or "fill: none" in background[1] or "opacity: 0" in background[1]


def test_pictures_ask_nothing_of_the_network() -> None:
    for picture in (
        plots.show(line, ALT),
        plots.animate(lambda _, theme: line(theme), range(2), ALT),
    ):
        assert all(uri.startswith("data:") for uri in sources(picture))
        assert not re.search(r"https?://|url\(|\bimport\b|fetch", picture.html)
    for uri in sources(plots.show(line, ALT)):
        assert not re.search(r"""(href|src)=["'](?!#|data:)|@import|url\((?!#)""", decoded(uri))


@pytest.mark.parametrize("theme", plots.THEMES, ids=lambda theme: theme.name)
def test_colours_stand_out_from_the_paper(theme: plots.Theme) -> None:
    assert contrast(theme.ink, theme.paper) > 7
    assert contrast(theme.muted, theme.paper) > 4.5
    for color in theme.colors:
        assert contrast(color, theme.paper) > 3, color


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLINDNESS = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


@pytest.mark.parametrize("theme", plots.THEMES, ids=lambda theme: theme.name)
@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_first_four_colours_differ_for_the_colour_blind(theme: plots.Theme, kind: str) -> None:
    seen = {color: lab(np.array(BLINDNESS[kind]) @ linear(color)) for color in theme.colors[:4]}
    for one, other in combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 10, (one, other)


@pytest.mark.parametrize("theme", plots.THEMES, ids=lambda theme: theme.name)
def test_the_sequential_map_runs_from_paper_to_ink_in_even_steps(theme: plots.Theme) -> None:
    shades = theme.sequential(np.linspace(0, 1, 17))
    lightness = np.array([lab(linear(shade[:3]))[0] for shade in shades])
    steps = np.diff(lightness) * (1 if theme.name == "dark" else -1)
    assert steps.min() > 0.6 * steps.mean()
    assert steps.max() < 1.4 * steps.mean()
    assert contrast(shades[0], theme.paper) < 1.2
    assert contrast(shades[-1], theme.paper) > 7


def test_the_joint_matrix_is_drawn_with_a_line_between_any_two_variables() -> None:
    _drawing, ax = plots.figure()
    image = plots.draw_joint(ax, torch.rand(9, 9), [2, 3, 4], plots.LIGHT)
    assert np.asarray(image.get_array()).shape == (9, 9)
    horizontal, vertical = (collection.get_segments() for collection in ax.collections)
    assert [segment[0][1] for segment in horizontal] == [1.5, 4.5]
    assert [segment[0][0] for segment in vertical] == [1.5, 4.5]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["$X_{1}$", "$X_{2}$", "$X_{3}$"]


@pytest.mark.parametrize(
    ("shape", "units", "message"),
    [
        ((4, 5), 2, "square"),
        ((4, 4), 3, "units=3"),
        ((4, 4), [1, 2], "units="),
        ((4, 4), 0, "units=0"),
    ],
)
def test_a_joint_matrix_that_does_not_fit_its_units_is_refused(
    shape: tuple, units: object, message: str
) -> None:
    _, ax = plots.figure()
    with pytest.raises(ValueError, match=message):
        plots.draw_joint(ax, torch.rand(shape), units, plots.LIGHT)


def test_an_animation_holds_every_frame_in_both_themes_and_shows_the_last() -> None:
    def frame(value: int, theme: plots.Theme) -> plots.Figure:
        drawing, ax = plots.figure(2, 2)
        ax.bar([0], [value])
        return drawing

    picture = plots.animate(frame, [1, 2, 3], ALT, labels=["one", "two", "</script>"])
    uris = re.findall(r'"(data:image/webp[^"]+)"', picture.html.split("<script>")[1])
    assert len(set(uris)) == 6
    assert sources(picture) == uris[-2:]
    assert picture.html.count("</script>") == 1, "a label must not end the script"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": []}, "frames is empty"),
        ({"frames": range(2), "labels": ["one"]}, "labels has 1"),
    ],
)
def test_an_impossible_animation_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.animate(lambda _, theme: line(theme), alt=ALT, **settings)


def test_a_contact_sheet_keeps_every_pixel_enlarged_and_its_gaps_clear() -> None:
    images = torch.arange(3 * 3 * 2 * 2, dtype=torch.uint8).reshape(3, 3, 2, 2)
    sheet = plots.contact_sheet(images, columns=2, gap=1, scale=2)
    assert sheet.shape == (9, 9, 4)
    assert (sheet[:4:2, 5::2, :3] == images[1].permute(1, 2, 0).numpy()).all()
    assert (sheet[5::2, :4:2, :3] == images[2].permute(1, 2, 0).numpy()).all()
    assert (sheet[:4, :4, 3] == 255).all()
    assert (sheet[4] == 0).all()
    assert (sheet[5:, 5:] == 0).all(), "no fourth image"


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 2, 2), "uint8"), ((0, 3, 2, 2), "uint8"), ((1, 3, 2, 2), "float32")]
)
def test_a_gallery_takes_only_uint8_images(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match="images has shape"):
        plots.gallery(np.zeros(shape, dtype), ALT)


def test_a_drawing_function_that_returns_no_figure_is_named() -> None:
    with pytest.raises(ValueError, match="draw returned NoneType"):
        plots.show(lambda theme: None, ALT)


def wide(theme: plots.Theme) -> plots.Figure:
    drawing, axes = plots.figure(7.2, 2.0, rows=2, cols=3, sharex="col", width_ratios=(1, 2, 3))
    assert axes.shape == (2, 3)
    for ax in axes.flat:
        ax.plot([0, 1])
    return drawing


def test_a_telephone_gets_a_drawing_of_its_own_whose_panels_stand_below_each_other() -> None:
    picture = plots.show(wide, ALT)
    narrow = re.findall(r'<source media="\(max-width: 575.98px\)" srcset="([^"]+)"', picture.html)
    assert len(narrow) == len(plots.THEMES)
    for uri, other in zip(narrow, sources(picture), strict=True):
        size, wide_size = (
            tuple(map(float, re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups()))
            for text in (decoded(uri), decoded(other))
        )
        assert size[0] == pytest.approx(72 * plots.NARROW)  # in points, of which an inch has 72
        assert size[1] == pytest.approx(3 * wide_size[1])


def test_what_fits_a_telephone_is_drawn_once() -> None:
    assert "<source" not in plots.show(line, ALT).html
