"""Every evaluation at laptop scale: backbones of CIFAR-10 and of Tiny-ImageNet (40 classes), each
judged on both, on small VOC and on small COCO, beside the same networks untrained.

    python book/studies/evaluations.py TINY_RUN OUT [NAME ...]

TINY_RUN is the folder of the run on Tiny-ImageNet (`imsvd pretrain imagenet-100 --scale laptop
--loop.epochs 30 --method.temperature 0.25`); CIFAR-10's model is the one kept in the book. What is
done in OUT is not done again. Writes evaluations-small.json, voc-mini-features.safetensors and
tiny-imagenet-40-laptop.safetensors beside the chapters. NAME limits what is done to some backbones.
The data root holds cifar10, tiny-imagenet-40, voc-mini and coco-mini.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn.functional import normalize

from imsvd_core.data.coco import open_coco
from imsvd_core.data.memory import load
from imsvd_core.data.sources import Split
from imsvd_core.data.voc import open_voc
from imsvd_core.evaluation import svm
from imsvd_core.evaluation.base import Setup
from imsvd_core.evaluation.features import embed
from imsvd_core.evaluation.knn import weighted_knn
from imsvd_core.evaluation.linear import LinearConfig
from imsvd_core.evaluation.svm import SVMConfig
from imsvd_core.networks import NetworkConfig
from imsvd_core.recipes import evaluation
from imsvd_core.results import STORE, provenance, read_result, write_result
from imsvd_core.runs import evaluate as evaluations
from imsvd_core.runs.backbones import load_run, open_backbone, save_backbone
from imsvd_core.runs.pretrain import build_network
from imsvd_core.system.files import atomic_write
from imsvd_core.views import EvalView

SPLITS: tuple[Split, ...] = ("train", "test")
CIFAR, TINY = "cifar10", "folder:tiny-imagenet-40"
ALIKE = 25.0  # root mean square of the differences of two images' bytes
KEPT = "cifar10-laptop-40-epochs-seed0.safetensors"


def backbones(tiny_run: Path, out: Path, store: Path) -> dict[str, Path]:
    """Files of weights: two trained networks, and the same two as they were before."""
    recipe, trained = load_run(tiny_run)
    save_backbone(
        store / "tiny-imagenet-40-laptop.safetensors", trained, recipe.network, torch.float16
    )
    files = {"cifar10": store / KEPT, "tiny": store / "tiny-imagenet-40-laptop.safetensors"}
    for name, stem in (("cifar10", True), ("tiny", False)):
        network = NetworkConfig(backbone="narrow", cifar_stem=stem)
        files[f"{name}-untrained"] = out / f"{name}-untrained.safetensors"
        save_backbone(files[f"{name}-untrained"], build_network(network, seed=0).backbone, network)
    return files


def twins(store: Path) -> dict[str, float]:
    """How many test images of CIFAR-10 have their nearest neighbour among the training images in
    nearly the same pixels, and what the neighbours are worth with and without those."""
    trained = open_backbone(store / KEPT, "laptop")
    train, test = (load(CIFAR, split) for split in SPLITS)
    view = EvalView(**asdict(trained.recipe.eval_view))
    gallery, queries = (embed(trained.backbone, part, view) for part in (train, test))
    unit = normalize(gallery, dim=1)
    nearest = torch.cat(
        [(some @ unit.T).argmax(1) for some in normalize(queries, dim=1).split(1000)]
    )
    differ = (
        (train.images[nearest].float() - test.images.float()).square().flatten(1).mean(1).sqrt()
    )
    twin = differ < ALIKE
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[nearest[twin]] = False

    def right(rows: torch.Tensor) -> torch.Tensor:
        found = weighted_knn(
            gallery[rows], train.labels[rows], queries, len(train.classes), neighbors=(20,)
        )[20]
        return (found == test.labels).float()

    whole, without = right(torch.ones_like(kept)), right(kept)
    figures = {
        "knn_20": whole.mean(),
        "knn_20_of_twins": whole[twin].mean(),
        "knn_20_of_others": whole[~twin].mean(),
        "knn_20_of_twins_without": without[twin].mean(),
        "same_label": (train.labels[nearest] == test.labels)[twin].float().mean(),
    }
    return {"rms_below": ALIKE, "twins": int(twin.sum()), "test_images": len(test)} | {
        name: round(100 * value.item(), 2) for name, value in figures.items()
    }


def main(tiny_run: Path, out: Path, names: list[str], store: Path = STORE) -> None:
    out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[str, Any]] = {}
    features: dict[str, torch.Tensor] = {}
    classes: tuple[str, ...] = ()
    for name, file in backbones(tiny_run, out, store).items():
        if names and name not in names:
            continue
        trained = replace(open_backbone(file, "laptop"), folder=out / name)
        for kind, data in (
            ("knn", CIFAR),
            ("knn", TINY),
            ("imagenet-linear", CIFAR),
            ("imagenet-linear", TINY),
            ("voc07-svm", None),
            ("coco-detection", None),
        ):
            if kind == "coco-detection" and trained.recipe.network.cifar_stem:
                # its features are four times as dense: sixteen times the work, and another detector
                continue
            asked = evaluation(kind, "laptop", trained.recipe)
            if data:
                asked = replace(asked, data=data, eval_view=trained.recipe.eval_view)
            if isinstance(asked.config, LinearConfig):
                # through crops of the size that the backbone knows
                view = replace(asked.config.view, size=trained.recipe.eval_view.size)
                asked = replace(asked, config=replace(asked.config, view=view))
            path = evaluations.evaluate(kind, trained, asked, default_data="")
            runs.setdefault(name, {})[path.stem] = read_result(path)["figures"]
            print(
                name,
                path.stem,
                {
                    key: value
                    for key, value in read_result(path)["figures"].items()
                    if not isinstance(value, dict)
                },
                flush=True,
            )
        config = evaluation("voc07-svm", "laptop", trained.recipe).config
        assert isinstance(config, SVMConfig)
        for split in SPLITS:
            images = open_voc("voc:voc-mini", split)
            classes = images.classes
            setup = Setup(out / name / "voc07-features")
            embedded, rows = svm.embed(trained.backbone, images, config, setup)
            features[f"{name}-{images.split}"] = embedded.half()
            features[f"labels-{images.split}"] = images.labels[rows].contiguous()
        if (
            name == "tiny"
        ):  # batch-norm's running averages in place of precise ones, on the same trained detector
            detection = replace(evaluation("coco-detection", "laptop").config, precise_bn=0)
            coco = open_coco("coco:coco-mini", "train"), open_coco("coco:coco-mini", "test")
            setup = Setup(out / name / "coco-detection", progress=True)
            runs[name]["coco-detection-running-averages"] = detection.run(
                trained.backbone, coco, setup
            )
    with atomic_write(store / "voc-mini-features.safetensors") as stored:
        stored.write(safetensors.torch.save(features))
    settings = {
        kind: evaluation(kind, "laptop")
        for kind in ("knn", "imagenet-linear", "voc07-svm", "coco-detection")
    }
    seconds = sum(
        read_result(path)["provenance"]["seconds"] for path in out.glob("*/*.json")
    )  # earlier calls' too
    origin = provenance(
        config=settings,
        seed=0,
        device="cpu",
        seconds=seconds,
        dataset="CIFAR-10 (JPEG), tiny-imagenet-40, voc-mini, coco-mini",
    )
    write_result(
        store / "evaluations-small.json",
        "evaluations-small",
        {"voc_classes": classes, "runs": runs, "twins": twins(store)},
        origin,
        overwrite=True,
    )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
