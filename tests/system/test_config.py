"""Settings survive JSON, and their identity survives settings that are added later.

`python tests/system/test_config.py` adds new settings to the table of the schema's defaults.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import pytest

from imsvd_core.evaluation.detection.protocol import DetectionConfig
from imsvd_core.evaluation.svm import SVMConfig
from imsvd_core.methods import IMSVD, VICReg
from imsvd_core.recipes import RECIPES, EvaluationRecipe, Recipe
from imsvd_core.system.config import (
    SCHEMA,
    complete,
    config_hash,
    default_values,
    differences,
    from_plain,
    full_hash,
    plain,
    settings,
)

TABLE = Path(__file__).parent / f"schema-{SCHEMA}.json"
CIFAR10 = RECIPES["cifar10"]("laptop")


def classes(hint: Any) -> dict[str, type]:
    """The classes of settings inside an annotation, by their names."""
    inside: dict[str, type] = {}
    if isinstance(hint, type) and is_dataclass(hint):
        inside[hint.__name__] = hint
        for inner in get_type_hints(hint).values():
            inside |= classes(inner)
    for part in get_args(hint):
        inside |= classes(part)
    return inside


def table() -> dict[str, dict[str, Any]]:
    """The defaults of every class of settings that a result may hold."""
    kinds = classes(Recipe) | classes(EvaluationRecipe)
    kinds |= classes(SVMConfig) | classes(DetectionConfig)
    return {name: plain(default_values(kind)) for name, kind in sorted(kinds.items())}


def test_no_default_of_the_schema_has_changed():
    stored, now = json.loads(TABLE.read_text()), table()
    for name, defaults in stored.items():
        kept = {key: value for key, value in now.get(name, {}).items() if key in defaults}
        changes = differences(_common(defaults, kept), kept, name)
        assert not changes, (
            f"{changes}. Stored results name only what differs from the defaults of schema "
            f"{SCHEMA}: "
            "keep the default and let recipes set the new value, or raise SCHEMA and migrate them"
        )
        assert not set(defaults) - set(kept), f"{name} has lost {set(defaults) - set(kept)}"


def _common(stored: Any, now: Any) -> Any:
    """What is stored, and in its parts what has been added to them since."""
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        return {**now, **{key: _common(value, now.get(key)) for key, value in stored.items()}}
    return stored


def test_the_table_of_the_schema_holds_every_setting():
    stored = json.loads(TABLE.read_text())
    missing = [
        f"{name}.{key}"
        for name, defaults in table().items()
        for key in defaults
        if key not in stored.get(name, {})
    ]
    assert not missing, (
        f"{missing} are new: run `python {Path(__file__).name}` to keep their defaults"
    )


def test_settings_name_only_what_differs_and_come_back():
    assert settings(Recipe()) == {"schema": SCHEMA}
    assert settings(CIFAR10)["method"] == {"temperature": 0.25}
    assert from_plain(Recipe, settings(CIFAR10)) == CIFAR10
    assert config_hash(from_plain(Recipe, plain(CIFAR10))) == config_hash(CIFAR10)
    other = replace(CIFAR10, method=VICReg(), watch=replace(CIFAR10.watch, gallery=500))
    assert settings(other)["method"] == {"name": "vicreg"}
    assert settings(other)["watch"] == {"gallery": 500}
    assert from_plain(Recipe, settings(other)) == other


@dataclass(frozen=True)
class Part:
    width: int = 3


@dataclass(frozen=True)
class Before:
    name: ClassVar[str] = "probe"
    size: int
    part: Part = field(default_factory=lambda: Part(width=5))


@dataclass(frozen=True)
class WiderPart(Part):
    added: tuple[float, ...] = (0.5,)


@dataclass(frozen=True)
class After(Before):
    part: WiderPart = field(default_factory=lambda: WiderPart(width=5))  # type: ignore[assignment]
    later: Literal["no", "yes"] = "no"
    more: WiderPart | None = None


def test_a_later_setting_with_the_old_behaviour_as_default_changes_no_hash():
    assert config_hash(After(size=2)) == config_hash(Before(size=2))
    wider = After(size=2, part=WiderPart(width=4))
    assert config_hash(wider) == config_hash(Before(size=2, part=Part(width=4)))
    assert config_hash(After(size=2, later="yes")) != config_hash(After(size=2))
    assert config_hash(After(size=2, part=WiderPart(5, (1.0,)))) != config_hash(After(size=2))


def test_absent_means_default_and_that_is_the_containing_classs():
    assert from_plain(After, {"size": 2, "part": {}}) == After(2)
    assert from_plain(After, settings(After(2, WiderPart(3)))) == After(2, WiderPart(3))
    assert complete(After, {**plain(Before(2)), "world_size": 1}) == {
        **plain(After(2)),
        "world_size": 1,
    }
    assert complete(After, plain(Before(2))) != complete(After, plain(After(2, later="yes")))


def test_parts_that_share_a_default_do_not_share_what_is_read():
    law = from_plain(Recipe, {"views": {"first": {"flip": 0.1}}}).views
    assert (law.first.flip, law.second.flip) == (0.1, 0.5)


def test_every_value_counts_and_classes_are_told_apart():
    two = make_dataclass("Two", [("name", str, "two")], frozen=True)
    three = make_dataclass("Three", [("name", str, "three")], frozen=True)
    assert config_hash(two()) != config_hash(three())
    changed = [
        replace(CIFAR10, **{name: replace(getattr(CIFAR10, name), **inner)})
        for name, inner in {
            "loop": {"seed": 1},
            "optim": {"lr": 0.1},
            "method": {"units": 16},
            "watch": {"queries": 7},
            "eval_view": {"size": 31},
        }.items()
    ]
    assert len({config_hash(one) for one in [CIFAR10, *changed]}) == 1 + len(changed)
    assert settings({"a": (1, CIFAR10.knn)}) == {"a": [1, settings(CIFAR10.knn)]}
    wholes = [replace(CIFAR10.optim, warmup_epochs=number) for number in (3, 3.0)]
    assert config_hash(wholes[0]) == config_hash(wholes[1])
    assert config_hash({"rounds": 3}) == full_hash({"rounds": 3})


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Part, {"width": 1.5}, "width=1.5 must be a whole number"),
        (Part, {"width": True}, "width=True must be a whole number"),
        (WiderPart, {"added": 1.0}, "added=1.0 must be a list"),
        (WiderPart, {"added": ["x"]}, "added='x' must be a number"),
        (After, {"size": 1, "later": "soon"}, "later='soon' must be one of no, yes"),
        (After, {"size": 1, "later": 3}, "later=3 must be one of no, yes"),
        (After, {"size": 1, "more": 3}, "more=3 must be a table of settings"),
        (After, {}, "After needs size"),
        (After, {"size": 1, "sise": 2}, "After has no field sise; it has: size, part"),
        (After, {"schema": 9, "size": 1}, "schema=9 is not known here"),
        (dict[str, str], [], "must be a table"),
        (IMSVD | VICReg, {"name": "simclr"}, "name='simclr' is none of"),
    ],
)
def test_what_cannot_be_read_is_named(kind, value, message):
    with pytest.raises(ValueError, match=message):
        from_plain(kind, value)


def test_values_come_back_in_their_types():
    assert from_plain(After, {"size": 1, "more": {"added": [1, 2]}}).more == WiderPart(
        3, (1.0, 2.0)
    )
    assert from_plain(Path, "a/b") == Path("a/b")
    assert from_plain(tuple[str, ...], ["a"]) == ("a",)
    assert from_plain(int | tuple[int, ...], [1, 2]) == (1, 2)
    assert from_plain(dict[str, str], {"a": "b"}) == {"a": "b"}
    assert from_plain(int | None, None) is None


if __name__ == "__main__":
    kept = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    rows = {name: {**defaults, **kept.get(name, {})} for name, defaults in (kept | table()).items()}
    TABLE.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
