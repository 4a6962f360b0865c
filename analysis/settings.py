"""Settings of a method from the command line: `key=value` as fields of its configuration."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from h2cache import MethodConfig, find_method


def parse_settings(config: type[MethodConfig], settings: list[str]) -> dict[str, Any]:
    """`["warmup_steps=3"]` as keyword arguments for `config`, each value in the type of the field's default.

    Raises ValueError for an unknown key (naming the known ones) or a value that does not fit its field.
    """
    known = {f.name: f for f in fields(config)}
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"cannot set {setting!r}: {config.name} has the fields {', '.join(known)} (key=value)"
            )
        if key in values:
            raise ValueError(f"{key} is set twice: say one of them")
        try:
            value = _parse(text, known[key].default, float if "float" in str(known[key].type) else int)
            if any(isinstance(part, float) and math.isnan(part) for part in (value, *_parts(value))):
                raise ValueError("a number is needed")
            values[key] = value
        except ValueError as error:
            raise ValueError(f"cannot set {key} to {text!r}: {error}") from None
    return values


def _parts(value: Any) -> tuple:
    return value if isinstance(value, tuple) else ()


def _parse(text: str, default: Any, number: type) -> Any:
    """`text` in the type of `default`; `number` is that of a field whose default is None."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("write true or false")
        return text.lower() == "true"
    if default is None:
        return None if text.lower() == "none" else number(text)
    if isinstance(default, tuple):
        return tuple(float(part) for part in text.split("/"))
    return type(default)(text)


def config_of(text: str) -> MethodConfig:
    """The settings that `METHOD[:KEY=VALUE...]` names."""
    name, *settings = text.split(":")
    kind = find_method(name)
    return kind(**parse_settings(kind, settings))
