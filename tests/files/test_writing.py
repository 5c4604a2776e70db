"""Files written whole or not at all, through no link, and what is said on a full disk."""

import errno
import os
import resource
import signal
import time
from pathlib import Path

import pytest

import tiny
from unloaf.errors import DiskFullError
from unloaf.files import writing as files
from unloaf.files.writing import check_writable, new_folder, read_text, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_older_file_stays_whole_where_the_disk_is_full(tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    page.write_text("yesterday")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"^disk full: need 5 bytes, free .* MB at .*; make room, or give another"):
        write_whole(page, "today")
    assert (names(tmp_path), page.read_text()) == (["report.html"], "yesterday")


def test_limit_on_the_size_of_a_file_is_told(tmp_path):
    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        try:
            write_whole(tmp_path / "report.html", "x" * 100)
        except DiskFullError as error:
            return 7 if "need 100 bytes" in str(error) and "(limit on the size of a file)" in str(error) else 8
        return 9

    assert os.waitstatus_to_exitcode(os.waitpid(tiny.fork(work), 0)[1]) == 7
    assert names(tmp_path) == []


def test_disk_without_inodes_is_not_said_to_lack_bytes(tmp_path, monkeypatch):
    room = os.statvfs(tmp_path)
    taken = os.statvfs_result((*room[:5], 1_234, 0, 0, *room[8:]))
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "statvfs", lambda path: taken)
    with pytest.raises(DiskFullError, match=r"disk full: no file can be added at .*: all 1,234 inodes are taken"):
        write_whole(tmp_path / "a.csv", "a")


def test_link_is_replaced_and_its_target_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("everything")
    (tmp_path / "subnets.csv").symlink_to("thesis.tex")
    write_whole(tmp_path / "subnets.csv", "depth\n")
    assert (tmp_path / "thesis.tex").read_text() == "everything"
    assert (tmp_path / "subnets.csv").read_text() == "depth\n"
    assert not (tmp_path / "subnets.csv").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "below a file", "too long"])
def test_what_is_no_file_is_refused_before_and_at_writing(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place = Path(os.devnull)
    elif kind == "below a file":
        place.touch()
        place = place / "report.html"
    else:
        place = tmp_path / ("x" * 300)
    for write in (check_writable, lambda path: write_whole(path, "text")):
        with pytest.raises(ValueError, match=r"^cannot write .*; give another --output$"):
            write(place)


def test_name_of_the_greatest_length_can_be_written(tmp_path):
    for name in ("x" * 255, "é" * 127):
        write_whole(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    assert len(names(tmp_path)) == 2


def test_text_that_is_no_utf8_is_written_as_an_escape(tmp_path):
    write_whole(tmp_path / "a.html", os.fsdecode(b"run\xff"))
    assert (tmp_path / "a.html").read_bytes() == b"run\\udcff"


def _export_until_killed(output: Path) -> int:
    """A process that is in the middle of an export."""

    def work() -> None:
        with new_folder(output) as folder:
            (folder / "model.safetensors").write_text("half")
            time.sleep(60)

    child, end = tiny.fork(work), time.monotonic() + 120
    while not list(output.parent.glob(".*/model.safetensors")):
        assert time.monotonic() < end
        time.sleep(0.005)
    return child


def test_next_export_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    (tmp_path / ".subnet-mine").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".subnet-0123abcd").symlink_to("elsewhere")
    child = _export_until_killed(tmp_path / "subnet")
    try:
        with new_folder(tmp_path / "subnet") as folder:  # while the other one still writes
            (folder / "README.md").touch()
            assert len(list(tmp_path.glob(".subnet-*/model.safetensors"))) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    (tmp_path / "subnet").rename(tmp_path / "first")
    with new_folder(tmp_path / "subnet"):
        pass
    assert names(tmp_path) == [".subnet-0123abcd", ".subnet-mine", "elsewhere", "first", "subnet"]


def test_full_disk_is_told_where_a_library_hides_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"need 1\.0 MB, free"), new_folder(tmp_path / "subnet", need=10**6):
        raise RuntimeError("unexpected pos 640 vs 534")
    assert names(tmp_path) == []


def test_refusal_of_an_exporter_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(ValueError, match="no such operator"), new_folder(tmp_path / "subnet", need=10**6):
        raise ValueError("no such operator")
    assert names(tmp_path) == []


def test_export_larger_than_the_disk_is_refused_before_it_begins(tmp_path):
    with pytest.raises(DiskFullError, match=r"need 1,000,000,000,000\.0 MB"), new_folder(tmp_path / "a", need=10**18):
        raise AssertionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "long", "bytes"])
def test_reading_ends_whatever_lies_in_the_place_of_a_file(tmp_path, kind):
    path = tmp_path / "args.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff" if kind == "bytes" else b"x" * 11)
    with pytest.raises(ValueError, match=r"no ordinary file|more than 10 bytes|utf-8"):
        read_text(path, limit=10)


def test_no_file_is_written_past_the_helper():
    """The other places write forms that a library writes, and a file in a temporary folder."""
    source = Path(files.__file__).parents[1]
    found = {
        f"{path.relative_to(source)}: {line.strip()}"
        for path in source.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if ".write_text(" in line or ".write_bytes(" in line or '.open("w"' in line or ".savefig(" in line
    }
    assert found == {
        'pages/plots.py: figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, '
        '"Description": about}, **look)',
        'release/subnet_files.py: (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")',
        'release/subnet_files.py: (Path(folder) / "config.json").write_text(json.dumps(architecture["config"]), '
        'encoding="utf-8")',
    }


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_files_that_a_library_made_for_the_owner_alone_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "export") as folder:
            (folder / "inner").mkdir()
            for name in ("weights", "inner/weights"):
                os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o600))
            (folder / "run.sh").write_text("echo")
            (folder / "run.sh").chmod(0o700)
    finally:
        os.umask(before)
    modes = [(tmp_path / "export" / name).stat().st_mode & 0o777 for name in ("weights", "inner/weights", "run.sh")]
    assert modes == [mode, mode, mode | 0o700]
