"""The `state.pt` of checkpoints in format 1, which nothing writes any more: a zip with a pickle.

Neither pickle nor torch reads it: they would call what it names. The instructions that torch.save wrote for dicts,
lists, tuples, numbers, texts and tensors are followed here; whatever else is in the file is refused.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unloaf.errors import CheckpointError
from unloaf.files.archives import check_stored
from unloaf.files.tensors import reading

_REBUILD, _HOOKS = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_STORAGES = {
    f"torch {kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "ComplexFloat": torch.complex64, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
        "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    }.items()
}  # fmt: skip


def read_old_state(path: Path) -> dict[str, Any]:
    """The state in a `state.pt`.

    Raises:
        CheckpointError: naming the file and, where there is one, the forbidden global or the storage.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        check_stored(archive, path.stat().st_size)
        folder = archive.namelist()[0].partition("/")[0]
        state = _Machine(path, archive, folder).run(archive.read(f"{folder}/data.pkl"))
        if type(state) is not dict:
            raise ValueError("it holds no dict")
        return state


class _Machine:
    """What the instructions of a pickle work on. It calls nothing that a file names."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str) -> None:
        self.path, self.archive, self.folder = path, archive, folder
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Tensor | None] = {}  # None once a tensor has it

    def run(self, program: bytes) -> Any:
        """The value that is left at the end."""
        for instruction, argument, _ in pickletools.genops(program):
            self.follow(instruction.name, argument)
        return self.stack.pop()

    def follow(self, name: str, argument: Any) -> None:
        """One instruction."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "MEMOIZE" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE":
                stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[name]())
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                entries = self.since_mark() if name == "APPENDS" else [stack.pop()]
                stack[-1].extend(entries)
            case "SETITEM" | "SETITEMS":
                entries = self.since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                stack[-1].update(zip(entries[::2], entries[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.once(self.memo[argument]))
            case "GLOBAL" | "INST" | "STACK_GLOBAL":
                stack.append(self.known(argument or " ".join(stack[-2:])))
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "REDUCE":
                stack.append(self.rebuilt(arguments=stack.pop(), function=stack.pop()))
            case _:
                raise ValueError(f"its pickle contains {name} {argument!r:.80}, which torch.save never writes")

    def since_mark(self) -> list[Any]:
        """Takes what was put on the stack after the last mark."""
        mark = self.marks.pop()
        entries = self.stack[mark:]
        del self.stack[mark:]
        return entries

    def once(self, value: Any) -> Any:
        """A container at two places would make ten nested lists of ten into ten thousand million entries."""
        if isinstance(value, (list, dict, tuple, Tensor)):
            raise ValueError(f"a {type(value).__name__} appears at two places")
        return value

    def known(self, name: str) -> Any:
        """What stands for a global: of a storage its dtype, of the two functions their names."""
        if name in (_REBUILD, _HOOKS):
            return name
        if name not in _STORAGES:
            raise CheckpointError(
                f"{self.path}: its pickle calls for {name.replace(' ', '.', 1)}, which no state of a run contains; "
                "nothing was executed; do not use this file, and take the checkpoint from a source you trust"
            )
        return _STORAGES[name]

    def storage(self, named: Any) -> Any:
        """Reads the numbers of one or more tensors; stands for them by its key."""
        kind, dtype, key, _, count = named
        if kind != "storage" or not isinstance(dtype, torch.dtype) or key in self.storages:
            raise ValueError(f"storage {key!r:.80} is none, or its tensors share it")
        data = self.archive.read(f"{self.folder}/data/{key}")
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"storage {key} declares {count:,} numbers, but the file holds {len(data):,} bytes for it")
        self.storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return key

    def rebuilt(self, function: Any, arguments: Any) -> Any:
        """A tensor, or the empty dict of its hooks."""
        if function == _HOOKS and arguments == ():
            return {}
        if function != _REBUILD:
            raise ValueError(f"its pickle calls {function!r:.80}, which is no function")
        key, offset, size, stride, requires_grad, hooks = arguments
        numbers, self.storages[key] = self.storages[key], None
        if numbers is None:
            raise ValueError(f"its tensors share storage {key}")
        if math.prod(size) != len(numbers):
            shape = "x".join(map(str, size))
            raise ValueError(f"tensor {key} declares {shape}, but the file holds {len(numbers):,} numbers for it")
        if offset != 0 or requires_grad is not False or hooks:
            raise ValueError(f"tensor {key} has an offset, a gradient or hooks, which no checkpoint had")
        return numbers.as_strided(size, stride)
