"""Settings as JSON and back, their identity, and how two differ."""

import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

#: Settings of a loop that touch the record and not the training: a run may be resumed under others.
OPERATIONAL = ("save_every", "save_minutes", "keep", "log_every", "tensorboard")


def config_hash(config: Any) -> str:
    """Twelve hex digits that change with any value of the configuration."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:12]


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as what JSON can hold; raises TypeError for anything else."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    return json.loads(json.dumps(value, default=_path))


def _path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(
        f"{value!r} ({type(value).__name__}) has no place in a result: give numbers, strings, lists, dicts"
    )


def from_plain(kind: Any, value: Any) -> Any:
    """A configuration back from the JSON that it was stored as: the inverse of `plain`.

    Raises ValueError for a field that `kind` does not have.
    """
    if get_origin(kind) is types.UnionType and isinstance(
        value, Mapping
    ):  # of methods, or a view that may be None
        named = [
            one
            for one in get_args(kind)
            if is_dataclass(one) and value.get("name") == getattr(one, "name", None)
        ]
        if not named:
            raise ValueError(f"name={value.get('name')!r} is none of {kind}")
        kind = named[0]
    if is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise ValueError(
                f"{kind.__name__} has no field {', '.join(unknown)}; it has: {', '.join(hints)}"
            )
        return kind(**{name: from_plain(hints[name], item) for name, item in value.items()})
    return tuple(value) if isinstance(value, list) else value


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
