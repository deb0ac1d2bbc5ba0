"""Anybody's weights: read from the layouts of other projects, and nothing in a file is executed."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from imsvd_core.data import memory as datasets
from imsvd_core.export import export
from imsvd_core.networks import NetworkConfig, TwinNetwork, build_backbone, stem
from imsvd_core.recipes import Recipe, evaluation, recipe
from imsvd_core.runs.backbones import load_backbone, open_backbone, save_backbone
from imsvd_core.runs.pretrain import Pretraining, build_method, start_from
from imsvd_core.system.config import from_plain, plain
from imsvd_core.system.foreign import ForeignConfig
from imsvd_core.weights import read

SEQUENTIAL = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def state_of(cifar_stem: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """A narrow network none of whose tensors is what a new one has."""
    generator = torch.Generator().manual_seed(seed)
    state = build_backbone("narrow", cifar_stem).state_dict()
    return {
        key: torch.rand(value.shape, generator=generator) * (1 if value.ndim < 4 else 0.1)
        if value.is_floating_point()
        else torch.tensor(7)
        for key, value in state.items()
    }


STATE, OTHER = state_of(), state_of(seed=2)


def under(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def numbered(state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    """As the children of an nn.Sequential."""
    parts = {key: key.partition(".") for key in state}
    return {f"{SEQUENTIAL[parts[key][0]]}.{parts[key][2]}": state[key] for key in state}


def nested(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first layers in an nn.Sequential of their own."""
    stages = {f"{number}.": f"{number - 3}." for number in range(4, 8)}
    return {stages.get(key[:2], f"0.{key[:2]}") + key[2:]: value for key, value in state.items()}


def for_detectron2() -> dict[str, np.ndarray]:
    names = [(r"bn(\d)", r"conv\1.norm"), ("downsample.0", "shortcut")]
    names += [("downsample.1", "shortcut.norm"), (r"^(conv1)", r"stem.\1")]
    names += [(f"layer{stage}", f"res{stage + 1}") for stage in range(1, 5)]
    arrays = {}
    for key, value in STATE.items():
        for pattern, theirs in names:
            key = re.sub(pattern, theirs, key)
        arrays[key] = value.numpy()
    return arrays


def of_1_dimension(parameter: Tensor) -> bool:
    return parameter.ndim == 1


class Node(dict):
    """A class that only the other project has, as omegaconf's nodes are."""


def same(path: Path, key: str | None = None) -> bool:
    network = read(path, key)
    return all(torch.equal(network.state[name], value.float()) for name, value in STATE.items())


FILES = {
    "the authors' full checkpoint": {
        "epoch": 100,
        "model": under("module.backbone.") | {"module.projector.0.weight": torch.ones(8, 256)},
        "optimizer": {"param_groups": [{"lr": 0.1, "weight_decay_filter": of_1_dimension}]},
    },
    "the authors' CIFAR file": {k.replace("downsample", "shortcut"): v for k, v in STATE.items()},
    "VISSL": {
        "iteration": np.float64(3),
        "classy_state_dict": {
            "base_model": {"model": {"trunk": under("_feature_blocks."), "heads": {}}}
        },
    },
    "lightly": {"state_dict": {f"backbone.{key}": value for key, value in numbered().items()}},
    "the children of a ResNet": numbered(),
    "a stem and its stages": nested(numbered()),
    "a BYOL learner": under("net.")
    | under("online_encoder.net.")
    | under("target_encoder.net.", OTHER),
    "foreign classes": Node(
        state=Node(under("module.")), args=argparse.Namespace(lr=1), shape=np.ones(3)
    ),
    "tensors in a list": [1, (under("encoder."), "name")],
    "detectron2": {
        "model": for_detectron2(),
        "__author__": "somebody",
        "matching_heuristics": True,
    },
}


@pytest.mark.parametrize("kind", FILES)
def test_the_layouts_of_other_projects_are_read(tmp_path, kind):
    torch.save(FILES[kind], tmp_path / "new.pth")
    torch.save(FILES[kind], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(FILES[kind]))
    assert all(same(path) for path in tmp_path.iterdir())


