"""Looks at a machine and its cluster: what there is, and what to do about it if it is a fault."""

import os
import re
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SHM = Path("/dev/shm")
SHM_REMEDY = "give the container more (docker run --shm-size 8g, or --ipc host), or fewer cores"


@dataclass(frozen=True)
class Look:
    """What somebody saw of something."""

    at: str
    seen: str
    #: "" if all is well.
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.at}: {self.seen}" + (f" → {self.remedy}" if self.remedy else "")


def looks(run_dir: Path, data: Path, disk_gb: float = 0, jobs: int = 1) -> list[Look]:
    """At all that a run in `run_dir` needs: room for `disk_gb`, and in the queue for `jobs`."""
    places = [folder_look(run_dir), disk_look(run_dir, disk_gb), root_look(data)]
    cluster = [inherited_look(), submission_look(jobs)]
    return [shared_memory_look(), *places, *cluster, cuda_look(), nccl_look()]


def shared_memory_look(needed: int = 0) -> Look:
    """At the room in /dev/shm, through which workers hand over images."""
    if not SHM.is_dir():
        return Look("/dev/shm", "not here")
    usage = shutil.disk_usage(SHM)
    seen = f"{_size(usage.free)} free of {_size(usage.total)}"
    if usage.free < needed:
        return Look("/dev/shm", f"{seen}, and {_size(needed)} are needed", SHM_REMEDY)
    docker_s_default = usage.total <= 64 * 2**20 and not needed
    return Look("/dev/shm", seen, SHM_REMEDY if docker_s_default else "")


def folder_look(run_dir: Path) -> Look:
    """At whether a run's folder can be made and written."""
    folder = existing(run_dir)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"imsvd")
    except OSError as error:
        return Look("run folder", f"{folder}: {error.strerror}", "give another (--run-dir, --out)")
    return Look("run folder", f"{folder} can be written")


def disk_look(run_dir: Path, needed_gb: float = 0) -> Look:
    """At the room for a run."""
    free = shutil.disk_usage(existing(run_dir)).free / 1e9
    seen = f"{free:,.1f} GB free" + (f", {needed_gb:,.1f} GB needed" if needed_gb else "")
    short = free <= max(needed_gb, 0.1)
    return Look("disk", seen, "make room, or keep fewer checkpoints (--loop.keep)" if short else "")


def root_look(data: Path) -> Look:
    """At the folder of all data sets."""
    if not data.is_dir():
        return Look("data root", f"{data} is not here", "set IMSVD_DATA, or imsvd data get cifar10")
    written = os.access(data, os.W_OK)
    how = "" if written else ", read-only (checks leave their stamp in the user's cache)"
    return Look("data root", f"{data}{how}")


def inherited_look() -> Look:
    """At variables that another job, or a profile, has left in the environment."""
    names = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]
    names = sorted({*names} - {"SLURM_CONF"})  # which says where Slurm is
    named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    ranks = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    sbatch = [name for name in names if name.startswith("SBATCH_")]
    remedy = ""
    if ranks != "1":
        remedy = f"a run here waits for {ranks} ranks: unset WORLD_SIZE and SLURM_STEP_NUM_TASKS"
    elif sbatch:
        remedy = f"unset {', '.join(sbatch)}, if jobs are to have their script's settings alone"
    return Look("inherited", named or "nothing of Slurm", remedy)


def submission_look(jobs: int = 1) -> Look:
    """At how many jobs may be queued."""
    if not shutil.which("sbatch"):
        return Look("submission", "no sbatch here; --executor local needs none")
    user = _said("id", "-un").strip()
    limits = _said(
        "sacctmgr",
        "-nP",
        "show",
        "assoc",
        "where",
        f"user={user}",
        "format=MaxSubmitJobs,GrpSubmitJobs",
    )
    limits += _said("sacctmgr", "-nP", "show", "qos", "normal", "format=MaxSubmitJobsPerUser")
    queued = len(_said("squeue", "-h", "-r", "-u", user).splitlines())
    if not (numbers := re.findall(r"\d+", limits)):
        return Look("submission", f"{queued} jobs are queued, no limit is known")
    limit = min(map(int, numbers))
    remedy = "imsvd reproduce --wait sends more whenever there is room"
    seen = f"{queued} jobs are queued, of at most {limit}; {jobs} to be sent"
    return Look("submission", seen, remedy if queued + jobs > limit else "")


def cuda_look() -> Look:
    """At the GPUs that torch can use."""
    import torch

    built = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        names = ", ".join(
            torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
        )
        return Look("CUDA", f"{names} ({built}, CUDA {torch.version.cuda})")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not Path("/dev/nvidia0").exists() or hidden:
        return Look("CUDA", f"no GPU here{' (CUDA_VISIBLE_DEVICES hides all)' * hidden} ({built})")
    why = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
    remedy = "install the torch of pytorch.org that fits the driver, which nvidia-smi names"
    return Look("CUDA", f"a GPU is here, and {built} {why} and cannot use it", remedy)


def nccl_look() -> Look:
    """At what several GPUs speak through."""
    import torch

    if not torch.cuda.is_available():
        return Look("NCCL", "not needed without GPUs")
    if not torch.distributed.is_nccl_available():
        return Look("NCCL", "not in this torch", "install the torch of pytorch.org for CUDA")
    interfaces = {name for _, name in socket.if_nameindex()}
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "").lstrip("^=").split(",")
    if lost := [name for name in wanted if not any(each.startswith(name) for each in interfaces)]:
        remedy = f"NCCL_SOCKET_IFNAME may name {', '.join(sorted(interfaces))}"
        return Look("NCCL", f"no interface {', '.join(lost)} is here", remedy)
    return Look("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _said(*command: str) -> str:
    """What a program says; "" where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
