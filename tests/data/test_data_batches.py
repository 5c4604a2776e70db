"""Batches: each image where it belongs, and the same ones however they are read."""

import pickle

import pytest
import torch

from image_files import reds
from unloaf.config import Config
from unloaf.data import EvalBatches, TrainBatches, load_data
from unloaf.data.augment import epoch_order
from unloaf.data.reading import Keys, TrainReader

# The number of cores of this machine is not the test's business.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def train(data, epoch=1, start=0, rank=0, world=1, **settings):
    """The steps of an epoch, as (x, y) of each accumulated batch."""
    config = Config(**{"batch_size": 64} | settings)
    return list(TrainBatches(data, config, device="cpu", rank=rank, world=world).epoch(epoch, start=start))


def equal(left, right):
    pairs = [(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)]
    return bool(pairs) and all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in pairs)


# What a batch holds. Digits are told apart by their labels, in the order of release 0.1.0.


def test_order_and_labels_are_those_of_the_published_figures(digits):
    steps = train(digits, epoch=2, seed=3)
    assert [len(step) for step in steps] == [1] * 14  # 897 = 14 * 64 + 1
    assert steps[-1][0].y[:10].tolist() == [4, 8, 1, 0, 0, 7, 2, 4, 8, 5]


def test_crops_are_those_of_the_published_figures(digits):
    # Rows of release 0.1.0 for images 0 and 895 at seed 0, epoch 1: (0, 0) and (1, 0), with one pixel of padding.
    order = epoch_order(897, seed=0, epoch=1).tolist()
    steps = train(digits)
    for image, (top, left) in ((0, (0, 0)), (895, (1, 0))):
        padded = torch.zeros(1, 10, 10, dtype=torch.uint8)
        padded[:, 1:9, 1:9] = digits.train.images[image]
        expected = digits.normalise(padded[None, :, top : top + 8, left : left + 8])
        step, row = divmod(order.index(image), 64)
        assert torch.equal(steps[step][0].x[row], expected[0])


@pytest.mark.parametrize("other", [{"epoch": 2}, {"seed": 1}])
def test_another_epoch_or_seed_gives_another_order(digits, other):
    assert not equal(train(digits), train(digits, **other))


def test_an_epoch_can_be_read_again(digits):
    batches = TrainBatches(digits, Config(batch_size=64), device="cpu")
    first = list(batches.epoch(1))
    torch.rand(3)
    list(batches.epoch(2))
    assert equal(first, list(batches.epoch(1)))


def test_reading_leaves_the_global_generator_alone(digits):
    state = torch.get_rng_state()
    train(digits)
    assert torch.equal(state, torch.get_rng_state())


def test_too_few_images_for_a_step(digits):
    with pytest.raises(
        ValueError, match=r"^a step takes 1024 images \(128 x 2 devices x 4 batches\), but digits has 897"
    ):
        TrainBatches(digits, Config(batch_size=128, grad_accum_steps=4), device="cpu", world=2)


@pytest.mark.parametrize(("epoch", "start"), [(0, 0), (1, 15), (1, -1)])
def test_positions_outside_the_epoch_are_refused(digits, epoch, start):
    with pytest.raises(ValueError, match=r"epochs count from 1, start is from 0 to 14"):
        TrainBatches(digits, Config(batch_size=64), device="cpu").epoch(epoch, start=start)


# However they are read: the same images.

# A set in memory cut in batches, the same image by image, and files.
READERS = {
    "memory": {"batch_size": 64},
    "aa": {"batch_size": 64, "aa": "rand-m9-mstd0.5", "color_jitter": 0.4, "reprob": 0.5},
    "resized": {"batch_size": 64, "augment": "resized-crop", "img_size": 12},
}


@pytest.mark.parametrize("name", READERS)
def test_workers_change_nothing_in_memory(digits, name):
    data = load_data(Config(**READERS[name]))
    assert equal(train(data, **READERS[name]), train(data, workers=2, **READERS[name]))


def test_workers_change_nothing_with_files(folder_config):
    settings = {"lighting": 0.1, "color_jitter": 0.4, "aa": "trivial", "workers": 0, "mixup": 0.2, "cutmix": 1.0}
    config = folder_config(**settings)
    data = load_data(config)
    several = folder_config(**settings | {"workers": 2})
    one, two = (TrainBatches(data, c, device="cpu") for c in (config, several))
    for epoch in (1, 2):  # the workers of the first epoch read the second too
        assert equal(list(one.epoch(epoch)), list(two.epoch(epoch)))


