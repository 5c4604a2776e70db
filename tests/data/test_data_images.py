"""How one encoded image becomes pixels: every mode of Pillow, EXIF, formats, limits."""

import io
import os
import socket
import struct
import subprocess
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from image_files import png
from unloaf.data import check_images, load_data
from unloaf.data.images import BadImageError, _own_limit, decode, read_image_file, traits


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content, **options):
    return np.asarray(decode(content, name="x", **options))


def grey(content):
    """The one channel of an image whose three are equal."""
    found = pixels(content)
    assert (found == found[:, :, :1]).all()
    return found[:, :, 0].tolist()


# 0x0000, 0x00FF, 0x1234, 0xABCD, 0xFFFF; their high bytes.
SIXTEEN, HIGH = [[0, 255, 4660, 43981, 65535]], [[0, 0, 0x12, 0xAB, 255]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_of_sixteen_bits_the_high_byte_is_kept(kind):
    assert grey(encoded(Image.fromarray(np.array(SIXTEEN, np.uint16)), kind)) == HIGH


def tiff(values, *, bits=16, white=0, order="<"):
    """A TIFF of one row of grey, written by hand: Pillow writes neither big-endian 16 bits nor 12, nor white as 0."""
    if bits == 12:
        text = "".join(f"{value:012b}" for value in values)
        row = bytes(int(text[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(text), 8))
    else:
        row = struct.pack(f"{order}{len(values)}H", *values)
    fields = {256: len(values), 257: 1, 258: bits, 259: 1, 262: int(not white), 273: 8, 277: 1, 278: 1, 279: len(row)}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(row))
    return head + row + struct.pack(f"{order}H", len(fields)) + entries + bytes(4)


def test_sixteen_bits_with_the_high_byte_first():
    assert grey(tiff(SIXTEEN[0], order=">")) == HIGH


def test_twelve_bits_are_scaled_by_their_own_range():
    # 0x000, 0x123, 0xABC, 0xFFF
    assert grey(tiff([0, 0x123, 0xABC, 0xFFF], bits=12)) == [[0, 0x12, 0xAB, 255]]


def test_sixteen_bits_with_white_as_zero():
    assert grey(tiff([0, 0x1234, 65535], white=1)) == [[255, 255 - 0x12, 0]]


def test_a_pgm_of_ten_bits_is_scaled_by_its_own_maximum():
    # 512 of 1,023 are 32,800 of 65,535, of which the high byte is 128.
    assert grey(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023)) == [[0, 128, 255]]


def test_sixteen_bits_of_colour_and_grey_agree():
    # A PNG of 16 bits a channel by hand: Pillow cannot write it.
    row = b"\0" + struct.pack(">3H", 0x1234, 0xABCD, 0xFFFF)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row)), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    assert pixels(content).tolist() == [[[0x12, 0xAB, 0xFF]]]


@pytest.mark.parametrize(
    ("array", "kind", "mode"),
    [
        (np.zeros((2, 2), np.int32), "TIFF", "I"),
        (np.zeros((2, 2), np.float32), "TIFF", "F"),
        (np.zeros((2, 2), np.float32), "PPM", "F"),
    ],
)
def test_values_without_a_fixed_range_are_refused_by_their_mode(array, kind, mode):
    with pytest.raises(BadImageError, match=rf"^image x cannot be read: mode {mode} .*; save it with 8 or 16 bits$"):
        decode(encoded(Image.fromarray(array), kind), name="x")


def test_signed_sixteen_bits_are_refused():
    content = encoded(Image.fromarray(np.zeros((1, 2), np.int32)), "TIFF", tiffinfo={258: 16, 339: 2})
    with pytest.raises(BadImageError, match=r"mode I "):
        decode(content, name="x")


ALPHA = Image.new("RGBA", (2, 1), (200, 100, 50, 7))
ORANGE = [[[200, 100, 50]] * 2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.fromarray(np.array([[True, False]]))), [[[255] * 3, [0] * 3]]),
        (encoded(Image.new("L", (2, 1), 99)), [[[99] * 3] * 2]),
        (encoded(Image.new("LA", (2, 1), (99, 3))), [[[99] * 3] * 2]),
        (encoded(ALPHA), ORANGE),
        (encoded(ALPHA, "TIFF"), ORANGE),
        (encoded(ALPHA.convert("RGB").quantize(2)), ORANGE),
        (encoded(ALPHA.convert("RGB").quantize(2), transparency=b"\0\7"), ORANGE),
        (encoded(ALPHA.convert("RGB").quantize(2), "GIF"), ORANGE),
        (encoded(ALPHA.convert("RGB"), "BMP"), ORANGE),
        (encoded(ALPHA, "WEBP", lossless=True, exact=True), ORANGE),
        # 255 - C less K, by hand
        (encoded(Image.new("CMYK", (2, 1), (55, 155, 205, 0)), "TIFF"), ORANGE),
        (encoded(Image.new("CMYK", (2, 1), (0, 0, 0, 255)), "TIFF"), [[[0] * 3] * 2]),
        # Luma alone is grey.
        (encoded(Image.new("YCbCr", (2, 1), (77, 128, 128)), "TIFF"), [[[77] * 3] * 2]),
    ],
)
def test_every_other_mode_is_converted(content, expected):
    assert pixels(content).tolist() == expected


