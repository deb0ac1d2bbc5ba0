"""One real Slurm for all tests here, and what they have seen of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, missing

from imsvd_core.results import provenance, write_result


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What tests observe: "setting", "faults", a row each, and "start_up". --record says where it is kept."""
    seen: dict[str, Any] = {"setting": {}, "faults": [], "start_up": {}}
    start = time.monotonic()
    yield seen
    path: Path | None = request.config.getoption("--record")
    if path and seen["faults"]:
        setting = seen["setting"]
        origin = provenance(config=setting, seed=0, device="cpu", dataset=setting["dataset"], seconds=time.monotonic() - start,
                            command=f"python -m pytest -m slurm tests/slurm --record {path.name}", world_size=setting["ranks"])
        write_result(path, "launch-faults", seen, origin, overwrite=True)
