"""Exports: other toolkits load them and give identical features; anybody's ResNet is recognised,
and nothing else is."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import ResNet

from imsvd_core.engine import checkpoints
from imsvd_core.export import export, read_state_dict
from imsvd_core.networks import build_backbone
from imsvd_core.runs.backbones import load_backbone
from imsvd_core.system.run_folder import RunFolder

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained(name: str, cifar_stem: bool = False) -> ResNet:
    """A backbone none of whose tensors is what a new one has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        backbone = build_backbone(name, cifar_stem)
        for tensor in backbone.state_dict().values():
            tensor.copy_(
                {4: tensor, 1: tensor + 0.1 * torch.rand(tensor.shape), 0: torch.tensor(7)}[
                    tensor.ndim
                ]
            )
    return backbone.eval()


@pytest.fixture(scope="module")
def resnet50() -> ResNet:
    return trained("resnet50")


@torch.no_grad()
def features(network: nn.Module) -> Tensor:
    found = network.eval()(IMAGES)
    assert found.isfinite().all()
    assert found.std(0).max() > 0.01
    return found


def test_a_classifier_stays_behind(tmp_path):
    path = export(
        torchvision.models.resnet18(num_classes=7),
        "resnet18",
        False,
        "torchvision",
        tmp_path / "r18.pth",
    )
    assert (
        torch.load(path, weights_only=True).keys() == build_backbone("resnet18").state_dict().keys()
    )


@pytest.mark.slow  # builds ResNets
def test_torchvision_lacks_the_classifier_alone(resnet50, tmp_path):
    path = export(resnet50, "resnet50", False, "torchvision", tmp_path / "new/r50.pth")
    theirs = torchvision.models.resnet50()
    missing = theirs.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert sorted(missing.missing_keys) == ["fc.bias", "fc.weight"]
    assert not missing.unexpected_keys
    theirs.fc = nn.Identity()
    assert torch.equal(features(theirs), features(resnet50))


@pytest.mark.slow  # builds timm's ResNet-50
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_gives_identical_features(resnet50, tmp_path, suffix):
    path = str(export(resnet50, "resnet50", False, "timm", tmp_path / f"r50.{suffix}"))
    overlay = {"file": path}
    for settings in (
        {"checkpoint_path": path},
        {"pretrained": True, "pretrained_cfg_overlay": overlay},
    ):
        theirs = timm.create_model("resnet50", num_classes=0, **settings)
        assert torch.equal(features(theirs), features(resnet50))


def detectron2_r50() -> dict[str, tuple[int, ...]]:
    """The tensors of detectron2's R-50 backbone with a trained norm, from its BasicStem and
    BottleneckBlock."""
    found: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out: int, into: int, size: int) -> None:
        found[f"{name}.weight"] = (out, into, size, size)
        found.update(
            {
                f"{name}.norm.{one}": (out,)
                for one in ("weight", "bias", "running_mean", "running_var")
            }
        )
        found[f"{name}.norm.num_batches_tracked"] = ()

    convolution("stem.conv1", 64, 3, 7)
    into = 64
    for stage, (blocks, inside, out) in {
        "res2": (3, 64, 256),
        "res3": (4, 128, 512),
        "res4": (6, 256, 1024),
        "res5": (3, 512, 2048),
    }.items():
        for block in range(blocks):
            if block == 0:
                convolution(f"{stage}.0.shortcut", out, into, 1)
            convolution(f"{stage}.{block}.conv1", inside, into, 1)
            convolution(f"{stage}.{block}.conv2", inside, inside, 3)
            convolution(f"{stage}.{block}.conv3", out, inside, 1)
            into = out
    return found