def test_lightness_alone_is_grey():
    # L* of 53.4 % is half of the range in sRGB (IEC 61966-2-1); the profile rounds.
    found = pixels(encoded(Image.new("LAB", (1, 1), (round(2.55 * 53.4), 128, 128)), "TIFF"))
    assert found == pytest.approx(np.full((1, 1, 3), 127), abs=1.5)


@pytest.mark.parametrize(("mode", "colour", "expected"), [("La", (100, 128), 199), ("RGBa", (100, 50, 25, 128), 199)])
def test_colours_that_alpha_was_multiplied_into_are_divided_by_it(monkeypatch, mode, colour, expected):
    # 100 * 255 / 128 = 199; only such a TIFF has these modes, and Pillow does not write it.
    opened = Image.new(mode, (1, 1), colour)
    monkeypatch.setattr(Image, "open", lambda *_, **__: opened)
    assert pixels(b"")[0, 0, 0] == expected


@pytest.mark.parametrize("mode", Image.MODES)
def test_no_mode_of_pillow_raises_anything_else(monkeypatch, mode):
    opened = Image.new(mode, (2, 1))
    monkeypatch.setattr(Image, "open", lambda *_, **__: opened)
    if mode in ("I", "F"):
        with pytest.raises(BadImageError, match=f"mode {mode} "):
            decode(b"", name="x")
    else:
        assert pixels(b"").shape == (1, 2, 3)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# Rows of the corner as it lies in the file, and as it is to be seen (EXIF 2.3, section 4.6.4, A).
CORNER = [[1, 2, 3], [4, 5, 6]]
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_images_are_turned_upright(orientation, kind):
    content = encoded(Image.fromarray(np.array(CORNER, np.uint8)), kind, exif=turned(orientation))
    assert grey(content) == UPRIGHT[orientation]


def test_sixteen_bits_are_turned_upright_too():
    corner = Image.fromarray(np.array(CORNER, np.uint16) * 256)
    assert grey(encoded(corner, "PNG", exif=turned(6))) == UPRIGHT[6]


def test_exif_that_cannot_be_read_turns_nothing():
    content = encoded(Image.new("L", (3, 2), 9), "PNG", exif=b"Exif\0\0no tags at all")
    assert grey(content) == [[9] * 3] * 2


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n", b"GRIB", b""])
def test_formats_that_are_not_named_are_not_opened(monkeypatch, content):
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("another program was started"))
    with pytest.raises(BadImageError, match="no image format that is read: JPEG, PNG"):
        decode(content, name="x.jpg")


def test_an_icon_is_an_image_for_pillow_and_not_here():
    with pytest.raises(BadImageError, match="no image format that is read"):
        decode(encoded(Image.new("RGB", (16, 16)), "ICO"), name="x.png")


def test_large_images_are_refused_before_they_are_decoded(monkeypatch):
    content = encoded(Image.new("1", (300, 100)))
    assert pixels(content, max_pixels=30_000).shape == (100, 300, 3)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(
        BadImageError, match=r"^image x cannot be read: 300 x 100 pixels are more than 29,999, see --max"
    ):
        decode(content, name="x", max_pixels=29_999)


def test_the_limit_of_a_configuration_holds(folder_config):
    data = load_data(folder_config(max_pixels=143))
    with pytest.raises(BadImageError, match="12 x 12 pixels are more than 143"):
        data.train.open(0)
    assert check_images(folder_config(max_pixels=144)).bad == ()
    assert len(check_images(folder_config(max_pixels=143)).bad) == 45


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
def test_what_is_no_regular_file_is_not_read(tmp_path, monkeypatch, kind):
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as ears:
            ears.bind("x.png")
    told = []

    def read():
        with pytest.raises(
            BadImageError, match="it is not a regular file but a folder, pipe, socket or device"
        ) as error:
            read_image_file(str(path), name="x")
        told.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert told


