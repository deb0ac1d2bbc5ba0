"""One image file as pixels, or an error that names it."""

import io
import math
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

JPEG_START = b"\xff\xd8"
FORMATS = "JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF"


def decode(file: Path | str) -> Tensor:
    """One image file as uint8 RGB (3, H, W); the pixels are Pillow's.

    Gray, CMYK and palette become RGB, transparency is dropped, the camera's orientation is left
    alone. Raises ValueError, naming the file, if it is broken or not of 8 bits.
    """
    try:
        content = Path(file).read_bytes()
        with open_image(io.BytesIO(content)) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"mode {picture.mode}, of more than 8 bits a channel")
            # torchvision reads JPEGs faster, and broken PNGs crash the process in its version 0.29.
            # Where it fails, Pillow reads more, or says what is wrong.
            if content.startswith(JPEG_START):
                with suppress(RuntimeError):
                    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                    return decode_jpeg(data, mode=ImageReadMode.RGB)
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        raise ValueError(
            f"{file} cannot be read as an 8-bit image ({type(error).__name__}: {error}): replace "
            "or remove it, or pass --on-corrupt skip (in Python on_corrupt='skip')"
        ) from error


def open_image(content: BinaryIO | Path) -> Image.Image:
    """An image of which only the header is read.

    Raises ValueError if it is none, or if the header claims more pixels than `IMSVD_MAX_PIXELS`, by
    default what Pillow thinks sane: a corrupt one could otherwise make us allocate gigabytes.
    """
    if limit := os.environ.get("IMSVD_MAX_PIXELS"):
        if not limit.isdecimal():
            raise ValueError(f"IMSVD_MAX_PIXELS={limit!r} must be a number of pixels, 0 for any")
        Image.MAX_IMAGE_PIXELS = int(limit) or None
    remedy = "if they are right, set IMSVD_MAX_PIXELS to more (0: no limit)"
    try:
        picture = Image.open(content, formats=formats())
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(formats())}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(
            f"it claims {picture.width} x {picture.height} pixels, more than "
            f"{Image.MAX_IMAGE_PIXELS:,}; {remedy}"
        )
    return picture


@cache
def formats() -> tuple[str, ...]:
    """The formats of images that are read: those of photographs and drawings that Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def suffixes() -> tuple[str, ...]:
    """How the names of image files end."""
    known = Image.registered_extensions().items()
    return tuple(sorted(suffix for suffix, name in known if name in {*formats(), "MPO"}))
