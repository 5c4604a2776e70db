"""Files and folders written whole or not at all, and files of a run that no link leads away. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from unloaf.errors import CheckpointError, DiskFullError
from unloaf.printable import printable

_FULL = {errno.ENOSPC: "", errno.EDQUOT: " (quota of this user)", errno.EFBIG: " (limit on the size of a file)"}
_PROBE = 1 << 16  # bytes; less than this is left where a write stopped for lack of space
_OTHER_OUTPUT = "give another --output"


def write_whole(path: Path, content: str | bytes, *, wait: bool = True, advice: str = _OTHER_OUTPUT) -> None:
    r"""Writes a file, and makes its folder: afterwards it holds the content or, if that fails, what it held before.

    A link in its place is replaced, not followed. What cannot be UTF-8 is written as an escape.

    Args:
        path: the file.
        content: what it holds.
        wait: until it is on the disk, so that this holds for a loss of power too.
        advice: what to do where it cannot be written.

    Raises:
        ValueError: it cannot be written.
        DiskFullError: there is no room for it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(Path(folder) / "new" / "table.csv", "depth,top1\n")
    ...     (Path(folder) / "new" / "table.csv").read_text()
    'depth,top1\n'
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    check_writable(path, advice=advice)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _appearing(path, wait=wait) as temporary, temporary.open("xb") as file:
            file.write(data)
            file.flush()
            if wait:
                os.fsync(file.fileno())
    except OSError as error:
        raise disk_full(error, path.parent, len(data)) or _cannot_write(path, error, advice) from error


@contextmanager
def _appearing(path: Path, *, folder: bool = False, wait: bool = True) -> Iterator[Path]:
    """The name of a sibling: what is made there gets the name `path` in one rename at the end, or is removed."""
    # With the whole of a long name its own would be too long.
    temporary = path.parent / f".{path.name[:40]}-{os.urandom(4).hex()}"
    with ExitStack() as stack:
        stack.callback(_remove, temporary)
        if folder:
            temporary.mkdir()
            stack.enter_context(_held(temporary))
        yield temporary
        os.replace(temporary, path)
        if wait:
            flush(path.parent)


def _remove(path: Path) -> None:
    with suppress(OSError):  # by now it has its name, or the disk does not let go of it
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def flush(path: Path) -> None:
    """Returns when the file, or the list of names in the folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point_to(link: Path, target: Path) -> None:
    """Makes `link` a relative link to `target`; it leads to the old or to the new place at every moment.

    Raises:
        CheckpointError: there is something else than a link at that place.
    """
    place = link.parent.resolve()
    if link.exists() and not link.is_symlink():
        raise CheckpointError(f"{link}: is not a link, and is not replaced by one; move it away")
    remove_leftovers(place, re.escape(link.name), links=True)
    with _appearing(place / link.name) as temporary:
        temporary.symlink_to(os.path.relpath(target.resolve(), place))


def check_writable(path: Path, *, advice: str = _OTHER_OUTPUT) -> None:
    """Raises ValueError if `write_whole` could not write there; nothing is written.

    What is to be written may take hours to measure: better known before.

    >>> check_writable(Path("folder/that/is/new/costs.csv"))
    """
    try:
        folder = next(place for place in path.absolute().parents if place.exists())
        if path.is_dir():
            reason = "it is a folder"
        elif path.exists() and not path.is_file():
            reason = "it is no ordinary file"
        elif not folder.is_dir():
            reason = f"{folder} is no folder"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = f"you may not write into {folder}"
        else:
            return
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise _cannot_write(path, error, advice) from error
    raise ValueError(f"cannot write {path}: {reason}; {advice}")


def _cannot_write(path: Path, error: OSError, advice: str) -> ValueError:
    return ValueError(f"cannot write {path}: {error.strerror or error}; {advice}")


def check_new(output: Path) -> None:
    """Raises ValueError if there is something at that place already, beyond an empty folder."""
    try:
        taken = output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir())))
    except OSError as error:
        raise _cannot_write(output, error, _OTHER_OUTPUT) from error
    if taken:
        raise ValueError(f"{output} exists already; {_OTHER_OUTPUT}, or remove it")


@contextmanager
def new_folder(output: Path, *, need: int = 0, stem: str | None = None, advice: str | None = None) -> Iterator[Path]:
    """A folder to write to that becomes `output` at the end, or is gone if anything raises.

    One that a killed process left at its temporary name is removed first.

    Args:
        output: its final name; its parent folder is made.
        need: bytes that will be written at least.
        stem: pattern of the names whose leftovers are removed; default: the name of `output`.
        advice: what to do where it cannot be written; default: give another --output.

    Raises:
        ValueError: there is something at that place already, or it cannot be written.
        DiskFullError: there is no room, whatever the error was that came of it.
    """
    check_new(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output.parent, stem or re.escape(output.name[:40]))
        check_room(output.parent, need)
        with _appearing(output, folder=True) as temporary:
            try:
                yield temporary
                _follow_umask(temporary)
            except Exception as error:
                if full := disk_full(error, output.parent, need, probe=0, advice=advice):  # it takes room itself
                    raise full from error
                raise
    except DiskFullError:
        raise
    except Exception as error:
        if full := disk_full(error, output.parent, need, advice=advice):
            raise full from error
        if isinstance(error, OSError):
            raise _cannot_write(output, error, advice or _OTHER_OUTPUT) from error
        raise


def _follow_umask(folder: Path) -> None:
    """Gives what libraries made for the owner alone, as safetensors 0.8 does, the mode of other new files."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o666 & folder.stat().st_mode))


