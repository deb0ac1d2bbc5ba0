"""The drawn data set: the same bytes every time, and factors that are really in the pictures."""

import colorsys

import pytest
import torch
from PIL import ImageColor
from torch import Tensor

from imsvd_core.data import attributes


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def factors() -> dict[str, Tensor]:
    return attributes.sample(2000, seeded(0))


@pytest.fixture(scope="module")
def images(factors: dict[str, Tensor]) -> Tensor:
    return attributes.draw(factors)


def test_a_seed_gives_the_same_bytes_on_any_number_of_threads(factors):
    threads, pictures = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            pictures.append(attributes.draw(attributes.sample(300, seeded(5)), noise=seeded(6)))
            assert torch.get_num_threads() == count  # drawing leaves the setting as it was
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*pictures)
    assert not torch.equal(
        pictures[0], attributes.draw(attributes.sample(300, seeded(4)), noise=seeded(6))
    )


def test_factors_alone_draw_the_picture_again_but_for_its_noise(factors, images):
    some = {name: values[100:140] for name, values in factors.items()}
    assert torch.equal(attributes.draw(some), images[100:140])
    noise = attributes.draw(some, noise=seeded(1)).int() - images[100:140].int()
    assert 0 < noise.abs().max() <= 9


@pytest.mark.slow  # draws every factor's every value
def test_each_discrete_factor_changes_the_picture(factors, images):
    for name, values in attributes.FACTORS.items():
        if name in ("size", "place"):  # drawn through radius, x and y
            continue
        changed = {**factors, name: (factors[name] + 1) % len(values)}
        difference = (attributes.draw(changed).int() - images.int()).abs().amax((1, 2, 3))
        assert (difference >= 8).all(), name


def test_factors_are_uniform_and_independent():
    factors = attributes.sample(40_000, seeded(3))
    names = list(attributes.FACTORS)
    for i, name in enumerate(names):
        k = len(attributes.FACTORS[name])
        assert factors[name].dtype == torch.int64
        assert factors[name].unique().tolist() == list(range(k))
        for other in names[i + 1 :]:
            cells = k * len(attributes.FACTORS[other])
            counts = torch.bincount(factors[name] * (cells // k) + factors[other], minlength=cells)
            expected = 40_000 / cells
            chi_squared = ((counts - expected) ** 2 / expected).sum().item()
            assert chi_squared < cells + 5 * (2 * cells) ** 0.5, (name, other)


def test_place_and_size_are_where_the_continuous_factors_say(factors):
    assert torch.equal((factors["x"] / 0.31).round().long() + 1, factors["place"] % 3)
    assert torch.equal((factors["y"] / 0.31).round().long() + 1, factors["place"] // 3)
    assert torch.equal(
        torch.bucketize(factors["radius"], torch.tensor([0.46, 0.59])), factors["size"]
    )


def test_colour_place_and_size_can_be_read_from_the_pixels(factors, images):
    rgb = images.float() / 255
    vivid = (
        (rgb.amax(1) - rgb.amin(1)) / rgb.amax(1).clamp(min=0.05) > 0.55
    ).float()  # the ground is muted
    seen = vivid.sum((1, 2)) > 15
    plain = seen & (factors["texture"] == 0) & (factors["shape"] < 6)  # all about their own centre
    mean = (rgb * vivid[:, None]).sum((2, 3)) / vivid.sum((1, 2))[:, None]
    hues = torch.tensor([colorsys.rgb_to_hsv(*pixel)[0] for pixel in mean.tolist()])
    palette = map(ImageColor.getrgb, attributes.PALETTE.values())
    true = torch.tensor([colorsys.rgb_to_hsv(*colour)[0] for colour in palette])
    gap = (hues[:, None] - true).abs()
    nearest = torch.minimum(gap, 1 - gap).argmin(1)
    assert (nearest == factors["colour"])[plain].float().mean() > 0.95
    axis = (torch.arange(32) + 0.5) / 16 - 1
    for name, centre in (("x", (vivid.sum(1) * axis).sum(1)), ("y", (vivid.sum(2) * axis).sum(1))):
        error = (centre / vivid.sum((1, 2)) - factors[name])[plain]
        assert error.abs().median() < 0.06, name
    assert (
        torch.corrcoef(torch.stack([vivid.sum((1, 2)).sqrt(), factors["radius"]])[:, plain])[0, 1]
        > 0.8
    )


def test_edges_are_anti_aliased_so_that_a_small_picture_is_a_large_one_averaged(factors):
    plain = (factors["texture"] == 0) & (factors["background"] < 2)
    some = {name: values[plain][:40] for name, values in factors.items()}
    large = attributes.draw(some, size=256).float()
    averaged = torch.nn.functional.avg_pool2d(large, 8)
    error = (attributes.draw(some).float() - averaged).abs()
    assert error.mean() < 1
    assert error.quantile(0.999) < 20


def test_the_label_is_shape_and_texture(factors):
    for i in range(20):
        shape, texture = (
            attributes.FACTORS[name][factors[name][i]] for name in ("shape", "texture")
        )
        assert attributes.CLASSES[attributes.label(factors)[i]] == f"{texture} {shape}"


def test_every_shape_is_inside_its_circle_and_negative_at_its_heart():
    axis = torch.linspace(-2, 2, 201)
    x, y = axis.expand(201, 201), axis[:, None].expand(201, 201)
    for name, shape in zip(attributes.FACTORS["shape"], attributes._SHAPES, strict=True):
        distance = shape(x, y)
        inside = distance < 0
        assert (x * x + y * y)[inside].max() < 1.35**2, name
        assert 0.1 < inside.float().mean() * 16 / 3.15 < 1, name  # share of the unit disc's area
        slope = (distance[:, 1:] - distance[:, :-1]).abs().max() / (axis[1] - axis[0])
        assert slope < 1.02, name  # a distance grows no faster than the way walked


def test_impossible_requests_are_refused(factors):
    with pytest.raises(ValueError, match="n is 0"):
        attributes.sample(0, seeded(0))
    with pytest.raises(ValueError, match="size is 4"):
        attributes.draw(factors, size=4)
