"""Anybody's ResNet for ours: found in whatever file holds it; nothing in the file is executed."""

import io
import pickle
import re
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from imsvd_core.networks import BackboneName, build_backbone

#: The first convolution of a stage: what stands before the network, the stage's kind of name, and
#: its number. Torchvision says layer1 to layer4, detectron2 res2 to res5; the children of an
#: nn.Sequential have numbers alone.
STAGE = re.compile(r"((?:.*\.)?)(layer|res|)(\d+)\.0\.conv1\.weight")
#: What else others call as torchvision does not, within a network.
OTHER_NAMES = (
    (r"^(0\.)?0\.(?=weight$)", "conv1."),
    (r"^(0\.)?1\.(?=weight$|bias$|running_|num_)", "bn1."),
    (r"^stem\.", ""),
    (r"\bconv(\d)\.norm\.", r"bn\1."),
    (r"\bshortcut\.(0\.)?(?=weight)", "downsample.0."),
    (r"\bshortcut\.(1|norm)\.", "downsample.1."),
)
#: What the names of a ResNet's tensors but the classifier's begin with.
BODY = r"(conv1|bn1|layer\d)\."
COUNTER = "num_batches_tracked"
#: Copies that trail behind what is trained.
FOLLOWERS = re.compile(r"(^|[._])(momentum|encoder_k|target|ema)[._]")
MAGIC = 0x1950A86A20F9469CFC6C  #: the first number in a file of torch.save before 1.6


@dataclass(frozen=True)
class Found:
    """A ResNet in a file, under torchvision's names."""

    name: BackboneName
    cifar_stem: bool
    state: dict[str, Tensor] = field(repr=False)
    place: str
    """Before the names of its tensors in the file."""
    remarks: tuple[str, ...]
    """What else is in the file."""
    metadata: Mapping[str, str]
    """What a file of safetensors says of itself, or an nn.Sequential by what it lacks."""

    def __str__(self) -> str:
        stem = "a 3×3 first convolution" if self.cifar_stem else "ImageNet's first convolution"
        place = f", under {self.place!r}" if self.place else ""
        return "; ".join((f"{self.name} with {stem}{place}", *self.remarks))


def read(path: Path | str, key: str | None = None) -> Found:
    """The ResNet in anybody's file: safetensors, what torch.save wrote (state dicts, whole
    checkpoints, whole modules), or a pickle of arrays.

    It may stand under any prefix ("module.", "backbone.", "module.encoder_q." …), with
    torchvision's names, detectron2's, `shortcut` for `downsample`, or the numbers of an
    nn.Sequential; what else is there is dropped. Equal copies count once; where a network and a
    copy that trails behind it are there, it is the network that is taken. `key` chooses: a part of
    the prefix. Runs no code from the file.

    Raises FileNotFoundError; ValueError, saying what was found, for what cannot be read, is none of
    our backbones, or is several that differ.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file: give a state dict (.pth, .pt or .safetensors)"
        )
    content, metadata = load(path)
    networks, lacks = _networks(content)
    place, weights, remarks = _choose(networks, content, path, key)
    body = {key: value for key, value in weights.items() if re.match(BODY, key)}
    if not any(key.endswith(COUNTER) for key in body):  # older files lack them
        body |= {
            key.replace("running_mean", COUNTER): torch.tensor(0)
            for key in body
            if key.endswith("running_mean")
        }
    name, cifar_stem = _recognise(body, path)
    if left := sorted({key.split(".")[0] for key in weights if key not in body}):
        remarks.append(f"left out {', '.join(left[:4])}{' …' if len(left) > 4 else ''}")
    state = {
        key: value.long() if key.endswith(COUNTER) else value.float() for key, value in body.items()
    }
    return Found(name, cifar_stem, state, place, tuple(remarks), {**metadata, **lacks[place]})


def read_state_dict(
    path: Path | str, key: str | None = None
) -> tuple[BackboneName, bool, dict[str, Tensor]]:
    """(name, cifar_stem, state dict) of the ResNet that `read` finds, for `build_backbone`."""
    network = read(path, key)
    return network.name, network.cifar_stem, network.state


# Reading: nothing that a file names is called, but what puts tensors and arrays together


class StandIn(dict[str, Any]):
    """In the place of whatever a pickle names: it keeps what it is given, and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.extend(args)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.update(part)

    def append(self, value: Any) -> None:
        self[str(len(self))] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    add = append


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


