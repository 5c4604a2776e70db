"""The zip of a `state.pt`: one archive, and every byte of the file belongs to it.

Python looks for the list of entries from the end of the file, torch at the offset that is stored there. A file in which
they find two lists can show a small archive to the one who checks and another to the one who loads.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from typing import IO

_HEADER = struct.Struct("<4s5H3L2H")  # of an entry: signature, ..., length of its name, length of its padding
_END = struct.Struct("<4s4H2LH")  # signature, two disks, entries here and in all, bytes and offset of the list, comment
_END_64 = struct.Struct("<4sQ2H2L4Q")  # the same in 64 bits
_LOCATOR = struct.Struct("<4sLQL")  # signature, disk, offset of _END_64, disks
_LARGE = 0xFFFFFFFF  # stands in 32 bits for a number of more
_HAS_SIZES_BEHIND = 8


def unaccounted(file: IO[bytes], archive: zipfile.ZipFile) -> str | None:
    """What of the file does not belong to the archive that Python found in it; None if nothing.

    Args:
        file: the archive, open.
        archive: what `zipfile` makes of it.
    """
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    position = 0
    for entry in entries:
        if entry.header_offset != position:
            return f"{entry.filename} begins at byte {entry.header_offset:,} instead of {position:,}"
        if entry.orig_filename != entry.filename or (entry.extra and entry.file_size + position < _LARGE):
            return f"{entry.filename} has a second name or size"
        end = _end_of(file, entry)
        if end is None:
            return f"{entry.filename} is another entry in its own place than in the list"
        position = end
    return _after(file, entries, position)


def _end_of(file: IO[bytes], entry: zipfile.ZipInfo) -> int | None:
    file.seek(entry.header_offset)
    signature, _, flags, _, _, _, _, _, _, name, padding = _HEADER.unpack(file.read(_HEADER.size))
    if (signature, flags) != (b"PK\x03\x04", entry.flag_bits) or file.read(name) != entry.filename.encode():
        return None
    end = entry.header_offset + _HEADER.size + name + padding + entry.file_size
    if not flags & _HAS_SIZES_BEHIND:
        return end
    file.seek(end)
    wide = entry.file_size >= _LARGE
    return end + (24 if wide else 16) if file.read(4) == b"PK\x07\x08" else None


def _after(file: IO[bytes], entries: Sequence[zipfile.ZipInfo], start: int) -> str | None:
    """What is wrong with the list of entries, which begins at `start`, and with what refers to it."""
    size = file.seek(0, 2)
    narrow_end = size - _END.size
    file.seek(max(0, narrow_end))
    signature, *narrow, comment = _END.unpack(file.read(_END.size))
    if signature != b"PK\x05\x06" or comment:
        return "there is something behind its end"
    wide_end = narrow_end - _LOCATOR.size - _END_64.size
    file.seek(max(0, wide_end))
    end_64, locator = file.read(_END_64.size), file.read(_LOCATOR.size)
    wide = locator[:4] == b"PK\x06\x07"
    end = wide_end if wide else narrow_end
    expected = [0, 0, len(entries), len(entries), end - start, start]
    if wide:
        fields = _END_64.unpack(end_64)
        sizes = (fields[0], fields[1]) == (b"PK\x06\x06", _END_64.size - 12)
        if not sizes or list(fields[4:]) != expected or _LOCATOR.unpack(locator)[1:] != (0, wide_end, 1):
            return "its two lists of entries differ"
    same = (number in (value, limit) if wide else number == value for number, value, limit in zip(
        narrow, expected, [0, 0, 0xFFFF, 0xFFFF, _LARGE, _LARGE], strict=True))  # fmt: skip
    return None if all(same) else "its list of entries is not where it says"
