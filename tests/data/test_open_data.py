"""The one door to the data sets, and what both kinds of images give to a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import imsvd_core.data
from imsvd_core.data import FolderImages, ImageData, open_data
from imsvd_core.evaluation.features import fingerprint
from imsvd_core.views import EvalView, TwoViews, View, cifar_views, imagenet_views

SIDE = 40


class Steps:
    """The order of a training as the data see it: pieces of each step, and a generator for it."""

    def __init__(self, *pieces: tuple[int, list[int]], seed: int = 0) -> None:
        self.pieces, self.seed = pieces, seed

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return ((step, torch.tensor(indices)) for step, indices in self.pieces)

    def generator(self, step: int, device: torch.device | str) -> torch.Generator:
        return torch.Generator(device).manual_seed(1000 * self.seed + step)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes, eight train and three val images each, all of one size."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label in ("cat", "dog"):
            home = tmp_path / "mine" / split / label
            home.mkdir(parents=True)
            for number in range(count):
                pixels = chance.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(home / f"{number}.png")
    return tmp_path / "mine"


def test_a_tree_is_loaded_unless_it_is_large_or_of_unequal_sizes_or_streaming_is_asked_for(
    tree, monkeypatch
):
    assert isinstance(open_data(f"folder:{tree}"), ImageData)
    assert isinstance(open_data("folder:mine", "test", root=tree.parent), ImageData)
    assert isinstance(open_data(f"folder:{tree}", stream=True), FolderImages)
    assert isinstance(open_data(f"tree:{tree}"), FolderImages)
    whole = 16 * 3 * SIDE**2
    monkeypatch.setattr(imsvd_core.data, "MEMORY_BYTES", whole - 1)
    assert isinstance(open_data(f"folder:{tree}"), FolderImages)
    assert isinstance(open_data(f"folder:{tree}", stream=False), ImageData)
    monkeypatch.setattr(imsvd_core.data, "MEMORY_BYTES", whole)
    assert isinstance(open_data(f"folder:{tree}"), ImageData)
    monkeypatch.setattr(imsvd_core.data, "MEMORY_BYTES", 2 * whole)
    Image.new("RGB", (SIDE, SIDE + 1)).save(tree / "train/dog/7.png")
    streamed = open_data(f"folder:{tree}")
    assert isinstance(streamed, FolderImages)
    assert streamed.name == f"folder:{tree}"


def test_a_broken_file_does_not_decide_how_a_tree_is_read(tree):
    (tree / "train/cat/0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cat/0\.png cannot be read"):
        open_data(f"folder:{tree}")
    data = open_data(f"folder:{tree}", on_corrupt="skip")
    assert isinstance(data, ImageData)
    assert data.skipped == 1


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("attributes", {"stream": True}, "stream=True contradicts 'attributes'"),
        ("tree:mine", {"stream": False}, "stream=False contradicts 'tree:mine'"),
        ("voc:mine", {"stream": False}, "stream=False contradicts 'voc:mine': only folder:PATH"),
        ("imagenet", {}, "'imagenet' is unknown"),
    ],
)
def test_what_contradicts_itself_is_refused(tree, name, settings, match):
    with pytest.raises(ValueError, match=match):
        open_data(name, root=tree.parent, **settings)


@pytest.mark.parametrize("stream", [False, True])
def test_all_pieces_of_a_step_draw_their_views_from_one_generator(tree, stream):
    data, views = open_data(f"folder:{tree}", stream=stream), TwoViews(imagenet_views(24))
    order = Steps((4, [0, 3, 9]), (4, [2]), (5, [7, 7]), seed=3)
    with closing(data.views(order, views, workers=0)) as stream_of_batches:
        batches = list(stream_of_batches)
    assert [batch.indices.tolist() for batch in batches] == [[0, 3, 9], [2], [7, 7]]
    assert [batch.labels.tolist() for batch in batches] == [[0, 0, 1], [0], [0, 0]]
    expected = []
    for step, generator in ((4, order.generator(4, "cpu")), (5, order.generator(5, "cpu"))):
        for _, indices in (piece for piece in order if piece[0] == step):
            if isinstance(data, ImageData):
                expected.append(views(data.images[indices], generator))
            else:
                crops = data.crops(views, [(step, indices)], seed=3, workers=0)
                expected.append(views.finish(next(crops), generator))
    for batch, pair in zip(batches, expected, strict=True):
        assert len(batch.views) == 2
        assert all(torch.equal(view, other) for view, other in zip(batch.views, pair, strict=True))


class ThreeViews:
    """Two large views and a small one, in the manner of multi-crop."""

    def __init__(self) -> None:
        large, small = View(imagenet_views(24).first), View(cifar_views(16).first)
        self.views = (large, large, small)


@pytest.mark.parametrize("stream", [False, True])
def test_any_number_of_views_of_any_size_can_be_drawn(tree, stream):
    data = open_data(f"folder:{tree}", stream=stream)
    first, again = (
        next(data.views(Steps((0, [1, 8])), views, workers=0))
        for views in (ThreeViews(), TwoViews(imagenet_views(24)))
    )
    assert [tuple(view.shape) for view in first.views] == [(2, 3, 24, 24)] * 2 + [(2, 3, 16, 16)]
    assert torch.equal(first.views[0], again.views[0])
    assert not torch.equal(first.views[0], first.views[1])
    (alone,) = next(data.views(Steps((0, [1, 8])), ThreeViews().views[0], workers=0)).views
    assert torch.equal(alone, again.views[0])


def test_both_kinds_show_the_same_images_in_the_same_order(tree):
    loaded, streamed = (open_data(f"folder:{tree}", stream=stream) for stream in (False, True))
    view = EvalView(SIDE, 32)
    for rows in (None, range(5, 16), [7, 2, 2]):
        parts = list(loaded.in_order(view, rows, batch_size=3))
        assert all(len(part) == 3 for part in parts[:-1])
        pixels = torch.cat(parts)
        assert torch.equal(pixels, torch.cat(list(streamed.in_order(view, rows, workers=0))))
        assert torch.equal(pixels, view(loaded.images[list(range(16) if rows is None else rows)]))
    assert list(loaded.in_order(view, range(4, 4))) == []


def test_an_identity_changes_with_images_and_labels(tree):
    loaded, streamed = (open_data(f"folder:{tree}", stream=stream) for stream in (False, True))
    prints = {fingerprint(*data.identity()) for data in (loaded, streamed)}
    prints |= {fingerprint(*data.subset(9).identity()) for data in (loaded, streamed)}
    assert len(prints) == 4
    assert fingerprint(*open_data(f"tree:{tree}").identity()) in prints
    pixels = loaded.images.clone()
    pixels[3, 0, 0, 0] ^= 1
    changed = replace(loaded, images=pixels)
    assert fingerprint(*changed.identity()) not in prints
