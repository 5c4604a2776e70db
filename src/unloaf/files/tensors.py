"""Weights as safetensors, read as if a stranger had written them."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unloaf.errors import CheckpointError

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BYTES = {name: dtype.itemsize for dtype, name in _DTYPES.items()}

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
        check_tensor(tensor, f"{name}.{key}")
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and same in first:
            aliases[key] = first[same]
        else:
            first[same] = key
            kept[key] = own_tensor(tensor, taken)
    return kept, aliases


def write_weights(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes tensors that share no memory; the texts go into the file's header."""
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


def check_tensor(tensor: Any, name: str) -> None:
    """Raises ValueError unless it is a dense tensor with data, of a known dtype."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{name} is {kind_of(tensor)}; a checkpoint holds dense tensors with data only, convert it")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; allowed are {', '.join(map(str, _DTYPES))}; convert it")


def own_tensor(tensor: Tensor, taken: set[int]) -> Tensor:
    """On the CPU, contiguous, and the only one in its storage: `taken` are the addresses in use."""
    own = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if own.untyped_storage().nbytes() != own.nbytes or own.untyped_storage().data_ptr() in taken:
        own = own.clone()
    taken.add(own.untyped_storage().data_ptr())
    return own


def kind_of(value: Any) -> str:
    """What a value is, for an error."""
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of layout {value.layout} on {value.device}"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


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
        declared = math.prod(entry["shape"]) * _BYTES[entry["dtype"]]
        if declared != end - begin or not 0 <= begin <= end <= size - 8 - length:
            shape = "x".join(map(str, entry["shape"]))
            what = f"tensor {name} declares {shape} {entry['dtype']} ({declared:,} bytes), but holds {end - begin:,}"
            raise damaged(path, what, remedy)
