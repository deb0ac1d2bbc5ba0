"""ImageNet's recipe, at its true widths, on a few images of ImageNet's kind."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.io import write_jpeg

from imsvd_core.data import attributes, sources
from imsvd_core.networks import represent
from imsvd_core.recipes import recipe
from imsvd_core.runs.backbones import load_run
from imsvd_core.runs.pretrain import Pretraining


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A tree of JPEGs: Tiny-ImageNet's if it is under the data root, else drawn ones of as many
    pixels."""
    real = sources.data_root() / "tiny-imagenet-40"
    if real.is_dir():
        return real
    factors = attributes.sample(32, torch.Generator().manual_seed(1))
    images = attributes.draw(factors, size=64)
    for split, start in (("train", 0), ("val", 16)):
        for number in range(16):
            folder = tmp_path / "tree" / split / f"n{number % 2:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            write_jpeg(images[start + number], str(folder / f"{number}.JPEG"))
    return tmp_path / "tree"


@pytest.mark.slow  # two steps of ResNet-50 and a projector of 84 million weights
def test_a_step_at_true_widths_is_taken_saved_resumed_and_exported(tmp_path, photographs):
    smoke = recipe("imagenet-1000", "smoke")
    few = replace(smoke, data=f"tree:{photographs}", loop=replace(smoke.loop, save_every=1))
    first = Pretraining(few, tmp_path / "run", progress=False)
    start = first.network.projector[-1].weight[:8, :8].detach().clone()
    progressed = next(iter(first))
    after = first.network.projector[-1].weight[:8, :8].detach().clone()
    assert progressed.step == 1
    assert progressed.metrics["loss"].isfinite()
    assert not torch.equal(start, after)
    del first

    second = Pretraining(few, tmp_path / "run", progress=False)
    assert second.trainer.step == 1
    assert torch.equal(second.network.projector[-1].weight[:8, :8], after)
    assert [later.step for later in second] == [2]
    second.finish()
    _, backbone = load_run(tmp_path / "run")
    images = torch.randn(2, 3, 224, 224)
    ours, exported = (
        represent(network, [images], "cpu") for network in (second.network.backbone, backbone)
    )
    assert exported.shape == (2, 2048)
    assert torch.equal(ours, exported)
