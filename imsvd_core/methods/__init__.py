"""IMSVD and what it is compared with, one file each: a small frozen configuration, and the module
that it builds.

One method more is one file more, its name below, and a recipe. `methods.base` has the contract.
"""

from imsvd_core.methods.barlow_twins import BarlowTwins
from imsvd_core.methods.base import Method
from imsvd_core.methods.byol import BYOL
from imsvd_core.methods.imsvd import IMSVD
from imsvd_core.methods.moco import MoCo
from imsvd_core.methods.simclr import SimCLR
from imsvd_core.methods.simsiam import SimSiam
from imsvd_core.methods.swav import SwAV
from imsvd_core.methods.vicreg import VICReg

MethodConfig = IMSVD | VICReg | BarlowTwins | BYOL | SwAV | SimCLR | MoCo | SimSiam

__all__ = [
    "BYOL",
    "IMSVD",
    "BarlowTwins",
    "Method",
    "MethodConfig",
    "MoCo",
    "SimCLR",
    "SimSiam",
    "SwAV",
    "VICReg",
]
