"""Checkpoints: folders that are complete or absent, verified before they are believed.

    RUN/last -> checkpoints/step-00000200
    RUN/checkpoints/step-00000200/{model.safetensors, state.pt, manifest.json}

A folder is written under a temporary name, its files are flushed to the disk, the manifest with their SHA-256 comes
last, and then one rename makes it visible. In a trial a plain `torch.save` left 24 of 25 files torn when the process
was killed, and writing in timm's order lost `last` in 2 of 25.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unloaf.engine.checkpoint.progress import progress
from unloaf.errors import CheckpointError
from unloaf.files.manifest import FILE_NAME, checked_texts, flush, read_manifest, seal, verified
from unloaf.files.tensors import (
    plain_state,
    read_state,
    read_weights,
    reading,
    untied,
    write_state,
    write_weights,
)
from unloaf.files.writing import check_room, disk_full

_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.step-\d{8,}-[0-9a-f]{8}")
_WEIGHTS_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What one step folder holds, read and verified.

    Attributes:
        path: the step folder, links resolved.
        step: optimizer steps done.
        weights: by file ("model", "model_ema"), then by name; on the CPU, tied tensors share memory.
        state: everything else, on the CPU.
        metadata: texts given to `save_checkpoint`.
    """

    path: Path
    step: int
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    metadata: dict[str, str]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    weights: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `folder/step-{step:08d}` and points `last`, next to `folder`, to it.

    A folder of the same step is replaced, in one rename where the system has one (Linux, local disks). The old one
    is not kept even when it is intact: after resuming from an earlier step it belongs to a training that was given up.

    Args:
        folder: RUN/checkpoints; made if missing. One process writes there at a time.
        step: optimizer steps done, >= 0.
        weights: state dicts by file name, such as "model"; any device, tied and strided tensors allowed.
        state: tensors, numbers, texts, True, False and None in dicts (keys: texts, integers), lists and tuples.
        metadata: texts, kept in the manifest and in the headers of the weights.

    Returns:
        the step folder.

    Raises:
        ValueError: an entry cannot be stored; the message names it. Nothing was written.
        CheckpointError: the disk is full or refuses. Earlier checkpoints and `last` are as before.
    """
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {step!r}; give the number of optimizer steps done, an integer >= 0")
    texts = checked_texts(metadata or {})
    tensors = {name: untied(entries, _checked_name(name)) for name, entries in weights.items()}
    plain = plain_state(state)
    target = Path(folder) / f"step-{step:08d}"
    need = _bytes_needed([{name: kept for name, (kept, _) in tensors.items()}, plain, texts])
    with _writing(target, need):
        # Not tempfile.mkdtemp: its folders are for the owner alone, a checkpoint follows the umask.
        temporary = _temporary_name(target)
        temporary.mkdir()
        try:
            for name, (kept, _) in tensors.items():
                write_weights(kept, file := temporary / f"{name}.safetensors", texts)
                file.chmod(0o666 & temporary.stat().st_mode)  # safetensors 0.8 makes files for the owner alone
            write_state(plain, temporary / "state.pt")
            seal(temporary, step, texts, {name: aliases for name, (_, aliases) in tensors.items() if aliases})
            _publish(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # by now the replaced folder, a torn one, or nothing
        point_to(target.parent.parent / "last", target)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Verifies and reads a step folder.

    Args:
        path: the folder, or a link to one such as RUN/last.

    Raises:
        CheckpointError: something is missing, damaged, forbidden or too large; the message names the file.
        ValueError: the path is no UTF-8.
    """
    place = os.path.abspath(path)
    if place != place.encode("utf-8", "replace").decode():
        raise ValueError(f"{path}: its path is no UTF-8, and safetensors takes no other; rename the folder")
    with reading(Path(path)):
        folder = Path(path).resolve()
        manifest = verified(folder)
        weights = {
            Path(name).stem: read_weights(folder / name, manifest.aliases.get(Path(name).stem, {}))
            for name in manifest.files
            if name != "state.pt"
        }
        return Checkpoint(folder, manifest.step, weights, read_state(folder / "state.pt"), manifest.metadata)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that `last` points to, or if that is none the latest one that verifies, and notes on the others.

    The latest is the one after the most epochs of training. Its number may be the lower one: in a run that went on with
    fewer images, unloaf 0.1 counted its steps anew.

    Returns:
        the checkpoint, and a line for each damaged one before which it was taken; (None, []) when there is none.

    Raises:
        CheckpointError: there are some and all of them are damaged.
    """
    passed_over: list[str] = []
    for path in _latest_first(folder):
        try:
            return load_checkpoint(path), passed_over
        except CheckpointError as error:
            passed_over.append(f"passed over {path.name}: {error}")
    if passed_over:
        raise CheckpointError(
            f"{folder}: none of {len(passed_over)} checkpoints can be used; copy one from a backup, or train anew "
            "under another --name\n" + "\n".join(passed_over)
        )
    return None, []


def prune_checkpoints(folder: Path, *, keep: int, protect: Collection[Path] = (), newest: Path | None = None) -> None:
    """Deletes the oldest step folders beyond `keep`, once the newest has verified.

    What is not a complete step folder with nothing else inside stays, and so does what `last` points to.

    Args:
        folder: RUN/checkpoints.
        keep: >= 1; complete folders, protected ones included.
        protect: folders, or links to them, that stay in any case.
        newest: the folder that was just written; default: the latest. Later ones stay and do not count: a resumed run
            passed them over because they are damaged.

    Raises:
        CheckpointError: the newest is damaged (then nothing was deleted), or the disk refuses.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least 1 checkpoint has to stay")
    folders = sorted(_step_folders(folder), key=progress, reverse=True)
    if newest is not None:
        folders = folders[[path.name for path in folders].index(newest.name) :]
    complete = [path for path in folders if _is_complete(path)]
    if len(complete) <= keep:
        return
    verified(complete[0])
    protected = {os.path.realpath(path) for path in [*protect, Path(folder).parent / "last"]}
    with _writing(complete[0], 0):
        for path in complete[keep:]:
            if os.path.realpath(path) not in protected:
                # Renamed first: killed half-way, it is a temporary and not a torn checkpoint.
                shutil.rmtree(path.rename(_temporary_name(path)))


