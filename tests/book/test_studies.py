"""The scripts whose results the book stores."""

import importlib.util
from pathlib import Path

from imsvd_core.results import read_result

STUDIES = Path(__file__).parents[2] / "book" / "studies"


def test_the_grid_of_units_runs_every_setting_once(tmp_path, monkeypatch):
    monkeypatch.setenv("IMSVD_SCALE", "smoke")
    monkeypatch.setenv("IMSVD_DATASET", "attributes")
    spec = importlib.util.spec_from_file_location("units", STUDIES / "units.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    monkeypatch.setattr(study, "BATCH_SIZES", (64,))
    monkeypatch.setattr(study, "UNITS", (4, 8))
    monkeypatch.setattr(study, "SEEDS", (0,))
    study.main(tmp_path)
    first = read_result(tmp_path / "result.json")["figures"]
    assert [run["units"] for run in first["runs"]] == [4, 8]
    assert len({run["knn_20"] for run in first["runs"]} | {run["mean_top"] for run in first["runs"]}) > 2
    monkeypatch.setattr(study.Pretraining, "__iter__", lambda self: 1 / 0)  # nothing is trained again
    study.main(tmp_path)
    assert read_result(tmp_path / "result.json")["figures"] == first
