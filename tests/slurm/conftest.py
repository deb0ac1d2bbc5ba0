"""One real Slurm for all tests here."""

from collections.abc import Iterator

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="session")
def observed(request: pytest.FixtureRequest) -> Iterator[list[dict]]:
    """What tests have seen, to be written where --record says."""
    rows: list[dict] = []
    yield rows
    print(rows)
