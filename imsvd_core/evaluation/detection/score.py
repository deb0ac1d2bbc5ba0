"""COCO's average precision of boxes and masks, by pycocotools."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def score(
    detections: Sequence[dict[str, Any]], truth: COCO, images: Sequence[int]
) -> dict[str, float]:
    """COCO's average precision in percent, by pycocotools, of what `protocol.detect` found.

    Counts the images with these of COCO's numbers. Returns box_ap, the mean over the
    overlaps .5, .55, ..., .95, box_ap50 and box_ap75, at one of them, and mask_ap,
    mask_ap50 and mask_ap75, by the overlap of masks. Raises ValueError where nothing
    is to be found.
    """
    objects = truth.loadAnns(truth.getAnnIds(imgIds=list(images)))
    if all(entry["iscrowd"] for entry in objects):
        raise ValueError(
            f"images={list(images)[:3]}… ({len(images)}): no object is annotated "
            "there, so nothing can be scored"
        )
    figures: dict[str, float] = {}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        precisions = [0.0] * 3
        if detections:
            # pycocotools would take the sizes of masks from their boxes.
            dropped = "bbox" if kind == "segm" else None
            entries = [
                {key: value for key, value in detection.items() if key != dropped}
                for detection in detections
            ]
            with redirect_stdout(io.StringIO()):
                scores = COCOeval(truth, truth.loadRes(entries), kind)
                scores.params.imgIds = sorted(images)
                scores.evaluate()
                scores.accumulate()
                scores.summarize()
            precisions = scores.stats[:3].tolist()
        if min(precisions) < 0:
            raise ValueError(f"{kind}: COCO's scoring sees no object in images={list(images)[:3]}…")
        for measure, precision in zip(("ap", "ap50", "ap75"), precisions, strict=True):
            figures[f"{name}_{measure}"] = round(100 * precision, 2)
    return figures
