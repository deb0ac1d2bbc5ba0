"""Networks: a backbone that represents, a projector that embeds, and the twin that applies both to
two views."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from imsvd_core.system import checks

BackboneName = Literal[
    "narrow",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


@dataclass(frozen=True)
class NetworkConfig:
    """A backbone and its projector."""

    backbone: BackboneName = "narrow"
    """narrow: a ten-layer ResNet of width 32 for CPUs; the others are torchvision's."""
    cifar_stem: bool = True
    """3×3 first convolution and no max-pooling, for images of about 32 pixels."""
    hidden: tuple[int, ...] = (1024, 1024)
    """Widths of the projector's hidden layers, each with batch-norm and ReLU."""
    dim: int = 1024
    """Embedding dimension D: the projector's output."""
    stem_padding: int | None = None
    """Padding of the first convolution; by default 1 if that is 3×3, else 3."""
    max_pool: bool | None = None
    """Whether the first convolution is followed by max-pooling; by default unless it is 3×3."""
    zero_init_residual: bool = False
    """Start with every block as the identity: the last norm of each begins with the weight 0."""
    init: Literal["kaiming", "pytorch"] = "kaiming"
    """How the backbone's convolutions begin: normal for ReLU (torchvision's), or as PyTorch makes
    them, uniform and smaller by √6."""

    def __post_init__(self) -> None:
        checks.literals(self)
        checks.at_least(self, hidden=1, dim=1, stem_padding=0)


class NarrowResNet(ResNet):
    """A ResNet of four one-block stages, `width` to 8·`width` channels: 1.2 M parameters at width
    32."""

    def __init__(self, width: int = 32):
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for stage in range(4):
            layer = self._make_layer(BasicBlock, width << stage, 1, stride=1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", layer)
        self.fc = nn.Linear(8 * width, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_backbone(
    name: BackboneName = "resnet50",
    cifar_stem: bool = False,
    stem_padding: int | None = None,
    max_pool: bool | None = None,
    stem_relu: bool = True,
) -> ResNet:
    """A ResNet without its classifier: images (N, 3, H, W) → representations (N,
    `features(backbone)`).

    Its state dict is torchvision's without `fc.*`; with `cifar_stem`, `conv1` is 3×3 and the rest
    fits. `stem_padding` and `max_pool` leave no trace there: they are as `NetworkConfig` says.
    Without `stem_relu` no ReLU follows the first convolution, as in an nn.Sequential of the
    children of a network that has it as a function.
    """
    backbone = (
        NarrowResNet() if name == "narrow" else getattr(torchvision.models, name)(weights=None)
    )
    if cifar_stem:
        width = backbone.conv1.out_channels
        backbone.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem_padding is not None:
        backbone.conv1.padding = (stem_padding, stem_padding)
    if not (not cifar_stem if max_pool is None else max_pool):
        backbone.maxpool = nn.Identity()
    if not stem_relu:
        backbone.relu = nn.Identity()  # the blocks have their own
    backbone.features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone


def stem(backbone: ResNet) -> dict[str, str]:
    """What tells the first layers of a backbone apart, as a file's metadata hold it; what is as
    usual is left out."""
    kernel, padding = backbone.conv1.kernel_size[0], backbone.conv1.padding[0]
    pools = not isinstance(backbone.maxpool, nn.Identity)
    words = {"cifar_stem": str(kernel == 3)}
    if padding != kernel // 2:
        words["stem_padding"] = str(padding)
    if pools == (kernel == 3):
        words["max_pool"] = str(pools)
    if isinstance(backbone.relu, nn.Identity):
        words["stem_relu"] = "False"
    return words


def _begin(backbone: ResNet, config: NetworkConfig) -> None:
    """The first weights, where they are not torchvision's."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and config.init == "pytorch":
            module.reset_parameters()
        last = {BasicBlock: "bn2", Bottleneck: "bn3"}.get(type(module))
        if last and config.zero_init_residual:
            nn.init.zeros_(getattr(module, last).weight)


def build_projector(features: int, hidden: Sequence[int], dim: int) -> nn.Sequential:
    """Linear layers (features, *hidden, dim) with batch-norm and ReLU between them; the last is
    bare, without bias.

    Depth and widths are free: `hidden=()` is one linear map; the paper's is `hidden=(8192,)`,
    `dim=8160`.
    """
    layers: list[nn.Module] = []
    for width in hidden:
        linear = nn.Linear(features, width, bias=False)
        layers += [linear, nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, dim, bias=False))


class TwinNetwork(nn.Module):
    """One backbone and one projector, shared by both views (Fig. 2)."""

    def __init__(self, backbone: ResNet, projector: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    @classmethod
    def build(cls, config: NetworkConfig) -> "TwinNetwork":
        backbone = build_backbone(
            config.backbone, config.cifar_stem, config.stem_padding, config.max_pool
        )
        _begin(backbone, config)
        return cls(backbone, build_projector(backbone.features, config.hidden, config.dim))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Two views (N, 3, H, W) → two logit tables (N, D); batch-norm sees one view at a time."""
        return self.embed(x1), self.embed(x2)

    def embed(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


@torch.no_grad()
def represent(
    backbone: nn.Module,
    batches: Iterable[Tensor],
    device: torch.device | str,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Representations (N, features) in float32 of batches of images, batch-norm frozen, order
    kept."""
    was_training, kind = backbone.training, torch.device(device).type
    backbone.eval()
    try:
        with torch.autocast(kind, dtype=precision, enabled=precision is not None):
            layout = torch.channels_last
            rows = [backbone(x.to(device, memory_format=layout)).float() for x in batches]
        return torch.cat(rows)
    finally:
        backbone.train(was_training)
