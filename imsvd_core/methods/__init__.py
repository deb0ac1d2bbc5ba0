"""IMSVD and what it is compared with, one file each: a small frozen configuration, and the module
that it builds.

One method more is one file more, its name below, and a recipe. `methods.base` has the contract.
"""

from imsvd_core.methods.barlow_twins import BarlowTwins
from imsvd_core.methods.base import Method
from imsvd_core.methods.byol import BYOL
from imsvd_core.methods.corinfomax import CorInfoMax
from imsvd_core.methods.dissl import DISSL
from imsvd_core.methods.frossl import FroSSL
from imsvd_core.methods.iic import IIC
from imsvd_core.methods.imsvd import IMSVD
from imsvd_core.methods.lejepa import LeJEPA
from imsvd_core.methods.mmcr import MMCR
from imsvd_core.methods.moco import MoCo
from imsvd_core.methods.npid import NPID
from imsvd_core.methods.sem import SEM
from imsvd_core.methods.simclr import SimCLR
from imsvd_core.methods.simsiam import SimSiam
from imsvd_core.methods.supervised import Supervised
from imsvd_core.methods.swav import SwAV
from imsvd_core.methods.twist import TWIST
from imsvd_core.methods.vicreg import VICReg
from imsvd_core.methods.wmse import WMSE

MethodConfig = (
    IMSVD
    | VICReg
    | BarlowTwins
    | BYOL
    | SwAV
    | SimCLR
    | MoCo
    | SimSiam
    | IIC
    | SEM
    | FroSSL
    | MMCR
    | LeJEPA
    | TWIST
    | CorInfoMax
    | WMSE
    | Supervised
    | NPID
    | DISSL
)

__all__ = [
    "BYOL",
    "DISSL",
    "IIC",
    "IMSVD",
    "MMCR",
    "NPID",
    "SEM",
    "TWIST",
    "WMSE",
    "BarlowTwins",
    "CorInfoMax",
    "FroSSL",
    "LeJEPA",
    "Method",
    "MethodConfig",
    "MoCo",
    "SimCLR",
    "SimSiam",
    "Supervised",
    "SwAV",
    "VICReg",
]
