"""The manifest of a checkpoint: what its files are, by size and SHA-256, and its own SHA-256."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unloaf.errors import CheckpointError
from unloaf.files.tensors import damaged, reading
from unloaf.files.writing import flush, write_whole

FORMAT_VERSION = 2  # 1 kept the state as a pickle; it is still read
_MOST_BYTES = 1 << 26  # some kilobytes are usual; a file may be as long as a stranger likes
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]+\.safetensors")
_STATE = {1: {"state.pt"}, 2: {"state.json", "state.safetensors"}}


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says, checked."""

    version: int
    step: int
    metadata: dict[str, str]
    aliases: dict[str, dict[str, str]]
    files: dict[str, tuple[int, str]]  # name: (bytes, SHA-256)

    @property
    def weights(self) -> list[str]:
        """The names under which weights were saved."""
        return [Path(name).stem for name in self.files if name not in _STATE[self.version]]


def seal(folder: Path, step: int, metadata: dict[str, str], aliases: dict[str, dict[str, str]]) -> None:
    """Flushes every file of `folder` to the disk, then writes the manifest that lists them."""
    files = {}
    for path in sorted(folder.iterdir()):
        flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    fields = {"format_version": FORMAT_VERSION, "step": step, "metadata": metadata, "aliases": aliases, "files": files}
    write_whole(folder / "manifest.json", _manifest_bytes(fields))


def verified(folder: Path) -> Manifest:
    """The manifest, once every file it lists has its size and SHA-256; CheckpointError otherwise."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        _verify(folder / name, *expected)
    return manifest


def verify_file(path: Path) -> None:
    """Raises CheckpointError unless a file of a step folder is what its manifest lists."""
    files = read_manifest(path.parent).files
    if path.name not in files:
        raise damaged(path, "is not among the files of manifest.json")
    _verify(path, *files[path.name])


def _verify(path: Path, size: int, digest: str) -> None:
    with reading(path):
        if not path.is_file():
            raise damaged(path, "is missing")
        if path.stat().st_size != size:
            raise damaged(path, f"has {path.stat().st_size:,} of {size:,} bytes")
        if sha256(path) != digest:
            raise damaged(path, "has other bytes than were written: the SHA-256 differs from manifest.json")


def read_manifest(folder: Path) -> Manifest:
    """The manifest, once its own SHA-256 is right; the files it lists are not looked at."""
    path = folder / "manifest.json"
    with reading(path):
        if not path.is_file():
            raise CheckpointError(f"{folder}: holds no manifest.json; give a complete step folder, such as RUN/last")
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES)
        fields = json.loads(raw)
        version = fields["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            raise CheckpointError(f"{path}: format {version}, this unloaf reads up to {FORMAT_VERSION}; update unloaf")
        del fields["manifest_sha256"]
        if _manifest_bytes(fields) != raw:
            raise damaged(path, "differs from what was written, by its own SHA-256")
        return _parsed(fields)


def checked_texts(metadata: Mapping[str, str]) -> dict[str, str]:
    """A copy; ValueError unless names and values are texts."""
    for key, value in metadata.items():
        if type(key) is not str or type(value) is not str:
            raise ValueError(f"metadata {key!r} is {value!r:.80}; names and values are texts")
    return dict(metadata)


def _parsed(fields: dict[str, Any]) -> Manifest:
    version, step = fields["format_version"], fields["step"]
    files = {name: (entry["bytes"], entry["sha256"]) for name, entry in fields["files"].items()}
    if version not in _STATE or type(step) is not int or step < 0:
        raise ValueError(f"format {version!r}, step {step!r}")
    if not _STATE[version] <= set(files) or not all(map(_FILE_NAME.fullmatch, set(files) - _STATE[version])):
        raise ValueError(f"lists the files {sorted(files)}")
    aliases = {name: dict(entries) for name, entries in fields["aliases"].items()}
    return Manifest(version, step, checked_texts(fields["metadata"]), aliases, files)


def _manifest_bytes(fields: dict[str, Any]) -> bytes:
    """The manifest as it has to be, byte for byte, so that a flip inside it is noticed as well."""
    digest = hashlib.sha256(_rendered(fields)).hexdigest()
    return _rendered({**fields, "manifest_sha256": digest})


def _rendered(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