def test_an_abandoned_epoch_does_not_leak_into_the_next(folder_config):
    data = load_data(folder_config())
    batches = TrainBatches(data, folder_config(workers=2), device="cpu")
    next(batches.epoch(1))
    expected = list(TrainBatches(data, folder_config(), device="cpu").epoch(2))
    assert equal(list(batches.epoch(2)), expected)


def test_images_on_the_device_are_the_same(digits):
    assert equal(train(digits), train(digits, device_data=True))


@pytest.mark.parametrize(
    "settings", [READERS["memory"], READERS["aa"], {"batch_size": 32, "mixup": 1.0, "aug_repeats": 3}]
)
def test_an_epoch_continues_where_it_was_left(digits, settings):
    assert equal(train(digits, **settings)[5:], train(digits, start=5, **settings))


def test_what_was_done_is_not_read_again(folders, folder_config):
    order = epoch_order(40, seed=0, epoch=1).tolist()
    files = sorted((folders / "train").rglob("*.png"))
    data = load_data(folder_config())
    for position in range(8):  # two steps of 4
        files[order[position]].unlink()
    assert len(train(data, start=2, **{"batch_size": 4, "dataset": "imagefolder", "data_dir": "."})) == 8


def test_a_reader_survives_the_way_to_a_worker(digits):
    config = Config(aa="uniform", reprob=0.5)
    reader = TrainReader(digits, config, digits.train)
    keys = Keys(1, list(range(8)), [0] * 8)
    sent = pickle.loads(pickle.dumps(reader))
    assert torch.equal(sent.__getitems__(keys).images, reader.__getitems__(keys).images)


# Several processes and accumulation: G = 2 ranks x 2 parts x 8 images.


def test_two_processes_together_see_what_one_sees(digits):
    alone = train(digits, batch_size=32)
    ranks = [train(digits, batch_size=8, grad_accum_steps=2, rank=rank, world=2) for rank in (0, 1)]
    assert len(alone) == len(ranks[0]) == len(ranks[1]) == 28
    for [whole], *shares in zip(alone, *ranks, strict=True):
        rebuilt = torch.empty_like(whole.x)
        for rank, parts in enumerate(shares):
            for part, batch in enumerate(parts):
                for j in range(8):
                    rebuilt[part * 2 * 8 + j * 2 + rank] = batch.x[j]
        assert torch.equal(rebuilt, whole.x)


def test_a_global_batch_is_split_over_the_processes(digits):
    batches = TrainBatches(digits, Config(batch_size=16, global_batch_size=128), device="cpu", rank=1, world=2)
    assert batches.steps_per_epoch == 897 // 128
    assert [[len(batch.y) for batch in step] for step in batches.epoch(1)] == [[16] * 4] * 7


# Repeated augmentation.


def test_each_image_comes_several_times_in_its_own_crops(folder_config):
    config = folder_config(aug_repeats=3, augment="resized-crop", scale=(0.2, 0.5))
    data = load_data(config)
    batches = [batch for step in TrainBatches(data, config, device="cpu").epoch(1) for batch in step]
    seen = [number for batch in batches for number in reds(batch, data)]
    order = epoch_order(40, seed=0, epoch=1).tolist()
    assert seen == [order[position // 3] for position in range(40)]


def test_repeats_in_memory_are_cropped_differently(digits):
    x = torch.cat([step[0].x for step in train(digits, aug_repeats=2, batch_size=2)])
    same = [torch.equal(a, b) for a, b in zip(x[::2], x[1::2], strict=True)]
    # 9 possible crops: two agree in 1/9 of 448 pairs, 50 +- 4 * 6.7.
    assert 23 < sum(same) < 77


# R24: nobody shares randomness.


def test_no_two_epochs_workers_or_images_share_randomness(folder_config):
    config = folder_config(augment="none", reprob=1.0, workers=2)
    batches = TrainBatches(load_data(config), config, device="cpu")
    x = torch.cat([batch.x for epoch in (1, 2, 3) for step in batches.epoch(epoch) for batch in step])
    # Erased pixels hold noise: what is left when each image's constant background is taken away tells the draw.
    prints = {(image[0] - image[0].flatten().mode().values).numpy().tobytes() for image in x}
    assert len(prints) == len(x) == 120


def test_crops_of_two_epochs_differ(digits):
    tables = [torch.cat([step[0].x for step in train(digits, epoch=epoch)]) for epoch in (1, 2)]
    assert len({image.numpy().tobytes() for table in tables for image in table}) > 1.6 * 896


# mixup and cutmix.


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}])
def test_mixed_targets_are_shares_that_sum_to_1(digits, settings):
    for [batch] in train(digits, **settings):
        assert batch.y.shape == (64, 10)
        assert torch.allclose(batch.y.sum(1), torch.ones(64), atol=1e-6)


