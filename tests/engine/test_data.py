"""Image sets and batches: splits, order, crops and what is said when files are missing."""

import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from unloaf.engine.data import (
    EvalBatches,
    augmentation,
    crop_and_flip,
    epoch_order,
    load_data,
    train_batches,
)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


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


def test_digits_splits_do_not_depend_on_anything(digits):
    torch.manual_seed(99)
    again = load_data("digits")
    assert torch.equal(again.test.images, digits.test.images)


def batches(data, **kwargs):
    return list(train_batches(data, **{"batch_size": 64, "seed": 0, "epoch": 1} | kwargs))


def test_same_seed_and_epoch_give_the_same_batches(digits):
    first = batches(digits)
    torch.rand(3)
    for (x, y), (u, v) in zip(first, batches(digits), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


@pytest.mark.parametrize("other", [{"epoch": 2}, {"seed": 1}])
def test_another_epoch_or_seed_gives_other_order_and_crops(digits, other):
    drawn = {"seed": 0, "epoch": 1}
    count = len(digits.train)
    assert not torch.equal(epoch_order(count, **drawn), epoch_order(count, **(drawn | other)))
    draws = [augmentation(count, pad=1, flip=True, **numbers) for numbers in (drawn, drawn | other)]
    assert not torch.equal(*draws)


def test_seed_and_epoch_do_not_trade_places():
    assert not torch.equal(epoch_order(100, seed=1, epoch=2), epoch_order(100, seed=2, epoch=1))


def test_order_is_a_permutation():
    assert epoch_order(50, seed=3, epoch=7).sort().values.tolist() == list(range(50))


def test_leftover_images_are_left_out(digits):
    sizes = [len(y) for _, y in batches(digits)]
    assert sizes == [64] * 14  # 897 = 14 * 64 + 1


def test_batch_larger_than_the_set_is_refused(digits):
    with pytest.raises(ValueError, match="batch_size 898 exceeds the 897 training images of digits"):
        next(train_batches(digits, batch_size=898, seed=0, epoch=1))


def test_crop_and_flip_by_hand():
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8).expand(4, 1, 2, 2)
    draws = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [2, 1, 1]])
    out = crop_and_flip(image, draws, pad=1)
    assert out[:, 0].tolist() == [[[1, 2], [3, 4]], [[2, 1], [4, 3]], [[0, 0], [0, 1]], [[4, 3], [0, 0]]]


def test_crops_reach_every_corner_and_mirror_half():
    draws = augmentation(3000, pad=2, flip=True, seed=0, epoch=1)
    assert {tuple(row) for row in draws.tolist()} == {(t, s, m) for t in range(5) for s in range(5) for m in (0, 1)}
    # Four standard deviations of 3,000 fair coins are 0.037.
    assert abs(draws[:, 2].float().mean() - 0.5) < 0.037


def test_digits_are_never_mirrored(digits):
    assert not digits.flip


def test_normalised_training_images_have_mean_0_and_spread_1(digits):
    x = digits.normalise(digits.train.images)
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1, abs=1e-5)


def test_eval_batches_visit_every_image_once_in_order_and_repeatedly(digits):
    loader = EvalBatches(digits.test, digits.normalise, 256)
    for _ in range(2):
        assert torch.equal(torch.cat([y for _, y in loader]), digits.test.labels)
    assert len(loader) == len(list(loader)) == 3


def test_img_size_resizes():
    data = load_data("digits", img_size=32)
    assert next(train_batches(data, batch_size=2, seed=0, epoch=1))[0].shape == (2, 1, 32, 32)


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """Ten images in the format of CIFAR-100: red planes of 0, 1, 2, ..."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 40), ("test", 10)):
        pixels = np.zeros((count, 3, 32, 32), np.uint8)
        pixels[:, 0] = np.arange(count)[:, None, None]
        labels = [index % 2 for index in range(count)]
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(count, -1), "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b"]}))
    # torchvision would refuse files whose sums are not the published ones.
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": None})
    return tmp_path


def test_cifar_files_are_read_with_channels_first(tiny_cifar):
    data = load_data("cifar100", data_dir=str(tiny_cifar), val_fraction=0.1)
    assert data.test.images.shape == (10, 3, 32, 32)
    assert data.test.images[:, 0, 5, 5].tolist() == list(range(10))
    assert data.test.labels.tolist() == [0, 1] * 5
    assert data.num_classes == 100


def test_cifar_validation_images_come_from_the_training_images(tiny_cifar):
    data = load_data("cifar100", data_dir=str(tiny_cifar), val_fraction=0.1)
    train, val = (set(split.images[:, 0, 0, 0].tolist()) for split in (data.train, data.val))
    assert (len(train), len(val)) == (36, 4)
    assert train | val == set(range(40))


def test_no_validation_images_on_request(tiny_cifar):
    data = load_data("cifar100", data_dir=str(tiny_cifar), val_fraction=0.0)
    assert (len(data.train), len(data.val)) == (40, 0)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python"), ("fashion_mnist", "FashionMNIST/raw")],
)
def test_missing_files_are_named(tmp_path, name, folder):
    with pytest.raises(ValueError, match=f"{name} is not complete in {tmp_path}: expected {tmp_path / folder} with"):
        load_data(name, data_dir=str(tmp_path))


def test_unknown_set_is_named():
    with pytest.raises(ValueError, match="dataset 'mnist': known are digits, cifar10, cifar100, fashion_mnist"):
        load_data("mnist")
