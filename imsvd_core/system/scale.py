"""The scales of all recipes."""

import os
from typing import Literal, cast, get_args

Scale = Literal["smoke", "laptop", "full"]


def current_scale(scale: str | None = None) -> Scale:
    """`scale`, by default IMSVD_SCALE's, or `laptop`. Raises ValueError for a word that is none."""
    setting = "scale" if scale else "IMSVD_SCALE"
    scale = scale or os.environ.get("IMSVD_SCALE", "laptop")
    if scale not in get_args(Scale):
        raise ValueError(f"{setting}={scale!r} must be one of {', '.join(get_args(Scale))}")
    return cast(Scale, scale)