def test_mixed_images_are_reproducible_and_differ_between_steps(digits):
    first = train(digits, mixup=0.8)
    torch.rand(3)
    assert equal(first, train(digits, mixup=0.8))
    assert len({float(batch.y.max(dim=1).values.min()) for [batch] in first}) > 10


def test_mixing_by_hand(digits):
    # y = lam * own + (1 - lam) * the mirrored batch's, and so is x.
    [plain], [mixed] = train(digits, augment="none")[0], train(digits, augment="none", mixup=0.8)[0]
    own = torch.nn.functional.one_hot(plain.y, 10).float()
    row = int((plain.y != plain.y.flip(0)).nonzero()[0])
    lam = float(mixed.y[row, plain.y[row]])
    assert 0 < lam < 1
    assert torch.allclose(mixed.y, lam * own + (1 - lam) * own.flip(0), atol=1e-6)
    assert torch.allclose(mixed.x, lam * plain.x + (1 - lam) * plain.x.flip(0), atol=1e-5)


def test_mixing_ends_at_its_epoch(digits):
    settings = {"mixup": 0.8, "mixup_off_epoch": 3}
    shares = [batch.y.max(dim=1).values for [batch] in train(digits, epoch=2, **settings)]
    assert any((largest < 1).any() for largest in shares)
    for [plain], [left] in zip(train(digits, epoch=3), train(digits, epoch=3, **settings), strict=True):
        assert torch.equal(left.x, plain.x)
        assert torch.equal(left.y, torch.nn.functional.one_hot(plain.y, 10).float())


def test_labels_stay_smooth_where_mixing_has_ended(digits):
    # Szegedy et al. 2016: (1 - 0.2) + 0.2 / 10 for the label, 0.2 / 10 for each other class.
    [plain], [left] = train(digits, epoch=3)[0], train(digits, epoch=3, cutmix=1.0, mixup_off_epoch=3, smoothing=0.2)[0]
    assert torch.equal(left.x, plain.x)
    assert torch.allclose(left.y, torch.nn.functional.one_hot(plain.y, 10) * 0.8 + 0.02)


# Evaluation.


def test_evaluation_visits_every_image_once_in_order_and_repeatedly(digits):
    batches = EvalBatches(digits.test, digits, Config(), device="cpu", batch_size=256)
    for _ in range(2):
        read = list(batches)
        assert torch.equal(torch.cat([y for _, y in read]), digits.test.labels)
        assert torch.equal(torch.cat([x for x, _ in read]), digits.normalise(digits.test.images))
    assert len(batches) == len(read) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_an_evaluation_and_padding_counts_nowhere(folder_config, workers):
    config = folder_config(workers=workers)
    data = load_data(config)
    ranks = [list(EvalBatches(data.val, data, config, device="cpu", rank=r, world=3, batch_size=1)) for r in range(3)]
    assert [[reds(batch, data) for batch in rank] for rank in ranks] == [
        [[100], [103]],
        [[101], [104]],
        [[102], [100]],
    ]
    assert [[batch.y.tolist() for batch in rank] for rank in ranks] == [[[0], [1]], [[0], [1]], [[0], [-100]]]


def test_an_empty_split_has_no_batches(folder_config):
    data = load_data(folder_config())
    batches = EvalBatches(data.test, data, folder_config(), device="cpu")
    assert (len(batches), list(batches)) == (0, [])


def test_sides_of_training_and_validation_batches():
    config = Config(img_size=32, train_img_size=24, batch_size=4)
    data = load_data(config)
    assert train(data, img_size=32, train_img_size=24)[0][0].x.shape == (64, 1, 24, 24)
    assert next(iter(EvalBatches(data.val, data, config, device="cpu"))).x.shape == (4, 1, 32, 32)
