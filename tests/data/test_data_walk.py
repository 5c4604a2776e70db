"""Which files of class folders are read: each real folder once, hidden ones not, and what is left out is told."""

import io
import os

import pytest
from rich.console import Console

from image_files import png, write_folders
from unloaf.config import Config
from unloaf.data import check_images, load_data
from unloaf.data.folders import open_folder_split
from unloaf.engine.run import train


def found(root, split="train"):
    """Counts by class, and the notes."""
    images, names, notes, _ = open_folder_split(root, split)
    return dict(zip(names, images.labels.bincount(minlength=len(names)).tolist(), strict=True)), list(notes)


PLAIN = {"cat": 20, "dog": 20}
ELSEWHERE = "folder(s) left out that are read elsewhere or lie above"


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog", "../cat"])
def test_a_link_to_what_is_read_already_adds_nothing(folders, target):
    (folders / "train" / "cat" / "link").symlink_to(target)
    assert found(folders) == (PLAIN, [f"1 {ELSEWHERE}: cat/link"])


def test_a_link_into_another_class_does_not_take_its_images(folders):
    write_folders(folders / "train" / "dog", {"puppies": 3}, first=50)
    (folders / "train" / "cat" / "link").symlink_to("../dog/puppies")
    assert found(folders) == ({"cat": 20, "dog": 23}, [f"1 {ELSEWHERE}: cat/link"])


def test_links_that_lead_to_each_other_end(folders):
    for name, other in (("a", "b"), ("b", "a")):
        inner = folders / "elsewhere" / name
        inner.mkdir(parents=True)
        (inner / "x.png").write_bytes(png(70))
        (inner / "on").symlink_to(f"../{other}")
    (folders / "train" / "dog" / "more").symlink_to(folders / "elsewhere" / "a")
    counts, notes = found(folders)
    assert counts == {"cat": 20, "dog": 22}
    assert notes[0] == f"1 {ELSEWHERE}: dog/more/on/on"
    assert notes[1].startswith(f"2 linked folder(s) read: dog/more -> {folders / 'elsewhere' / 'a'}, dog/more/on -> ")


def test_a_link_to_itself_and_a_broken_one(folders):
    (folders / "train" / "cat" / "self").symlink_to("self")
    (folders / "train" / "cat" / "gone.png").symlink_to("nowhere")
    counts, notes = found(folders)
    assert counts == {"cat": 21, "dog": 20}
    assert notes == ["1 file(s) left out that do not end like an image: without ending 1"]
    # An image that is not there is one that cannot be read: it is not passed over.
    [(name, reason)] = check_images(Config(dataset="imagefolder", data_dir=str(folders))).bad
    assert (os.path.basename(name), reason) == ("gone.png", "No such file or directory")


def test_class_folders_may_be_links(tmp_path):
    write_folders(tmp_path / "all", {"ape": 2, "bee": 3, "cow": 4})
    (tmp_path / "train").mkdir()
    for name in ("ape", "cow"):
        (tmp_path / "train" / name).symlink_to(f"../all/{name}")
    assert found(tmp_path) == ({"ape": 2, "cow": 4}, [])


def test_two_classes_that_are_one_folder_are_refused(folders):
    (folders / "train" / "tom").symlink_to("cat")
    with pytest.raises(
        ValueError, match=r"^classes cat and tom of .*train are the same folder; remove one of the two$"
    ):
        found(folders)


def test_a_class_folder_that_leads_above_is_no_class(folders):
    (folders / "train" / "all").symlink_to(".")
    assert found(folders) == (PLAIN, [f"1 {ELSEWHERE}: all"])


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", "lost+found"])
def test_hidden_folders_are_left_out(folders, name):
    for folder in (folders / "train", folders / "train" / "cat"):
        (folder / name).mkdir()
        (folder / name / "1-copy.png").write_bytes(png(1))
    assert found(folders) == (PLAIN, ["2 hidden folder(s) left out: " + ", ".join(sorted([name, f"cat/{name}"]))])


def test_hidden_images_are_counted_and_other_hidden_files_are_not(folders):
    (folders / "train" / "dog" / "._020.png").write_bytes(png(1))
    (folders / "train" / "dog" / ".DS_Store").touch()
    assert found(folders) == (PLAIN, ["1 hidden image(s) left out: dog/._020.png"])


def test_files_of_other_kinds_are_counted_by_their_ending(folders):
    for name in ("a.HEIC", "b.heic", "c.gif", "README"):
        (folders / "train" / "dog" / name).touch()
    (folders / "train" / "dog" / "d.JPG").write_bytes(png(1))
    counts, notes = found(folders)
    assert counts == {"cat": 20, "dog": 21}
    [note] = notes
    assert note.startswith("4 file(s) left out that do not end like an image: .heic 2, ")


def test_images_outside_of_class_folders_are_told(folders):
    (folders / "train" / "stray.png").write_bytes(png(1))
    assert found(folders) == (PLAIN, ["1 image(s) outside of the class folders left out: stray.png"])


def test_a_folder_that_cannot_be_read_is_not_passed_over(folders, monkeypatch):
    (folders / "train" / "cat" / "inner").mkdir()
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"^folder .*cat/inner cannot be read: Permission denied; permit it"):
        found(folders)


def test_names_that_are_no_utf8(folders):
    name = os.fsdecode(b"caf\xe9.png")
    (folders / "train" / "dog" / name).write_bytes(png(7))
    (folders / "train" / "dog" / os.fsdecode(b"@eaDir")).mkdir()
    images = open_folder_split(folders, "train").images
    [at] = [at for at in range(len(images)) if images.name(at).endswith(name)]
    assert images.open(at).getpixel((0, 0)) == (7, 100, 200)
    (folders / "train" / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(ValueError, match=r"^class folder .*train/caf\\xe9: its name is not UTF-8; rename it$"):
        found(folders)


def test_notes_are_told_by_check_and_at_the_start_of_a_run(folders, folder_config, tmp_path):
    (folders / "train" / "cat" / "line\nend").symlink_to(".")
    told = f"train: 1 {ELSEWHERE}: cat/line\\nend"
    assert check_images(folder_config()).notes == (told,)
    assert load_data(folder_config()).notes == (told,)
    network = {"method": "common", "model": "cifar/resnet8", "width": 4}
    config = folder_config(**network, epochs=1, device="cpu", output=str(tmp_path / "o"))
    run = train(config, console=Console(file=io.StringIO())).path
    assert sum(line.endswith(told) for line in (run / "log.txt").read_text().splitlines()) == 1


def shared(split, *folders):
    return f"{split} images are training images too: {', '.join(map(str, folders))} is read for both"


def test_validating_on_the_training_images_is_told(folders, folder_config):
    (folders / "val").rename(folders / "old")
    (folders / "val").symlink_to("train")
    both = (folders / "train" / "cat", folders / "train" / "dog")
    assert load_data(folder_config()).notes == (shared("validation", *both),)


def test_a_folder_that_two_splits_link_to_is_told(folders, folder_config):
    # Two class folders that are one, and a linked one inside a class.
    write_folders(folders / "all", {"eel": 2}, first=50)
    for split in ("train", "val"):
        (folders / split / "eel").symlink_to("../all/eel")
    write_folders(folders / "test", {"cat": 1, "dog": 1, "eel": 1}, first=60)
    (folders / "train" / "cat" / "more").symlink_to("../../test/cat")
    assert load_data(folder_config()).notes == (
        f"train: 1 linked folder(s) read: cat/more -> {folders / 'test' / 'cat'}",
        shared("validation", folders / "all" / "eel"),
        shared("test", folders / "test" / "cat"),
    )
