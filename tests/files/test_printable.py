"""Names from outside, shown."""

import os
import unicodedata

import pytest

from unloaf.printable import printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("a\rb\tc\0d", r"a\rb\tc\x00d"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("\x9b31m", r"\x9b31m"),  # the one-byte form of ESC [
        ("gpj.\u202egnp", r"gpj.\u202egnp"),
        ("\u2066x\u2069\u200f\u061c", r"\u2066x\u2069\u200f\u061c"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        (os.fsdecode(b"bad\xff.jpg"), r"bad\xff.jpg"),
        ("\ud800", r"\ud800"),
        ("plain name-1 é 猫 😀 $(x) 'y' \\n", "plain name-1 é 猫 😀 $(x) 'y' \\n"),
        ("", ""),
    ],
)
def test_a_name_is_shown_on_one_line_without_control_characters(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_what_is_shown_can_be_encoded_and_has_no_character_that_acts() -> None:
    every = [chr(code) for code in range(0x110000)]
    shown = printable("".join(every))
    shown.encode("utf-8")
    assert shown.splitlines() == [shown]
    assert not {unicodedata.category(letter) for letter in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