def test_a_file_of_safetensors_is_known_by_its_header_whatever_its_length_and_name(tmp_path):
    """The length comes first, and its first byte may be that of a pickle."""
    for pad in range(0, 256, 8):
        content = safetensors.torch.save(STATE, {"note": "x" * pad})
        if content.startswith(b"\x80"):
            break
    assert content.startswith(b"\x80")
    (tmp_path / "model.bin").write_bytes(content)
    assert same(tmp_path / "model.bin")
    (tmp_path / "torn.safetensors").write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"torn.safetensors cannot be read as tensors"):
        read(tmp_path / "torn.safetensors")


def test_a_whole_module_is_read_for_its_tensors(tmp_path):
    backbone = build_backbone("narrow")
    backbone.load_state_dict(STATE)
    torch.save(nn.DataParallel(backbone), tmp_path / "module.pth")
    assert same(tmp_path / "module.pth")


def test_our_own_file_for_detectron2_is_read_back(tmp_path):
    backbone = build_backbone("resnet18")
    export(backbone, "resnet18", False, "detectron2", tmp_path / "r18.pkl")
    network = read(tmp_path / "r18.pkl")
    assert network.name == "resnet18"
    assert all(torch.equal(network.state[k], v) for k, v in backbone.state_dict().items())


class Shouts:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "inside a class", "TorchScript"])
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": STATE, "hook": Shouts()}
    if form == "pickle":
        Path("theirs.pth").write_bytes(pickle.dumps(content))
    elif form == "inside a class":
        Path("theirs.pth").write_bytes(
            pickle.dumps([STATE, pickle.dumps(Shouts()), Node(a=Shouts())])
        )
    else:
        torch.save(content, "theirs.pth", _use_new_zipfile_serialization=form != "old torch")
    if form == "TorchScript":
        writer = torch._C.PyTorchFileWriter("theirs.pth")
        writer.write_record("constants.pkl", b"", 0)
        writer.write_end_of_file()
        with pytest.raises(ValueError, match=r"theirs.pth cannot .*TorchScript.*give a state dict"):
            read("theirs.pth")
    else:
        assert same(Path("theirs.pth"))
    assert not Path("executed").exists()


def test_a_stand_in_for_a_class_cannot_be_changed_by_the_file(tmp_path):
    """A pickle may set attributes of what it names; for a class with `dump_patches` torch would
    write a file."""
    pushes = b"c__main__\nNet\n(N}X\x0c\x00\x00\x00dump_patchesI01\nstb."
    (tmp_path / "theirs.pkl").write_bytes(pushes)
    with pytest.raises(ValueError, match=r"cannot be read as tensors .TypeError"):
        read(tmp_path / "theirs.pkl")


DINO = {
    "student": under("module.backbone.", OTHER),
    "teacher": under("backbone."),
    "args": argparse.Namespace(arch="resnet50"),
}


def test_where_two_networks_differ_a_sentence_names_them_and_the_key_chooses(tmp_path):
    path = tmp_path / "dino.pth"
    torch.save(DINO, path)
    with pytest.raises(ValueError, match=r"2 ResNets that differ.*--weights-key student. and 't.*"):
        read(path)
    assert same(path, "teacher")
    assert not same(path, "student")
    assert "not taken: 'student.module.backbone.'" in str(read(path, "teacher"))
    with pytest.raises(ValueError, match=r"weights_key='ema' is none of .*'teacher\.b"):
        read(path, "ema")
    torch.save(DINO | {"student": under("module.backbone.")}, path)
    assert same(path)  # equal copies count once


