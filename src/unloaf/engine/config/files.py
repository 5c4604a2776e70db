"""A configuration as a YAML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from unloaf.engine.config.checks import brief
from unloaf.engine.config.fields import Config
from unloaf.engine.config.names import similar


def load_config(path: str | Path) -> Config:
    """Reads a configuration from a YAML file such as a run folder's `args.yaml`.

    Args:
        path: a YAML mapping from field names to values; fields left out keep their default.

    Raises:
        ValueError: the file cannot be read, is no mapping, or holds an unknown or illegal entry.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from error
    try:
        entries = yaml.safe_load(text)
    except Exception as error:  # not only YAMLError: `!!bool maybe` is a KeyError, `[[[[...` a RecursionError
        reason = " ".join(str(error).split()) if isinstance(error, (yaml.YAMLError, ValueError)) else repr(error)
        raise ValueError(f"{path} is not YAML: {reason[:500]}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: give lines of the form 'epochs: 30', not {type(entries).__name__}")
    return _from_entries(entries, source=str(path))


def _from_entries(entries: dict[Any, Any], *, source: str) -> Config:
    known = [field.name for field in dataclasses.fields(Config)]
    for key in entries:
        if key not in known:
            close = similar(key, known) if isinstance(key, str) else None
            hint = f"did you mean {close}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"{source}: unknown entry {brief(key)}; {hint}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()}
    try:
        return Config(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal value.

    >>> print(dump_config(Config(lr=1e-3))[:31])
    dataset: digits
    data_dir: null
    """
    entries = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
