"""Image sets in memory: splits, sums, and what is said when files are missing."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from unloaf.config import Config
from unloaf.data import load_data
from unloaf.data.images import ImageSet
from unloaf.data.in_memory import take_share


def keys(images):
    return {image.numpy().tobytes() for image in images.images}


def test_digits_has_all_1797_images_in_disjoint_splits(digits):
    splits = [digits.train, digits.val, digits.test]
    assert [len(split) for split in splits] == [897, 300, 600]
    assert len(set.union(*map(keys, splits))) == sum(len(keys(split)) for split in splits) == 1797


def test_digits_splits_are_stratified(digits):
    # The 1,797 images hold 174 to 183 of each digit.
    for split in (digits.train, digits.val, digits.test):
        share = split.labels.bincount(minlength=10) / len(split)
        assert 0.09 < share.min() <= share.max() < 0.11


def test_digits_splits_are_those_of_the_published_figures(digits):
    # Computed by release 0.1.0.
    train, test = (
        hashlib.sha256(t.numpy().tobytes()).hexdigest()[:8] for t in (digits.train.images, digits.test.labels)
    )
    assert (train, test) == ("3f717a9a", "3f81e180")


def test_digits_splits_do_not_depend_on_anything(digits):
    torch.manual_seed(99)
    again = load_data(Config(seed=5))
    assert torch.equal(again.test.images, digits.test.images)


def test_digits_are_never_mirrored():
    assert load_data(Config(hflip=1.0)).hflip == 0


def test_normalised_training_images_have_mean_0_and_spread_1(digits):
    x = digits.normalise(digits.train.images)
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1, abs=1e-5)


def test_sides_default_to_those_of_the_images(digits):
    assert (digits.img_size, digits.train_img_size, digits.in_chans) == (8, 8, 1)


def test_the_training_side_follows_the_validation_side_unless_given():
    data = load_data(Config(img_size=32))
    assert (data.img_size, data.train_img_size) == (32, 32)
    assert load_data(Config(img_size=32, train_img_size=24)).train_img_size == 24


def test_a_random_choice_of_interpolation_is_refused_where_batches_are_resized():
    with pytest.raises(ValueError, match=r"^interpolation 'random' .* digits is resized in batches; give bilinear"):
        load_data(Config(img_size=32, interpolation="random"))


def test_another_class_count_is_refused():
    with pytest.raises(ValueError, match=r"^num_classes 7, but digits has 10 classes; give --num-classes 10"):
        load_data(Config(num_classes=7))


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """Forty images in the format of CIFAR-100: red planes of 0, 1, 2, ..."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 40), ("test", 10)):
        pixels = np.zeros((count, 3, 32, 32), np.uint8)
        pixels[:, 0] = np.arange(count)[:, None, None]
        labels = [index % 2 for index in range(count)]
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(count, -1), "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{number}" for number in range(100)]}))
    # torchvision would refuse files whose sums are not the published ones.
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": None})
    return tmp_path


def cifar(folder, **settings):
    return load_data(Config(dataset="cifar100", data_dir=str(folder), **settings))


def test_cifar_files_are_read_with_channels_first(tiny_cifar):
    data = cifar(tiny_cifar)
    assert data.test.images.shape == (10, 3, 32, 32)
    assert data.test.images[:, 0, 5, 5].tolist() == list(range(10))
    assert data.test.labels.tolist() == [0, 1] * 5
    assert (data.num_classes, data.class_names[99]) == (100, "class99")


def test_cifar_validation_images_come_from_the_training_images(tiny_cifar):
    data = cifar(tiny_cifar, val_fraction=0.1)
    train, val = (set(split.images[:, 0, 0, 0].tolist()) for split in (data.train, data.val))
    assert (len(train), len(val)) == (36, 4)
    assert train | val == set(range(40))


def test_no_validation_images_on_request(tiny_cifar):
    data = cifar(tiny_cifar, val_fraction=0.0)
    assert (len(data.train), len(data.val)) == (40, 0)


def test_a_share_of_the_training_images_is_of_every_class_and_always_the_same(tiny_cifar):
    data, again = (cifar(tiny_cifar, train_images=12, seed=seed) for seed in (0, 9))
    whole = cifar(tiny_cifar)
    assert data.train.labels.bincount().tolist() == [6, 6]
    assert torch.equal(data.train.images, again.train.images)
    assert keys(data.train) < keys(whole.train)
    assert keys(data.val) == keys(whole.val)
    assert data.mean[0] == pytest.approx(float(data.train.images[:, 0].float().mean()))


def test_a_share_of_uneven_classes_has_one_image_of_each_at_least():
    labels = torch.tensor([0] * 60 + [1] * 39 + [2])
    images = ImageSet(torch.zeros(100, 1, 1, 1, dtype=torch.uint8), labels)
    # One for the third class; of the other nine 60/99 are 5.5 and 39/99 are 3.5.
    assert take_share(images, 10).labels.bincount().tolist() in ([5, 4, 1], [6, 3, 1])
    assert take_share(images, 3).labels.tolist() == [0, 1, 2]
    assert take_share(images, 100).labels.tolist() == labels.tolist()


@pytest.mark.parametrize("count", [2, 101])
def test_a_share_that_cannot_be(count):
    images = ImageSet(torch.zeros(100, 1, 1, 1, dtype=torch.uint8), torch.arange(100) % 3)
    with pytest.raises(ValueError, match=rf"^train_images {count}: give from 3, one for each class, to 100, what is"):
        take_share(images, count)


@pytest.mark.parametrize(
    ("augment", "fed"),
    [("auto", ("pad-crop", 4, 0.5)), ("none", ("none", 0, 0)), ("resized-crop", ("resized-crop", 0, 0.5))],
)
def test_how_cifar_images_are_fed(tiny_cifar, augment, fed):
    data = cifar(tiny_cifar, augment=augment)
    assert (data.augment, data.pad, data.hflip) == fed


@pytest.mark.parametrize(
    ("name", "folder"),
    [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python"), ("fashion_mnist", "FashionMNIST/raw")],
)
def test_missing_files_are_named(tmp_path, name, folder):
    with pytest.raises(ValueError, match=f"{name} is not complete in {tmp_path}: expected {tmp_path / folder} with"):
        load_data(Config(dataset=name, data_dir=str(tmp_path)))