def test_a_copy_that_trails_behind_is_named_and_can_be_chosen(tmp_path):
    content = under("module.encoder_q.", OTHER) | under("module.encoder_k.")
    torch.save({"state_dict": content}, tmp_path / "moco.pth.tar")
    said = str(read(tmp_path / "moco.pth.tar"))
    assert "under 'state_dict.module.encoder_q.'" in said
    assert "not taken: 'state_dict.module.encoder_k.' (--weights-key chooses)" in said
    assert same(tmp_path / "moco.pth.tar", "encoder_k")


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "wide_resnet50_2"])
def test_torchvisions_other_resnets_are_recognised(tmp_path, name):
    state = getattr(torchvision.models, name)().state_dict()
    flat = {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}
    torch.save(flat, tmp_path / "theirs.pth")
    network = read(tmp_path / "theirs.pth")
    assert (network.name, network.cifar_stem) == (name, False)
    assert network.remarks == ("left out fc",)
    with torch.device("meta"):
        assert NetworkConfig(name).backbone == name
        assert TwinNetwork.build(NetworkConfig(name, hidden=(), dim=8)).backbone.features == (
            512 if name == "resnet34" else 2048
        )
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
        assert str(build_backbone(name).layer3) == str(theirs.layer3)


def solo_learns(state: dict[str, Tensor], padding: int, pools: bool) -> Tensor:
    """Features of a narrow network with a 3×3 stem of that padding, with max-pooling or without."""
    body = build_backbone("narrow", cifar_stem=True).eval()
    body.load_state_dict(state)
    x = F.relu(body.bn1(F.conv2d(IMAGES, state["conv1.weight"], padding=padding)))
    x = F.max_pool2d(x, 3, 2, 1) if pools else x
    for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
        x = stage(x)
    return x.mean((2, 3))


@pytest.mark.parametrize(("padding", "pools"), [(1, False), (2, False), (1, True), (2, True)])
@torch.no_grad()
def test_the_first_layers_that_weights_do_not_tell_can_be_set(
    tmp_path, monkeypatch, padding, pools, caplog
):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    state = state_of(cifar_stem=True)
    torch.save({"state_dict": under("backbone.", state)}, "solo.ckpt")
    usual = (padding, pools) == (1, False)
    foreign = ForeignConfig() if usual else ForeignConfig(None, padding, pools)
    trained = open_backbone("solo.ckpt", "smoke", foreign)
    expected = solo_learns(state, padding, pools)
    torch.testing.assert_close(trained.backbone.eval()(IMAGES), expected, rtol=0, atol=1e-6)
    (line,) = [record.getMessage() for record in caplog.records]
    word = "" if pools else "not "
    assert "narrow with a 3×3 first convolution, under 'state_dict.backbone.'" in line
    assert f"padded by {padding} and {word}followed by max-pooling (--stem-padding" in line
    # what was set goes along
    save_backbone("ours.safetensors", trained.backbone, trained.recipe.network)
    export(trained.backbone, "narrow", True, "safetensors", "exported.safetensors")
    for again in (
        load_backbone("ours.safetensors"),
        open_backbone("exported.safetensors", "smoke").backbone,
    ):
        torch.testing.assert_close(again.eval()(IMAGES), expected, rtol=0, atol=1e-6)
    assert stem(trained.backbone) == stem(again)


