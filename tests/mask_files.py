"""Small sets of images with masks, drawn here: squares in the colours of their classes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([(20, 20, 20), (230, 30, 30), (30, 230, 30), (30, 30, 230)], np.uint8)


def drawn(seed: int, *, height: int = 48, width: int = 64) -> np.ndarray:
    """A mask: squares of 16 pixels, each of a class from 0 to 3."""
    squares = np.random.default_rng(seed).integers(0, 4, (height // 16, width // 16))
    return squares.repeat(16, 0).repeat(16, 1).astype(np.uint8)


def write(folder: Path, split: str, masks: list[np.ndarray], *, turned: bool = False) -> None:
    """Images 0.png, 1.png ... and their masks, in SPLIT/images or, turned, images/SPLIT."""
    for part in ("images", "masks"):
        place(folder, split, part, turned=turned).mkdir(parents=True)
    for at, ids in enumerate(masks):
        colours = COLOURS[np.where(ids < 4, ids, 0)]
        Image.fromarray(colours).save(place(folder, split, "images", turned=turned) / f"{at}.png")
        Image.fromarray(ids).save(place(folder, split, "masks", turned=turned) / f"{at}.png")


def place(folder: Path, split: str, part: str, *, turned: bool = False) -> Path:
    return folder / part / split if turned else folder / split / part


def masked(folder: Path, *, train: int = 8, val: int = 4, **size: int) -> Path:
    """A set with training and validation images of four classes."""
    write(folder, "train", [drawn(at, **size) for at in range(train)])
    write(folder, "val", [drawn(100 + at, **size) for at in range(val)])
    return folder


def png(rows: list[list[int]], *, bits: int, colour: int) -> bytes:
    """A PNG whose samples are these numbers, as its specification has it: nothing in between that knows better."""
    lines = b""
    for row in rows:
        text = "".join(f"{value:0{bits}b}" for value in row)
        lines += b"\0" + int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, colour, 0, 0, 0)
    parts = {b"IHDR": head, b"PLTE": bytes(3 * 2**bits), b"IDAT": zlib.compress(lines), b"IEND": b""}
    if colour != 3:
        del parts[b"PLTE"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in parts.items())
