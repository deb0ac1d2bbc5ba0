"""IMSVD: self-supervised learning by information-maximized soft variable discretization.

Source: Niu, Xia, Shan and Wang, 2025 (arXiv 2501.03469).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imsvd_core.loss import CrossJointEntropyLoss
    from imsvd_core.recipes import recipe
    from imsvd_core.runs.pretrain import pretrain

__version__ = "0.1.0"
__all__ = ["CrossJointEntropyLoss", "pretrain", "recipe"]

_HOMES = {"CrossJointEntropyLoss": "loss", "pretrain": "runs.pretrain", "recipe": "recipes"}


def __getattr__(name: str) -> Any:
    """Import what the package offers when it is first used: torch takes seconds."""
    if name in _HOMES:
        return getattr(import_module(f"imsvd_core.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'imsvd_core' has no attribute {name!r}")
