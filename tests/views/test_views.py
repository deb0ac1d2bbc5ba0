"""The two views: operations are torchvision's, draws follow torchvision's laws, every image is by
itself.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from imsvd_core.system.config import from_plain, plain
from imsvd_core.views import (
    BRIGHTNESS,
    CONTRAST,
    CROP_DRAWS,
    HUE,
    SATURATION,
    EvalView,
    TwoViewConfig,
    TwoViews,
    View,
    ViewConfig,
    ViewParameters,
    Views,
    cifar_multicrop_views,
    cifar_views,
    imagenet_views,
)

TOLERANCE = 2 / 255
P_VALUE = 1e-3  # the seeds are fixed, so a test that has passed does not flicker
PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # so that a view shows its picture


def photographs(count: int, height: int, width: int) -> Tensor:
    """Pictures, uint8 (count, 3, height, width): CIFAR-10's at 32x32 where it is at hand, else
    drawn.
    """
    root = Path(os.environ.get("IMSVD_DATA", "")) / "cifar10" / "test"
    files = (
        list(itertools.islice(root.glob("*/*.[jp][pn]g"), count))
        if os.environ.get("IMSVD_DATA")
        else []
    )
    if (height, width) == (32, 32) and len(files) == count:
        return torch.stack([tv.pil_to_tensor(Image.open(file).convert("RGB")) for file in files])
    generator = torch.Generator().manual_seed(height)
    picture = torch.zeros(count, 3, height, width)
    for cells, strength in ((4, 90.0), (16, 30.0)):  # soft colours at two scales
        coarse = torch.randn(count, 3, cells, cells, generator=generator)
        picture += strength * torch.nn.functional.interpolate(
            coarse, (height, width), mode="bicubic"
        )
    picture[:, :, height // 4 : height // 2, width // 3 :] += 120  # hard edges, and some pure white
    picture += 4 * torch.randn(picture.shape, generator=generator)
    picture[:, 1:, -height // 5 :] = picture[
        :, :1, -height // 5 :
    ]  # a grey strip, where hue has no meaning
    return (picture + 110).clamp(0, 255).to(torch.uint8)


def still(n: int, rows: int, columns: int, /, **changes: Tensor) -> ViewParameters:
    """Parameters that leave n images as they are, but for the changes."""
    off, whole = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64)
    parameters = ViewParameters(
        top=whole,
        left=whole,
        height=whole + rows,
        width=whole + columns,
        flip=off,
        jitter=off,
        order=torch.arange(4).expand(n, 4),
        factors=torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(n, 4),
        gray=off,
        blur=off,
        sigma=torch.ones(n),
        solarize=off,
    )
    return replace(parameters, **changes)


def all_on(size: int, **settings: object) -> View:
    """A view that can do everything; what it does is up to the parameters."""
    on = dict(
        jitter_probability=1.0, gray_probability=1.0, blur_probability=1.0, solarize_probability=1.0
    )
    return View(ViewConfig(**{"size": size, "scale": (0.1, 1.0), **on, **PLAIN, **settings}))


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


def worst(ours: Tensor, theirs: Tensor | list[Tensor]) -> float:
    """The largest difference, on the scale where white is 1. theirs: uint8 or float."""
    theirs = torch.stack(theirs) if isinstance(theirs, list) else theirs
    return (ours - (theirs / 255 if theirs.dtype == torch.uint8 else theirs)).abs().max().item()


# Each operation is torchvision's


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (200, 300, 224), (300, 200, 64)]
)
@pytest.mark.parametrize("reference", ["tensor", "pil"])
def test_crop_flip_and_resize_are_torchvisions(
    height: int, width: int, size: int, interpolation: str, reference: str
) -> None:
    images = photographs(6, height, width)
    top, left = torch.tensor([0, 1, 3, 5, 8, height - 9]), torch.tensor([0, 2, 0, 4, 9, width - 7])
    crop_height = torch.tensor([height, height - 1, 21, 8, 20, 9])
    crop_width = torch.tensor([width, 17, width, 25, 20, 7])
    flip = torch.tensor([False, True, False, True, True, False])
    ours = all_on(size, interpolation=interpolation).apply(
        images,
        still(
            6, height, width, top=top, left=left, height=crop_height, width=crop_width, flip=flip
        ),
    )
    mode, theirs = transforms.InterpolationMode(interpolation), []
    for i, image in enumerate(images):
        image = tv.to_pil_image(image) if reference == "pil" else image
        box = [int(side[i]) for side in (top, left, crop_height, crop_width)]
        view = tv.resized_crop(image, *box, [size, size], mode, antialias=True)
        view = tv.pil_to_tensor(view) if reference == "pil" else view
        theirs.append(tv.horizontal_flip(view) if flip[i] else view)
    assert worst(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("size", [32, 200])
@pytest.mark.parametrize(
    ("operation", "reference", "low", "high"),
    [
        (BRIGHTNESS, tv.adjust_brightness, 0.2, 1.8),
        (CONTRAST, tv.adjust_contrast, 0.2, 1.8),
        (SATURATION, tv.adjust_saturation, 0.2, 1.8),
        (HUE, tv.adjust_hue, -0.5, 0.5),
    ],
)
def test_each_jitter_operation_is_torchvisions(
    operation: int, reference: object, low: float, high: float, size: int
) -> None:
    images, values = photographs(8, size, size), torch.linspace(low, high, 8)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(8, 1)
    factors[:, operation] = values
    order = torch.stack(
        [torch.arange(4).roll(i) for i in range(8)]
    )  # wherever it stands in the order
    ours = all_on(size).apply(
        images, still(8, size, size, jitter=ones(8), factors=factors, order=order)
    )
    assert (
        worst(ours, [reference(x, v) for x, v in zip(images, values.tolist(), strict=True)])
        <= TOLERANCE
    )


def test_all_24_orders_of_jitter_are_done_in_their_order() -> None:
    orders = torch.tensor(list(itertools.permutations(range(4))))
    images = photographs(1, 32, 32).expand(24, -1, -1, -1)
    factors = torch.tensor([2.0, 1.8, 2.2, 0.3])  # strong: without a clamp some orders are equal
    parameters = still(24, 32, 32, jitter=ones(24), factors=factors.expand(24, 4), order=orders)
    ours = all_on(32).apply(images, parameters)
    operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    theirs = []
    for order in orders.tolist():
        x = images[0] / 255
        for operation in order:
            x = operations[operation](x, factors[operation].item())
        theirs.append(x)
    theirs = torch.stack(theirs)
    assert worst(ours, theirs) <= TOLERANCE
    apart = (theirs[:, None] - theirs).abs().amax(dim=(2, 3, 4)) + torch.eye(24)
    assert apart.min() > TOLERANCE, "the picture does not tell these orders apart"


@pytest.mark.parametrize("size", [32, 200])
def test_gray_blur_and_solarize_are_torchvisions(size: int) -> None:
    images, sigma = photographs(5, size, size), torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0])
    view, n = all_on(size), len(images)
    gray = view.apply(images, still(n, size, size, gray=ones(n)))
    assert worst(gray, tv.rgb_to_grayscale(images, num_output_channels=3)) <= TOLERANCE
    blur = view.apply(images, still(n, size, size, blur=ones(n), sigma=sigma))
    theirs = [
        tv.gaussian_blur(x, [23, 23], [s, s]) for x, s in zip(images, sigma.tolist(), strict=True)
    ]
    assert worst(blur, theirs) <= TOLERANCE
    solarized = view.apply(images, still(n, size, size, solarize=ones(n)))
    assert worst(solarized, tv.solarize(images, 128)) <= TOLERANCE


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (cifar_views().first, 32, 32),
        (imagenet_views(64).first, 90, 70),
        (imagenet_views(64).second, 90, 70),
    ],
)
def test_a_whole_view_is_torchvisions_operations_in_the_papers_order(
    config: ViewConfig, height: int, width: int
) -> None:
    images, view = photographs(40, height, width), View(config)
    p = view.draw(40, height, width, torch.Generator().manual_seed(3))
    operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    mode, size, theirs = transforms.InterpolationMode(config.interpolation), [config.size] * 2, []
    for i, x in enumerate(images):
        box = [int(side[i]) for side in (p.top, p.left, p.height, p.width)]
        x = tv.resized_crop(x, *box, size, mode, antialias=True) / 255
        x = tv.horizontal_flip(x) if p.flip[i] else x
        for operation in p.order[i].tolist() if p.jitter[i] else ():
            x = operations[operation](x, p.factors[i, operation].item())
        x = tv.rgb_to_grayscale(x, 3) if p.gray[i] else x
        x = tv.gaussian_blur(x, [23, 23], [p.sigma[i].item()] * 2) if p.blur[i] else x
        x = tv.solarize(x, 128 / 255) if p.solarize[i] else x
        theirs.append(tv.normalize(x, config.mean, config.std))
    difference = (view.apply(images, p) - torch.stack(theirs)).abs() * torch.tensor(
        config.std
    ).view(3, 1, 1)
    # torchvision alone rounds the crop to whole grey levels; each later operation stretches that by
    # 1.4 at most
    assert difference.mean() < 0.5 * TOLERANCE
    assert difference.max() < 3 * TOLERANCE


@pytest.mark.parametrize(
    ("height", "width", "resize", "size"),
    [(32, 32, 32, 32), (32, 32, 36, 32), (90, 131, 64, 56), (131, 90, 64, 64)],
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_eval_view_is_torchvisions(
    height: int, width: int, resize: int, size: int, interpolation: str
) -> None:
    images = photographs(3, height, width)
    mode = transforms.InterpolationMode(interpolation)
    theirs = tv.center_crop(tv.resize(images, resize, mode, antialias=True), size)
    assert (
        worst(EvalView(resize, size, **PLAIN, interpolation=interpolation)(images), theirs)
        <= TOLERANCE
    )
    mean, std = (
        torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1),
        torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1),
    )
    view = EvalView(resize, size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1), interpolation)
    assert worst(view(images) * std + mean, theirs) <= TOLERANCE


# The draws follow torchvision's laws


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (240, 320, (0.08, 1.0), (3 / 4, 4 / 3)),
        (60, 200, (0.3, 1.0), (3 / 4, 4 / 3)),
        (200, 60, (0.3, 1.0), (3 / 4, 4 / 3)),
        (40, 50, (0.9, 1.0), (0.5, 1.4)),
    ],
)
def test_crops_follow_torchvisions_law(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    p = View(ViewConfig(size=32, scale=scale, ratio=ratio)).draw(
        20_000, height, width, torch.Generator().manual_seed(0)
    )
    ours = torch.stack([p.top, p.left, p.height, p.width], dim=1).double().numpy()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio))
            for _ in range(3000)
        ],
        dtype=float,
    )
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    for measure in (
        lambda top, left, h, w: h,
        lambda top, left, h, w: w,
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: w / h,
        lambda top, left, h, w: top,
        lambda top, left, h, w: left,
        lambda top, left, h, w: top - left,
    ):
        assert stats.ks_2samp(measure(*ours.T), measure(*theirs.T)).pvalue > P_VALUE
    if scale[0] == 0.3:  # far too long for these ratios: here the fallback is often needed
        fallback = (ours[:, 2] == min(height, 80)) & (ours[:, 3] == min(width, 80))
        assert fallback.mean() > 0.1


def test_jitter_factors_and_sigma_follow_torchvisions_law() -> None:
    config = replace(
        imagenet_views(64).first, brightness=0.3, contrast=0.5, saturation=1.5, hue=0.2
    )
    p = View(config).draw(20_000, 64, 64, torch.Generator().manual_seed(1))
    jitter = v2.ColorJitter(0.3, 0.5, 1.5, 0.2)
    ranges = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
    for operation, (low, high) in enumerate(ranges):
        ours = p.factors[:, operation].numpy()
        assert stats.kstest(ours, "uniform", (low, high - low)).pvalue > P_VALUE
        unreached = 0.001 * (high - low)  # of 20,000 draws some come as close as this to either end
        assert low <= ours.min() < low + unreached
        assert high - unreached < ours.max() <= high
    assert stats.kstest(p.sigma.numpy(), "uniform", (0.1, 1.9)).pvalue > P_VALUE
    torch.manual_seed(0)
    theirs = [transforms.ColorJitter.get_params(*ranges) for _ in range(3000)]
    for operation in range(4):
        factors = [draw[1 + operation] for draw in theirs]
        assert stats.ks_2samp(p.factors[:, operation].numpy(), factors).pvalue > P_VALUE


def test_switches_turn_on_as_often_as_asked() -> None:
    config = replace(imagenet_views(64).second, flip=0.3)
    p = View(config).draw(20_000, 64, 64, torch.Generator().manual_seed(2))
    for switch, probability in (
        (p.flip, 0.3),
        (p.jitter, 0.8),
        (p.gray, 0.2),
        (p.blur, 0.1),
        (p.solarize, 0.2),
    ):
        assert stats.binomtest(int(switch.sum()), 20_000, probability).pvalue > P_VALUE
    always = View(imagenet_views(64).first).draw(20_000, 64, 64, torch.Generator().manual_seed(2))
    assert always.blur.all()
    assert not always.solarize.any()


def test_all_24_orders_are_equally_frequent() -> None:
    p = View(cifar_views().first).draw(24_000, 32, 32, torch.Generator().manual_seed(4))
    codes, counts = (p.order * torch.tensor([64, 16, 4, 1])).sum(dim=1).unique(return_counts=True)
    assert len(codes) == 24
    assert p.order.sort(dim=1).values.eq(torch.arange(4)).all()
    assert stats.chisquare(counts.numpy()).pvalue > P_VALUE


def test_no_two_parameters_share_a_draw() -> None:
    p = View(imagenet_views(64).second).draw(20_000, 200, 200, torch.Generator().manual_seed(5))
    area, ratio = p.height * p.width, p.width / p.height
    across, down = (p.left + 0.5) / (201 - p.width), (p.top + 0.5) / (201 - p.height)
    columns = [
        area,
        ratio,
        across,
        down,
        *p.factors.unbind(1),
        *p.order[:, :3].unbind(1),
        p.sigma,
        p.flip,
        p.jitter,
        p.gray,
        p.blur,
        p.solarize,
    ]
    correlation = np.corrcoef(np.stack([c.double().numpy() for c in columns]))
    correlation[8:11, 8:11] = 0  # the places of one order do depend on each other
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.04  # 5.6 standard errors; a shared draw gives 0.1 and more


# Images, views and runs are independent where they should be, and equal where they should be


def test_the_same_generator_state_gives_the_same_bits_and_another_does_not() -> None:
    views, images = TwoViews(cifar_views()), photographs(16, 32, 32)
    generator = torch.Generator().manual_seed(6)
    views(images, generator)
    state = generator.get_state()
    first = views(images, generator)
    torch.rand(7)  # the global generator has no say
    generator.set_state(state)
    again = views(images, generator)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    later = views(images, generator)
    assert not any(torch.equal(a, b) for a, b in zip(first, later, strict=True))
    assert not torch.equal(first[0], first[1]), "both views of a pair are the same"


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    TwoViews(imagenet_views(32))(photographs(4, 40, 40), torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("config", [cifar_views().first, imagenet_views(64).second])
def test_an_images_view_does_not_depend_on_its_neighbours(config: ViewConfig) -> None:
    view, images = View(config), photographs(40, config.size, config.size)
    p = view.draw(40, config.size, config.size, torch.Generator().manual_seed(7))
    together = view.apply(images, p)
    for i in (0, 13, 39):
        alone = view.apply(images[i : i + 1], p[i : i + 1])
        assert torch.allclose(alone[0], together[i], atol=1e-4)
    others = images.clone()
    others[1:] = 255 - others[1:]
    assert torch.allclose(view.apply(others, p)[0], together[0], atol=1e-4)


def test_a_batch_larger_than_a_cpus_part_is_done_to_its_end() -> None:
    images = photographs(1, 32, 32).expand(300, -1, -1, -1)  # 128 images of 32x32 are one part
    out = View(ViewConfig(32, (0.2, 1.0), **PLAIN)).apply(images, still(300, 32, 32))
    assert worst(out, images) < 1e-5


def test_images_of_one_batch_get_parameters_and_orders_of_their_own() -> None:
    p = View(cifar_views().first).draw(64, 32, 32, torch.Generator().manual_seed(8))
    assert len(p.order.unique(dim=0)) > 10
    assert len(p.factors.unique(dim=0)) == 64
    assert len(torch.stack([p.top, p.left, p.height, p.width], 1).unique(dim=0)) > 50


def test_autocast_does_not_coarsen_the_picture() -> None:
    view, images = View(cifar_views().first), photographs(8, 32, 32)
    p = view.draw(8, 32, 32, torch.Generator().manual_seed(9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = view.apply(images, p)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, view.apply(images, p))


def test_memory_layout_of_the_input_does_not_matter() -> None:
    view, images = View(cifar_views().first), photographs(8, 32, 32)
    p = view.draw(8, 32, 32, torch.Generator().manual_seed(9))
    out = view.apply(images.to(memory_format=torch.channels_last), p)
    assert torch.equal(out, view.apply(images, p))
    assert out.is_contiguous()


# Settings


def test_the_presets_are_the_papers_and_the_authors() -> None:
    first, second = imagenet_views().first, imagenet_views().second
    for view in (first, second):
        assert (view.size, view.scale, view.interpolation, view.flip) == (
            224,
            (0.08, 1.0),
            "bicubic",
            0.5,
        )
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (view.jitter_probability, view.gray_probability) == (0.8, 0.2)
        assert (view.blur_sigma, view.blur_kernel) == ((0.1, 2.0), 23)
    assert (first.blur_probability, first.solarize_probability) == (1.0, 0.0)
    assert (second.blur_probability, second.solarize_probability) == (0.1, 0.2)
    view = cifar_views().first
    assert view == cifar_views().second
    assert (view.size, view.scale, view.flip) == (32, (0.2, 1.0), 0.5)
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (view.jitter_probability, view.gray_probability) == (0.8, 0.2)
    assert (view.blur_probability, view.solarize_probability) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0),
        ("size", 32.0),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.5)),
        ("ratio", (-1.0, 1.0)),
        ("ratio", (1.0, float("inf"))),
        ("ratio", (float("nan"), 1.0)),
        ("interpolation", "nearest"),
        ("flip", 1.5),
        ("brightness", -0.1),
        ("contrast", float("inf")),
        ("saturation", float("nan")),
        ("hue", 0.6),
        ("jitter_probability", -0.1),
        ("gray_probability", 2),
        ("blur_probability", 1.1),
        ("blur_sigma", (0.0, 1.0)),
        ("blur_kernel", 22),
        ("solarize_probability", -1),
        ("solarize_threshold", 128),
        ("mean", (0.5,)),
        ("std", (0.2, 0.2, 0.0)),
    ],
)
def test_an_impossible_setting_is_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as error:
        ViewConfig(**{"size": 32, "scale": (0.2, 1.0), name: value})
    assert repr(value) in str(error.value)


def test_impossible_combinations_are_refused() -> None:
    small = ViewConfig(size=8, scale=(0.2, 1.0))
    with pytest.raises(ValueError, match="blur_kernel=23"):
        replace(small, blur_probability=0.5)
    with pytest.raises(ValueError, match=r"second\.size=9"):
        TwoViewConfig(small, replace(small, size=9))
    with pytest.raises(ValueError, match="resize=30"):
        EvalView(30, 32)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
    ],
)
def test_images_of_another_type_or_shape_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="images="):
        View(cifar_views().first)(images, torch.Generator())
    with pytest.raises(ValueError, match="images="):
        EvalView(32, 32)(images)


def test_parameters_of_another_batch_are_refused() -> None:
    view, images = View(cifar_views().first), photographs(4, 32, 32)
    with pytest.raises(ValueError, match="rows of parameters=3"):
        view.apply(images, view.draw(3, 32, 32, torch.Generator()))


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "config", [cifar_views().first, imagenet_views(64).first, imagenet_views(64).second]
)
def test_a_gpu_gives_the_cpus_views_and_never_waits(config: ViewConfig) -> None:
    view, images = View(config), photographs(40, 64, 64)
    p = view.draw(40, 64, 64, torch.Generator().manual_seed(10))
    on_gpu, p_gpu = images.cuda(), p.to("cuda")
    assert all(getattr(p_gpu, f.name).is_cuda for f in fields(p_gpu))
    assert (view.apply(on_gpu, p_gpu).cpu() - view.apply(images, p)).abs().max() < 1e-3
    generator = torch.Generator("cuda").manual_seed(0)
    view(on_gpu, generator)  # constants are sent on the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        view(on_gpu, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Crops that are made one by one, and finished together


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 224])  # smaller than most crops, and larger than all
def test_crop_and_finish_make_the_view_up_to_the_rounding_to_bytes(
    size: int, interpolation: str
) -> None:
    images = photographs(40, 100, 150)
    plain = ViewConfig(size=size, scale=(0.08, 1.0), interpolation=interpolation, **PLAIN)
    colourful = replace(imagenet_views(size).first, interpolation=interpolation, **PLAIN)
    for config, largest, average in ((plain, 2 / 255, 0.5 / 255), (colourful, 8 / 255, 1 / 255)):
        view = View(config)
        parameters = view.draw(40, 100, 150, torch.Generator().manual_seed(5))
        boxes = torch.stack(
            [parameters.top, parameters.left, parameters.height, parameters.width], 1
        ).tolist()
        crops = torch.stack(
            [view.crop(image, box) for image, box in zip(images, boxes, strict=True)]
        )
        assert crops.dtype == torch.uint8
        assert crops.shape == (40, 3, size, size)
        finished = view.finish(
            crops, torch.Generator().manual_seed(5)
        )  # its draws differ in the crops alone
        difference = (finished - view.apply(images, parameters)).abs()
        assert difference.max() <= largest
        assert difference.mean() <= average


def test_two_views_finish_as_they_are_called_one_after_the_other() -> None:
    two, crops = TwoViews(imagenet_views(24)), photographs(2 * 9, 24, 24).split(9)
    x1, x2 = two.finish(crops, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(x1, two.views[0].finish(crops[0], generator))
    assert torch.equal(x2, two.views[1].finish(crops[1], generator))
    with pytest.raises(ValueError, match=r"crops=.*32, 32.*: give crops of 24 x 24"):
        two.finish(photographs(4, 32, 32).split(2), generator)


def test_a_call_draws_the_first_view_before_the_second_and_returns_them_in_that_order() -> None:
    images, views = photographs(12, 40, 40), imagenet_views(24)
    x1, x2 = TwoViews(views)(images, generator := torch.Generator().manual_seed(2))
    drawn = generator.get_state()
    generator.manual_seed(2)
    assert torch.equal(x1, View(views.first)(images, generator))
    assert torch.equal(x2, View(views.second)(images, generator))
    assert torch.equal(drawn, generator.get_state())


def test_any_number_of_views_are_drawn_one_after_the_other_from_the_one_generator() -> None:
    images, views = photographs(6, 40, 50), cifar_multicrop_views(small_count=3)
    drawn = Views(views.configs)(images, torch.Generator().manual_seed(3))
    assert [len(x) for x in drawn] == [6] * 5
    assert [x.shape[2:] for x in drawn] == [(32, 32)] * 2 + [(16, 16)] * 3
    generator = torch.Generator().manual_seed(3)
    for config, x in zip(views.configs, drawn, strict=True):
        assert torch.equal(x, View(config)(images, generator))
    two = TwoViews(views)(images, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(two, drawn[:2], strict=True))


def test_multicrop_adds_small_views_and_its_counts_are_checked() -> None:
    large, again, *small = cifar_multicrop_views().configs
    assert large == again
    assert small == [replace(large, size=16, scale=(0.05, 0.2))] * 4
    assert cifar_multicrop_views(small_count=2).configs[:2] == cifar_views().configs
    with pytest.raises(ValueError, match="small_count=0: give 0 without `small`, else 1 or more"):
        TwoViewConfig(large, large, small[0])
    with pytest.raises(ValueError, match="small_count=2"):
        TwoViewConfig(large, large, small_count=2)


def test_a_stored_law_of_two_views_is_read_as_it_was() -> None:
    law = cifar_views()
    stored = {"first": plain(law.first), "second": plain(law.second)}
    assert from_plain(TwoViewConfig, stored) == law
    assert from_plain(TwoViewConfig, plain(cifar_multicrop_views())) == cifar_multicrop_views()


def test_solarisation_inverts_the_threshold_itself() -> None:
    images = torch.tensor([127, 128, 129], dtype=torch.uint8).expand(1, 3, 3, 3)
    solarized = all_on(3, blur_probability=0.0).apply(images, still(1, 3, 3, solarize=ones(1)))
    assert worst(solarized, tv.solarize(images, 128)) < 1e-6
    assert worst(solarized[..., 1], torch.full((1, 3, 3), 127, dtype=torch.uint8)) < 1e-6


def test_crops_of_unequal_images_follow_the_law_of_equal_ones() -> None:
    sizes, n = (
        [(32, 32), (375, 500), (40, 400), (17, 9)],
        200,
    )  # the third has no crop that fits at times
    view = View(ViewConfig(size=16, scale=(0.5, 1.0)))
    drawn = [view.draw(n, *size, torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    uniform = torch.cat(
        [
            torch.rand(n, CROP_DRAWS + 14, generator=torch.Generator().manual_seed(i))[
                :, :CROP_DRAWS
            ]
            for i in range(len(sizes))
        ]
    )
    height, width = torch.tensor(sizes).repeat_interleave(n, 0).unbind(1)
    boxes = view.draw_crops(uniform, height, width)
    for column, name in enumerate(("top", "left", "height", "width")):
        assert torch.equal(boxes[:, column], torch.cat([getattr(p, name) for p in drawn])), name


def test_draws_are_those_that_stored_results_came_from() -> None:
    parameters = View(imagenet_views().first).draw(4, 375, 500, torch.Generator().manual_seed(1))
    boxes = torch.stack([parameters.top, parameters.left, parameters.height, parameters.width], 1)
    assert boxes.tolist() == [
        [2, 20, 367, 397],
        [44, 32, 283, 307],
        [0, 73, 375, 382],
        [3, 6, 371, 494],
    ]
    assert parameters.flip.tolist() == [True, False, True, True]
    assert parameters.order.tolist() == [[1, 3, 0, 2], [1, 2, 3, 0], [0, 2, 3, 1], [3, 2, 1, 0]]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(90, 120), (121, 83), (32, 32)])
def test_the_evaluation_view_may_be_cropped_and_finished_apart(
    height: int, width: int, interpolation: str
) -> None:
    images = photographs(3, height, width)
    view = EvalView(64, 56, interpolation=interpolation, **PLAIN)
    crops = torch.stack([view.crop(image) for image in images])
    assert (view.finish(crops) - view(images)).abs().max() <= 2 / 255
