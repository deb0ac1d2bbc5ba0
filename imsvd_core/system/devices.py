"""The device at hand, what it is called, and what it computes fast."""

import logging
import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from imsvd_core.distributed import world

Precision = Literal["fp32", "bf16", "fp16"]

log = logging.getLogger(__name__)
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """CUDA, else MPS, else the CPU; or the device `name`. Among ranks, CUDA is the rank's own GPU.

    Raises ValueError for a device that is not there, and for one GPU that all ranks would share.
    """
    if name.startswith("cuda:") and world()[1] > 1:
        raise ValueError(
            f"device={name!r} would put {world()[1]} ranks on one GPU: "
            "use 'cuda', which gives each its own"
        )
    available = ["cuda"] if torch.cuda.is_available() else []
    available += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    name = available[0] if name == "auto" else name
    if name.split(":")[0] not in available:
        raise ValueError(f"device={name!r} is not here; there is: {', '.join(available)}")
    if name == "cuda" and world()[1] > 1:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


@lru_cache(maxsize=1)
def fast_precision() -> Precision:
    """bf16 where the device that training picks has units for it, else fp32."""
    return "bf16" if bf16_is_fast(pick_device()) else "fp32"


def bf16_is_fast(device: torch.device) -> bool:
    """Whether a device has units for bf16; a processor without them takes twelve times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of torch do not tell: they are taken to have none.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type != "cpu" or any(
        "bf16" in name and present for name, present in capabilities.items()
    )


def warn_of_emulation(precision: Precision, device: torch.device) -> None:
    """Say that a precision will be slow here, and which one will not."""
    fast = {"bf16": bf16_is_fast(device), "fp16": device.type != "cpu", "fp32": True}
    if not fast[precision]:
        log.warning(
            "precision=%r has no units of its own on this %s and takes many times as long: use "
            "precision=%r",
            precision,
            device.type,
            next(name for name, units in fast.items() if units),
        )


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    return f"{_processor()}, {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpus.read_text() if cpus.exists() else "")
    return model[1] if model else platform.processor() or platform.machine()
