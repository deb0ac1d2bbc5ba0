"""Results carry their origin, are whole, and are not overwritten silently."""

import json
from dataclasses import replace

import pytest

from imsvd_core.engine.config import LoopConfig
from imsvd_core.results import provenance, read_result, stored, stored_path, write_result
from imsvd_core.system.config import config_hash


@pytest.fixture
def origin():
    return provenance(config=LoopConfig(), seed=3, device="cpu", dataset="CIFAR-10", seconds=1.24)


def test_a_result_says_where_it_comes_from(tmp_path, origin):
    result = read_result(write_result(tmp_path / "r.json", "knn", {"knn_20": 51.0}, origin))
    assert set(result["provenance"]) == {
        "command",
        "commit",
        "config_hash",
        "seed",
        "device",
        "dataset",
        "seconds",
        "date",
        "versions",
        "world_size",
        "settings",
    }
    assert all(result["provenance"][key] not in ("", None) for key in result["provenance"])
    assert result["figures"] == {"knn_20": 51.0}


def test_the_hash_changes_with_any_setting():
    assert (
        config_hash(LoopConfig())
        == config_hash(LoopConfig())
        != config_hash(replace(LoopConfig(), seed=1))
    )


def test_other_figures_are_not_overwritten_silently(tmp_path, origin):
    path = write_result(tmp_path / "r.json", "knn", {"knn_20": 51.0}, origin)
    write_result(path, "knn", {"knn_20": 51.0}, origin)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_result(path, "knn", {"knn_20": 52.0}, origin)
    assert read_result(path)["figures"]["knn_20"] == 51.0
    write_result(path, "knn", {"knn_20": 52.0}, origin, overwrite=True)


def test_what_is_no_number_is_no_figure(tmp_path, origin):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result(tmp_path / "r.json", "knn", {"knn_20": float("nan")}, origin)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"figures": {}}))
    with pytest.raises(ValueError, match=r"r\.json is not a stored result"):
        read_result(tmp_path / "r.json")


def test_a_stored_result_that_is_not_there_is_named_with_those_that_are():
    assert stored("cifar10-laptop-imsvd-seed0")["name"] == "cifar10-laptop-imsvd-seed0"
    with pytest.raises(
        FileNotFoundError, match=r"'nothing\.json'.*cifar10-laptop-imsvd-seed0\.json"
    ):
        stored("nothing")
    with pytest.raises(FileNotFoundError, match=r"'nothing\.safetensors'"):
        stored_path("nothing.safetensors")
