"""Bad images and dead workers."""

import io
import json
import os
import shutil
import signal
import time

import pytest
import torch
from rich.console import Console

from image_files import png, reds, write_folders, write_shard
from unloaf.config import Config
from unloaf.data import EvalBatches, TrainBatches, check_images, explain_worker_death, load_data
from unloaf.data.augment import epoch_order
from unloaf.engine.run import train
from unloaf.runs.judge import judge_run

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def damage(folders, name="cat/005.png", *, split="train"):
    """Cuts a file off in the middle of its pixels."""
    path = folders / split / name
    path.write_bytes(path.read_bytes()[:48])
    return path


def run(config, epoch=1):
    data = load_data(config)
    batches = TrainBatches(data, config, device="cpu")
    return data, batches, [batch for step in batches.epoch(epoch) for batch in step]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["cut off", "empty", "text", "gone"])
def test_a_bad_image_stops_the_run_with_its_path(folders, folder_config, workers, how):
    path = damage(folders)
    config = folder_config(workers=workers)
    data = load_data(config)
    if how == "gone":
        path.unlink()
    elif how != "cut off":
        path.write_bytes({"empty": b"", "text": b"<html>"}[how])
    with pytest.raises(ValueError, match=rf"^image {path} cannot be read: .*; remove or replace it") as told:
        list(TrainBatches(data, config, device="cpu").epoch(1))
    assert "\n" not in str(told.value)


@pytest.fixture
def many(tmp_path, folder_config):
    """Two hundred images, of which 1 % may be bad."""
    write_folders(tmp_path / "many" / "train", {"cat": 100, "dog": 100})

    def build(**settings):
        return folder_config(data_dir=str(tmp_path / "many"), val_fraction=0, bad_images="skip", **settings)

    return tmp_path / "many", build


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_gives_way_to_its_neighbour(many, workers):
    folder, build = many
    paths = [damage(folder, f"cat/{number:03}.png") for number in (98, 99)]
    data, batches, read = run(build(workers=workers, augment="none"))
    expected = [{98: 100, 99: 100}.get(number, number) for number in epoch_order(200, seed=0, epoch=1).tolist()]
    assert [number for batch in read for number in reds(batch, data)] == expected
    # Image 100 is the first dog: the label belongs to what is shown.
    assert [int(y) for batch in read for y in batch.y] == [int(number >= 100) for number in expected]
    assert batches.bad_images == tuple(map(str, paths))


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_per_cent_stops_the_run(many, workers):
    folder, build = many
    for number in (3, 50, 98):
        damage(folder, f"cat/{number:03}.png")
    with pytest.raises(ValueError, match=r"^3 of 200 images cannot be read, more than 1 %: .*003.png, .*check-data`"):
        run(build(workers=workers))


def test_a_skipped_validation_image_counts_nowhere(many):
    folder, build = many
    damage(folder, "cat/007.png")
    data = load_data(build())
    batches = EvalBatches(data.train, data, build(), device="cpu")
    labels = torch.cat([y for _, y in batches]).tolist()
    assert labels == [0] * 7 + [-100] + [0] * 92 + [1] * 100


def test_skipped_images_are_told_once_after_their_epoch(many, tmp_path):
    folder, build = many
    names = [str(damage(folder, f"cat/{number:03}.png")) for number in (50, 98)]
    config = build(
        method="common", width=4, model="cifar/resnet8", epochs=2, batch_size=50, device="cpu", output=str(tmp_path)
    )
    path = train(config, console=Console(file=io.StringIO())).path
    told = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [event for event in told if event["event"] == "bad_images"] == [
        {"event": "bad_images", "epoch": 1, "images": names}
    ]
    said = [line.partition(": ")[0][20:] for line in (path / "log.txt").read_text().splitlines() if names[1] in line]
    assert said == ["epoch 1 took the neighbours of 2 image(s) that cannot be read"]


def test_images_that_validation_left_out_are_told_once_and_by_the_judgement(many, tmp_path):
    folder, _ = many
    write_folders(folder / "val", {"cat": 100, "dog": 20})
    name = str(damage(folder, "cat/050.png", split="val"))
    config = Config(
        dataset="imagefolder", data_dir=str(folder), img_size=8, bad_images="skip", method="common", width=4,
        model="cifar/resnet8", epochs=2, batch_size=50, device="cpu", output=str(tmp_path),
    )  # fmt: skip
    path = train(config, console=Console(file=io.StringIO())).path
    told = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [event for event in told if event["event"] == "bad_images"] == [
        {"event": "bad_images", "epoch": 1, "images": [name]}
    ]
    lines = [line for line in (path / "log.txt").read_text().splitlines() if "cannot be read" in line]
    assert [line[20:] for line in lines] == [f"validation left out 1 image(s) that cannot be read: {name}"]
    assert judge_run(path).notes == ("1 of the val images cannot be read and were left out",)


def test_a_run_without_bad_images_says_nothing_of_them(many, tmp_path):
    config = many[1](
        method="common", width=4, model="cifar/resnet8", epochs=1, batch_size=50, device="cpu", output=str(tmp_path)
    )
    path = train(config, console=Console(file=io.StringIO())).path
    assert "cannot be read" not in (path / "log.txt").read_text()
    assert "bad_images" not in (path / "metrics.jsonl").read_text()