def test_names_in_messages_are_printable():
    with pytest.raises(BadImageError, match=r"^image a\\n\\x1bb cannot be read"):
        decode(b"", name="a\n\x1bb")


ONE = Image.new("L", (4, 4), 200)


def test_check_says_what_it_saw(folders, folder_config):
    cat = folders / "train" / "cat"
    (cat / "000.png").write_bytes(encoded(Image.fromarray(np.array(SIXTEEN, np.uint16))))
    (cat / "001.png").write_bytes(encoded(ALPHA, exif=turned(3)))
    (cat / "002.png").write_bytes(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))
    (cat / "003.png").write_bytes(encoded(Image.new("L", (4, 4)), "GIF", save_all=True, append_images=[ONE]))
    (cat / "004.png").write_bytes(png(4))
    report = check_images(folder_config(workers=2))
    assert report.modes == {"RGB": 41, "I;16": 1, "RGBA": 1, "P": 1}
    assert sorted(report.notes) == [
        "1 image(s): 16 bits, of which the high byte is kept",
        "1 image(s): alpha, which is left out",
        "1 image(s): several frames, of which the first is taken",
        "1 image(s): turned upright as EXIF says",
    ]
    assert [reason for _, reason in report.bad] == [
        "mode F (TIFF) has no fixed range of values; save it with 8 or 16 bits"
    ]


def test_twelve_bits_in_sixteen_are_told(folders, folder_config):
    (folders / "train" / "cat" / "000.png").write_bytes(encoded(Image.fromarray(np.array([[0, 4095]], np.uint16))))
    (folders / "train" / "cat" / "001.png").write_bytes(encoded(Image.fromarray(np.array([[0, 4096]], np.uint16))))
    (folders / "train" / "cat" / "002.tif").write_bytes(tiff([0, 0xFFF], bits=12))
    notes = check_images(folder_config()).notes
    assert notes == (
        "3 image(s): 16 bits, of which the high byte is kept",
        "1 image(s): of 16 bits 12 or fewer are used, so that little is left in the high byte: scale them before",
    )


def test_very_elongated_images_are_refused():
    # Its shorter side resized to 256 pixels, the longer would have 256,256.
    assert pixels(encoded(Image.new("L", (1, 1000)))).shape == (1000, 1, 3)
    for size in ((1001, 1), (2, 2002)):
        with pytest.raises(BadImageError, match="pixels: one side is more than 1,000 times the other; cut it up"):
            decode(encoded(Image.new("L", size)), name="x")


def test_a_refused_image_is_told_once():
    # Pillow's warning, two lines, would come before ours.
    content = encoded(Image.new("1", (9500, 9500)))
    _own_limit.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(BadImageError, match="9500 x 9500 pixels are more than 89,478,485"):
            decode(content, name="x")
    assert warned == []


def test_damage_behind_the_first_frame_is_no_fault_of_it(folders, folder_config):
    content = bytearray(tiff(SIXTEEN[0]))
    content[-4:] = struct.pack("<I", 9)  # where the next frame is said to be, there is none
    (folders / "train" / "cat" / "000.tif").write_bytes(content)
    assert grey(bytes(content)) == HIGH
    report = check_images(folder_config())
    assert (report.modes["I;16"], report.bad) == (1, ())


def mutated(content, draw):
    """The file with one to eight bytes changed, left out or put in, most of them near its beginning."""
    found = bytearray(content)
    for _ in range(draw.integers(1, 9)):
        at = int(draw.integers(len(found) if draw.random() < 0.3 else min(len(found), 120)))
        kind = draw.random()
        if kind < 0.7:
            found[at] = draw.choice([0, 1, 127, 128, 255, draw.integers(256)])
        elif kind < 0.85:
            del found[at : at + 3]
        else:
            found[at:at] = draw.bytes(3)
    return bytes(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM"])
def test_a_damaged_file_is_read_or_bad_and_nothing_else(kind):
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    options = {"exif": turned(6)} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    content = encoded(picture, kind, **options)
    bad = []
    for _ in range(150):
        damaged = mutated(content, draw)
        try:
            assert decode(damaged, name="x", max_pixels=10_000).mode == "RGB"
            assert traits(damaged)[0] in Image.MODES
        except BadImageError as error:
            bad.append(str(error))
    assert len(bad) > 15
    assert all(line.startswith("image x cannot be read: ") and "\n" not in line for line in bad)
