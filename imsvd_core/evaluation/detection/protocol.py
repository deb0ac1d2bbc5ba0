"""Object detection and instance segmentation on COCO: the backbone is trained on, inside a Mask
R-CNN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pycocotools import mask as rle
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.models.resnet import ResNet
from torchvision.ops import box_convert

from imsvd_core.data.batch import Batch, Plan
from imsvd_core.data.coco import CocoImages, Target
from imsvd_core.distributed import mean_over_ranks, on_rank_0, world
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.optim import OptimConfig
from imsvd_core.engine.order import stream_seed
from imsvd_core.engine.trainer import Progressed, Trainer
from imsvd_core.evaluation.base import Color, Evaluation, Setup
from imsvd_core.evaluation.detection.detector import DetectorConfig, build_detector
from imsvd_core.evaluation.detection.score import score
from imsvd_core.evaluation.features import fingerprint
from imsvd_core.methods.base import Method
from imsvd_core.system import checks, signals
from imsvd_core.system.config import config_hash, plain
from imsvd_core.system.devices import PRECISIONS
from imsvd_core.system.progress import bar

BLOCK = 25  # test images whose detections are written together: what a kill may cost

#: Settings on which the trained weights do not depend; then those of the detector.
TEST_SETTINGS = ("test_images", "precise_bn")
DETECTOR_TEST_SETTINGS = ("test_size", "test_proposals", "score_threshold", "nms", "detections")


@dataclass(frozen=True)
class DetectionConfig(Evaluation):
    """How the detector is trained and tested; by default the paper's protocol: the 1× schedule on
    COCO 2017."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    iterations: int = 90_000
    """Steps of the training, whatever the epochs of `loop` say."""
    lr: float = 0.1
    """Learning rate after the warm-up."""
    warmup: int = 50
    """Iterations of the linear rise to it, from a thousandth."""
    drops: tuple[int, ...] = (60_000, 80_000)
    """Iterations from which the rate is a tenth of what it was."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    """Decay of weights; biases and norms are never decayed."""
    flip: float = 0.5
    """Probability that a training image is mirrored."""
    precise_bn: int = 200
    """Training batches whose mean statistics replace batch-norm's running ones before the test; 0
    keeps those."""
    train_images: int | None = None
    """Training images to use; all by default."""
    test_images: int | None = None
    """Test images to use; all by default."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(batch_size=16, precision="fp32"))

    evaluation = "detection"
    layout = "coco"

    def __post_init__(self) -> None:
        checks.at_least(self, iterations=1, warmup=0, precise_bn=0, drops=1)
        checks.between(self, 0, 1, "flip")
        if list(self.drops) != sorted(set(self.drops)):
            raise ValueError(f"drops={self.drops} must be rising iterations ≥ 1")
        _ = self.optim  # refuses impossible rates

    def normalised(self, mean: Color, std: Color) -> DetectionConfig:
        return replace(self, detector=replace(self.detector, mean=mean, std=std))

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig(
            name="sgd", lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def resolution(self, setup: Setup) -> int:
        return self.detector.test_size

    def learning_rate(self, step: int) -> float:
        """The rate of `step`, from 0, as detectron2 warms up."""
        rise = min(1.0, step / self.warmup) if self.warmup else 1.0
        drops = sum(step >= drop for drop in self.drops)
        return self.lr * (1e-3 * (1 - rise) + rise) * 0.1**drops

    def judge(
        self, backbone: ResNet, data: tuple[CocoImages, CocoImages], setup: Setup
    ) -> dict[str, float]:
        """COCO's average precision, in percent, of boxes and masks, after the **last** iteration.

        A copy of the backbone is trained inside a Mask R-CNN (`detector`), nothing frozen; among
        ranks with GPUs batch-norm sees the images of all. It then gets precise statistics, and each
        rank looks at its share of the test images. Each combination of backbone, data and settings
        trains in a folder of its own under `setup.folder`, tests in another below it, and is
        resumed there.

        Returns {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75",
        "iterations", "train_images", "test_images", "seconds": of training}. Raises ValueError if
        the data cannot serve; `signals.Stopped` when told to stop.
        """
        train, test = data
        if train.categories != test.categories:
            raise ValueError(
                f"{test.listing} has other classes than {train.listing}: give two splits of one "
                "data set"
            )
        _refuse_unsound(test)
        detector, trainer = training(backbone, train, self, setup.folder, progress=setup.progress)
        for _ in steps(trainer, train, self):
            pass
        trainer.refuse_unfinished()
        test_settings = {**plain(self), "loop": None, "data": _identity(test)}
        folder = trainer.run.path.resolve() / f"test-{config_hash(test_settings)}"
        # Every block of detections is kept as it comes.
        with trainer.run.on_rank_0(), signals.interruptible():
            _make_precise(detector, train, self, trainer, folder)
            figures = _test(detector, test, self, trainer, folder)
        return figures | {
            "iterations": trainer.step,
            "train_images": len(train),
            "seconds": round(trainer.seconds, 1),
        }


def _identity(images: CocoImages) -> list[str]:
    """What changes with the images and what stands in them."""
    return [fingerprint(images.ids, images.records), images.contents().hex()]


@on_rank_0
def _refuse_unsound(test: CocoImages) -> None:
    """Raise ValueError, before any work, where not even the truth would be scored 100."""
    if lost := test.lost():
        raise ValueError(
            f"{test.listing}: scored against itself the truth misses {len(lost)} objects, such as "
            f"annotation {lost[0]}: give each a mask that covers pixels, or remove it"
        )


def training(
    backbone: ResNet,
    train: CocoImages,
    config: DetectionConfig,
    run_dir: Path | str,
    *,
    progress: bool = True,
) -> tuple[nn.Module, Trainer]:
    """The detector, and the loop that trains it when it is iterated, in a folder under `run_dir`
    that its settings name.

    The new layers' weights are fixed by `config.loop.seed`. Raises as `Trainer` does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.loop.seed, "weights", 0))
        detector = build_detector(backbone, len(train.classes), config.detector)
    settings = config.identity(backbone)
    for name in TEST_SETTINGS:
        del settings[name]
    for name in DETECTOR_TEST_SETTINGS:
        del settings["detector"][name]
    settings["data"] = [train.title, *_identity(train)]
    trainer = Trainer(
        Detection(detector),
        len(train),
        config.loop,
        config.optim,
        Path(run_dir) / config_hash(settings),
        settings=settings,
        progress=progress,
        steps=config.iterations,
        rate=config.learning_rate,
    )
    return detector, trainer


def steps(trainer: Trainer, train: CocoImages, config: DetectionConfig) -> Iterator[Progressed]:
    """Train to the end, and tell after every step where the training stands."""
    order, seed_of = trainer.order.since(trainer.step), trainer.order.seed_of
    return trainer.train(training_batches(train, order, config, trainer.device, seed_of))


class Detection(Method):
    """A detector under the sum of its losses; the losses of pieces are averaged."""

    whole_batch = False

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector
        self.names: tuple[str, ...] = ()

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The detector's losses, scalars, of images (bytes) and what stands in them."""
        losses = self.detector([image / 255 for image in batch.views], batch.labels)
        self.names = tuple(losses)
        return tuple(losses.values())

    def loss(self, *embeddings: Tensor) -> dict[str, Tensor]:
        parts = dict(zip(self.names, embeddings, strict=True))
        return {"loss": torch.stack(embeddings).sum(), **parts}


def training_batches(
    train: CocoImages,
    plan: Plan,
    config: DetectionConfig,
    device: torch.device,
    seed_of: Callable[[int], int],
) -> Iterator[Batch]:
    """The pieces of every batch, of which the seed of its step mirrors some images."""
    ahead, plan = tee(plan)
    current, generator = -1, torch.Generator(device)
    with closing(train.batches(ahead, device=device)) as pieces:
        for (images, targets), (step, indices) in zip(pieces, plan, strict=True):
            if step != current:
                current, generator = step, generator.manual_seed(seed_of(step))
            images, targets = mirror(images, targets, config.flip, generator)
            # A detector's labels are all that stands in the images.
            yield Batch(tuple(images), targets, indices)  # type: ignore[arg-type]


def mirror(
    images: list[Tensor], targets: list[Target], chance: float, generator: torch.Generator
) -> tuple[list[Tensor], list[Target]]:
    """Images and targets, of which each is flipped with that chance."""
    draws = torch.rand(len(images), generator=generator, device=generator.device)
    flips = [
        flip(image, target) if turn else (image, target)
        for image, target, turn in zip(images, targets, (draws < chance).tolist(), strict=True)
    ]
    return [image for image, _ in flips], [target for _, target in flips]


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """The image (3, H, W) and what stands in it, mirrored left to right."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return image.flip(-1), target | {"boxes": boxes, "masks": target["masks"].flip(-1)}


@torch.no_grad()
def precise_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace batch-norm's running statistics by the plain means, over all batches that the model
    is shown, of each batch's mean and variance; over ranks too.

    The weights stay, and the model ends in testing mode. After Wu and Johnson (2021), as
    detectron2 does: running statistics forget, and lag behind the last weights.
    """
    update_bn(([batch] for batch in batches), model)  # it takes the first item of a list
    model.eval()
    for name, statistics in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            statistics.copy_(mean_over_ranks(statistics))


@torch.no_grad()
def detect(
    detector: nn.Module,
    image: Tensor,
    number: int,
    categories: Sequence[int],
    precision: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """What the detector, in testing mode, finds in an image (bytes), as COCO writes results.

    Each has image_id, the `number`; category_id, that of label 1, 2, ... in `categories`;
    bbox, [x, y, width, height] in pixels; score; segmentation, compressed run lengths.
    """
    with torch.autocast(image.device.type, precision, enabled=precision is not None):
        (finding,) = detector([image / 255])
    inside = (finding["masks"][:, 0] > 0.5).byte().permute(1, 2, 0)
    masks = rle.encode(np.asfortranarray(inside.cpu().numpy()))
    boxes = box_convert(finding["boxes"], "xyxy", "xywh").tolist()
    labels, scores = finding["labels"].tolist(), finding["scores"].tolist()
    return [
        {
            "image_id": number,
            "category_id": categories[label - 1],
            "bbox": box,
            "score": confidence,
            "segmentation": mask | {"counts": mask["counts"].decode()},
        }
        for box, label, confidence, mask in zip(boxes, labels, scores, masks, strict=True)
    ]


def _make_precise(
    detector: nn.Module,
    train: CocoImages,
    config: DetectionConfig,
    trainer: Trainer,
    folder: Path,
) -> None:
    """Give batch-norm precise statistics and keep the detector as detector.safetensors; or read it
    from there."""
    path = folder / "detector.safetensors"
    if not on_rank_0(path.exists)():
        if config.precise_bn:
            _show_batches(detector, train, config, trainer)
        weights = {name: value.cpu().contiguous() for name, value in detector.state_dict().items()}
        on_rank_0(trainer.run.write)(path, safetensors.torch.save(weights))
    detector.load_state_dict(safetensors.torch.load_file(path))
    detector.eval()


def _show_batches(
    detector: nn.Module, train: CocoImages, config: DetectionConfig, trainer: Trainer
) -> None:
    """Precise statistics from training batches: this rank's share of each is as large as those that
    batch-norm saw in training."""
    rank, ranks = world()
    device, share = trainer.device, config.loop.batch_size // config.loop.accumulate // ranks
    generator = torch.Generator().manual_seed(stream_seed(config.loop.seed, "precise", 0))
    rounds = math.ceil(config.precise_bn * share * ranks / len(train))
    shuffled = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(rounds)])
    whole = shuffled.split(share * ranks)[: config.precise_bn]
    plan = list(enumerate(batch[rank * share :][:share] for batch in whole))
    seed_of = partial(stream_seed, config.loop.seed, f"precise of rank {rank}")
    batches = training_batches(train, plan, config, device, seed_of)

    def seeded() -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            torch.manual_seed(seed_of(number))
            yield batch
            advance(1)

    precision = PRECISIONS[config.loop.precision]
    with (
        bar("precise batch-norm", len(plan), trainer.progress) as advance,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, precision, enabled=precision is not None),
    ):
        precise_statistics(Detection(detector), seeded())


