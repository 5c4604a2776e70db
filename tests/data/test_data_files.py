"""Image sets in folders, tables and tar shards: what is found, and each mistake told in one line."""

import json
import os
import shutil
import socket

import pytest
import torch

from image_files import png, write_folders, write_shard
from unloaf.config import Config
from unloaf.data import load_data


def contents(images):
    """(red, label) of every image, in order."""
    return [(images.open(index).getpixel((0, 0))[0], int(images.labels[index])) for index in range(len(images))]


TRAIN = [(number, int(number >= 20)) for number in range(40)]
VAL = [(100, 0), (101, 0), (102, 0), (103, 1), (104, 1)]


def refused(config, *parts):
    """The one line that load_data answers with."""
    with pytest.raises(ValueError, match=r".") as told:
        load_data(config)
    line = str(told.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def test_class_folders_are_classes_in_alphabetical_order(folder_config):
    data = load_data(folder_config())
    assert data.class_names == ("cat", "dog")
    assert contents(data.train) == TRAIN
    assert contents(data.val) == VAL
    assert len(data.test) == 0


def test_files_are_normalised_with_the_constants_of_imagenet(folder_config):
    data = load_data(folder_config())
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    # (1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225
    assert data.normalise(white)[0, :, 0, 0].tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-4)


def test_files_default_to_224_pixels_and_resized_crops(folders):
    data = load_data(Config(dataset="imagefolder", data_dir=str(folders), train_img_size=200))
    assert (data.img_size, data.train_img_size, data.augment) == (224, 200, "resized-crop")


def test_files_in_folders_of_a_class_and_other_files(folders, folder_config):
    inner = folders / "train" / "dog" / "zz"
    inner.mkdir()
    (inner / "x.PNG").write_bytes(png(77))
    (folders / "train" / "dog" / "notes.txt").write_text("no image")
    (folders / "train" / ".cache").mkdir()
    assert contents(load_data(folder_config()).train) == [*TRAIN, (77, 1)]


def test_held_out_images_are_stratified_and_the_same_in_every_run(folders, folder_config):
    shutil.rmtree(folders / "val")
    data = load_data(folder_config(val_fraction=0.2))
    assert data.val.labels.bincount().tolist() == [4, 4]
    assert sorted(contents(data.train) + contents(data.val)) == TRAIN
    assert contents(load_data(folder_config(val_fraction=0.2, seed=9)).val) == contents(data.val)


def test_a_share_of_the_training_images(folder_config):
    data = load_data(folder_config(train_images=8))
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert set(contents(data.train)) < set(TRAIN)
    assert contents(data.val) == VAL


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_the_validation_folder(folders, folder_config, name):
    (folders / "val").rename(folders / name)
    data = load_data(folder_config())
    assert contents(data.val) == VAL
    assert data.test is data.val if name == "test" else len(data.test) == 0


def test_a_test_folder_beside_a_validation_folder(folders, folder_config):
    write_folders(folders / "test", {"cat": 1, "dog": 1}, first=200)
    assert contents(load_data(folder_config()).test) == [(200, 0), (201, 1)]


def test_a_test_folder_without_classes_is_left_alone(folders, folder_config):
    (folders / "test").mkdir()
    (folders / "test" / "000.png").write_bytes(png(1))
    assert len(load_data(folder_config()).test) == 0


def test_a_validation_folder_without_classes_is_told(folders, folder_config):
    for path in (folders / "val").glob("*/*.png"):
        path.rename(folders / "val" / path.name)
    for name in ("cat", "dog"):
        (folders / "val" / name).rmdir()
    data = load_data(folder_config(val_fraction=0.2))
    assert data.notes[0] == f"{folders / 'val'} has no class folders but hidden ones, if any; it is left alone"
    assert len(data.val) == 8


@pytest.mark.parametrize(("name", "inner"), [("cifar10", "cifar-10-batches-py"), ("fashion_mnist", "FashionMNIST/raw")])
def test_a_pipe_among_the_files_of_torchvision_is_refused(tmp_path, name, inner):
    (tmp_path / inner).mkdir(parents=True)
    os.mkfifo(tmp_path / inner / "train")
    refused(Config(dataset=name, data_dir=str(tmp_path)), "train is a pipe, socket or device, not a regular file")


