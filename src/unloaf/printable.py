"""Names that come from outside, such as those of files, as text that is safe to show and to keep. Imports no torch."""

from __future__ import annotations


def printable(text: object) -> str:
    r"""The text on one line, with an escape for whatever a terminal or an editor would not show as a letter.

    Line ends, ESC and other control characters, marks that turn the direction of reading and bytes that are no UTF-8
    become what Python writes for them; everything else stays. Such a text can be encoded, and a log keeps one line for
    each entry, whatever a file is called.

    >>> printable("cat/1.jpg\nepoch 9")
    'cat/1.jpg\\nepoch 9'
    >>> import os
    >>> print(printable(os.fsdecode(b"caf\xc3\xa9 \xff")))
    café \xff
    """
    name = str(text)
    if name.isprintable():
        return name
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in name)


def _escape(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte that is not UTF-8 (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def is_unicode(text: str) -> bool:
    r"""Whether a text can be written as UTF-8: names of files may hold bytes that are none.

    >>> is_unicode("\udcff")
    False
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
