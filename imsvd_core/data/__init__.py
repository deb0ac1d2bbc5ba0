"""Images: in memory or streamed from disk, and the checks of what is there."""

from contextlib import suppress

import numpy as np

from imsvd_core.data.decoding import open_image
from imsvd_core.data.memory import ImageData, load
from imsvd_core.data.sources import OnCorrupt, Root, Split, resolve
from imsvd_core.data.streamed import StreamedImages
from imsvd_core.data.tree import FolderImages, open_folder
from imsvd_core.data.voc import open_voc

__all__ = [
    "FolderImages",
    "ImageData",
    "Images",
    "open_data",
    "resolve",
]

Images = ImageData | FolderImages

MEMORY_BYTES = 2 * 10**9  #: of decoded images: a tree that holds more is streamed
SAMPLE = 64  #: images of a tree whose sizes tell how much memory all would take


def open_data(
    name: str = "auto",
    split: Split = "train",
    *,
    root: Root = None,
    on_corrupt: OnCorrupt = "error",
    stream: bool | None = None,
    progress: bool = False,
) -> ImageData | StreamedImages:
    """Open one split of a data set: the one door to all of them.

    Args:
        name: `auto`, `cifar10`, `cifar100`, `fashion-mnist` or `attributes`, which load into memory
            (see `resolve` for `auto`); `folder:PATH` for a tree PATH/{train,test or
            val}/<class>/<image>, or PATH/train/<image> and PATH/<image>, which have no labels;
            `tree:PATH` for the same, streamed; `voc:PATH` and `coco:PATH` for the layouts of PASCAL
            VOC 2007 and COCO 2017. PATH is absolute, or under the data root.
        root: the data root; `data_root()` by default.
        on_corrupt: whether an unreadable image file is an error that names it, or is passed over
            and counted.
        stream: of `folder:PATH`, whether images are decoded whenever they are needed (True) or
            once, into memory (False). By default the headers of 64 of the split's images, evenly
            spread, decide: the tree is streamed if these differ in size, or if all images would
            take more than 2 GB at their mean size.
        progress: show a bar while files are read.

    Raises ValueError for an argument or a tree that cannot be used, naming an unreadable file, and
    FileNotFoundError, with the remedy, for data that are not there.
    """
    scheme = name.partition(":")[0]
    if scheme != "folder" and stream not in (None, scheme in ("tree", "voc", "coco")):
        raise ValueError(f"stream={stream} contradicts {name!r}: only folder:PATH can be both")
    if scheme == "voc":
        return open_voc(name, split, root, on_corrupt=on_corrupt)
    if scheme == "coco":
        from imsvd_core.data.coco import open_coco  # pycocotools is slow to import

        return open_coco(name, split, root, on_corrupt=on_corrupt, progress=progress)
    if scheme in ("tree", "folder") and stream is not False:
        images = open_folder(name, split, root, on_corrupt=on_corrupt)
        if stream or scheme == "tree" or _needs_streaming(images):
            return images
    return load(name, split, root=root, on_corrupt=on_corrupt, progress=progress)


def _needs_streaming(images: FolderImages) -> bool:
    """Whether sampled images differ in size, or all would take too much memory."""
    sizes = []
    for index in np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int):
        # A broken file makes Pillow raise nearly anything; reading will name it.
        with suppress(Exception), open_image(images.file(index)) as picture:
            sizes.append(picture.size)
    total = sum(3 * width * height for width, height in sizes)
    return len(set(sizes)) > 1 or total * len(images) > MEMORY_BYTES * len(sizes)