def test_damaged_files_of_torchvision_are_told(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (folder / f"{part}-{kind}-ubyte").write_bytes(b"no numbers at all")
    refused(Config(dataset="fashion_mnist", data_dir=str(tmp_path)), "fashion_mnist is not complete in ")


def test_splits_by_other_names(folders, folder_config):
    (folders / "train").rename(folders / "a")
    (folders / "val").rename(folders / "b")
    data = load_data(folder_config(train_split="a", val_split="b"))
    assert (contents(data.train), contents(data.val)) == (TRAIN, VAL)


def test_differing_class_folders_are_named(folders, folder_config):
    (folders / "val" / "dog").rename(folders / "val" / "wolf")
    refused(folder_config(), "missing there: dog; only there: wolf; give both the same class names")


def test_another_class_count_is_named(folder_config):
    refused(folder_config(num_classes=5), "num_classes 5, but imagefolder has 2 classes; give --num-classes 2")


def test_an_empty_class_is_named(folders, folder_config):
    for split in ("train", "val"):
        (folders / split / "eel").mkdir()
    refused(folder_config(), "1 of 3 classes have no image in train: eel; add images")


def test_an_empty_set_is_named(folders, folder_config):
    shutil.rmtree(folders / "train")
    (folders / "train" / "cat").mkdir(parents=True)
    refused(folder_config(), "no image in train; expected train/CLASS/*.jpg")


def test_a_missing_data_dir_is_named(tmp_path, folder_config):
    refused(folder_config(data_dir=str(tmp_path / "no")), f"data_dir {tmp_path / 'no'} is no folder", "train/CLASS")


def test_a_missing_split_is_told_with_what_is_there(folders, folder_config):
    (folders / "train").rename(folders / "training")
    refused(folder_config(), "expected train/CLASS/*.jpg", "there is training, val")
    refused(folder_config(train_split="training", val_split="dev"), "expected dev/CLASS/*.jpg")


def test_too_few_images_to_hold_out(folders, folder_config):
    shutil.rmtree(folders / "val")
    refused(folder_config(val_fraction=0.02), "cannot hold out 1 of 40 images, every class in both", "--val-fraction")


# Tar shards.


@pytest.fixture
def shards(tmp_path):
    """The images of `folders` in two training shards and one for validation."""

    def write(train=TRAIN, val=VAL):
        for name, part in (("train-0", train[:15]), ("train-1", train[15:]), ("val-0", val)):
            members = {}
            for red, label in part:
                members[f"s/{red:03}.png"] = png(red)
                members[f"s/{red:03}.cls"] = str(label).encode()
            write_shard(tmp_path / f"{name}.tar", members)
        return tmp_path

    return write


def shard_config(folder, **settings):
    return Config(dataset="webdataset", data_dir=str(folder), img_size=8, batch_size=4, **settings)


def test_shards_hold_what_the_folders_hold(shards):
    data = load_data(shard_config(shards()))
    assert (contents(data.train), contents(data.val)) == (TRAIN, VAL)
    assert data.class_names == ("0", "1")


def test_labels_in_json(tmp_path):
    members = {}
    for number in range(4):
        members[f"{number}.json"] = json.dumps({"label": number % 2, "text": "x"}).encode()
        members[f"{number}.png"] = png(number)
    write_shard(tmp_path / "train-0.tar", members)
    data = load_data(shard_config(tmp_path, val_fraction=0))
    assert contents(data.train) == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_members_are_named_with_their_shard(shards):
    data = load_data(shard_config(shards()))
    assert data.train.name(20) == f"{shards() / 'train-1.tar'}!s/020.png"
    assert data.train.subset(torch.tensor([20])).name(0) == data.train.name(20)


def test_a_label_out_of_range_is_named(shards):
    folder = shards(val=[*VAL, (105, 9)])
    refused(shard_config(folder), f"label 9 of image {folder / 'val-0.tar'}!s/105.png is not from 0 to 1")
    refused(shard_config(shards(train=[*TRAIN, (50, -1)])), "label -1 of image", "is not from 0 to 1")


def test_a_class_that_no_label_names(shards):
    refused(shard_config(shards(), num_classes=3), "1 of 3 classes have no image in train: 2")


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"a.png": png(1)}, "image {}!a.png has no label: put a .cls or .json"),
        ({"a.png": png(1), "a.cls": b"cat"}, "label {}!a.cls holds b'cat'; expected a number as text"),
        (
            {"a.png": png(1), "a.json": b"[1]"},
            "label {}!a.json holds b'[1]'; expected an object with a number as \"label\"",
        ),
        ({"a.txt": b"x"}, "no image in train; expected train*.tar"),
    ],
)
def test_faulty_shards_are_told(tmp_path, members, told):
    write_shard(tmp_path / "train.tar", members)
    refused(shard_config(tmp_path), told.format(tmp_path / "train.tar"))


