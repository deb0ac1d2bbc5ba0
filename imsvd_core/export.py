"""A trained backbone for other toolkits, and anybody's ResNet for ours."""

import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor
from torchvision.models.resnet import ResNet

from imsvd_core.networks import BackboneName, build_backbone
from imsvd_core.system.files import atomic_write

Format = Literal["torchvision", "timm", "detectron2", "safetensors"]
SUFFIXES = {
    "torchvision": (".pth", ".pt"),
    "timm": (".pth", ".pt", ".safetensors"),
    "detectron2": (".pkl",),
    "safetensors": (".safetensors",),
}
# what every ResNet has, after a prefix that says where in a larger network it stood
FIRST = "layer1.0.conv1.weight"
# what the names of a ResNet's tensors but the classifier's begin with
BODY = r"(conv1|bn1|layer\d)\."
COUNTER = "num_batches_tracked"
FOLLOWERS = ("momentum", "encoder_k", "target", "ema")  # copies that trail behind what is trained

log = logging.getLogger(__name__)


def export(
    backbone: ResNet, name: BackboneName, cifar_stem: bool, to: Format, path: Path | str
) -> Path:
    """Write the backbone `name` as another toolkit reads it; it gives identical features there.

    * torchvision (.pth): a state dict.
      `torchvision.models.resnet50().load_state_dict(torch.load(path), strict=False)` lacks `fc`
      alone. With the CIFAR stem that model's `conv1` must be `nn.Conv2d(3, 64, 3, padding=1,
      bias=False)` and its `maxpool` `nn.Identity()` first. `narrow` fits
      `imsvd_core.networks.build_backbone("narrow", ...)` alone.
    * timm (.pth or .safetensors): `timm.create_model("resnet50", num_classes=0,
      checkpoint_path=path)`. * detectron2 (.pkl): for MODEL.WEIGHTS, with MODEL.RESNETS.DEPTH 50
      (or 18, and then RES2_OUT_CHANNELS 64), STRIDE_IN_1X1 False, INPUT.FORMAT "RGB",
      MODEL.PIXEL_MEAN [123.675, 116.28, 103.53], PIXEL_STD [58.395, 57.12, 57.375], and a norm that
      is trained, since these statistics are no supervised network's. Its arrays are numpy 2's,
      which numpy reads from 1.26 on.
    * safetensors (.safetensors): torchvision's names, with what the network is as metadata.

    Returns the path. Raises ValueError for a format that cannot hold this network, for another
    suffix, and for a backbone that is not what `name` and `cifar_stem` say.
    """
    path = Path(path)
    if to not in SUFFIXES:
        raise ValueError(f"to={to!r} must be one of {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES[to]:
        raise ValueError(
            f"path={str(path)!r} must end in {' or '.join(SUFFIXES[to])}, by which readers know "
            f"{to}'s files"
        )
    if to in ("timm", "detectron2") and (cifar_stem or name == "narrow"):
        raise ValueError(
            f"to={to!r} cannot hold backbone={name!r} with cifar_stem={cifar_stem}: its ResNets do "
            "not come with a 3×3 first convolution without max-pooling, nor with a first "
            "convolution of 32 channels; export to safetensors or torchvision"
        )
    state = {
        key: value.cpu().contiguous().clone()
        for key, value in backbone.state_dict().items()
        if not key.startswith("fc.")
    }
    if _shapes_of(state) != _shapes(name, cifar_stem):
        raise ValueError(
            f"backbone={_describe(state)} is not what name={name!r} and cifar_stem={cifar_stem} say"
        )
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            network = {"backbone": name, "cifar_stem": str(cifar_stem)}
            about = {"format": "pt", "names": "torchvision", **network}
            file.write(safetensors.torch.save(state, about))
        elif to == "detectron2":
            renamed = {detectron2_name(key): value.numpy() for key, value in state.items()}
            origin = {"__author__": "imsvd_core", "matching_heuristics": True}
            pickle.dump({"model": renamed, **origin}, file)
        else:
            torch.save(state, file)
    return path


def detectron2_name(name: str) -> str:
    """What detectron2 calls a tensor of torchvision's ResNets: layer1.0.bn2.weight →
    res2.0.conv2.norm.weight."""
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = (
        re.sub(r"\bbn(\d)", r"conv\1.norm", name)
        .replace("downsample.0", "shortcut")
        .replace("downsample.1", "shortcut.norm")
    )
    return name if name.startswith("res") else f"stem.{name}"


def read_state_dict(path: Path | str) -> tuple[BackboneName, bool, dict[str, Tensor]]:
    """(name, cifar_stem, state dict) of a ResNet with torchvision's names in anybody's file, for
    `build_backbone`.

    The file is .safetensors, or what torch.save wrote: tensors alone, or in dicts of tensors and
    plain values, the ResNet under any prefix ("module.", "backbone.", "module.encoder_q." …), its
    classifier or projector, which are dropped, beside it. Where a network and a copy that trails
    behind it are there, it is the network that is taken. A 3×3 first convolution is taken for our
    CIFAR stem, which has no max-pooling: weights cannot tell. Runs no code from the file.

    Raises FileNotFoundError; ValueError, saying what was found, for what cannot be read or is none
    of our backbones.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file: give a state dict (.pth, .pt or .safetensors)"
        )
    weights = _find(_load(path), path)
    body = {key: value for key, value in weights.items() if re.match(BODY, key)}
    if not any(key.endswith(COUNTER) for key in body):  # older files lack them
        body |= {
            key.replace("running_mean", COUNTER): torch.tensor(0)
            for key in body
            if key.endswith("running_mean")
        }
    shapes = _shapes_of(body)

    def differing(network: tuple[BackboneName, bool]) -> list[str]:
        wanted = _shapes(*network)
        return sorted(key for key in wanted | shapes if wanted.get(key) != shapes.get(key))

    names: tuple[BackboneName, ...] = get_args(BackboneName)
    nearest = min(product(names, (False, True)), key=lambda network: len(differing(network)))
    if keys := differing(nearest):
        raise ValueError(
            f"{path} holds {_describe(weights)}, which is none of {', '.join(names)}, with "
            f"ImageNet's stem or the 3×3 one; of the nearest, {nearest[0]} with "
            f"cifar_stem={nearest[1]}, {len(keys)} tensors are missing, too many or of another "
            f"shape: {', '.join(keys[:3])}"
        )
    if left := sorted({key.split(".")[0] for key in weights if key not in body} - {"fc"}):
        log.info("%s: left out %s, which are not of the backbone", path, ", ".join(left))
    state = {
        key: value.long() if key.endswith(COUNTER) else value.float() for key, value in body.items()
    }
    return *nearest, state


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or foreign file makes them raise nearly anything
        raise ValueError(
            f"{path} cannot be read as tensors ({type(error).__name__}: the file is torn, or holds "
            "more than tensors and plain values); if you trust it, load it with "
            "weights_only=False and save its state dict alone"
        ) from error


def _find(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of the ResNet in a file's content, without its prefix, with whatever has the
    same."""
    tensors = dict(_named(content))
    prefixes = [key.removesuffix(FIRST) for key in tensors if key.endswith(FIRST)]
    leading = [prefix for prefix in prefixes if not any(word in prefix for word in FOLLOWERS)]
    prefixes = leading or prefixes
    if len(prefixes) != 1:
        names = ", ".join(map(repr, prefixes or list(tensors)[:6]))
        raise ValueError(
            f"{path} holds {len(prefixes)} ResNets with torchvision's names "
            f"({type(content).__name__} of {names or 'no tensors'}), and one is needed: save the "
            "state dict of one alone"
        )
    (prefix,) = prefixes
    return {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}


def _named(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in dicts of dicts, under their keys joined by dots."""
    if isinstance(content, Tensor):
        yield name.removeprefix("."), content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _named(value, f"{name}.{key}")


def _shapes(name: BackboneName, cifar_stem: bool) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return _shapes_of(build_backbone(name, cifar_stem).state_dict())


def _shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def _describe(state: Mapping[str, Tensor]) -> str:
    """A ResNet in words, as far as its tensors tell."""
    blocks = [
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    ]
    first, depth = state.get("conv1.weight"), "three" if "layer1.0.conv3.weight" in state else "two"
    width = state["layer4.0.conv1.weight"].shape[0] if "layer4.0.conv1.weight" in state else "?"
    return (
        f"a ResNet whose first convolution is "
        f"{tuple(first.shape) if first is not None else 'missing'}, with "
        f"{'-'.join(map(str, blocks))} blocks of {depth} convolutions, {width} channels inside "
        f"the last stage's"
    )
