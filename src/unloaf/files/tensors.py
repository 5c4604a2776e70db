"""The two kinds of tensor file in a checkpoint, read as if a stranger had written them.

`<name>.safetensors` holds weights and `state.pt` the rest: tensors, numbers, strings and None in dicts, lists and
tuples. A `state.pt` is a zip with a pickle. `torch.load(weights_only=True)` refuses foreign functions, but takes sizes
on trust (a tensor of 10 GB over 4 bytes of storage is a legal pickle, and it does not compare the length of a storage
with the length of its zip entry), so the pickle is first run with stand-ins that neither call nor allocate anything.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unloaf.errors import CheckpointError
from unloaf.files.archives import unaccounted

# dtype: (name in a safetensors header, name of the storage class in a pickle). Both formats write all of these.
_DTYPES = {
    torch.float64: ("F64", "DoubleStorage"),
    torch.float32: ("F32", "FloatStorage"),
    torch.float16: ("F16", "HalfStorage"),
    torch.bfloat16: ("BF16", "BFloat16Storage"),
    torch.complex64: ("C64", "ComplexFloatStorage"),
    torch.int64: ("I64", "LongStorage"),
    torch.int32: ("I32", "IntStorage"),
    torch.int16: ("I16", "ShortStorage"),
    torch.int8: ("I8", "CharStorage"),
    torch.uint8: ("U8", "ByteStorage"),
    torch.bool: ("BOOL", "BoolStorage"),
}
_HEADER_BYTES = {name: dtype.itemsize for dtype, (name, _) in _DTYPES.items()}

# torch's restricted unpickler reads integers of up to 255 bytes, sign included.
_INTEGER_BITS = 8 * 255 - 1
_DEPTH = 64

# What torch.save writes for the values above, and no more.
_INSTRUCTIONS = frozenset(
    [
        "PROTO",
        "STOP",
        "MARK",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "EMPTY_LIST",
        "EMPTY_DICT",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "APPEND",
        "APPENDS",
        "SETITEM",
        "SETITEMS",
        "GLOBAL",
        "REDUCE",
        "BINPERSID",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
    ]
)


_REMEDY = "resume from an older checkpoint or copy this one again from its source"


def damaged(file: Path, what: str, remedy: str = _REMEDY) -> CheckpointError:
    """The error for a file that is not what was written."""
    return CheckpointError(f"{file}: {what}; {remedy}")


@contextmanager
def reading(file: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Turns whatever goes wrong while `file` is read into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise anything in zipfile, json, pickle, safetensors and torch
        text = str(error).partition("\n")[0][:300]
        raise damaged(file, f"cannot be read ({type(error).__name__}: {text})", remedy) from error


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies the containers of `state` and moves its tensors to the CPU.

    Raises:
        ValueError: an entry is of a kind that `read_state` would refuse; the message names its path.
    """
    taken: set[int] = set()

    def convert(tensor: Any, name: str) -> Tensor:
        _refuse_odd(tensor, name)
        return _own_tensor(tensor, taken)

    return _rebuilt(dict(state), "", convert)


def write_state(state: dict[str, Any], path: Path) -> None:
    """Writes what `plain_state` returned."""
    torch.save(state, path)


def read_state(path: Path) -> dict[str, Any]:
    """Reads a `state.pt` without running or allocating anything that its bytes do not cover.

    Raises:
        CheckpointError: naming the file and, where there is one, the forbidden global or the tensor.
    """
    with reading(path):
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            sizes = _entry_sizes(archive, path)
            if odd := unaccounted(file, archive):
                raise damaged(path, f"is no single archive: {odd}")
            program = archive.read(_prefix(sizes) + "data.pkl")
        _refuse_forbidden(program, path)
        _dry_run(program, {name.removeprefix(_prefix(sizes)): size for name, size in sizes.items()}, path)
        # Explicit, because TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD overrides a default.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)


