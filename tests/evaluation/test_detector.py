"""The C4 detector: which layer sees what, nothing frozen, losses as said, at any precision."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from imsvd_core.evaluation.detection.detector import DetectorConfig, build_detector
from imsvd_core.networks import build_backbone

SMALL = DetectorConfig(
    min_sizes=(64,),
    test_size=64,
    max_size=96,
    anchors=(16, 32),
    rpn_samples=32,
    train_proposals=(100, 40),
    test_proposals=(60, 20),
    rois=16,
    mask_channels=16,
    score_threshold=0.0,
    detections=5,
)
CLASSES = 3


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return build_detector(build_backbone("narrow"), CLASSES, SMALL)


def pictures(n=2):
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 80 + 16 * (i % 2), generator=generator) for i in range(n)]
    targets = []
    for image in images:
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        masks[0, 8:40, 8:40] = masks[1, 20:60, 40:70] = 1
        boxes = torch.tensor([[8.0, 8, 40, 40], [40, 20, 70, 60]])
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks})
    return images, targets


def empty(targets):
    return [{name: value[:0] for name, value in target.items()} for target in targets]


def calls(module):
    """The shapes that leave a module, as they come."""
    shapes = []
    module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    return shapes


def test_res5_sees_each_training_box_once_and_in_testing_the_boxes_that_come_out_again(detector):
    images, targets = pictures()
    seen, masks = (
        calls(detector.roi_heads.box_head.layer4),
        calls(detector.roi_heads.mask_predictor),
    )
    detector(images, targets)
    assert seen == [(32, 256, 7, 7)]  # 16 boxes of each image, for class, box and mask
    assert masks == [(masks[0][0], CLASSES, 14, 14)]
    assert 0 < masks[0][0] <= 8  # a quarter of them at most are objects
    seen.clear()
    found = detector.eval()(images)
    assert [shape[0] for shape in seen] == [40, 10]  # proposals, then detections
    assert found[0]["masks"].shape == (5, 1, 64, 80)


def test_the_extra_norm_follows_res5_and_all_that_the_predictors_see_has_passed_it(detector):
    head = detector.roi_heads.box_head
    assert [*head._modules] == ["layer4", "norm"]
    assert type(head.norm) is nn.BatchNorm2d
    passed = []
    head.norm.register_forward_hook(lambda module, inputs, output: passed.append(output))
    detector.roi_heads.box_predictor.register_forward_pre_hook(
        lambda module, inputs: passed.append(inputs[0])
    )
    detector.roi_heads.mask_predictor.register_forward_pre_hook(
        lambda module, inputs: passed.append(inputs[0])
    )
    detector(*pictures())
    normed, pooled, objects = passed
    assert torch.equal(pooled, normed.mean((2, 3)))
    assert all((normed == one).flatten(1).all(1).any() for one in objects)


@pytest.mark.parametrize(
    ("name", "cifar_stem", "stride"),
    [("narrow", False, 16), ("resnet18", False, 16), ("resnet50", False, 16), ("narrow", True, 4)],
)
def test_every_backbone_is_inside_whole_unfrozen_and_at_its_stride(name, cifar_stem, stride):
    backbone = build_backbone(name, cifar_stem).requires_grad_(False)
    detector = build_detector(backbone, CLASSES, SMALL).eval()
    inside = {
        key.removeprefix("backbone.").removeprefix("roi_heads.box_head."): value
        for key, value in detector.state_dict().items()
    }
    assert all(torch.equal(inside[key], value) for key, value in backbone.state_dict().items())
    assert all(parameter.requires_grad for parameter in detector.parameters())
    with torch.no_grad():
        whole = detector.backbone(torch.zeros(1, 3, 64, 96))
    assert whole.shape[2:] == (64 // stride, 96 // stride)
    assert detector.roi_heads.box_roi_pool.spatial_scale == 1 / stride
    assert not any(
        a.data_ptr() == b.data_ptr()
        for a, b in zip(backbone.parameters(), detector.parameters(), strict=False)
    )


def test_every_parameter_is_trained(detector):
    sum(detector(*pictures()).values()).backward()
    assert [
        name
        for name, parameter in detector.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ] == []


def test_images_without_an_object_give_zero_losses_of_boxes_and_masks_that_reach_every_parameter(
    detector,
):
    images, targets = pictures()
    parts = detector(images, empty(targets))
    assert {name: value.item() for name, value in parts.items() if value == 0} == dict.fromkeys(
        ("loss_box_reg", "loss_mask", "loss_rpn_box_reg"), 0
    )
    sum(parts.values()).backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in detector.parameters()
    )
    mixed = detector(images, [empty(targets)[0], targets[1]])
    assert mixed["loss_mask"] > 0


def test_masks_are_those_of_the_objects_own_classes(detector):
    """Labels count from 1, the masks' channels from 0."""
    images, targets = pictures()
    detector(images, targets)["loss_mask"].backward()
    touched = detector.roi_heads.mask_predictor.mask_fcn_logits.weight.grad.flatten(1).any(1)
    assert touched.tolist() == [True, False, True]  # of labels 1 and 3


