"""Mask R-CNN on a ResNet's C4 features (He et al., 2017), as MoCo and VISSL judge a backbone by it;
torchvision's parts.

conv1 to layer3 see the whole image. RoIAlign cuts 14×14 features out of theirs for each box, layer4
("res5") sees those, and an extra batch-norm follows it: its output is pooled for class and box, and
upsampled for the mask. Nothing is frozen.

What detectron2 does and torchvision's parts do not was put right where it touches the training: the
plain L1 loss of boxes (torchvision: smooth below 1/9), divided in the region proposals by 256 an
image; RoIAlign that is aligned by half a pixel, with as many samples as a bin has pixels; the
layers' first weights; masks of the K classes without one for the background. What remains
different:

* pictures are resized as floating-point numbers without anti-aliasing (detectron2: as bytes, by
  Pillow);
* masks are drawn once, as bitmaps, resized to the nearest pixel with their picture, and cut out by
  RoIAlign (not aligned), with fractions at their edges (detectron2: every box's part of the polygon
  is drawn anew, in zeros and ones);
* a predicted mask is pasted at whole pixels (detectron2: between them);
* base anchors have whole sides, proposals thinner than 1/1000 pixel are dropped (detectron2: 0),
  and the box predictor has four idle numbers for the background;
* a batch takes pictures as they come (detectron2 puts wide ones with wide ones, which saves
  padding);
* biases are not decayed, as nowhere in this package (detectron2: 1e-4); norms are decayed in
  neither.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import ResNet
from torchvision.ops import RoIAlign

from imsvd_core.data.coco import Target
from imsvd_core.evaluation.base import Color
from imsvd_core.system import checks
from imsvd_core.views import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class DetectorConfig:
    """The detector's sizes; by default the paper's, those of detectron2's R50-C4."""

    min_sizes: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Pixels of the shorter side, one of which is drawn for each training image."""
    test_size: int = 800
    """Pixels of the shorter side in testing."""
    max_size: int = 1333
    """Pixels that the longer side may have: the shorter gives way."""
    mean: Color = IMAGENET_MEAN
    """That the backbone's images were normalised by."""
    std: Color = IMAGENET_STD
    """That the backbone's images were normalised by."""
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Sides of the square anchors, in pixels of the resized image."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width of the anchors of each area."""
    rpn_samples: int = 256
    """Anchors of an image that the region proposals are trained on, up to half of them positive."""
    train_proposals: tuple[int, int] = (12000, 2000)
    """Proposals of an image in training, before and after the non-maximum suppression."""
    test_proposals: tuple[int, int] = (6000, 1000)
    """Those in testing."""
    rois: int = 512
    """Proposals of an image that the heads are trained on, up to a quarter of them positive."""
    roi_size: int = 14
    """Side of the features that RoIAlign gives layer4; masks have the same."""
    mask_channels: int = 256
    """Channels of the upsampled features under the masks."""
    score_threshold: float = 0.05
    """Detections below this probability are dropped."""
    nms: float = 0.5
    """Overlap (IoU) from which the less probable of two detections of one class is dropped."""
    detections: int = 100
    """Detections that an image may keep, as in COCO's own scoring."""

    def __post_init__(self) -> None:
        for name in ("min_sizes", "anchors", "ratios"):
            if not getattr(self, name):
                raise ValueError(f"{name}=() must hold positive numbers, at least one")
        for name in ("train_proposals", "test_proposals"):
            if len(counts := getattr(self, name)) != 2:
                raise ValueError(
                    f"{name}={counts} must be two counts: before and after the suppression"
                )
        checks.positive(self, "min_sizes", "anchors", "ratios")
        checks.at_least(self, train_proposals=1, test_proposals=1, test_size=1, max_size=1, rois=1)
        checks.at_least(self, rpn_samples=1, roi_size=1, mask_channels=1, detections=1)
        checks.between(self, 0, 1, "score_threshold", "nms")
        if self.roi_size % 2:
            raise ValueError(
                f"roi_size={self.roi_size} must be even: layer4 halves it, and the mask doubles "
                "that again"
            )
        largest = max(*self.min_sizes, self.test_size)
        if self.max_size < largest:
            raise ValueError(
                f"max_size={self.max_size} is below the shorter side's {largest}: raise it"
            )


