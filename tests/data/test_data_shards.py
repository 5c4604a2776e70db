"""Tar shards: nothing that is labelled is left out silently, and no shard makes the reader wait or run away."""

import io
import os
import random
import tarfile
import threading

import pytest

from image_files import png, write_shard
from unloaf.config import Config
from unloaf.data import check_images, load_data
from unloaf.data.tars import open_tar_split


def read(folder, members):
    """(member, label) of what is read, and the notes."""
    write_shard(folder / "train-0.tar", members)
    images, _, notes, _ = open_tar_split(folder, "train")
    names = [images.name(at).partition("!")[2] for at in range(len(images))]
    return list(zip(names, images.labels.tolist(), strict=True)), list(notes)


def test_names_with_a_second_dot_have_labels_of_their_own(tmp_path):
    # 12 labelled images: none of them is left out.
    keys = [*(f"{number:03}" for number in range(6)), *(f"photo_1.{number}" for number in range(6))]
    members = {}
    for number, key in enumerate(keys):
        members |= {f"{key}.png": png(number), f"{key}.cls": b"%d" % (number % 2)}
    assert read(tmp_path, members) == ([(f"{key}.png", number % 2) for number, key in enumerate(keys)], [])


def test_images_beside_the_labelled_one_are_named(tmp_path):
    members = {
        "d/1.jpg": png(1),
        "d/1.mask.png": png(2),
        "d/1.cls": b"1",
        "d/2.left.jpg": png(3),
        "d/2.json": b'{"label": 0}',
    }
    assert read(tmp_path, members) == (
        [("d/1.jpg", 1)],
        [
            "2 image(s) without a label of their own left out: train-0.tar!d/1.mask.png, train-0.tar!d/2.left.jpg",
            "1 label(s) without an image that is read (.jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp): "
            "train-0.tar!d/2.json",
        ],
    )


def test_a_second_image_of_a_label_is_named(tmp_path):
    members = {"1.jpg": png(1), "1.png": png(2), "1.cls": b"4"}
    assert read(tmp_path, members) == (
        [("1.jpg", 4)],
        ["1 image(s) without a label of their own left out: train-0.tar!1.png"],
    )


def test_labels_of_images_that_are_not_read_are_named(tmp_path):
    found, [note] = read(tmp_path, {"1.heic": b"x", "1.cls": b"1", "2.png": png(2), "2.cls": b"0"})
    assert found == [("2.png", 0)]
    assert note.startswith("1 label(s) without an image that is read (.jpg ")
    assert note.endswith("): train-0.tar!1.cls")


