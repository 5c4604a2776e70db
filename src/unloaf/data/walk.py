"""Which files lie in class folders: every real folder once, no hidden ones, and a note of all that is not read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from unloaf.data.consistency import some
from unloaf.printable import is_unicode, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Folders that systems and storage put beside the user's, with copies or thumbnails of the images in them.
_OF_SYSTEMS = ("@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found")


class ClassFiles(NamedTuple):
    """Names of classes in alphabetical order, for each the sorted paths of its files below the root, and notes.

    `folders` are the real paths of those that were read.
    """

    names: tuple[str, ...]
    files: tuple[list[bytes], ...]
    notes: tuple[str, ...]
    folders: frozenset[str]


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image."""
    return name.lower().endswith(EXTENSIONS) and not is_hidden(name)


def holds_images(folder: Path) -> bool:
    """Whether images lie in the folder itself."""
    return any(is_image(entry.name) for entry in _scan(folder))


def class_folders(root: Path) -> list[str]:
    """Names of the folders that are classes, sorted."""
    if not root.is_dir():
        return []
    found = _scan(root)
    return sorted(entry.name for entry in found if _is_folder(entry) and not is_hidden(entry.name))


def find_files(root: Path) -> ClassFiles:
    """The image files of every class, also from folders inside it and from those that it links to.

    A real folder is read once: where a link leads to one that belongs to a class already, or to one above, it is left
    out.

    Raises:
        ValueError: a folder cannot be read, its name cannot be written, or two classes are one folder.
    """
    walk = _Walk(root)
    names = walk.classes()
    for number, name in enumerate(names):
        walk.read(number, name)
    walk.follow_links()
    files = tuple(sorted(walk.files[number]) for number in range(len(names)))
    return ClassFiles(names, files, tuple(walk.notes()), frozenset(walk.folders))


class _Walk:
    """What was found so far. Paths are relative to the root."""

    def __init__(self, root: Path) -> None:
        self.root, self.files = root, dict[int, list[bytes]]()
        self.links: list[tuple[int, str]] = []
        self.hidden_folders, self.hidden_files = list[str](), list[str]()
        self.followed, self.left_out, self.beside = list[str](), list[str](), list[str]()
        self.others: Counter[str] = Counter()
        self.folders: list[str] = []
        # By real path, which no file system gets wrong; some give folders no number of their own.
        self.seen = {str(folder): str(folder) for folder in (root.resolve(), *root.resolve().parents)}

    def classes(self) -> tuple[str, ...]:
        """The class folders; from here on they are no part of another class."""
        names, above = [], set(self.seen)
        self.hidden_folders += [e.name for e in _scan(self.root) if _is_folder(e) and is_hidden(e.name)]
        self.beside += [e.name for e in _scan(self.root) if is_image(e.name) and not _is_folder(e)]
        for name in class_folders(self.root):
            real = self._real(name)
            if real in above:
                self.left_out.append(name)
                continue
            if real in self.seen:
                raise ValueError(
                    f"classes {printable(self.seen[real])} and {printable(name)} of {printable(self.root)} are the "
                    "same folder; remove one of the two"
                )
            if not is_unicode(name):
                raise ValueError(f"class folder {printable(self.root / name)}: its name is not UTF-8; rename it")
            self.seen[real] = name
            names.append(name)
        return tuple(names)

    def read(self, number: int, path: str) -> None:
        """Takes the files below a folder into a class; links to folders wait."""
        waiting, files = [path], self.files.setdefault(number, [])
        while waiting:
            folder = waiting.pop()
            self.folders.append(self._real(folder))
            for entry in _scan(self.root / folder):
                inner = os.path.join(folder, entry.name)
                if not _is_folder(entry):
                    self._take(entry.name, inner, files)
                elif is_hidden(entry.name):
                    self.hidden_folders.append(inner)
                elif entry.is_symlink():
                    self.links.append((number, inner))
                elif self._is_new(inner):
                    waiting.append(inner)

    def _take(self, name: str, path: str, files: list[bytes]) -> None:
        if is_image(name):
            files.append(os.fsencode(path))
        elif name.lower().endswith(EXTENSIONS):
            self.hidden_files.append(path)
        elif not is_hidden(name):
            self.others[os.path.splitext(name)[1].lower() or "without ending"] += 1

    def _is_new(self, path: str) -> bool:
        real = self._real(path)
        if real in self.seen:
            self.left_out.append(path)
            return False
        self.seen[real] = path
        return True

    def _real(self, path: str) -> str:
        return os.path.realpath(self.root / path)

    def follow_links(self) -> None:
        """Reads the linked folders, once all that are no links have found their class."""
        self.links.sort()
        while self.links:
            number, path = self.links.pop(0)
            if self._is_new(path):
                self.followed.append(f"{path} -> {self._real(path)}")
                self.read(number, path)

    def notes(self) -> Iterator[str]:
        """A line for each kind of thing that is not read, or not from where it seems."""
        yield from _note("hidden folder(s) left out", self.hidden_folders)
        yield from _note("hidden image(s) left out", self.hidden_files)
        yield from _note("folder(s) left out that are read elsewhere or lie above", self.left_out)
        yield from _note("linked folder(s) read", self.followed)
        yield from _note("image(s) outside of the class folders left out", self.beside)
        kinds = [f"{kind} {count}" for kind, count in self.others.most_common()]
        if kinds:
            yield f"{self.others.total()} file(s) left out that do not end like an image: {printable(some(kinds))}"


def _note(what: str, paths: Iterable[str]) -> Iterator[str]:
    found = sorted(paths)
    if found:
        yield f"{len(found)} {what}: {printable(some(found, 3))}"


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(
            f"folder {printable(folder)} cannot be read: {error.strerror or error}; permit it, or move the folder away"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's images."""
    return name.startswith(".") or name in _OF_SYSTEMS