@pytest.mark.parametrize("absent", [{"relu", "maxpool"}, {"maxpool"}, set()])
@torch.no_grad()
def test_an_nn_sequential_gives_its_own_features_whatever_its_first_layers_lack(
    tmp_path, monkeypatch, caplog, absent
):
    """lightly's backbones are the children of a ResNet whose ReLU is a function: they have none
    behind the first convolution."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    whole = build_backbone("narrow")
    whole.load_state_dict(STATE)
    children = [part for name, part in whole.named_children() if name not in {*absent, "fc"}]
    theirs = nn.Sequential(*children).eval()
    torch.save({"state_dict": under("backbone.", theirs.state_dict())}, "theirs.ckpt")
    trained = open_backbone("theirs.ckpt", "smoke")
    expected = theirs(IMAGES).flatten(1)
    torch.testing.assert_close(trained.backbone.eval()(IMAGES), expected, rtol=0, atol=1e-6)
    assert ("no ReLU among its first layers" in caplog.text) == ("relu" in absent)
    export(trained.backbone, "narrow", False, "safetensors", "exported.safetensors")
    again = open_backbone("exported.safetensors", "smoke").backbone.eval()
    assert torch.equal(again(IMAGES), trained.backbone(IMAGES))


def test_networks_of_another_stem_are_built_from_the_settings():
    config = NetworkConfig(stem_padding=2, max_pool=True, hidden=(), dim=8)
    assert stem(TwinNetwork.build(config).backbone) == {
        "cifar_stem": "True",
        "stem_padding": "2",
        "max_pool": "True",
    }


@pytest.mark.parametrize("to", ["timm", "detectron2"])
def test_a_stem_that_another_toolkit_has_not_is_not_exported_to_it(tmp_path, to):
    suffix = {"timm": "pth", "detectron2": "pkl"}[to]
    backbone = build_backbone("resnet18", max_pool=False)
    with pytest.raises(ValueError, match="other padding; export to safetensors"):
        export(backbone, "resnet18", False, to, tmp_path / f"x.{suffix}")


def test_weights_of_an_imagenet_stem_are_seen_at_224_pixels_at_every_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(torchvision.models.resnet18().state_dict(), "r18.pth")
    trained = open_backbone("r18.pth", "laptop")
    for name in ("knn", "linear", "imagenet-knn", "imagenet-linear", "places205-linear"):
        asked = evaluation(name, "laptop", trained.recipe, trained.view)
        assert (asked.eval_view.resize, asked.eval_view.size) == (256, 224), name
        assert getattr(asked.config, "view", asked.eval_view).size == 224, name
    svm = evaluation("voc07-svm", "laptop", trained.recipe, trained.view).config
    assert (svm.resize, svm.size) == (256, 224)
    # a run of this package keeps the size of its scale
    assert (
        evaluation("imagenet-knn", "laptop", recipe("imagenet-100", "laptop")).eval_view.size == 64
    )


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The smallest recipe, on few drawn images."""
    monkeypatch.setattr(datasets, "ATTRIBUTES_SIZES", {"train": 600, "test": 200})
    monkeypatch.setenv("IMSVD_DATASET", "attributes")
    monkeypatch.chdir(tmp_path)
    base = recipe("cifar10", "smoke")
    return replace(
        base, loop=replace(base.loop, epochs=1, batch_size=64), data="attributes", samples=64
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar10-byol"])
def test_a_pretraining_starts_from_somebodys_weights(small, name):
    state = state_of(cifar_stem=True)
    torch.save(DINO | {"teacher": under("backbone.", state)}, "dino.pth")
    asked = replace(recipe(name, "smoke"), init=Path("dino.pth"), weights_key="teacher")
    method = build_method(asked)
    start_from(asked, method)
    copies = [method.network] + ([method.target] if name == "cifar10-byol" else [])
    for network in copies:
        assert all(torch.equal(v, state[k]) for k, v in network.backbone.state_dict().items())


def test_weights_of_another_network_than_the_recipes_are_refused_with_the_remedy(small):
    torch.save(STATE, "theirs.pth")
    asked = replace(small, init=Path("theirs.pth"))
    with pytest.raises(
        ValueError, match=r"holds narrow .*pass --network.backbone narrow --network.no"
    ):
        start_from(asked, build_method(asked))
    with pytest.raises(ValueError, match="weights_key='teacher' chooses in a file: give its init"):
        replace(small, weights_key="teacher")


def test_more_epochs_for_a_finished_run_say_what_they_would_mean_and_how_to_do_it(small):
    run = Pretraining(small, "first", progress=False)
    assert [progressed.step for progressed in run] == [1]
    run.finish()
    with pytest.raises(ValueError, match=r"holds a run of loop.epochs=1, not 3") as refusal:
        Pretraining(replace(small, loop=replace(small.loop, epochs=3)), "first", progress=False)
    assert "its learning rate ends at 0.002 after epoch 1, where a run of 3 would be at" in str(
        refusal.value
    )
    assert "pass --init first --loop.epochs 2 and another --run-dir" in str(refusal.value)
    # and so it is done
    asked = replace(small, init=Path("first"), loop=replace(small.loop, epochs=2))
    assert from_plain(Recipe, plain(asked)) == asked
    again = Pretraining(asked, "second", progress=False)
    kept = load_backbone("first/backbone.safetensors").state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in again.method.backbone.state_dict().items())
    assert [progressed.step for progressed in again] == [1, 2]
    shutil.rmtree("first")  # what is begun needs it no more
    assert Pretraining(asked, "second", progress=False).trainer.step == 2
