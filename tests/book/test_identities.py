"""Every stored result says which settings gave it, whatever settings came later."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from imsvd_core.recipes import RECIPES, Recipe
from imsvd_core.results import STORE, read_result
from imsvd_core.system.config import config_hash, from_plain, full_hash

RESULTS = sorted(STORE.glob("*.json"))
SPEC = importlib.util.spec_from_file_location("migrate", STORE.parent / "studies" / "migrate.py")
migrate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(migrate)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_hash_of_a_stored_result_follows_from_its_settings(path):
    result = read_result(path)
    origin = result["provenance"]
    assert full_hash(origin["settings"]) == origin["config_hash"]
    assert config_hash(migrate.configuration(result)) == origin["config_hash"]
    assert migrate.migrate(result) == result


@pytest.mark.parametrize("before", migrate.BEFORE)
def test_a_result_of_before_the_schemas_keeps_its_meaning(before):
    assert full_hash(migrate.BEFORE[before]) == before
    assert [path for path in RESULTS if f'"config_hash_before": "{before}"' in path.read_text()]


def runs():
    """The stored results of `imsvd pretrain`, with the words of their commands."""
    for path in RESULTS:
        origin = read_result(path)["provenance"]
        if words := re.match(r"imsvd pretrain (\S+) (.*)", origin["command"]):
            yield pytest.param(words[1], words[2], origin, id=path.stem)


@pytest.mark.parametrize(("name", "options", "origin"), list(runs()))
def test_a_stored_run_is_the_recipe_that_its_command_names(name, options, origin):
    words = re.sub(r"--no-progress|--run-dir \S+", "", options).split()
    named = tyro.cli(
        tyro.conf.AvoidSubcommands[Recipe], default=RECIPES[name]("laptop"), args=words
    )
    assert config_hash(named) == origin["config_hash"]
    assert from_plain(Recipe, origin["settings"]) == named


def test_the_studies_of_units_and_cheaper_losses_start_from_the_recipe_that_they_name():
    for name in ("cifar10-laptop-units-grid", "cifar10-laptop-cheaper"):
        origin = read_result(STORE / f"{name}.json")["provenance"]
        assert config_hash(RECIPES["cifar10-units"]("laptop")) == origin["config_hash"]


def test_a_result_whose_settings_are_not_its_own_is_not_migrated():
    result = read_result(RESULTS[0])
    result["provenance"]["config_hash"] = "0" * 12
    with pytest.raises(ValueError, match="its settings do not give its hash"):
        migrate.migrate(result)


def test_migration_changes_nothing_but_the_identity(tmp_path: Path):
    path = STORE / "cifar10-laptop-imsvd-seed0.json"
    result = json.loads(path.read_text())
    origin = dict(result["provenance"])
    origin["config_hash"] = origin.pop("config_hash_before")
    origin.pop("settings")
    old = {**result, "provenance": origin}
    assert migrate.migrate(old) == result
    assert migrate.migrate(old)["figures"] == old["figures"]
    (tmp_path / path.name).write_text(json.dumps(old))
    migrate.main(tmp_path)
    assert read_result(tmp_path / path.name) == result
    other = replace(RECIPES["cifar10"]("laptop"), samples=100)
    assert config_hash(other) != result["provenance"]["config_hash"]