def test_members_of_shards_and_rows_are_named(tmp_path):
    members = {f"{number}.png": png(number) for number in range(4)} | {"2.png": b"?"}
    write_shard(tmp_path / "train.tar", members | {f"{number}.cls": b"%d" % (number % 2) for number in range(4)})
    config = Config(dataset="webdataset", data_dir=str(tmp_path), batch_size=4, img_size=8, val_fraction=0)
    with pytest.raises(ValueError, match=rf"^image {tmp_path / 'train.tar'}!2.png cannot be read: no image format"):
        run(config)


def test_rows_are_named(tmp_path):
    hub = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": png(1), "path": None}, {"bytes": b"?", "path": None}] * 2, "label": [0, 1] * 2}
    hub.Dataset.from_dict(columns, features=hub.Features(image=hub.Image(), label=hub.Value("int64"))).save_to_disk(
        str(tmp_path / "set")
    )
    config = Config(dataset="hf", data_dir=str(tmp_path / "set"), batch_size=4, img_size=8, val_fraction=0)
    with pytest.raises(ValueError, match=r"^image row [13] of train cannot be read: no image format"):
        run(config)


# Dead workers.


class Deadly:
    """Images whose twentieth kills the process that opens it."""

    def __init__(self, images):
        self.images, self.labels = images, images.labels

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return str(index)

    def open(self, index):
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images.open(index)


def test_a_killed_worker_is_told_in_one_line(folder_config):
    config = folder_config(workers=2)
    data = load_data(config)
    batches = EvalBatches(Deadly(data.train), data, config, device="cpu")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^data worker [01] \(pid \d+\) was killed by SIGKILL; .*memory") as told:
        list(batches)
    assert time.monotonic() - start < 60
    assert "\n" not in str(told.value)


def test_a_death_that_torch_tells_elsewhere_is_explained():
    # The text of torch's signal handler, which may interrupt the training step.
    error = RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")
    assert explain_worker_death(error) == (
        "data worker (pid 123) was killed by Killed; the usual reason is that memory ran out: "
        "give fewer --workers or a smaller --batch-size"
    )
    assert explain_worker_death(RuntimeError("CUDA error")) is None


# check_images.


@pytest.mark.parametrize("workers", [0, 3])
def test_every_bad_file_of_every_split_is_listed(folders, folder_config, workers):
    (folders / "val" / "dog" / "104.png").write_bytes(b"")
    paths = [damage(folders), damage(folders, "dog/030.png"), folders / "val" / "dog" / "104.png"]
    report = check_images(folder_config(workers=workers))
    assert [name for name, _ in report.bad] == list(map(str, paths))
    assert report.bad[2][1] == "no image format that is read: JPEG, PNG, PPM, BMP, TIFF, WEBP, GIF"
    assert report.counts == {"train": {"cat": 20, "dog": 20}, "val": {"cat": 3, "dog": 2}, "test": {"cat": 0, "dog": 0}}


def test_everything_that_is_wrong_is_listed_at_once(folders, folder_config):
    bad = damage(folders)
    (folders / "train" / "eel").mkdir()
    (folders / "val" / "dog").rename(folders / "val" / "wolf")
    (folders / "test" / "cat").mkdir(parents=True)
    report = check_images(folder_config(num_classes=5))
    assert [name for name, _ in report.bad] == [str(bad)]
    starts = (
        "num_classes 5, but imagefolder has 3 classes",
        "1 of 3 classes have no image in train: eel",
        "the classes of validation differ from the 3 classes of the training images; missing there: dog, eel; only ",
    )
    assert [fault.startswith(start) for fault, start in zip(report.faults, starts, strict=True)] == [True] * 3
    assert report.counts["train"] == {"cat": 20, "dog": 20, "eel": 0}
    assert report.counts["val"] == {"cat": 3, "wolf": 2}
    assert report.notes == (f"no image in {folders / 'test'}; it is left alone",)


def test_a_missing_training_folder_keeps_no_other_from_being_checked(folders, folder_config):
    (folders / "train").rename(folders / "trian")
    bad = folders / "val" / "dog" / "104.png"
    bad.write_bytes(b"")
    report = check_images(folder_config())
    assert [name for name, _ in report.bad] == [str(bad)]
    assert len(report.faults) == 1
    assert report.faults[0].endswith("there is trian, val")


def test_what_may_surprise_is_noted_and_no_fault(folders, folder_config):
    for image in (folders / "val" / "dog").iterdir():
        image.unlink()
    report = check_images(folder_config())
    assert (report.faults, report.notes) == ((), ("1 of 2 classes have no image in val: dog",))
    shutil.rmtree(folders / "val")
    for image in sorted((folders / "train" / "dog").iterdir())[1:]:
        image.unlink()
    [note] = check_images(folder_config()).notes
    assert note.startswith("by default, `unloaf train` cannot hold out 2 of 21 images, every class in both")
