"""The lock of a run folder, which the system drops when its owner dies. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO
from weakref import WeakSet

from unloaf.files.writing import own_file
from unloaf.printable import printable


def lock(folder: Path) -> IO[str]:
    """Opens run.lock, which stays locked as long as this process lives; children that it forks do not hold the lock.

    Raises:
        ValueError: another process holds it; the message says which.
    """
    path = folder / "run.lock"
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace", opener=own_file)  # noqa: SIM115
        try:
            _take(file)
        except BlockingIOError:
            file.seek(0)
            owner = printable(file.read(200).strip()) or "another process"
            file.close()
            raise ValueError(
                f"run folder {folder} is in use by {owner}; wait for it, stop it or give another --name"
            ) from None
        if _is(path, file):
            break
        file.close()  # its owner removed it between our opening and locking it
    _HELD.add(file)
    file.truncate(0)
    owner = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
    with suppress(OSError):  # on a full disk the lock holds as well
        os.write(file.fileno(), owner.encode())
    return file


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a folder; a file that one left behind says nothing, as one that may not be
    read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     before = is_locked(Path(folder))
    ...     with lock(Path(folder)):
    ...         before, is_locked(Path(folder))
    (False, True)
    """
    try:
        with open(folder / "run.lock", "rb", opener=own_file) as file:
            return _is_taken(file)
    except (OSError, ValueError):
        return False


def _is_taken(file: IO[bytes]) -> bool:
    """Asks without taking it: a training that begins at this moment is not kept out."""
    if hasattr(fcntl, "F_OFD_GETLK"):
        asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        with suppress(OSError):  # before Linux 3.15
            return struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK
    return False  # asking another way would take it for a moment


def _take(file: IO[str]) -> None:
    """Locks the open file, not the process.

    A lock of the process is given up when any descriptor of the file is closed, by whatever reads it, and does not
    keep the process itself out.
    """
    if hasattr(fcntl, "F_OFD_SETLK"):
        whole_file = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of Linux
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, whole_file)
            return
        except OSError as error:
            if error.errno != errno.EINVAL:  # before Linux 3.15
                raise
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Locks of open files are inherited: a data worker would hold on to them after the run was killed.
_HELD: WeakSet[IO[str]] = WeakSet()


def _let_go() -> None:
    for file in list(_HELD):
        with suppress(OSError):
            file.close()


os.register_at_fork(after_in_child=_let_go)


def _is(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
