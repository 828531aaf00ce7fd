"""Typed settings from a TOML file and ``key=value`` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def read_config(cls: type[T], path: str | Path | None, overrides: list[str]) -> T:
    """Build the dataclass `cls` from a file (optional) and overrides such as ``lr=1e-3`` or ``augment.mirror=0``.

    Args:
        path: TOML, or the ``config.json`` of a run.

    Raises:
        ValueError: malformed TOML or JSON, an unknown key (the nearest known one is named), a value of the wrong type.
        FileNotFoundError: `path` does not exist.
    """
    values: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"configuration file {path} does not exist")
        values = dict(read_run(path)["config"]) if path.suffix == ".json" else _read_toml(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} must have the form key=value")
        target = values
        *parents, last = key.strip().split(".")
        for part in parents:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ValueError(f"override {override!r}: {part!r} is not a group of settings")
        target[last] = _value(text, None if parents else typing.get_type_hints(cls).get(last), override)
    return from_dict(cls, values, "")


def _value(text: str, hint: Any, override: str) -> Any:
    """What is meant by the text of an override: a value in TOML, whose texts need no quotes and fractions no 0."""
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError as error:
        if hint is str:
            return text
        if text.lstrip()[:1] in ("[", "{"):
            raise ValueError(f"override {override!r} is not valid TOML: {error}") from None
        try:
            return text if text.strip().isdecimal() else float(text)  # decimals are 08 and the like: no fraction
        except ValueError:
            return text
    return text if hint is str and not isinstance(value, str) else value


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"configuration file {path} is not valid TOML: {error}") from None


def read_run(path: Path) -> dict[str, Any]:
    """Contents of a run's ``config.json``, of which ``config`` are the settings; raises ValueError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"configuration file {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ValueError(f"configuration file {path} has no 'config'; expected the config.json of a run")
    return content


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build dataclass `cls` from nested dicts, checking names and types; `where` prefixes keys in messages.

    Where a field is one of several dataclasses, the key ``type`` chooses: it is compared with the default of their
    fields ``type``, which are not arguments of the constructor. Without it the first one is meant.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown setting {where + key!r}{hint} (known: {', '.join(fields)})")
        arguments[key] = _convert(hints[key], value, where + key)
    missing = [
        n
        for n, f in fields.items()
        if n not in arguments and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"missing setting {where + missing[0]!r}; give it in the file or as {missing[0]}=...")
    return cls(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        kinds = {getattr(a, "type", ""): a for a in args if a is not type(None)}
        if len(kinds) > 1 and not isinstance(value, dict):
            raise ValueError(
                f"setting {where!r} is a group: choose {where}.type from {', '.join(kinds)}, got {value!r}"
            )
        if len(kinds) == 1:
            return _convert(next(iter(kinds.values())), value, where)
        kind = value.get("type", next(iter(kinds)))
        if kind not in kinds:
            raise ValueError(f"setting {where + '.type'!r} must be one of {', '.join(kinds)}, got {kind!r}")
        return _convert(kinds[kind], {k: v for k, v in value.items() if k != "type"}, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return from_dict(hint, value, where + ".")
    if origin is tuple and isinstance(value, list):
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) == len(value):
            return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and origin is None and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ValueError(f"setting {where!r} must be {name}, got {value!r}")
