"""Does the C4 detector learn, and does the full-width one run? On coco-mini and a CPU (chapter 11).

    python book/studies/detection.py RUN_DIR

First, a narrow backbone from its first weights overfits ten training images: losses, and average
precision on those ten, as the training goes; then both through the whole evaluation, on the ten and
on the hundred images of the test split, which it has never seen. Second, Mask R-CNN R50-C4 at full
width takes a step on real images, saves, and goes on in another process, which must end with the
weights of one that was not cut. Whatever RUN_DIR holds is not done again; the result goes to
RUN_DIR/result.json, or with --keep among the book's.
"""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from imsvd_core.data.coco import open_coco
from imsvd_core.engine.config import LoopConfig
from imsvd_core.engine.order import stream_seed
from imsvd_core.evaluation.base import Setup
from imsvd_core.evaluation.detection import protocol as detection
from imsvd_core.evaluation.detection.detector import DetectorConfig
from imsvd_core.evaluation.detection.protocol import DetectionConfig
from imsvd_core.evaluation.detection.score import score
from imsvd_core.evaluation.features import fingerprint
from imsvd_core.networks import BackboneName, build_backbone
from imsvd_core.results import STORE, provenance, write_json, write_result
from imsvd_core.system.config import plain

SEED, IMAGES, WATCHED = 0, 10, 50  # average precision every so many steps

CPU = LoopConfig(precision="fp32", device="cpu", channels_last=False, seed=SEED)
OVERFIT = DetectionConfig(
    detector=DetectorConfig(
        min_sizes=(256,),
        test_size=256,
        max_size=512,
        anchors=(16, 32, 64, 128, 256),
        rpn_samples=128,
        train_proposals=(1000, 200),
        test_proposals=(500, 100),
        rois=64,
        roi_size=8,
        mask_channels=64,
    ),
    iterations=500,
    lr=0.02,
    drops=(400,),
    flip=0.0,
    precise_bn=20,
    loop=replace(CPU, batch_size=2, save_minutes=1),
)
FULL = DetectionConfig(
    detector=DetectorConfig(min_sizes=(640,), rois=32),
    iterations=2,
    drops=(),
    precise_bn=0,
    loop=replace(CPU, batch_size=2, save_every=1, log_every=1),
)


def backbone(name: BackboneName) -> torch.nn.Module:
    torch.manual_seed(stream_seed(SEED, "weights", 0))
    return build_backbone(name)


def overfit(run_dir: Path) -> dict:
    """Losses and average precision on the way, and at the end; all processor time that went into
    it."""
    path = run_dir / "figures.json"
    if path.exists():
        return json.loads(path.read_text())
    train, test = open_coco("coco:coco-mini"), open_coco("coco:coco-mini", "test")
    ten = train.subset(IMAGES, SEED)
    images, truth, ids = (
        [ten.read(index)[0] for index in range(IMAGES)],
        ten.truth(),
        ten.ids.tolist(),
    )
    detector, trainer = detection.training(backbone("narrow"), ten, OVERFIT, run_dir)
    for progressed in detection.steps(trainer, ten, OVERFIT):
        if progressed.step % WATCHED == 0:
            detector.eval()  # by the running statistics
            found = [
                one
                for number, image in zip(ids, images, strict=False)
                for one in detection.detect(detector, image, number, ten.categories)
            ]
            detector.train()
            trainer.record(**score(found, truth, ids))
    ends = {
        name: OVERFIT.run(backbone("narrow"), (ten, other), Setup(run_dir, progress=True))
        for name, other in (("on_the_ten", ten), ("on_the_test_split", test))
    }
    curves = {"losses": trainer.records(), "watched": trainer.records("box_ap50")}
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    core_seconds = round(sum(one.ru_utime + one.ru_stime for one in used))
    figures = {
        "images": ids,
        "settings": plain(OVERFIT),
        "core_seconds": core_seconds,
        **ends,
        **curves,
    }
    write_json(path, figures)
    return figures


def one_process(run_dir: Path, steps: int) -> dict:
    """Take `steps` training steps of the full-width detector from where `run_dir` stands; what is
    there before and after."""
    train = open_coco("coco:coco-mini")
    detector, trainer = detection.training(
        backbone("resnet50"), train, FULL, run_dir, progress=False
    )
    states = [fingerprint(*detector.state_dict().values())]
    first = trainer.step
    for _ in islice(detection.steps(trainer, train, FULL), steps):
        states.append(fingerprint(*detector.state_dict().values()))
    return {
        "from_step": first,
        "to_step": trainer.step,
        "states": states,
        "seconds": round(trainer.seconds, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "parameters": sum(parameter.numel() for parameter in detector.parameters()),
    }


def full_width(run_dir: Path) -> dict:
    """Two steps in one process; and one step, saved, with the other in another process."""
    told = {}
    for name, folder, steps in (
        ("whole", "whole", 2),
        ("before_the_cut", "cut", 1),
        ("after_the_cut", "cut", 1),
    ):
        path = run_dir / f"{name}.json"
        if not path.exists():
            command = [sys.executable, __file__, str(run_dir / folder), "--steps", str(steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            write_json(path, json.loads(done.stdout))
        told[name] = json.loads(path.read_text())
    cut = told["before_the_cut"]["states"] + told["after_the_cut"]["states"][1:]
    checkpoint = max(
        run_dir.glob("cut/*/checkpoints/step-*.pt"), key=lambda path: path.stat().st_mtime
    )
    return {
        "identical": cut == told["whole"]["states"],
        "resumed_with_what_was_saved": told["before_the_cut"]["states"][-1]
        == told["after_the_cut"]["states"][0],
        "processes": told,
        "checkpoint_mb": round(checkpoint.stat().st_size / 1e6, 1),
        "settings": plain(FULL),
    }


def main(run_dir: Path, path: Path) -> None:
    figures = {
        "overfit": overfit(run_dir / "overfit"),
        "full_width": full_width(run_dir / "full-width"),
    }
    seconds = figures["overfit"]["on_the_ten"]["seconds"]
    origin = provenance(
        config=OVERFIT, seed=SEED, device="cpu", dataset="coco-mini", seconds=seconds
    )
    write_result(path, "coco-mini-overfit", figures, origin, overwrite=True)
    print(
        {name: figures["overfit"][name] for name in ("on_the_ten", "on_the_test_split")},
        {name: value for name, value in figures["full_width"].items() if name != "settings"},
    )


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[2] == "--steps":
        print(json.dumps(one_process(Path(sys.argv[1]), int(sys.argv[3]))))
    elif len(sys.argv) == 2 or (len(sys.argv) == 3 and sys.argv[2] == "--keep"):
        here = Path(sys.argv[1])
        main(here, STORE / "coco-mini-overfit.json" if len(sys.argv) == 3 else here / "result.json")
    else:
        raise SystemExit(__doc__)
