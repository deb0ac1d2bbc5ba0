"""One image file as pixels, or an error that names it."""

import io
import math
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

JPEG_START = b"\xff\xd8"


def decode(file: Path | str) -> Tensor:
    """One image file as uint8 RGB (3, H, W); the pixels are Pillow's.

    Gray, CMYK and palette become RGB, transparency is dropped, the camera's orientation is left
    alone. Raises ValueError, naming the file, if it is broken or not of 8 bits.
    """
    try:
        content = Path(file).read_bytes()
        with open_image(io.BytesIO(content)) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"mode {picture.mode}: more than 8 bits a channel")
            # torchvision reads JPEGs faster, and broken PNGs crash the process in its version 0.29.
            # Where it fails, Pillow reads more, or says what is wrong.
            if content.startswith(JPEG_START):
                with suppress(RuntimeError):
                    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                    return decode_jpeg(data, mode=ImageReadMode.RGB)
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        raise ValueError(
            f"{file} cannot be read as an 8-bit image ({type(error).__name__}): replace or "
            "remove it, or pass --on-corrupt skip (in Python on_corrupt='skip')"
        ) from error


def open_image(content: BinaryIO) -> Image.Image:
    """A JPEG or PNG of which only the header is read.

    Raises ValueError if the header claims more pixels than Pillow thinks sane: a corrupt one could
    otherwise make us allocate gigabytes.
    """
    picture = Image.open(content, formats=("JPEG", "PNG"))
    if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"it claims {picture.width} x {picture.height} pixels")
    return picture
