"""Representations of a data set, computed once and shared by the evaluations."""

import torch
from torch import Tensor, nn

from imsvd_core.datasets import ImageData
from imsvd_core.folders import FolderImages
from imsvd_core.networks import represent
from imsvd_core.views import EvalView


def embed(backbone: nn.Module, data: ImageData | FolderImages, view: EvalView, *, device: torch.device | str = "cpu",
          batch_size: int = 500, precision: torch.dtype | None = None) -> Tensor:
    """Representations (N, features), float32, of `data` in its order, batch-norm frozen, seen through `view`.

    `batch_size` is of images in memory; streamed ones come as they are handed over.
    """
    backbone.to(device)
    if isinstance(data, FolderImages):
        batches = (view.finish(crops) for crops in data.center_crops(view, device=device))
    else:
        batches = (view(images.to(device)) for images in data.images.split(batch_size))
    return represent(backbone, batches, device, precision)
