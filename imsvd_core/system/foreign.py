"""What a command is told about somebody's file of weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ForeignConfig:
    """How a file of weights is read, where it does not say."""

    weights_key: str | None = None
    """Which network of the file, where it holds several: its name there, or a part of it, such as
    teacher."""
    stem_padding: int | None = None
    """Padding of the first convolution; by default 1 if that is 3×3, else 3. solo-learn's 3×3 has
    2."""
    max_pool: bool | None = None
    """Whether the first convolution is followed by max-pooling; by default unless it is 3×3."""
