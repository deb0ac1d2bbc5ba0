"""Give the stored results of before schema 1 their identity under it, and all their settings.

    python book/studies/migrate.py [STORE]

Their `config_hash` was that of all settings that there were then. before-schema-1.json keeps those,
by that hash, as the commits of the results wrote them. A result whose old hash does not follow from
them is refused; else it receives what differs from the defaults of schema 1 (`settings`), the hash
of that, and its old hash as `config_hash_before`.
"""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from imsvd_core.evaluation.detection.protocol import DetectionConfig
from imsvd_core.recipes import EvalViewConfig, Recipe, evaluation
from imsvd_core.results import STORE, read_result, write_json
from imsvd_core.system.config import from_plain, full_hash, settings

BEFORE: dict[str, Any] = json.loads((Path(__file__).parent / "before-schema-1.json").read_text())
# What `launch.py` was called with; the other results that hold no recipe keep theirs as "setting".
LAUNCHED = {
    "settings": shlex.split(
        "--scale smoke --samples 2560 --loop.epochs 4 --loop.save-minutes 0.05 --loop.keep 1000"
    ),
    "launch": shlex.split("--nodes 2 --tasks-per-node 1 --time 10 --grace-seconds 60"),
}


def configuration(result: dict[str, Any]) -> Any:
    """The configuration of a stored result, as today's classes hold it."""
    before = BEFORE.get(result["provenance"].get("config_hash_before"))
    if before is None:
        return result["figures"].get("setting", LAUNCHED)
    if "method" in before:
        return from_plain(Recipe, before)
    if "detector" in before:
        return from_plain(DetectionConfig, before)
    return {name: _evaluation(name, stored) for name, stored in before.items()}


def _evaluation(name: str, stored: dict[str, Any]) -> Any:
    today = evaluation(name, "laptop")
    config = from_plain(type(today.config), stored["config"])
    view = from_plain(EvalViewConfig, stored["eval_view"])
    return replace(today, config=config, data=stored["data"], eval_view=view)


def migrate(result: dict[str, Any]) -> dict[str, Any]:
    """The result with its identity under schema 1. Raises ValueError for a hash that is not its."""
    origin = result["provenance"]
    before = origin.get("config_hash_before", origin["config_hash"])
    origin = {**origin, "config_hash_before": before} if before in BEFORE else dict(origin)
    identity = settings(configuration({**result, "provenance": origin}))
    if full_hash(BEFORE.get(before, identity)) != before:
        raise ValueError(f"{result['name']}: its settings do not give its hash, {before}")
    origin |= {"config_hash": full_hash(identity), "settings": identity}
    return {**result, "provenance": origin}


def main(store: Path = STORE) -> None:
    for path in sorted(store.glob("*.json")):
        write_json(path, migrate(read_result(path)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