def untied(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors on the CPU, each with its own memory, and for each tied one the name it is kept under.

    Raises:
        ValueError: an entry is not a dense tensor of a known dtype.
    """
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    taken: set[int] = set()
    for key, tensor in tensors.items():
        if type(key) is not str or key == "__metadata__":
            raise ValueError(f"weights {name!r}: the name {key!r} cannot be stored; use a text, not '__metadata__'")
        _refuse_odd(tensor, f"{name}.{key}")
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and same in first:
            aliases[key] = first[same]
        else:
            first[same] = key
            kept[key] = _own_tensor(tensor, taken)
    return kept, aliases


def write_weights(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes what `untied` returned; the texts go into the file's header."""
    save_file(tensors, path, metadata={"format": "pt", **metadata})


def read_weights(path: Path, aliases: Mapping[str, str], *, remedy: str = _REMEDY) -> dict[str, Tensor]:
    """Reads weights; tied ones share their memory again. An error ends in `remedy`, what its reader can do.

    Raises:
        CheckpointError: naming the file and, where there is one, the tensor.
    """
    with reading(path, remedy):
        _check_header(path, remedy)
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned: safetensors maps the file, and a change to it would reach weights that were already checked.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def load_strictly(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """model.load_state_dict, with the modules' versions, which no file holds and torchvision's MNASNet asks for."""
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state)


def _refuse_odd(tensor: Any, name: str) -> None:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{name} is {_kind(tensor)}; a checkpoint holds dense tensors with data only, convert it")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; allowed are {', '.join(map(str, _DTYPES))}; convert it")


def _own_tensor(tensor: Tensor, taken: set[int]) -> Tensor:
    """On the CPU, contiguous, and the only one in its storage: `taken` are the addresses in use."""
    own = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if own.untyped_storage().nbytes() != own.nbytes or own.untyped_storage().data_ptr() in taken:
        own = own.clone()
    taken.add(own.untyped_storage().data_ptr())
    return own


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of layout {value.layout} on {value.device}"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def _rebuilt(value: Any, name: str, convert: Callable[[Any, str], Any], depth: int = 0) -> Any:
    if depth > _DEPTH:
        raise ValueError(f"{name[:100]}...: nested deeper than {_DEPTH}; make the state flatter")
    kind = type(value)
    if kind in (bool, int, float, str, type(None)):
        if kind is int and value.bit_length() > _INTEGER_BITS:
            raise ValueError(f"{name} is an integer of {value.bit_length()} bits; allowed are {_INTEGER_BITS}")
        return value
    if kind in (list, tuple):
        return kind(
            _rebuilt(item, f"{name}.{i}" if name else str(i), convert, depth + 1) for i, item in enumerate(value)
        )
    if kind in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int):
                raise ValueError(f"{name or 'the state'} has the key {key!r:.80}; keys are texts or integers")
        return {
            _rebuilt(key, name, convert): _rebuilt(item, f"{name}.{key}" if name else str(key), convert, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (Tensor, _Tensor)):
        return convert(value, name)
    raise ValueError(
        f"{name or 'the state'} is {_kind(value)}; a state holds tensors, numbers, texts, True, False and None in "
        "dicts, lists and tuples; convert it (a numpy number with .item(), an array with torch.from_numpy)"
    )


def _prefix(names: Mapping[str, int]) -> str:
    return next(iter(names)).partition("/")[0] + "/"


def _entry_sizes(archive: zipfile.ZipFile, path: Path) -> dict[str, int]:
    entries = archive.infolist()
    sizes = {entry.filename: entry.file_size for entry in entries}
    if len({name.lower() for name in sizes}) != len(entries) or not all(
        name.startswith(_prefix(sizes)) for name in sizes
    ):
        raise damaged(path, "its zip has entries of the same name, or outside of one folder")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise damaged(path, f"its entry {entry.filename} is compressed or encrypted, which torch.save never does")
    if sum(sizes.values()) > path.stat().st_size:
        raise damaged(path, f"its entries declare {sum(sizes.values()):,} bytes, more than the file has")
    return sizes


def _refuse_forbidden(program: bytes, path: Path) -> None:
    """Reads the pickle as a text, before anything runs it; forbidden globals are reported before other faults."""
    forbidden = fault = None
    texts: list[str] = []
    try:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(program)):
            name = instruction.name
            if name == "STACK_GLOBAL":
                forbidden = ".".join(texts[-2:])
            elif name in ("GLOBAL", "INST") and str(argument).replace(" ", ".", 1) not in _STAND_INS:
                forbidden = str(argument).replace(" ", ".", 1)
            elif isinstance(argument, str):
                texts = [*texts[-1:], argument]
            # CPython's unpickler makes room for as many entries as the number says.
            if name not in _INSTRUCTIONS or (name.endswith("BINPUT") and int(argument or 0) > number):
                fault = fault or f"{name} {argument!r:.80}"
            if forbidden:
                break
    except Exception as error:
        fault = fault or f"nothing readable ({error})"
    if forbidden:
        raise CheckpointError(
            f"{path}: its pickle calls for {forbidden}, which no state of a run contains; nothing was executed; "
            "do not use this file, and take the checkpoint from a source you trust"
        )
    if fault or program[:2] != b"\x80\x02":
        raise damaged(path, f"its pickle contains {fault or 'another protocol than 2'}, which torch.save never writes")


