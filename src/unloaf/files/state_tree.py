"""The state of a run as two files that hold values alone: state.json and, for its tensors, state.safetensors.

JSON has texts, finite numbers, true, false, null and lists for themselves; for everything else an object of one entry
that says what it is: ``{"tuple": [0.9, 0.999]}``, ``{"dict": [["lr", 0.1], [0, true]]}``, ``{"float": "inf"}``,
``{"bytes": "00ff"}``, ``{"tensor": "0:optimizer.state.0.exp_avg"}``.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unloaf.files.old_state import read_old_state
from unloaf.files.tensors import check_tensor, kind_of, own_tensor, read_weights, reading, write_weights
from unloaf.files.writing import write_whole
from unloaf.printable import printable

FILES = ("state.json", "state.safetensors")
_INTEGER_BITS = 8 * 255 - 1
_DEPTH = 64


def split_state(state: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    r"""The text of state.json and, by their names in it, the tensors, on the CPU.

    Raises:
        ValueError: an entry is of a kind that `read_state` would refuse; the message names its path.

    >>> split_state({"betas": (0.9, 0.999)})
    ('{"dict": [["betas", {"tuple": [0.9, 0.999]}]]}\n', {})
    """
    tensors: dict[str, Tensor] = {}
    return json.dumps(_packed(dict(state), "", 0, tensors, set()), allow_nan=False) + "\n", tensors


def write_state(text: str, tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes what `split_state` returned."""
    write_weights(tensors, folder / FILES[1], {})
    write_whole(folder / FILES[0], text, wait=False)


def read_state(folder: Path, version: int) -> dict[str, Any]:
    """Reads the state of a checkpoint without running or allocating anything that its bytes do not cover.

    Args:
        folder: of the checkpoint.
        version: of its format; in format 1 the state was a pickle.

    Raises:
        CheckpointError: naming the file and, where there is one, the tensor.
    """
    if version == 1:
        with reading(folder / "state.pt"):
            split_state(state := read_old_state(folder / "state.pt"))  # what could not be written today is refused
            return state
    tensors = read_weights(folder / FILES[1], {})
    with reading(folder / FILES[0]):

        def unpacked(pairs: list[tuple[str, Any]]) -> Any:
            return _unpacked(pairs, tensors)

        text = (folder / FILES[0]).read_text(encoding="utf-8")
        state = json.loads(text, object_pairs_hook=unpacked, parse_float=_finite, parse_constant=_finite)
        if type(state) is not dict:
            raise ValueError("it holds no dict")
        if tensors:
            raise ValueError(f"{FILES[1]} holds {next(iter(tensors))}, which is nowhere in it")
        return state


def _packed(value: Any, name: str, depth: int, tensors: dict[str, Tensor], taken: set[int]) -> Any:
    """The value as JSON knows it; its tensors are added to `tensors`, and the addresses in use to `taken`."""
    if depth > _DEPTH:
        raise ValueError(f"{name[:100]}...: nested deeper than {_DEPTH}; make the state flatter")
    kind = type(value)
    if kind is int and value.bit_length() > _INTEGER_BITS:
        raise ValueError(f"{name} is an integer of {value.bit_length()} bits; allowed are {_INTEGER_BITS}")
    if kind in (bool, int, str, type(None)):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if isinstance(value, Tensor):
        check_tensor(value, name)
        number = printable(f"{len(tensors)}:{name}")
        tensors[number] = own_tensor(value, taken)
        return {"tensor": number}

    def inner(key: Any, entry: Any) -> Any:
        return _packed(entry, f"{name}.{key}" if name else str(key), depth + 1, tensors, taken)

    if kind in (list, tuple):
        entries = [inner(number, entry) for number, entry in enumerate(value)]
        return entries if kind is list else {"tuple": entries}
    if kind in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int):
                raise ValueError(f"{name or 'the state'} has the key {key!r:.80}; keys are texts or integers")
        return {"dict": [[inner("", key), inner(key, entry)] for key, entry in value.items()]}
    raise ValueError(
        f"{name or 'the state'} is {kind_of(value)}; a state holds tensors, numbers, texts, bytes, True, False and "
        "None in dicts, lists and tuples; convert it (a numpy number with .item(), an array with torch.from_numpy)"
    )


def _unpacked(pairs: list[tuple[str, Any]], tensors: dict[str, Tensor]) -> Any:
    """What an object of JSON stands for; of `tensors` it takes the one that it names."""
    match pairs:
        case [("tuple", list(entries))]:
            return tuple(entries)
        case [("dict", list(entries))] if all(type(entry) is list for entry in entries):
            found = {key: entry for key, entry in entries if type(key) in (str, int)}
            if len(found) == len(entries):
                return found
        case [("float", "inf" | "-inf" | "nan" as text)]:
            return float(text)
        case [("bytes", str(digits))]:
            return bytes.fromhex(digits)
        case [("tensor", str(name))] if name in tensors:
            return tensors.pop(name)
    raise ValueError(f"{dict(pairs)!r:.80} is no value, or one that was there already")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text} is not finite")
    return number