def build_detector(
    backbone: ResNet, classes: int, config: DetectorConfig = DetectorConfig()
) -> GeneralizedRCNN:
    """A detector of `classes` classes on a copy of the backbone; the new layers draw from torch's
    generator.

    In training it takes images, a list of float (3, H, W) in [0, 1], and their targets
    (`coco.Target`), and returns five losses by name; in testing it takes images alone and returns
    for each boxes (n, 4) in its own pixels, scores (n,), labels (n,) from 1, and masks (n, 1, H,
    W), the probability of every pixel.

    The state dict holds the backbone's entries: conv1 to layer3 under `backbone.`, layer4 under
    `roi_heads.box_head.`. Raises ValueError for a backbone that is no ResNet, or for `classes` < 1.
    """
    if not isinstance(backbone, ResNet):
        raise ValueError(
            f"backbone is a {type(backbone).__name__}: the C4 detector needs a ResNet with layer1 "
            "to layer4"
        )
    if classes < 1:
        raise ValueError(f"classes={classes} must be at least 1")
    backbone = copy.deepcopy(backbone).requires_grad_(True)
    stride, wide = _stride(backbone), backbone.inplanes  # the channels that leave layer4
    anchors = AnchorGenerator((config.anchors,), (config.ratios,))
    counts = [
        {"training": train, "testing": test}
        for train, test in zip(config.train_proposals, config.test_proposals, strict=True)
    ]
    rpn_head = _ProposalHead(wide // 2, anchors.num_anchors_per_location()[0])
    rpn = _Proposals(anchors, rpn_head, 0.7, 0.3, config.rpn_samples, 0.5, *counts, 0.7)
    boxes = FastRCNNPredictor(wide, classes + 1)
    nn.init.normal_(boxes.cls_score.weight, std=0.01)
    nn.init.normal_(boxes.bbox_pred.weight, std=0.001)
    masks = MaskRCNNPredictor(wide, config.mask_channels, classes)
    nn.init.normal_(masks.mask_fcn_logits.weight, std=0.001)
    for layer in (boxes.cls_score, boxes.bbox_pred, masks.conv5_mask, masks.mask_fcn_logits):
        nn.init.zeros_(layer.bias)
    heads = SharedHeads(
        RoIAlign(config.roi_size, 1 / stride, sampling_ratio=0, aligned=True),
        nn.Sequential(OrderedDict(layer4=backbone.layer4, norm=nn.BatchNorm2d(wide))),
        boxes,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.rois,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms,
        detections_per_img=config.detections,
        mask_predictor=masks,
    )
    return GeneralizedRCNN(_Body(backbone), rpn, heads, _Transform(config, stride))


class SharedHeads(RoIHeads):
    """Class, box and mask from one pass of layer4 over each box: in training over the
    sampled proposals; in testing over all proposals for class and box, and again over the
    boxes that come out for their masks."""

    def has_mask(self) -> bool:
        return True

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        (whole,) = features.values()
        if self.training and targets is not None:
            return [], self._losses(whole, proposals, targets)
        logits, deltas = self._classify(self._roi_features(whole, proposals))
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        drawn = self.mask_predictor(self._roi_features(whole, boxes)).float()
        masks = maskrcnn_inference(drawn, [label - 1 for label in labels])
        detections = zip(boxes, scores, labels, masks, strict=True)
        return [
            {"boxes": box, "scores": score, "labels": label, "masks": mask}
            for box, score, label, mask in detections
        ], {}

    def _roi_features(self, features: Tensor, boxes: list[Tensor]) -> Tensor:
        return self.box_head(self.box_roi_pool(features, boxes))

    def _classify(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = self.box_predictor(features.mean((2, 3)))
        return logits.float(), deltas.float()

    def _losses(
        self, features: Tensor, proposals: list[Tensor], targets: list[Target]
    ) -> dict[str, Tensor]:
        boxes, matched, labels, truth = self.select_training_samples(proposals, targets)
        roi_features = self._roi_features(features, boxes)
        logits, deltas = self._classify(roi_features)
        label = torch.cat(labels)
        objects = (label > 0).nonzero().squeeze(1)
        right_class = deltas.unflatten(1, (-1, 4))[objects, label[objects]]
        box = smooth_l1_loss(right_class, torch.cat(truth)[objects], beta=0.0, reduction="sum")
        masks = self.mask_predictor(roi_features[objects]).float()
        return {
            "loss_classifier": cross_entropy(logits, label),
            "loss_box_reg": box / len(label),
            # Without objects its gradients are 0: other ranks, which have some, wait for them.
            "loss_mask": maskrcnn_loss(
                masks,
                [rois[kinds > 0] for rois, kinds in zip(boxes, labels, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] - 1 for target in targets],
                [match[kinds > 0] for match, kinds in zip(matched, labels, strict=True)],
            ),
        }


class _Body(nn.Sequential):
    """conv1 to layer3, whose features leave in float32: boxes would be wrong by pixels at
    a lower precision."""

    def __init__(self, backbone: ResNet):
        super().__init__(OrderedDict(islice(backbone.named_children(), 7)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class _ProposalHead(RPNHead):
    """For the same reason, float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in deltas]


class _Proposals(RegionProposalNetwork):
    """Losses as detectron2's: plain L1, and both divided by the samples that every image
    should have."""

    def compute_loss(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], truth: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(sample).bool() for sample in self.fg_bg_sampler(labels))
        sampled, label = positive | negative, torch.cat(labels)
        presence = binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], label[sampled], reduction="sum"
        )
        box = smooth_l1_loss(
            deltas[positive], torch.cat(truth)[positive], beta=0.0, reduction="sum"
        )
        samples = self.fg_bg_sampler.batch_size_per_image * len(labels)
        return presence / samples, box / samples


class _Transform(GeneralizedRCNNTransform):
    """Resizes, normalises, and pads to whole strides; in testing at a size of its own."""

    def __init__(self, config: DetectorConfig, stride: int):
        super().__init__(
            config.min_sizes, config.max_size, config.mean, config.std, size_divisible=stride
        )
        self.sizes = {True: config.min_sizes, False: (config.test_size,)}

    def train(self, mode: bool = True) -> "_Transform":
        self.min_size = self.sizes[mode]
        return super().train(mode)


def _stride(backbone: ResNet) -> int:
    """Pixels between two of layer3's features: 16, or 4 with a CIFAR stem, which has no pooling."""
    return 4 * backbone.conv1.stride[0] * getattr(backbone.maxpool, "stride", 1)