def detectron2_features(model: Mapping[str, np.ndarray], x: Tensor) -> Tensor:
    """What its ResNet computes with STRIDE_IN_1X1 False, then the mean over places; of basic or
    bottleneck blocks."""
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in model.items()}

    def convolution(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = tensors[f"{name}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        return F.batch_norm(
            x,
            *(
                tensors[f"{name}.norm.{one}"]
                for one in ("running_mean", "running_var", "weight", "bias")
            ),
        )

    x = F.max_pool2d(F.relu(convolution("stem.conv1", x, 2)), 3, 2, 1)
    for stage in range(2, 6):
        for block in range(sum(f"res{stage}.{k}.conv1.weight" in tensors for k in range(9))):
            at, stride = f"res{stage}.{block}", 2 if block == 0 and stage > 2 else 1
            if f"{at}.conv3.weight" in tensors:
                y = F.relu(
                    convolution(f"{at}.conv2", F.relu(convolution(f"{at}.conv1", x)), stride)
                )
                y = convolution(f"{at}.conv3", y)
            else:
                y = convolution(f"{at}.conv2", F.relu(convolution(f"{at}.conv1", x, stride)))
            x = F.relu(
                y
                + (
                    convolution(f"{at}.shortcut", x, stride)
                    if f"{at}.shortcut.weight" in tensors
                    else x
                )
            )
    return x.mean((2, 3))


def test_detectron2_finds_each_tensor_under_its_own_name(resnet50, tmp_path):
    path = export(resnet50, "resnet50", False, "detectron2", tmp_path / "r50.pkl")
    content = pickle.loads(path.read_bytes())
    assert content["matching_heuristics"] is True
    assert content["__author__"] == "imsvd_core"
    assert {name: value.shape for name, value in content["model"].items()} == detectron2_r50()
    assert {
        "stem.conv1.norm.bias",
        "res2.0.shortcut.norm.weight",
        "res4.5.conv3.norm.running_var",
    } <= content["model"].keys()
    assert all(type(value) is np.ndarray for value in content["model"].values())
    assert torch.allclose(
        detectron2_features(content["model"], IMAGES), features(resnet50), rtol=1e-4
    )


def test_detectron2_gets_a_resnet18_too(tmp_path):
    backbone = trained("resnet18")
    model = pickle.loads(
        export(backbone, "resnet18", False, "detectron2", tmp_path / "r18.pkl").read_bytes()
    )["model"]
    assert len(model) == len(backbone.state_dict())
    assert model["res3.0.shortcut.weight"].shape == (
        128,
        64,
        1,
        1,
    )
    assert torch.allclose(detectron2_features(model, IMAGES), features(backbone), rtol=1e-4)


def test_safetensors_says_what_it_holds(tmp_path):
    backbone = trained("resnet18", cifar_stem=True)
    path = export(backbone, "resnet18", True, "safetensors", tmp_path / "r18.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "names": "torchvision",
            "backbone": "resnet18",
            "cifar_stem": "True",
        }
    assert torch.equal(features(load_backbone(path)), features(backbone))


@pytest.mark.slow  # builds and writes ResNets
@pytest.mark.parametrize("name", ["narrow", "resnet18", "resnet50"])
@pytest.mark.parametrize("cifar_stem", [False, True])
@pytest.mark.parametrize("to", ["torchvision", "safetensors"])
def test_what_was_exported_is_read_back(tmp_path, name, cifar_stem, to):
    backbone = trained(name, cifar_stem)
    path = export(
        backbone,
        name,
        cifar_stem,
        to,
        tmp_path / {"torchvision": "b.pt", "safetensors": "b.safetensors"}[to],
    )
    found = read_state_dict(path)
    assert found[:2] == (name, cifar_stem)
    assert all(torch.equal(value, found[2][key]) for key, value in backbone.state_dict().items())


def wrapped(kind: str, state: dict[str, Tensor]) -> dict:
    def under(prefix: str, tensors: dict[str, Tensor] = state) -> dict[str, Tensor]:
        return {prefix + key: value for key, value in tensors.items()}

    trailing = {key: value + 1 for key, value in state.items()}
    return {
        "classifier": {**state, "fc.weight": torch.ones(5, 512), "fc.bias": torch.ones(5)},
        "old": {
            key: value for key, value in state.items() if not key.endswith("num_batches_tracked")
        },
        "half": {
            key: value.half() if value.is_floating_point() else value
            for key, value in state.items()
        },
        "barlow twins": {
            "epoch": 3,
            "model": under("module.backbone.") | {"module.projector.0.weight": torch.ones(8, 512)},
        },
        "moco": {
            "arch": "resnet18",
            "state_dict": under("module.encoder_q.")
            | under("module.encoder_k.", trailing)
            | {
                "module.encoder_q.fc.0.weight": torch.ones(8, 512),
                "module.queue": torch.ones(128, 4),
            },
        },
        "swav": under("module.")
        | {
            "module.projection_head.0.weight": torch.ones(8, 512),
            "module.prototypes.weight": torch.ones(3, 8),
        },
        "lightning": {
            "hyper_parameters": {"lr": 0.1},
            "state_dict": under("backbone.") | under("momentum_backbone.", trailing),
        },
    }[kind]


@pytest.mark.parametrize(
    "kind", ["classifier", "old", "half", "barlow twins", "moco", "swav", "lightning"]
)
def test_a_backbone_is_found_in_the_files_of_others(tmp_path, kind):
    state = trained("resnet18").state_dict()
    torch.save(wrapped(kind, state), tmp_path / "theirs.pth")
    name, cifar_stem, found = read_state_dict(tmp_path / "theirs.pth")
    assert (name, cifar_stem) == ("resnet18", False)
    assert found.keys() == state.keys()
    for key, value in state.items():
        if value.is_floating_point():
            expected = value.half().float() if kind == "half" else value
            assert found[key].dtype == torch.float32, key
            assert torch.equal(found[key], expected), key
        else:
            assert found[key].dtype == torch.int64
            assert found[key] == (0 if kind == "old" else 7)
    build_backbone(name, cifar_stem).load_state_dict(found)


def test_a_backbone_is_found_in_our_own_checkpoint(tmp_path):
    state = trained("narrow").state_dict()
    network = {f"backbone.{key}": value for key, value in state.items()} | {
        "projector.0.weight": torch.ones(8, 256)
    }
    target = {f"target.backbone.{key}": value + 1 for key, value in state.items()}
    method = {f"network.{key}": value for key, value in network.items()} | target
    for weights in ({"modules": {"network": network}}, {"method": method}):  # older ones; today's
        path = checkpoints.save(RunFolder(tmp_path), 3, {"step": 3, **weights, "seconds": 1.0})
        name, cifar_stem, found = read_state_dict(path)
        assert (name, cifar_stem) == ("narrow", False)
        assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.slow  # builds several ResNets
def test_a_file_without_one_of_our_backbones_says_what_it_holds(tmp_path):
    def attempt(match: str, content: object, file: str = "x.pth") -> None:
        torch.save(content, tmp_path / file)
        with pytest.raises(ValueError, match=match):
            read_state_dict(tmp_path / file)

    with torch.device("meta"):
        shapes = {
            name: getattr(torchvision.models, name)().state_dict()
            for name in ("resnet18", "resnext50_32x4d")
        }
    zeros = {
        name: {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}
        for name, state in shapes.items()
    }
    lacking = {
        key: value for key, value in zeros["resnet18"].items() if key != "layer2.0.conv1.weight"
    }
    attempt(
        r"of the nearest, resnet18 with cifar_stem=False, 1 tensors are missing, too many or of "
        r"another shape: layer2\.0\.conv1\.weight",
        lacking,
    )
    attempt(
        r"\(64, 3, 7, 7\), with 3-4-6-3 blocks of three convolutions, 1024 channels.*none of "
        r"narrow, resnet18, resnet34, resnet50",
        zeros["resnext50_32x4d"],
    )
    attempt(
        "holds 0 ResNets .dict of 'blocks.0.weight'",
        {"epoch": 1, "blocks.0.weight": torch.ones(1)},
    )
    attempt("0 ResNets .int of no tensors", 3)
    state = trained("narrow").state_dict()
    attempt(
        "holds 2 ResNets that differ, .*'state_dict.a.' .--weights-key a. and 'state_dict.b.'",
        {
            "state_dict": {
                f"{prefix}.{key}": value + (prefix == "b")
                for prefix in "ab"
                for key, value in state.items()
            }
        },
    )
    attempt(
        "conv1|first convolution is missing",
        {key: value for key, value in state.items() if key != "conv1.weight"},
    )
    attempt("0 ResNets .PosixPath of no tensors", Path("/"))  # would run code
    for name in ("torn.pth", "torn.safetensors"):
        (tmp_path / name).write_bytes(b"torn")
        with pytest.raises(ValueError, match=f"{name} cannot be read as tensors"):
            read_state_dict(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth is not a file"):
        read_state_dict(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("name", "cifar_stem", "to", "file", "match"),
    [
        (
            "resnet18",
            True,
            "detectron2",
            "a.pkl",
            "to='detectron2' cannot hold .*cifar_stem=True.*3×3 first convolution.*export to "
            "safetensors",
        ),
        ("resnet18", True, "timm", "a.pth", "to='timm' cannot hold"),
        ("narrow", False, "timm", "a.pth", "a first convolution of 32 channels"),
        ("narrow", False, "detectron2", "a.pkl", "to='detectron2' cannot hold"),
        ("narrow", False, "onnx", "a.onnx", "to='onnx' must be one of"),
        ("narrow", False, "torchvision", "a.pkl", "must end in .pth or .pt"),
        (
            "resnet18",
            False,
            "torchvision",
            "a.pth",
            "backbone=.*1-1-1-1 blocks.* is not what name='resnet18'",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, name, cifar_stem, to, file, match):
    with pytest.raises(ValueError, match=match):
        export(build_backbone("narrow"), name, cifar_stem, to, tmp_path / file)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_text("old")
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(build_backbone("narrow"), "narrow", False, "torchvision", path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
