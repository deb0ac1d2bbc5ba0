"""Settings as JSON and back, their identity, and how two differ.

Settings are identified by what differs from the defaults of a numbered schema: a setting that is
added later, with the old behaviour as its default, changes no identity. A default therefore never
changes without a new number.
"""

import hashlib
import json
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

#: Number of the defaults that identities refer to; tests/system/schema-1.json lists them.
SCHEMA = 1
#: Settings of a loop that touch the record and not the training: a run may be resumed under others.
OPERATIONAL = (
    "save_every",
    "save_minutes",
    "keep",
    "log_every",
    "tensorboard",
    "patience_minutes",
)
#: What a value of a type is called in an error message.
WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text, in quotes",
    bool: "true or false",
    Path: "a path, in quotes",
    types.NoneType: "null",
}


def settings(config: Any) -> Any:
    """What identifies a configuration: the schema's number, and what is not its default.

    Goes through mappings and sequences of configurations; anything else stays as JSON holds it.
    """
    if is_dataclass(config):
        return {"schema": SCHEMA, **_changed(config, None)}
    if isinstance(config, Mapping):
        return {str(key): settings(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [settings(value) for value in config]
    return plain(config)


def config_hash(config: Any) -> str:
    """Twelve hex digits of `settings(config)`: another value changes them, a later setting not."""
    return full_hash(settings(config))


def full_hash(config: Any) -> str:
    """Twelve hex digits of all values; the `config_hash` of results from before the schemas."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:12]


def default_values(kind: type, default: Any = None) -> dict[str, Any]:
    """Defaults of the fields that have one; every field of `default`, if that is a `kind`."""
    if type(default) is kind:
        return dict(vars(default))
    values = {}
    for field in fields(kind):
        if field.default_factory is not MISSING:
            values[field.name] = field.default_factory()
        elif field.default is not MISSING:
            values[field.name] = field.default
    return values


def _changed(config: Any, default: Any) -> dict[str, Any]:
    """The fields that differ from those of `default`, or from those of the class where `default` is
    of another: then with the name."""
    kind = type(config)
    changed: dict[str, Any] = {} if type(default) is kind else _name(config)
    defaults = default_values(kind, default)
    for field in fields(config):
        value, standard = getattr(config, field.name), defaults.get(field.name, MISSING)
        if value != standard:
            part = is_dataclass(value)
            changed[field.name] = _changed(value, standard) if part else _whole(plain(value))
    return changed


def _whole(value: Any) -> Any:
    """The value with 1 for 1.0: they are equal; code gives the one, a command line the other."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _name(config: Any) -> dict[str, str]:
    return {"name": config.name} if hasattr(config, "name") else {}


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as what JSON can hold; raises TypeError for anything else."""
    return json.loads(json.dumps(value, default=_for_json))


def _for_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(
        f"{value!r} ({type(value).__name__}) has no place in a result: "
        "give numbers, strings, lists, dicts"
    )


def from_plain(kind: Any, value: Any, default: Any = MISSING, path: str = "") -> Any:
    """What `plain` or `settings` wrote, as `kind` again; a setting that is absent has its default.

    Args:
        kind: a dataclass, or the annotation of a field.
        value: what JSON or TOML gave.
        default: what the containing class has by default; its fields stand for absent ones.
        path: name of the setting, for messages.

    Raises ValueError for a value of another type, an unknown field, and a missing one.
    """
    origin, parts = get_origin(kind), get_args(kind)

    def require(fits: bool, words: str) -> None:
        if not fits:
            raise ValueError(f"{path}={value!r} must be {words}")

    if is_dataclass(kind) and isinstance(kind, type):
        if value is None and default is not MISSING:
            # The probe's view in the oldest runs, where it was not used.
            return default
        require(isinstance(value, Mapping), "a table of settings")
        return _read_config(kind, value, default)
    if origin in (Union, types.UnionType):
        return _read_option(parts, value, default, path)
    if origin is Literal:
        require(value in parts, f"one of {', '.join(map(str, parts))}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), "a list")
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        require(len(kinds) == len(value), f"a list of {len(kinds)}")
        return tuple(from_plain(*pair, path=path) for pair in zip(kinds, value, strict=True))
    if origin in (dict, Mapping):
        require(isinstance(value, Mapping), "a table")
        return {
            key: from_plain(parts[1], item, path=f"{path}.{key}") for key, item in value.items()
        }
    if kind is Any:
        return tuple(value) if isinstance(value, list) else value
    accepted = {float: (float, int), Path: (Path, str)}.get(kind, kind)
    is_number = kind is bool or not isinstance(value, bool)
    require(is_number and isinstance(value, accepted), WORDS[kind])
    return value if value is None else kind(value)


def _read_option(parts: Sequence[Any], value: Any, default: Any, path: str) -> Any:
    """`value` as the one of the types of a union that it fits; classes are told apart by `name`."""
    if isinstance(value, Mapping):
        name = value.get("name", getattr(default, "name", None))
        parts = [part for part in parts if getattr(part, "name", None) == name]
        if not parts:
            raise ValueError(f"name={name!r} is none of the classes that {path} may have")
    for part in parts:
        with suppress(ValueError):
            return from_plain(part, value, default, path)
    return from_plain(parts[0], value, default, path)


def _read_config(kind: type, stored: Mapping[str, Any], default: Any) -> Any:
    schema = stored.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise ValueError(f"schema={schema} is not known here, only {SCHEMA}: update imsvd")
    hints, names = get_type_hints(kind), [field.name for field in fields(kind)]
    if unknown := sorted({*stored} - {*names, *_name(kind), "schema"}):
        has = ", ".join(names)
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has: {has}")
    values = default_values(kind, default)
    for name in names:
        if name in stored:
            inner = values.get(name, MISSING)
            values[name] = from_plain(hints[name], stored[name], inner, name)
        elif name not in values:
            raise ValueError(f"{kind.__name__} needs {name}")
    return kind(**values)


def complete(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings of `kind` with those that they lack: absent means default.

    Two runs have the same settings if these are equal. Entries unknown to `kind` stay as they are.
    """
    names = {field.name for field in fields(kind)}
    known = {name: value for name, value in stored.items() if name in names}
    return {**stored, **plain(from_plain(kind, known))}


def essential(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without what a resumption may change."""
    kept = {
        name: value for name, value in settings.get("loop", {}).items() if name not in OPERATIONAL
    }
    return {**settings, "loop": kept} if "loop" in settings else dict(settings)


def differences(
    before: Any, now: Any, path: str = "", words: tuple[str, str] = ("before", "now")
) -> str:
    """The settings that differ, as "optim.lr: 0.002 before, 0.001 now"; "" if none does."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        parts = [
            differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."), words)
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        return "; ".join(parts)
    return "" if before == now else f"{path or 'settings'}: {before} {words[0]}, {now} {words[1]}"