def test_a_shard_that_is_cut_off_is_told(shards):
    shard = shards() / "train-1.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    refused(shard_config(shard.parent), str(shard))


def test_missing_shards_are_told(tmp_path):
    (tmp_path / "readme").touch()
    refused(shard_config(tmp_path), "expected train*.tar with KEY.jpg and KEY.cls inside; there is readme")


# Tables of Hugging Face's datasets.


@pytest.fixture
def tables(tmp_path, monkeypatch):
    hub = pytest.importorskip("datasets")
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))

    def build(part, *, label=None):
        columns = {"image": [{"bytes": png(red), "path": None} for red, _ in part], "label": [y for _, y in part]}
        label = label or hub.ClassLabel(names=["cat", "dog"])
        return hub.Dataset.from_dict(columns, features=hub.Features(image=hub.Image(), label=label))

    return hub, build, tmp_path / "set"


def table_config(folder, **settings):
    return Config(dataset="hf", data_dir=str(folder), img_size=8, batch_size=4, **settings)


def test_saved_splits_hold_what_the_folders_hold(tables):
    hub, build, folder = tables
    hub.DatasetDict(train=build(TRAIN), validation=build(VAL), test=build([(7, -1)])).save_to_disk(str(folder))
    data = load_data(table_config(folder))
    assert (contents(data.train), contents(data.val)) == (TRAIN, VAL)
    assert (data.class_names, len(data.test)) == (("cat", "dog"), 0)
    assert data.val.name(3) == "row 3 of validation"


def test_a_set_without_splits_is_for_training(tables):
    _, build, folder = tables
    build(TRAIN).save_to_disk(str(folder))
    data = load_data(table_config(folder, val_fraction=0.25))
    assert sorted(contents(data.train) + contents(data.val)) == TRAIN
    assert len(data.val) == 10


def test_parquet_files(tables):
    _, build, folder = tables
    folder.mkdir()
    build(TRAIN[:15]).to_parquet(str(folder / "train-00000.parquet"))
    build(TRAIN[15:]).to_parquet(str(folder / "train-00001.parquet"))
    build(VAL).to_parquet(str(folder / "validation-00000.parquet"))
    data = load_data(table_config(folder))
    assert (contents(data.train), contents(data.val)) == (TRAIN, VAL)


def test_bare_numbers_and_texts_as_labels(tables):
    hub, build, folder = tables
    build(TRAIN, label=hub.Value("int64")).save_to_disk(str(folder / "a"))
    build([(red, "zebra" if y == 0 else "ape") for red, y in TRAIN], label=hub.Value("string")).save_to_disk(
        str(folder / "b")
    )
    assert load_data(table_config(folder / "a", val_fraction=0)).class_names == ("0", "1")
    named = load_data(table_config(folder / "b", val_fraction=0))
    assert named.class_names == ("ape", "zebra")
    assert contents(named.train)[0] == (0, 1)


def test_wrong_columns_are_told_with_those_there(tables):
    _, build, folder = tables
    build(TRAIN).save_to_disk(str(folder))
    refused(table_config(folder, input_key="img"), "--input-key 'img' is not a column", "give one of image, label")
    refused(table_config(folder, target_key="y"), "--target-key 'y' is not a column", "give one of image, label")
    refused(table_config(folder, input_key="label"), "column 'label' holds", "give another --input-key")
    refused(table_config(folder, target_key="image"), "column 'image' holds", "give another --target-key")


