"""The zip that torch.save writes: nothing in it is compressed, so that none can grow when it is read."""

from __future__ import annotations

import zipfile


def check_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Raises ValueError unless the entries of a file of so many bytes lie in it as they are.

    torch unpacks what is compressed: 160 KB can become gigabytes.
    """
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ValueError(f"its entry {entry.filename} is compressed or encrypted, which torch.save never does")
    declared = sum(entry.file_size for entry in archive.infolist())
    if declared > size:
        raise ValueError(f"its entries declare {declared:,} bytes, more than the file has")