def remove_leftovers(folder: Path, stem: str, *, links: bool = False) -> None:
    """Deletes the folders, or links, that killed processes left at temporary names.

    Args:
        folder: where they are.
        stem: pattern of what they were to be called.
        links: whether they are links.
    """
    pattern = re.compile(rf"\.(?:{stem})-[0-9a-f]{{8}}")
    for path in folder.iterdir():
        if not pattern.fullmatch(path.name) or path.is_symlink() != links:
            continue
        if links:
            path.unlink()
        elif path.is_dir():
            with suppress(OSError), _held(path, needed=True):
                shutil.rmtree(path)


@contextmanager
def _held(folder: Path, *, needed: bool = False) -> Iterator[None]:
    """Inside, the folder is this process's own, as far as the disk knows locks on folders.

    Raises:
        OSError: another process holds it and `needed` is given.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if needed:
                raise
        yield
    finally:
        os.close(handle)


def check_room(folder: Path, need: int) -> None:
    """Raises OSError (ENOSPC) unless so many bytes are free where `folder` is."""
    if (free := shutil.disk_usage(folder).free) < need:
        raise OSError(errno.ENOSPC, f"only {free} bytes are free")


def disk_full(
    error: BaseException,
    folder: Path,
    need: int,
    *,
    probe: int | None = None,
    advice: str | None = None,
) -> DiskFullError | None:
    """The error to raise in the place of `error` if it came of a full disk; None if it did not.

    Args:
        error: what a write into `folder` raised. Libraries keep the system's number to themselves (torch: "unexpected
            pos 640 vs 534"), so the disk is asked as well.
        folder: where it was written.
        need: bytes that were to be written.
        probe: bytes that the disk is asked for, to find out; default: `need`.
        advice: what to do; default: make room, or give another --output.
    """
    advice = advice or f"make room, or {_OTHER_OUTPUT}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return _full(cause.errno, folder, need, advice)
        cause = cause.__cause__ or cause.__context__
    number = None if isinstance(error, OSError) else _refusal(folder, max(need if probe is None else probe, _PROBE))
    return None if number is None else _full(number, folder, need, advice)


def _refusal(folder: Path, size: int) -> int | None:
    """Why the disk does not take so many bytes, as an error number; None where it would or cannot be asked."""
    if not hasattr(os, "posix_fallocate"):
        return None
    import tempfile  # takes 5 ms of the 400 in which a command answers

    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, size)
    except OSError as refusal:
        return refusal.errno if refusal.errno in _FULL else None
    return None


def _full(number: int, folder: Path, need: int, advice: str) -> DiskFullError:
    folder = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free, room = shutil.disk_usage(folder).free, os.statvfs(folder)
    if number == errno.ENOSPC and room.f_files and not room.f_favail and free >= need:
        what = f"no file can be added at {folder}: all {room.f_files:,} inodes are taken"
    else:
        what = f"need {_megabytes(need)}, free {_megabytes(free)} at {folder}{_FULL[number]}"
    return DiskFullError(f"disk full: {what}; {advice}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 or not count else f"{count:,} bytes"


def own_file(path: str | Path, flags: int) -> int:
    """Opens a file that a run writes: an opener for `open`, which follows no link and waits for nobody.

    Whoever hands a run folder on may have put links into it that lead to files of the one who resumes it.

    Raises:
        ValueError: it is a link, a second name of another file, or no file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "log.txt").symlink_to("elsewhere")
    ...     open(Path(folder) / "log.txt", "a", opener=own_file)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...log.txt is a link to elsewhere; a run writes to files of its own only: remove the link
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        check_own(Path(path))
        raise error
    found = os.fstat(handle)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return handle
    os.close(handle)
    check_own(Path(path))
    raise ValueError(f"{path} changed while it was opened; start again")


def check_own(path: Path, *, folder: bool = False) -> None:
    """Raises ValueError if there is something else than a file, or a folder, in that place, such as a link.

    So is a second name (hard link) of a file: it would change under the first name as well.
    """
    kind = "folder" if folder else "file"
    if path.is_symlink():
        target = printable(os.readlink(path))
        raise ValueError(f"{path} is a link to {target}; a run writes to {kind}s of its own only: remove the link")
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        raise ValueError(f"{path} is no {kind}; move it away")
    if not folder and path.exists() and (names := path.stat().st_nlink) > 1:
        raise ValueError(
            f"{path} has {names} names (hard links) and would change under all of them; copy the run folder with cp -r "
            "and resume the copy"
        )


def read_text(path: Path, *, limit: int) -> str:
    """The text of a file, which may be somebody else's: neither a pipe nor an endless file stops the reader.

    Args:
        path: an ordinary file, or a link to one.
        limit: bytes it has at most.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no ordinary file, longer than `limit`, or no UTF-8.
    """
    with open(path, "rb", opener=_ordinary_file) as file:
        size = os.fstat(file.fileno()).st_size  # not the limit, for which memory would be asked for
        data = file.read(min(size, limit) + 1)
        if len(data) > size:  # it grows, or has no size, as in /proc
            data += file.read(max(0, limit + 1 - len(data)))
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return data.decode("utf-8")


def _ordinary_file(path: str, flags: int) -> int:
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise ValueError("it is no ordinary file")