def test_the_heads_losses_are_those_of_the_papers(detector, monkeypatch):
    """Class: the mean over boxes. Box: plain L1 of the right class over all boxes. Mask: the mean
    over pixels of objects."""
    heads, (_, targets) = detector.roi_heads, pictures(1)
    features = torch.randn(1, 128, 4, 5)
    boxes = [torch.tensor([[8.0, 8, 40, 40], [0, 0, 20, 20], [44, 20, 70, 60]])]
    labels, matched, deltas = (
        [torch.tensor([1, 0, 3])],
        [torch.tensor([0, 0, 1])],
        [torch.randn(3, 4)],
    )
    monkeypatch.setattr(
        heads, "select_training_samples", lambda *a: (boxes, matched, labels, deltas)
    )
    heads.train()
    found = heads({"0": features}, boxes, [(64, 80)], targets)[1]
    seen = heads.box_head(heads.box_roi_pool(features, boxes))
    logits, predicted = heads.box_predictor(seen.mean((2, 3)))
    predicted = predicted.view(3, CLASSES + 1, 4)
    box = (predicted[0, 1] - deltas[0][0]).abs().sum() + (
        predicted[2, 3] - deltas[0][2]
    ).abs().sum()
    torch.testing.assert_close(found["loss_classifier"], cross_entropy(logits, labels[0]))
    torch.testing.assert_close(found["loss_box_reg"], box / 3)
    masks = heads.mask_predictor(seen[[0, 2]])
    first = binary_cross_entropy_with_logits(
        masks[0, 0], torch.ones(14, 14)
    )  # box and mask coincide
    assert (
        abs(
            found["loss_mask"]
            - (first + binary_cross_entropy_with_logits(masks[1, 2], torch.ones(14, 14))) / 2
        )
        < 0.1
    )


def test_proposals_are_trained_by_plain_l1_over_the_samples_that_every_image_should_have(detector):
    labels = [torch.tensor([1.0, 0, -1, 0]), torch.tensor([0.0, -1, -1, -1])]
    objectness, deltas, truth = (
        torch.randn(8, 1),
        torch.randn(8, 4),
        [torch.randn(4, 4) for _ in range(2)],
    )
    found = detector.rpn.compute_loss(objectness, deltas, labels, truth)
    kept, flat = [0, 1, 3, 4], torch.cat(labels)
    entropy = sum(binary_cross_entropy_with_logits(objectness[i, 0], flat[i]) for i in kept)
    torch.testing.assert_close(found[0], entropy / (2 * SMALL.rpn_samples))
    torch.testing.assert_close(
        found[1], (deltas[0] - truth[0][0]).abs().sum() / (2 * SMALL.rpn_samples)
    )


@pytest.mark.slow  # a step of a detector in bf16
def test_boxes_are_float32_whatever_the_precision(detector):
    """bf16 has eight bits: a corner at 600 would be wrong by up to two pixels."""
    images, targets = pictures()
    shapes = []
    detector.rpn.register_forward_hook(
        lambda module, inputs, output: shapes.extend(box.dtype for box in output[0])
    )
    detector.roi_heads.box_roi_pool.register_forward_hook(
        lambda module, inputs, output: shapes.append(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        parts = detector(images, targets)
        found = detector.eval()(images)
    assert set(shapes) == {torch.float32}
    assert (
        {value.dtype for value in parts.values()}
        == {found[0]["boxes"].dtype, found[0]["scores"].dtype}
        == {torch.float32}
    )
    corners = torch.cat([one["boxes"] for one in found])
    assert not torch.equal(corners, corners.bfloat16().float())


@pytest.mark.slow  # steps of a detector
def test_training_draws_a_size_and_testing_has_its_own():
    detector = build_detector(
        build_backbone("narrow"), CLASSES, replace(SMALL, min_sizes=(32, 48), test_size=64)
    )
    images, targets = pictures()
    sizes = calls_of_size(detector)
    for _ in range(12):
        detector(images, targets)
    assert {min(size) for one in sizes for size in one} == {32, 48}
    sizes.clear()
    detector.eval()(images)
    assert {min(size) for one in sizes for size in one} == {64}
    detector.train()(images, targets)
    assert {min(size) for size in sizes[-1]} <= {32, 48}


def calls_of_size(detector):
    sizes = []
    detector.transform.register_forward_hook(
        lambda module, inputs, output: sizes.append(output[0].image_sizes)
    )
    return sizes


def test_the_defaults_are_the_papers():
    config = DetectorConfig()
    detector = build_detector(build_backbone("narrow"), 80, config)
    assert detector.rpn._pre_nms_top_n == {"training": 12000, "testing": 6000}
    assert detector.rpn._post_nms_top_n == {"training": 2000, "testing": 1000}
    assert detector.rpn.anchor_generator.num_anchors_per_location() == [15]
    assert (
        detector.roi_heads.fg_bg_sampler.batch_size_per_image,
        detector.roi_heads.fg_bg_sampler.positive_fraction,
    ) == (512, 0.25)
    assert (
        detector.rpn.fg_bg_sampler.batch_size_per_image,
        detector.rpn.fg_bg_sampler.positive_fraction,
    ) == (256, 0.5)
    assert detector.roi_heads.box_coder.weights == (10, 10, 5, 5)
    assert detector.roi_heads.box_roi_pool.aligned


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_sizes": ()}, r"min_sizes=\(\) must hold positive numbers"),
        ({"anchors": (32, 0)}, r"anchors=\(32, 0\)"),
        ({"rois": 0}, "rois=0 must be at least 1"),
        ({"roi_size": 7}, "roi_size=7 must be even"),
        ({"max_size": 700}, "max_size=700 is below the shorter side's 800"),
        ({"train_proposals": (5,)}, "two counts"),
        ({"nms": 1.5}, r"nms=1\.5 must be between 0 and 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DetectorConfig(**settings)


def test_what_is_no_resnet_is_refused():
    with pytest.raises(ValueError, match="backbone is a Linear"):
        build_detector(nn.Linear(1, 1), 3)
    with pytest.raises(ValueError, match="classes=0"):
        build_detector(build_backbone("narrow"), 0)