def _test(
    detector: nn.Module,
    test: CocoImages,
    config: DetectionConfig,
    trainer: Trainer,
    folder: Path,
) -> dict[str, float]:
    """Look at the test images, each rank at its share, in blocks of which each is written; then
    score."""
    rank, ranks = world()
    blocks = {
        folder / f"detections-{block[0]:06d}.json": block
        for block in torch.arange(len(test)).split(BLOCK)
    }
    own = list(blocks.items())[rank::ranks]
    missing = [(path, block) for path, block in own if not path.exists()]
    # One image at a time: padding to others' sizes would change what is seen.
    order = [index for _, block in missing for index in block.split(1)]
    precision = PRECISIONS[config.loop.precision]
    with (
        closing(test.batches(enumerate(order), masks=False, device=trainer.device)) as batches,
        bar("testing", len(order), trainer.progress) as advance,
    ):
        for path, block in missing:
            content: dict[str, list[Any]] = {"images": [], "detections": []}
            for images, targets in islice(batches, len(block)):
                # An unreadable image is not there.
                for image, target in zip(images, targets, strict=True):
                    number = int(target["image_id"])
                    results = detect(detector, image, number, test.categories, precision)
                    content["images"].append(number)
                    content["detections"] += results
                advance(1)
            trainer.run.write(path, json.dumps(content).encode())
    mean_over_ranks(torch.zeros(1, device=trainer.device))  # wait for all
    return _score_files(list(blocks), test, trainer.progress)


@on_rank_0
def _score_files(paths: Sequence[Path], test: CocoImages, progress: bool) -> dict[str, float]:
    """The figures of what is written in these files."""
    blocks = [json.loads(path.read_text()) for path in paths]
    images = [number for block in blocks for number in block["images"]]
    detections = [detection for block in blocks for detection in block["detections"]]
    # pycocotools does not tell how far it is.
    with bar("scoring", None, progress):
        return score(detections, test.truth(), images) | {"test_images": len(images)}
