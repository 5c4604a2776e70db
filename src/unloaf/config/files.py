"""A configuration as a YAML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from unloaf.config.checks import brief
from unloaf.config.fields import Config
from unloaf.config.names import current_names, similar
from unloaf.files.writing import read_text

_MOST_BYTES = 1 << 16  # a configuration has 3 kB


def load_config(path: str | Path) -> Config:
    """Reads a configuration from a YAML mapping of field names to values, such as a run folder's `args.yaml`.

    Raises:
        ValueError: the file cannot be read, is no mapping, or holds an unknown or illegal entry.
    """
    return _from_entries(read_mapping(path, what="configuration", form="epochs: 30"), source=str(path))


def read_mapping(path: str | Path, *, what: str, form: str) -> dict[Any, Any]:
    """Reads a YAML mapping in which nothing is hidden: no entry twice, no references.

    Args:
        path: the file.
        what: it is, for errors.
        form: of a line in it, for errors.

    Raises:
        ValueError: the file cannot be read, or is no such mapping.
    """
    try:
        text = read_text(Path(path), limit=_MOST_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the {what} {path}: {error}") from error
    try:
        loader = yaml.SafeLoader(text)  # not the one in C, which deep nesting can crash
        root = loader.get_single_node()
        fault = _fault(root)
        entries = None if fault or root is None else loader.construct_document(root)
    except Exception as error:  # not only YAMLError: `!!bool maybe` is a KeyError, `[[[[...` a RecursionError
        reason = " ".join(str(error).split()) if isinstance(error, (yaml.YAMLError, ValueError)) else repr(error)
        raise ValueError(f"{path} is not YAML: {reason[:500]}") from error
    if fault:
        raise ValueError(f"{path}, {fault}")
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: give lines of the form '{form}', not {type(entries).__name__}")
    return entries


def _fault(root: yaml.Node | None) -> str | None:
    """What a configuration does not need and what hides or multiplies entries; None if there is nothing of it."""
    pending, met = [root], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, yaml.CollectionNode):
            continue
        line = node.start_mark.line + 1
        if id(node) in met:
            return f"line {line}: is used at two places by '*'; write it out at both"
        met.add(id(node))
        for child in node.value:
            pending += child if isinstance(child, tuple) else [child]
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                return f"line {line}: entries are taken over by '<<'; write them out"
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                return f"line {line}: {brief(key.value)} is given a second time; keep one"
            names.add(key.value if isinstance(key, yaml.ScalarNode) else None)
    return None


def with_entries(config: Config, entries: dict[Any, Any], *, source: str) -> Config:
    """A configuration with some fields changed, by their names as in a file.

    Raises:
        ValueError: an entry is unknown or not allowed; the message begins with the source.

    >>> with_entries(Config(), {"lr": 0.2, "sides": [8, 16]}, source="row a").sides
    (8, 16)
    """
    return _from_entries(entries, source=source, base=config)


def _from_entries(entries: dict[Any, Any], *, source: str, base: Config | None = None) -> Config:
    try:
        entries = current_names(entries)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    known = [field.name for field in dataclasses.fields(Config)]
    for key in entries:
        if key not in known:
            close = similar(key, known) if isinstance(key, str) else None
            hint = f"did you mean {close}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"{source}: unknown entry {brief(key)}; {hint}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()}
    try:
        return Config(**values) if base is None else dataclasses.replace(base, **values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def dump_config(config: Config, *, only_changed: bool = False) -> str:
    """The configuration, or what is not the default in it, as YAML that `load_config` reads back to an equal value.

    >>> print(dump_config(Config(lr=1e-3), only_changed=True), end="")
    lr: 0.001
    """
    entries = {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default or not only_changed
    }
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
