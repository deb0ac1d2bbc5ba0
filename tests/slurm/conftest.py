"""One real Slurm for all tests here, and what they have seen of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, missing

from imsvd_core.results import provenance, read_result, write_result


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What tests observe: the "setting", a row for each of the "faults", times of the "start_up",
    ... --record says where it is kept; what this session did not look at stays there as it was."""
    seen: dict[str, Any] = {"setting": {}, "faults": [], "start_up": {}}
    start = time.monotonic()
    yield seen
    path: Path | None = request.config.getoption("--record")
    if path and any(seen.values()):
        before = read_result(path)["figures"] if path.exists() else {}
        kept = before | {name: value for name, value in seen.items() if value}
        rows = {row["fault"]: row for row in [*before.get("faults", []), *seen["faults"]]}
        kept["faults"] = list(rows.values())
        setting = kept.get("setting", {})
        origin = provenance(
            config=setting,
            seed=0,
            device="cpu",
            dataset=setting.get("dataset", "none"),
            seconds=time.monotonic() - start,
            world_size=setting.get("ranks", 1),
            command=f"python -m pytest -m slurm tests/slurm --record {path.name}",
        )
        write_result(path, "launch-faults", kept, origin, overwrite=True)