_reconstruct, _frombuffer = np.zeros(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0]
#: All that a file may call.
CALLABLE: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, state: function(*args),
    "torch._utils._rebuild_device_tensor_from_numpy": lambda array, *_: torch.from_numpy(array),
    "torch.storage._load_from_bytes": lambda part: _unpickled(io.BytesIO(part)),
    "_codecs.encode": lambda text, *_: text.encode("latin-1"),
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy._core.numeric._frombuffer": _frombuffer,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = CALLABLE.get(f"{module}.{name}")
        return stand_in or type(name, (StandIn,), {"__module__": ""})


#: In the place of the module `pickle`, for torch.
PICKLE: Any = types.SimpleNamespace(
    __name__="pickle",
    Unpickler=_Unpickler,
    load=lambda file, **settings: _Unpickler(file, **settings).load(),
)


def load(path: Path) -> tuple[Any, Mapping[str, str]]:
    """(content, metadata) of a file, with a `StandIn` for all but tensors, arrays and plain values.

    Raises ValueError for what cannot be read so.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    try:
        # safetensors begin with the length of their header; a pickle's first bytes would be a vast
        # one
        if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            with safetensors.safe_open(path, framework="pt") as tensors:
                return safetensors.torch.load_file(path), tensors.metadata() or {}
        if not head.startswith(b"PK"):
            return _unpickled(io.BytesIO(path.read_bytes())), {}
        if any(
            name.endswith("constants.pkl")
            for name in torch._C.PyTorchFileReader(str(path)).get_all_records()
        ):
            raise ValueError("TorchScript, a program")
        return _torch_load(path), {}
    except Exception as error:  # a torn or foreign file makes them raise nearly anything
        reason = str(error).partition("\n")[0][:100]
        raise ValueError(
            f"{path} cannot be read as tensors ({type(error).__name__}: {reason}): it is torn, or "
            "no file of weights; give a state dict, as torch.save or safetensors write it"
        ) from error


def _unpickled(file: BinaryIO) -> Any:
    """The content of a pickle; of what torch.save wrote before 1.6, if that is there."""
    content = _Unpickler(file, encoding="latin-1").load()
    if content == MAGIC:
        file.seek(0)
        return _torch_load(file)
    return content


def _torch_load(file: Path | BinaryIO) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(
            file, map_location="cpu", weights_only=False, pickle_module=PICKLE, encoding="latin-1"
        )


# Finding: the networks among the tensors, and which of them is meant


def _named(content: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """All tensors in dicts, lists and modules, under their keys joined by dots."""
    if isinstance(content, np.ndarray) and content.dtype.kind in "fiu":
        content = torch.from_numpy(content.copy())
    if isinstance(content, Tensor):
        yield name.removeprefix("."), content
    elif isinstance(content, Mapping | list | tuple) and id(content) not in seen:
        seen.add(id(content))
        parts = content if isinstance(content, Mapping) else dict(enumerate(content))
        for key, value in parts.items():
            inner = key in ("_modules", "_parameters", "_buffers")
            yield from _named(value, name if inner else f"{name}.{key}", seen)


#: By the number of an nn.Sequential's first stage, what is not among the children before it.
LACKS = {
    3: {"max_pool": "False"},
    2: {"max_pool": "False", "stem_relu": "False"},
}


def _networks(content: Any) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, str]]]:
    """The tensors under each prefix with a ResNet's stages, under torchvision's names, with
    whatever has the same prefix; and what the first layers of each lack."""
    tensors = dict(_named(content, "", set()))
    stages: dict[tuple[str, str], list[int]] = {}
    for match in filter(None, map(STAGE.fullmatch, tensors)):
        stages.setdefault((match[1], match[2]), []).append(int(match[3]))
    networks, lacks = {}, {}
    for (prefix, kind), numbers in stages.items():
        shift = {"layer": 0, "res": 1}.get(kind, min(numbers) - 1)
        names = {f"{kind}{number + shift}": f"layer{number}" for number in range(1, 5)}
        network = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                stage, dot, rest = key.removeprefix(prefix).partition(".")
                is_stage = stage in names and rest[:1].isdigit()
                name = f"{names[stage]}.{rest}" if is_stage else f"{stage}{dot}{rest}"
                for pattern, torchvisions in OTHER_NAMES:
                    name = re.sub(pattern, torchvisions, name)
                network[name] = value
        networks[prefix] = network
        lacks[prefix] = {} if kind else LACKS.get(min(numbers), {})
    return networks, lacks


def _choose(
    networks: dict[str, dict[str, Tensor]], content: Any, path: Path, key: str | None
) -> tuple[str, dict[str, Tensor], list[str]]:
    """(prefix, tensors, remarks) of the network that is meant."""
    if not networks:
        names = ", ".join(repr(name) for name, _ in list(_named(content, "", set()))[:6])
        raise ValueError(
            f"{path} holds 0 ResNets ({type(content).__name__} of {names or 'no tensors'}), and "
            "one is needed: give its state dict under torchvision's names"
        )
    listed = ", ".join(map(repr, networks))
    if key is None:
        fitting = [name for name in networks if not FOLLOWERS.search(name)] or list(networks)
    else:
        fitting = [name for name in networks if f".{key.strip('.')}." in f".{name}"]
        if not fitting:
            raise ValueError(f"weights_key={key!r} is none of {path}'s networks: it has {listed}")
    place, *others = fitting
    weights = networks[place]
    if differing := [name for name in others if not _equal(networks[name], weights)]:
        several = [place, *differing]
        words = " and ".join(
            f"{name!r} (--weights-key {_telling(name, several)})" for name in several
        )
        raise ValueError(
            f"{path} holds {len(several)} ResNets that differ, and one is needed: choose {words}"
        )
    behind = [name for name in networks if name not in fitting]
    passed = f"not taken: {', '.join(map(repr, behind))} (--weights-key chooses)"
    return place, weights, [passed] if behind else []


def _telling(place: str, several: list[str]) -> str:
    """The first part of a prefix that no other has, or all of it."""
    others = [f".{name}" for name in several if name != place]
    parts = [part for part in place.split(".") if part]
    own = [part for part in parts if not any(f".{part}." in name for name in others)]
    return own[0] if own else ".".join(parts)


def _equal(network: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    body, same = (
        {key: value for key, value in tensors.items() if re.match(BODY, key)}
        for tensors in (network, other)
    )
    return shapes_of(body) == shapes_of(same) and all(
        torch.equal(body[key].float(), same[key].float()) for key in body
    )


# Recognising: which of our backbones has just these tensors


def _recognise(body: dict[str, Tensor], path: Path) -> tuple[BackboneName, bool]:
    shapes = shapes_of(body)

    def differing(network: tuple[BackboneName, bool]) -> list[str]:
        wanted = shapes_wanted(*network)
        return sorted(key for key in wanted | shapes if wanted.get(key) != shapes.get(key))

    names: tuple[BackboneName, ...] = get_args(BackboneName)
    nearest = min(product(names, (False, True)), key=lambda network: len(differing(network)))
    if keys := differing(nearest):
        raise ValueError(
            f"{path} holds {describe(body)}, which is none of {', '.join(names)}, with "
            f"ImageNet's stem or the 3×3 one; of the nearest, {nearest[0]} with "
            f"cifar_stem={nearest[1]}, {len(keys)} tensors are missing, too many or of another "
            f"shape: {', '.join(keys[:3])}"
        )
    return nearest


@cache
def shapes_wanted(name: BackboneName, cifar_stem: bool) -> dict[str, torch.Size]:
    """Names and shapes of a backbone's tensors."""
    with torch.device("meta"):
        return shapes_of(build_backbone(name, cifar_stem).state_dict())


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Names and shapes of tensors."""
    return {key: value.shape for key, value in state.items()}


def describe(state: Mapping[str, Tensor]) -> str:
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