def test_an_image_that_comes_twice_is_named(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, content in (("1.png", png(1)), ("1.cls", b"0"), ("1.png", png(9)), ("1.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    images, _, notes, _ = open_tar_split(tmp_path, "train")
    # The last one counts, as it does for tar.
    assert (images.open(0).getpixel((0, 0))[0], images.labels.tolist()) == (9, [1])
    assert notes == ("1 image(s) left out because another of that name follows: train.tar!1.png",)


def test_cls_comes_before_json_in_any_order(tmp_path):
    members = {"1.png": png(1), "1.cls": b"3", "1.json": b'{"caption": "no label"}'}
    assert read(tmp_path, members) == ([("1.png", 3)], [])
    assert read(tmp_path, dict(reversed(members.items()))) == ([("1.png", 3)], [])


def test_hidden_members_are_left_out(tmp_path):
    members = {"./1.png": png(1), "./._1.png": b"x", "__MACOSX/1.png": b"x", "./1.cls": b"3", ".DS_Store": b"x"}
    assert read(tmp_path, members) == (
        [("./1.png", 3)],
        ["2 hidden image(s) left out: train-0.tar!./._1.png, train-0.tar!__MACOSX/1.png"],
    )


def test_members_that_are_links_are_named(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, content in (("1.png", png(1)), ("1.cls", b"0"), ("2.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.LNKTYPE, "1.png"
        archive.addfile(link)
    images, _, notes, _ = open_tar_split(tmp_path, "train")
    assert len(images) == 1
    assert notes[0] == "1 image(s) that are but links left out: train.tar!2.png"


def test_compressed_shards_are_named(tmp_path):
    (tmp_path / "train-1.tar.gz").touch()
    assert read(tmp_path, {"1.png": png(1), "1.cls": b"0"})[1] == ["1 compressed shard(s) left out: train-1.tar.gz"]


def test_names_that_are_no_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_shard(tmp_path / "train.tar", {f"{name}.png": png(5), f"{name}.cls": b"1"})
    images = open_tar_split(tmp_path, "train").images
    assert images.name(0) == f"{tmp_path / 'train.tar'}!{name}.png"
    assert images.open(0).getpixel((0, 0)) == (5, 100, 200)


def refused(folder, match):
    """What check and a run say; a reader that waits for ever would say nothing."""
    config, told = Config(dataset="webdataset", data_dir=str(folder), val_fraction=0), []

    def ask():
        with pytest.raises(ValueError, match=match):
            load_data(config)
        told.extend(check_images(config).faults)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20)
    assert len(told) == 1
    assert "\n" not in told[0]


LABELS = ["1000000000", "1000000", "-99999999999999999999", "9" * 400]


@pytest.mark.parametrize("label", LABELS)
def test_a_label_that_is_no_class_is_named(tmp_path, label):
    write_shard(tmp_path / "train.tar", {"1.png": png(1), "1.cls": label.encode(), "2.png": png(1), "2.cls": b"0"})
    refused(
        tmp_path, r"^label (an integer of 40[01] digits|-?\d+) of image .*train.tar!1.png: numbers of classes are below"
    )


@pytest.mark.parametrize("text", [b"", b"\n", b"1_0", b"1.0", "٣".encode(), b"nan", b"0x1", b"1 2"])
def test_a_label_that_is_no_number_is_refused(tmp_path, text):
    write_shard(tmp_path / "train.tar", {"1.png": png(1), "1.cls": text})
    refused(tmp_path, r"^label .*train.tar!1.cls holds b'.*'; expected a number as text$")


@pytest.mark.parametrize(
    "text", [b"", b"true", b'{"label": true}', b'{"label": 1.5}', b'{"label": "1"}', b"[" * 10_000]
)
def test_a_label_in_json_that_is_no_number_is_refused(tmp_path, text):
    write_shard(tmp_path / "train.tar", {"1.png": png(1), "1.json": text})
    refused(tmp_path, r"^label .*train.tar!1.json holds b'.*'; expected an object with a number as \"label\"$")


def header(name, size, kind=tarfile.REGTYPE):
    """A tar header with any size; negative ones are written to base 256 (GNU)."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("size", [-512, -1, -1024, -(2**60)])
def test_members_of_negative_size_are_refused(tmp_path, size):
    (tmp_path / "train.tar").write_bytes(header("1.cls", size) + png(1).ljust(512, b"\0") + bytes(1024))
    refused(tmp_path, r"^shard .*train.tar (has a negative size for 1.cls|cannot be read|continues after)")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
def test_other_headers_of_negative_size_are_refused(tmp_path, kind):
    (tmp_path / "train.tar").write_bytes(header("x", -512, kind) + bytes(2048))
    refused(tmp_path, r"^shard .*train.tar ")


def test_a_member_beyond_the_end_is_refused(tmp_path):
    (tmp_path / "train.tar").write_bytes(header("1.png", 2**60) + bytes(1024))
    refused(tmp_path, r"^shard .*train.tar is cut off inside 1.png; copy it again")


def test_joined_and_damaged_shards_are_refused(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", {f"{number}.png": png(1), f"{number}.cls": b"%d" % number})
    first, second = ((tmp_path / f"{number}.tar").read_bytes() for number in range(2))
    (tmp_path / "train.tar").write_bytes(first + second)
    refused(tmp_path, r"^shard .*train.tar continues after its end at byte \d+: it is damaged, or was joined by cat")
    damaged = bytearray(first)
    damaged[1024 + 5] ^= 1  # in the header of the label: to tarfile this is the end
    (tmp_path / "train.tar").write_bytes(damaged)
    refused(tmp_path, r"^shard .*train.tar continues after its end at byte 1024: it is damaged")


def test_a_shard_without_its_end_is_told(tmp_path):
    write_shard(tmp_path / "a.tar", {"1.png": png(1), "1.cls": b"0"})
    (tmp_path / "train.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: 4 * 512])
    images, _, notes, _ = open_tar_split(tmp_path, "train")
    assert len(images) == 1
    assert notes == ("1 shard(s) without the mark of the end, which may be cut off: train.tar",)


@pytest.mark.parametrize("name", ["train.tar", "train.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused(tmp_path, name, kind):
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    if name.endswith("parquet"):
        pytest.importorskip("datasets")
    config, told = Config(dataset="hf" if name.endswith("parquet") else "webdataset", data_dir=str(tmp_path)), []

    def ask():
        told.extend(check_images(config).faults)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20)
    assert told == [f"{tmp_path / name} is a pipe, socket or device, not a regular file; remove it"]


def test_validating_on_a_shard_that_is_trained_on_is_told(tmp_path):
    for name in ("a-0", "a-val-0"):
        write_shard(
            tmp_path / f"{name}.tar", {f"{i}.{k}": v for i in "01" for k, v in (("png", png(1)), ("cls", i.encode()))}
        )
    config = Config(dataset="webdataset", data_dir=str(tmp_path), train_split="a", val_split="a-val")
    shared = f"validation images are training images too: {tmp_path / 'a-val-0.tar'} is read for both"
    assert load_data(config).notes == (shared,)


def test_a_damaged_shard_is_read_or_refused_and_nothing_else(tmp_path):
    draw = random.Random(0)
    write_shard(tmp_path / "whole.tar", {f"{i}.{kind}": b"%d" % i for i in range(3) for kind in ("png", "cls")})
    whole, refusals = (tmp_path / "whole.tar").read_bytes(), []
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            start = 1024 * draw.randrange(6)  # of a header; its fields: name, size, type, prefix
            field = draw.choice([0, 124, 156, 345, draw.randrange(500)])
            damaged[start + field + draw.randrange(12)] = draw.choice([0, 255, 128, *b"7xLgS-", draw.randrange(256)])
            header = damaged[start : start + 512]
            header[148:156] = b" " * 8
            if draw.random() < 0.8:  # a right checksum, or tarfile would not look at the rest
                damaged[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        (tmp_path / "train.tar").write_bytes(damaged)
        try:
            open_tar_split(tmp_path, "train")
        except ValueError as error:
            refusals.append(str(error))
    assert 30 < len(refusals) < 300
    assert all(line.startswith(("shard ", "image ", "label ")) and "\n" not in line for line in refusals)