def test_a_folder_without_tables_is_told(tmp_path):
    pytest.importorskip("datasets")
    refused(table_config(tmp_path), "expected what datasets' save_to_disk wrote, with a split train")


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_text_is_no_label(tables, text):
    hub, build, folder = tables
    part = [(red, "ape" if red else text) for red, _ in TRAIN]
    build(part, label=hub.Value("string")).save_to_disk(str(folder))
    refused(table_config(folder), "row 0 of train has an empty label in column 'label'; remove or label it")


def test_a_label_of_a_table_that_is_no_class_is_refused(tables):
    hub, build, folder = tables
    build([(red, 2**62 + red) for red, _ in TRAIN], label=hub.Value("int64")).save_to_disk(str(folder))
    refused(table_config(folder), f"label {2**62} of image row 0 of train: numbers of classes are below 1,000,000")


def test_a_damaged_table_is_told(tables):
    _, build, folder = tables
    build(TRAIN).save_to_disk(str(folder))
    next(folder.glob("*.arrow")).write_bytes(b"no table")
    refused(table_config(folder), f"split train in {folder} cannot be read")


# Class folders without a split above them.


@pytest.fixture
def flat(tmp_path):
    """20 cats and 20 dogs, reds 0 to 39, in tmp_path/cat and tmp_path/dog."""
    write_folders(tmp_path, {"cat": 20, "dog": 20})
    return tmp_path


def flat_config(folder, **settings):
    return Config(dataset="imagefolder", data_dir=str(folder), img_size=8, batch_size=4, **settings)


def test_flat_class_folders_are_trained_on_and_validated_with(flat):
    data = load_data(flat_config(flat))
    assert data.class_names == ("cat", "dog")
    assert data.val.labels.tolist().count(0) == data.val.labels.tolist().count(1) == 2  # a tenth of each class
    assert sorted(contents(data.train) + contents(data.val)) == TRAIN
    assert data.notes == (
        f"no train/ in {flat}: its 2 folders are taken as the classes",
        "4 of 40 images are held out for validation (--val-fraction 0.1)",
    )


def test_flat_class_folders_with_folders_inside_and_beside_them(flat):
    (flat / "dog" / "puppies").mkdir()
    (flat / "dog" / "puppies" / "x.jpg").write_bytes(png(77))
    (flat / ".thumbnails").mkdir()
    (flat / "notes.txt").write_text("no image")
    data = load_data(flat_config(flat, val_fraction=0.0))
    assert contents(data.train) == [*TRAIN, (77, 1)]


@pytest.mark.parametrize("name", ["test", "Validation", "valid", "dev"])
def test_a_folder_named_like_a_split_is_no_class(flat, name):
    write_folders(flat / name, {"cat": 1, "dog": 1})
    refused(flat_config(flat), "expected train/CLASS/*.jpg", "there is")


def test_folders_of_folders_are_no_classes(flat, tmp_path):
    (tmp_path / "up").mkdir()
    flat_one = tmp_path / "up" / "one"
    (flat / "cat").rename(tmp_path / "cat-moved")
    write_folders(flat_one, {"cat": 2, "dog": 2})
    refused(flat_config(tmp_path / "up"), "expected train/CLASS/*.jpg", "there is one")


def test_flat_folders_are_not_taken_where_a_split_is_asked_for(flat):
    refused(flat_config(flat, val_split="val"), "expected train/CLASS/*.jpg")


def test_a_single_class_is_refused(tmp_path):
    write_folders(tmp_path / "train", {"cat": 20})
    refused(flat_config(tmp_path), "cat is the only class of train; give at least 2")


def test_a_label_of_a_billion_is_refused_without_a_billion_names(tmp_path):
    write_shard(tmp_path / "train-0.tar", {"a.png": png(0), "a.cls": b"0", "b.png": png(1), "b.cls": b"1000000000"})
    config = Config(dataset="webdataset", data_dir=str(tmp_path))
    refused(
        config, "train-0.tar!b.png: numbers of classes are below 1,000,000; correct the label", "label 1000000000 of"
    )


def test_what_is_held_out_of_a_training_folder_is_told(folders, folder_config):
    assert load_data(folder_config()).notes == ()
    shutil.rmtree(folders / "val")
    told = "8 of 40 images are held out for validation (--val-fraction 0.2)"
    assert load_data(folder_config(val_fraction=0.2)).notes == (told,)