def point_to(link: Path, target: Path) -> None:
    """Makes `link` a relative link to `target`; it leads to the old or to the new place at every moment.

    Raises:
        CheckpointError: there is something else than a link at that place.
    """
    link, place = Path(link), Path(link).parent.resolve()
    if link.exists() and not link.is_symlink():
        raise CheckpointError(f"{link}: is not a link, and is not replaced by one; move it away")
    for leftover in place.glob(f".{link.name}-*"):
        if leftover.is_symlink() and re.fullmatch(r"-[0-9a-f]{8}", leftover.name[len(link.name) + 1 :]):
            leftover.unlink()
    temporary = place / f".{link.name}-{secrets.token_hex(4)}"
    temporary.symlink_to(os.path.relpath(Path(target).resolve(), place))
    os.replace(temporary, place / link.name)
    flush(place)


def clean_up(folder: Path) -> None:
    """Deletes what a killed process left half-written in `folder`, by its name: `.step-00000200-1a2b3c4d`."""
    for path in Path(folder).glob(".step-*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _checked_name(name: str) -> str:
    if not _WEIGHTS_NAME.fullmatch(name):
        raise ValueError(f"weights {name!r}: the name becomes a file name; use letters, digits, '-' and '_'")
    return name


def _bytes_needed(value: Any) -> int:
    # 1 KiB per entry covers its name, its line in a header, and the alignment to 64 bytes.
    if isinstance(value, Tensor):
        return value.nbytes + 1024
    if isinstance(value, str):
        return 1024 + 6 * len(value)
    if isinstance(value, dict):
        return 1024 + sum(_bytes_needed(item) for item in value.values())
    return 16 + sum(map(_bytes_needed, value)) if isinstance(value, (list, tuple)) else 16


@contextmanager
def _writing(target: Path, need: int) -> Iterator[None]:
    """Turns a failed write into a CheckpointError, and says so where the disk is full."""
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean_up(folder)
        check_room(folder, need)
        yield
    except CheckpointError:
        raise
    except Exception as error:
        advice = "make room and resume: the checkpoints before this one are intact"
        full = disk_full(error, folder, need, advice=advice)
        if full is None:
            what = f"cannot be written ({type(error).__name__}: {error}); check the folder's owner and the disk"
            raise CheckpointError(f"{target}: {what}") from error
        raise CheckpointError(str(full)) from error


def _temporary_name(target: Path) -> Path:
    return target.parent / f".{target.name}-{secrets.token_hex(4)}"


def _publish(temporary: Path, target: Path) -> None:
    if target.is_symlink() or (target.exists() and not _is_ours(target)):
        raise CheckpointError(f"{target}: is there already, and unloaf did not write it; move it away")
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        # Killed between these two, only the older checkpoints are left.
        old = target.rename(_temporary_name(target))
        os.rename(temporary, target)
        shutil.rmtree(old)
    flush(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot (Python has no name for renameat2)."""
    if not sys.platform.startswith("linux"):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and all(
        path.is_file() and (path.name == "manifest.json" or FILE_NAME.fullmatch(path.name)) for path in folder.iterdir()
    )


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds what its manifest lists, by name and size, and nothing else."""
    try:
        manifest = read_manifest(folder)
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
    except (CheckpointError, OSError):
        return False
    listed = {name: size for name, (size, _) in manifest.files.items()}
    return not folder.is_symlink() and folder.name == f"step-{manifest.step:08d}" and sizes == listed


def _latest_first(folder: Path) -> Iterator[Path]:
    """What `last` points to, then the others by their progress, which is only looked at when it is asked for."""
    folders = _step_folders(folder)
    last = os.path.realpath(Path(folder).parent / "last")  # also of a link to itself
    first = [path for path in folders if os.path.realpath(path) == last]
    yield from first
    yield from sorted((path for path in folders if path not in first), key=progress, reverse=True)


def _step_folders(folder: Path) -> list[Path]:
    return [path for path in Path(folder).glob("step-*") if _STEP.fullmatch(path.name)]
