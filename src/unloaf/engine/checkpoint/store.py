"""Checkpoints: folders that are complete or absent, verified before they are believed.

    RUN/last -> checkpoints/step-00000200
    RUN/checkpoints/step-00000200/{model.safetensors, state.json, state.safetensors, manifest.json}

A folder is written under a temporary name, its files are flushed to the disk, the manifest with their SHA-256 comes
last, and then one rename makes it visible. It is never written again: a step that is saved once more gets the folder
step-00000200.1, to which `last` leads then. In a trial a plain `torch.save` left 24 of 25 files torn when the process
was killed, and writing in timm's order lost `last` in 2 of 25.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unloaf.engine.checkpoint.progress import number_of, progress
from unloaf.errors import CheckpointError, DiskFullError
from unloaf.files import state_tree
from unloaf.files.manifest import checked_texts, read_manifest, seal, verified
from unloaf.files.tensors import read_weights, reading, untied, write_weights
from unloaf.files.writing import new_folder, point_to

_STEP = r"step-\d{8,}(\.\d+)?"
_ADVICE = "make room or look at the owner of the folder, and resume: the checkpoints before this one are intact"
_WEIGHTS_NAME = re.compile(r"(?!state$)[A-Za-z0-9_-]+")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What one step folder holds, read and verified."""

    path: Path  # the step folder, links resolved
    step: int  # optimizer steps done
    # By file ("model", "model_ema"), then by name; on the CPU, tied tensors share memory.
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Any]  # everything else, on the CPU
    metadata: dict[str, str]  # texts given to `save_checkpoint`


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    weights: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `folder/step-{step:08d}` and points `last`, next to `folder`, to it.

    If there is a folder of the same step, the new one's name ends in `.1`, `.2`, ...; pruning deletes the older one.

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
    tensors = {_checked_name(name): untied(entries, name) for name, entries in weights.items()}
    text, of_state = state_tree.split_state(state)
    need = len(text) + sum(_bytes(kept) for kept, _ in tensors.values()) + _bytes(of_state) + 4096
    folder = Path(folder)
    with _told_as_checkpoint_error(folder / f"step-{step:08d}"):
        target = _unused(folder, step)
        with new_folder(target, need=need, stem=_STEP, advice=_ADVICE) as temporary:
            for name, (kept, _) in tensors.items():
                write_weights(kept, temporary / f"{name}.safetensors", texts)
            state_tree.write_state(text, of_state, temporary)
            seal(temporary, step, texts, {name: aliases for name, (_, aliases) in tensors.items() if aliases})
        point_to(folder.parent / "last", target)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Verifies and reads a step folder.

    Args:
        path: the folder, or a link to one such as RUN/last.

    Raises:
        CheckpointError: something is missing, damaged, forbidden or too large; the message names the file.
        ValueError: the path is not UTF-8.
    """
    place = os.path.abspath(path)
    if place != place.encode("utf-8", "replace").decode():
        raise ValueError(f"{path}: its path is not UTF-8, and safetensors takes no other; rename the folder")
    with reading(Path(path)):
        folder = Path(path).resolve()
        manifest = verified(folder)
        weights = {
            name: read_weights(folder / f"{name}.safetensors", manifest.aliases.get(name, {}))
            for name in manifest.weights
        }
        state = state_tree.read_state(folder, manifest.version)
        return Checkpoint(folder, manifest.step, weights, state, manifest.metadata)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that `last` points to, or if that is none the latest one that verifies, and notes on the others.

    The latest is the one after the most epochs of training. Its number may be the lower one: in a run that continued
    with fewer images, unloaf 0.1 counted its steps again.

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
            f"{folder}: none of {len(passed_over)} checkpoints can be used; copy one from a backup, or train again "
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
    if not complete:
        return
    steps = [number_of(path)[0] for path in complete]
    again = [path for place, path in enumerate(complete) if steps[place] in steps[:place]]
    surplus = [*again, *[path for path in complete if path not in again][keep:]]
    protected = {os.path.realpath(path) for path in [*protect, Path(folder).parent / "last"]}
    surplus = [path for path in surplus if os.path.realpath(path) not in protected]
    if surplus:
        verified(complete[0])
    with _told_as_checkpoint_error(complete[0]):
        for path in surplus:
            # Renamed first: killed half-way, it is a temporary and not a torn checkpoint.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}-{os.urandom(4).hex()}")))


def _checked_name(name: str) -> str:
    if not _WEIGHTS_NAME.fullmatch(name):
        raise ValueError(
            f"weights {name!r}: the name becomes a file name; use letters, digits, '-' and '_', not 'state'"
        )
    return name


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    # 1 KiB for each covers its name, its line in a header, and the alignment to 64 bytes.
    return sum(tensor.nbytes + 1024 for tensor in tensors.values())


@contextmanager
def _told_as_checkpoint_error(target: Path) -> Iterator[None]:
    """Turns a failed write into a CheckpointError, and says so where the disk is full."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if isinstance(error, DiskFullError) or isinstance(error.__cause__, OSError):  # said already
            raise CheckpointError(str(error)) from error
        what = f"cannot be written ({type(error).__name__}: {error}); {_ADVICE}"
        raise CheckpointError(f"{target}: {what}") from error


def _unused(folder: Path, step: int) -> Path:
    """The name of the step, or if there is such a folder the next one of its names."""
    numbers = [number_of(path)[1] for path in _step_folders(folder) if number_of(path)[0] == step]
    return folder / (f"step-{step:08d}.{max(numbers) + 1}" if numbers else f"step-{step:08d}")


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds what its manifest lists, by name and size, and nothing else."""
    try:
        manifest = read_manifest(folder)
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
    except (CheckpointError, OSError):
        return False
    listed = {name: size for name, (size, _) in manifest.files.items()}
    return not folder.is_symlink() and number_of(folder)[0] == manifest.step and sizes == listed


def _latest_first(folder: Path) -> Iterator[Path]:
    """What `last` points to, then the others by their progress, which is only looked at when it is asked for."""
    folders = _step_folders(folder)
    last = os.path.realpath(Path(folder).parent / "last")  # also of a link to itself
    first = [path for path in folders if os.path.realpath(path) == last]
    yield from first
    yield from sorted((path for path in folders if path not in first), key=progress, reverse=True)


def _step_folders(folder: Path) -> list[Path]:
    return [path for path in Path(folder).glob("step-*") if re.fullmatch(_STEP, path.name)]
