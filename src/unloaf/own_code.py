"""Functions of the user's own, "module:function": imported and called, and told apart from what they were. No torch."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
FLAG = "--run-own-code"


def is_own(name: str) -> bool:
    """Whether this names a function, as module:function.

    >>> is_own("nets:build"), is_own("timm/resnet50"), is_own("hf/a:b")
    (True, False, False)
    """
    return _OWN.fullmatch(name) is not None


def own_settings(config: Any) -> dict[str, str]:
    """The settings of a configuration that name a function of the user's own.

    >>> from unloaf.config import Config
    >>> own_settings(Config(model="nets:build"))
    {'model': 'nets:build'}
    """
    return {name: value for name in ("model", "dataset") if is_own(value := getattr(config, name))}


def check_allowed(names: Mapping[str, str], *, allowed: bool) -> None:
    """Raises ValueError if one of these settings is code that would be run, and that was not asked for.

    >>> check_allowed({"model": "nets:build", "dataset": "digits"}, allowed=False)
    Traceback (most recent call last):
    ValueError: model nets:build is a function of your own, which would be imported and run; add --run-own-code if you
    trust it
    """
    own = [f"{setting} {name}" for setting, name in names.items() if is_own(name)]
    if own and not allowed:
        several = "are functions of your own, which" if len(own) > 1 else "is a function of your own, which"
        raise ValueError(f"{' and '.join(own)} {several} would be imported and run; add {FLAG} if you trust it")


def load_function(name: str, *, setting: str) -> Callable[..., Any]:
    """The function; modules are looked for in the working folder first, as `python -m` does.

    Raises:
        ValueError: there is no such module or function, or the module raises an error.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module raises
        raise ValueError(
            f"{setting} {name!r}: module {module_name} cannot be imported: {fault(error, module_name)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{setting} {name!r}: module {module_name} has no function {function_name!r}")
    return function


def call_function(
    name: str, *, setting: str, offered: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> Any:
    """What the function returns. It gets those of the offered arguments that it has, and all that are given.

    Raises:
        ValueError: there is no such function, it has not an argument that is given, or it raises an error, which is
            told with its line.
    """
    function, given = load_function(name, setting=setting), dict(given or {})
    taken = parameters_of(function)
    unknown = [key for key in given if key not in taken]
    if unknown and not _takes_any(function):
        raise ValueError(f"{setting} {name!r}: {name.partition(':')[2]}() has no argument {', '.join(unknown)}")
    arguments = {key: value for key, value in offered.items() if key in taken} | given
    try:
        return function(**arguments)
    except Exception as error:  # whatever the function raises
        where = getattr(function, "__module__", "") or ""
        raise ValueError(f"{setting} {name!r}: {name.partition(':')[2]}() raised {fault(error, where)}") from error


def parameters_of(function: Callable[..., Any], *, needed: bool = False) -> frozenset[str]:
    """The names of the arguments that a function has; ``**kwargs`` is none. `needed`: of those without a default."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some that are written in C
        return frozenset()
    named = (one for one in found if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))
    return frozenset(one.name for one in named if not needed or one.default is one.empty)


def _takes_any(function: Callable[..., Any]) -> bool:
    return any(one.kind is one.VAR_KEYWORD for one in inspect.signature(function).parameters.values())


def fault(error: BaseException, module: str = "") -> str:
    """An error in the user's code: its class, its text, and the last line of that code on the way to it.

    >>> try:
    ...     {}["width"]
    ... except KeyError as error:
    ...     print(fault(error).partition(" (")[0])
    KeyError: 'width'
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({error.filename}, line {error.lineno}: {(error.text or '').strip()})"
    frames = traceback.extract_tb(error.__traceback__)
    own = getattr(sys.modules.get(module), "__file__", None)
    theirs = [frame for frame in frames if own and frame.filename == own] or [
        frame
        for frame in frames
        if Path(frame.filename).parent != Path(__file__).parent and "importlib" not in frame.filename
    ]
    if not theirs:
        return text
    last = theirs[-1]
    return f"{text} ({last.filename}, line {last.lineno}: {last.line})"


def code_record(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Of each setting that names a function: its name, its file's name and the SHA-256 of that file.

    Files that it imports are not looked at.

    Raises:
        ValueError: see `load_function`.

    >>> code_record({"model": "json:loads"})["model"]["file"], code_record({"model": "timm/resnet50"})
    ('__init__.py', {})
    """
    found = {}
    for setting, name in names.items():
        if is_own(name):
            load_function(name, setting=setting)
            file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
            found[setting] = {"function": name, "file": Path(file).name if file else "", "sha256": digest}
    return found


def changed_code(
    had: Mapping[str, Mapping[str, str]] | None, now: Mapping[str, Mapping[str, str]], *, since: str
) -> list[str]:
    """A line for each file that is not what it was; of runs without a record nothing is known.

    >>> one = {"function": "nets:build", "file": "nets.py", "sha256": "1"}
    >>> changed_code({"model": one}, {"model": one | {"sha256": "2"}}, since="step-8")
    ['nets.py (model nets:build) was changed since step-8 was written']
    """
    files: dict[str, list[str]] = {}
    for setting, record in now.items():
        if (had or {}).get(setting, record) != record:
            files.setdefault(record["file"], []).append(f"{setting} {record['function']}")
    return [f"{file} ({', '.join(names)}) was changed since {since} was written" for file, names in files.items()]