@dataclass(frozen=True)
class _Dtype:
    itemsize: int


@dataclass(frozen=True)
class _Storage:
    key: str
    bytes: int
    itemsize: int


@dataclass(frozen=True)
class _Tensor:
    """Stands for a tensor while the pickle is run dry: the arguments of torch._utils._rebuild_tensor_v2."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    hooks: OrderedDict[Any, Any]


_STAND_INS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "collections.OrderedDict": OrderedDict,
    **{f"torch.{storage}": _Dtype(dtype.itemsize) for dtype, (_, storage) in _DTYPES.items()},
}


class _DryRun(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        return _STAND_INS[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, location, count = pid
        if kind != "storage" or not isinstance(dtype, _Dtype) or [*map(type, pid[2:])] != [str, str, int]:
            raise ValueError(f"{(kind, key, location, count)!r:.200} is no storage")
        self.storages.append(key)
        return _Storage(key, count * dtype.itemsize, dtype.itemsize)


def _dry_run(program: bytes, sizes: Mapping[str, int], path: Path) -> None:
    run = _DryRun(io.BytesIO(program))
    state = run.load()
    if type(state) is not dict:
        raise damaged(path, "it holds no dict")
    _refuse_shared(state)
    used: list[str] = []

    def check(tensor: Any, name: str) -> None:
        _check_tensor(tensor, name, sizes, path)
        used.append(tensor.storage.key)

    _rebuilt(state, "", check)
    # Each tensor has its own memory in what write_state writes; sharing it would multiply it on its way to a device.
    if len(set(used)) != len(used) or sorted(used) != sorted(run.storages):
        raise damaged(path, "its tensors share storages, or leave some unused")


def _refuse_shared(state: Any) -> None:
    """A container met twice would make ten nested lists of ten into ten thousand million entries, a cycle even more."""
    pending, met = [state], set()
    while pending:
        value = pending.pop()
        if isinstance(value, (dict, list, tuple)) and value:
            if id(value) in met:
                raise ValueError(f"a {type(value).__name__} of {len(value)} entries appears at two places")
            met.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)


def _check_tensor(tensor: Any, name: str, sizes: Mapping[str, int], path: Path) -> None:
    storage, size = tensor.storage, tensor.size
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in (*size, *tensor.stride)):
        raise damaged(path, f"tensor {name} has no proper storage or shape")
    declared, held = math.prod(size) * storage.itemsize, sizes.get(f"data/{storage.key}", 0)
    if declared != held or storage.bytes != held:
        shape = "x".join(map(str, size))
        raise damaged(path, f"tensor {name} declares {shape} ({declared:,} bytes), but the file holds {held:,} for it")
    if tensor.offset != 0 or tensor.requires_grad is not False or type(tensor.hooks) is not OrderedDict or tensor.hooks:
        raise damaged(path, f"tensor {name} has an offset, a gradient or hooks, which a checkpoint never writes")
    reach = sum((n - 1) * stride for n, stride in zip(size, tensor.stride, strict=True))
    if declared and reach != math.prod(size) - 1:
        raise damaged(path, f"tensor {name} is not contiguous")


def _check_header(path: Path, remedy: str) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise damaged(path, f"its header declares {length:,} bytes, more than the file has", remedy)
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        declared = math.prod(entry["shape"]) * _HEADER_BYTES[entry["dtype"]]
        if declared != end - begin or not 0 <= begin <= end <= size - 8 - length:
            shape = "x".join(map(str, entry["shape"]))
            what = f"tensor {name} declares {shape} {entry['dtype']} ({declared:,} bytes), but holds {end - begin:,}"
            raise damaged(path, what, remedy)
