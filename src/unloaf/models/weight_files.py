"""Weights of any origin, by name: a run, an exported folder, safetensors, or what torch.save wrote. No code is run."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unloaf.errors import CheckpointError, in_one_line
from unloaf.files.archives import check_stored
from unloaf.files.manifest import sha256, verify_file
from unloaf.files.tensors import read_weights

_KINDS = "a run, an exported folder, or weights in .safetensors, .pth, .pt, .pth.tar or .bin"
_PLACES = (
    "model.safetensors", "last/model.safetensors", "elastic.safetensors", "pytorch_model.bin", "model.pth",
)  # fmt: skip
_DESCRIPTIONS = ("subnet.json", "elastic.json")
# Where training scripts put the weights, as timm looks for them: the moving average before the last ones.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")


def read_tensors(path: Path) -> tuple[Path, dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a file or folder by name, on the CPU.

    Args:
        path: a run, of which the last checkpoint is taken, a checkpoint, a folder that `unloaf export`, timm or
            transformers wrote, or a file of weights.

    Returns:
        the file that was read, its tensors, and the entry that they lay in, such as state_dict_ema, if any.

    Raises:
        ValueError: there is no such file, it holds no weights, or things that are none.
        CheckpointError: a checkpoint or an exported folder is damaged.
    """
    file = find_weights(path)
    if file is None:
        what = f"has none of {', '.join(_PLACES)}" if path.is_dir() else "no such file or folder"
        raise ValueError(f"{path}: {what}; give {_KINDS}")
    _check_hashes(file)
    try:
        with file.open("rb") as opened:
            start = opened.read(16)
        size = file.stat().st_size
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        try:
            return file, read_weights(file, {}, remedy="copy it again from its source"), ()
        except CheckpointError as error:
            raise ValueError(str(error)) from error
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return file, *_unnested(_read_pickle(file), file)
    raise ValueError(f"{file}: is not a file of weights (it begins with {start!r}); give {_KINDS}")


def find_weights(path: Path) -> Path | None:
    """The file of weights that a path means: itself, or one inside a folder."""
    return next((place for place in (path, *(path / name for name in _PLACES)) if place.is_file()), None)


def texts_of(file: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; none for any other."""
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def _check_hashes(file: Path) -> None:
    """Of a checkpoint or of what `unloaf export` wrote, whose sums lie beside it."""
    folder = file.resolve().parent
    if (folder / "manifest.json").is_file() or folder.name.startswith("step-"):
        verify_file(folder / file.name)
    for description in (folder / name for name in _DESCRIPTIONS):
        if description.is_file():
            weights = _entries(description).get("weights")
            named = weights if isinstance(weights, dict) else {}
            if named.get("file") == file.name and named.get("sha256") != sha256(file):
                raise CheckpointError(f"{file}: its SHA-256 is not the one in {description.name}: one is damaged")


def _entries(file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({in_one_line(error)}); export it again") from error
    return entries if isinstance(entries, dict) else {}


def _read_pickle(file: Path) -> Any:
    """What torch.save wrote, of tensors and plain values alone; timm's own checkpoints keep their arguments beside."""
    _check_archive(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Explicit, because TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD overrides a default.
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise anything
        classes = _foreign_classes(file)
        if classes:
            reason = f"it calls for {classes}, which is no weight and is not loaded"
            raise ValueError(f"{file}: {reason}; save model.state_dict() there and give that file") from error
        raise ValueError(
            f"{file}: is not what torch.save writes, or is damaged ({in_one_line(error)}); give {_KINDS}"
        ) from error


def _check_archive(file: Path) -> None:
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        try:
            check_stored(archive, file.stat().st_size)
        except ValueError as error:
            raise ValueError(f"{file}: {error}; give {_KINDS}") from error


def _foreign_classes(file: Path) -> str:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        return ", ".join(sorted(found, key=lambda name: name.startswith("torch."))[:3])
    except Exception:  # it is no zip, or no pickle
        return ""


def _unnested(found: Any, file: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    nests: list[str] = []
    while isinstance(found, Mapping):
        nest = next((key for key in _NESTS if isinstance(found.get(key), Mapping) and found[key]), None)
        if nest is None:
            break
        nests.append(nest)
        found = found[nest]
    entries = found if isinstance(found, Mapping) else {}
    tensors = {name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        there = ", ".join(f"{name!s:.40}" for name in list(entries)[:6]) or type(found).__name__
        raise ValueError(f"{file}: holds no weights by name (it holds {there}); save model.state_dict() there")
    return tensors, tuple(nests)
