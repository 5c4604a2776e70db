"""What augmentation does to pixels."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from unloaf.config import Config
from unloaf.data import EvalBatches, TrainBatches, load_data
from unloaf.data.augment import (
    augmentation,
    crop_and_flip,
    epoch_order,
    evaluation_transform,
    lighting_shift,
    lit,
    training_transform,
    windows_of,
)


def test_seed_and_epoch_do_not_trade_places():
    assert not torch.equal(epoch_order(100, seed=1, epoch=2), epoch_order(100, seed=2, epoch=1))


def test_order_is_a_permutation():
    assert epoch_order(50, seed=3, epoch=7).sort().values.tolist() == list(range(50))


def test_draws_are_those_of_the_published_figures():
    # Computed by release 0.1.0.
    draws = augmentation(5, pad=4, hflip=0.5, seed=0, epoch=1)
    assert draws.tolist() == [[3, 3, 0], [2, 8, 0], [7, 2, 0], [8, 7, 1], [6, 1, 0]]
    assert epoch_order(897, seed=0, epoch=1)[:4].tolist() == [522, 644, 758, 151]


def test_crop_and_flip_by_hand():
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8).expand(4, 1, 2, 2)
    draws = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [2, 1, 1]])
    out = crop_and_flip(windows_of(image, pad=1), torch.arange(len(draws)), draws)
    assert out[:, 0].tolist() == [[[1, 2], [3, 4]], [[2, 1], [4, 3]], [[0, 0], [0, 1]], [[4, 3], [0, 0]]]


@pytest.mark.parametrize("hflip", [0.5, 0.2])
def test_crops_reach_every_corner_and_mirror_their_share(hflip):
    draws = augmentation(3000, pad=2, hflip=hflip, seed=0, epoch=1)
    assert {tuple(row) for row in draws.tolist()} == {(t, s, m) for t in range(5) for s in range(5) for m in (0, 1)}
    # Four standard deviations of 3,000 fair coins are 0.037.
    assert abs(draws[:, 2].float().mean() - hflip) < 0.037


@pytest.mark.parametrize(("hflip", "mirrored"), [(0.0, 0), (1.0, 50)])
def test_nothing_or_everything_is_mirrored(hflip, mirrored):
    assert int(augmentation(50, pad=1, hflip=hflip, seed=0, epoch=1)[:, 2].sum()) == mirrored


AUTOMATIC = ["original", "originalr", "v0", "v0r", "3a", "trivial", "uniform", "rand-m9-mstd0.5-inc1", "rand-m7-n3-t3a"]


@pytest.mark.parametrize("aa", [*AUTOMATIC, "augmix-m5-w2"])
def test_every_automatic_augmentation_works_on_colour_and_grey(folder_config, digits, aa):
    colour = folder_config(aa=aa, augment="none")
    data = load_data(colour)
    steps = list(TrainBatches(data, colour, device="cpu").epoch(1))
    assert steps[0][0].x.shape == (4, 3, 8, 8)
    grey = Config(aa=aa, batch_size=128)
    plain, changed = (next(TrainBatches(digits, c, device="cpu").epoch(1))[0] for c in (Config(), grey))
    assert changed.x.shape == (128, 1, 8, 8)
    # Crops and order stay; most, but not all, images are changed further.
    same = (plain.x == changed.x).flatten(1).all(1).float().mean()
    assert same < 0.7
    assert torch.equal(plain.y, changed.y)


def test_a_text_that_timm_cannot_read_is_refused(digits):
    with pytest.raises(ValueError, match=r"^aa 'rand-q9': timm cannot read it .*; give one like rand-m9"):
        TrainBatches(digits, Config(aa="rand-q9"), device="cpu")


def test_resized_crops_have_the_area_and_side_asked_for(folder_config):
    config = folder_config(scale=(0.25, 0.25), train_img_size=8, hflip=0.0, interpolation="bicubic")
    data = load_data(config)
    # Red is the column, green the row: the range of each tells how much of the image is left.
    ramp = np.zeros((200, 200, 3), np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(200)[None], np.arange(200)[:, None]
    transform = training_transform(data, config)
    random.seed(0)
    for _ in range(5):
        x = transform(Image.fromarray(ramp)).float()
        width, height = ((x[channel].max() - x[channel].min()) * 8 / 7 for channel in (0, 1))
        assert float(width * height / 200**2) == pytest.approx(0.25, rel=0.15)


def test_validation_images_are_resized_and_cropped_in_the_centre(folder_config):
    # 16 x 16 at crop_pct 0.5: the middle 8 x 8 of an image that keeps its size.
    config = folder_config(crop_pct=0.5)
    data = load_data(config)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = evaluation_transform(data, config)(Image.fromarray(image))
    assert torch.equal(out, torch.from_numpy(image[4:12, 4:12]).permute(2, 0, 1))


@pytest.mark.parametrize("augment", ["none", "pad-crop"])
def test_files_without_resized_crops(folder_config, augment):
    config = folder_config(augment=augment, train_img_size=16)
    data = load_data(config)
    [batch] = next(TrainBatches(data, config, device="cpu").epoch(1))
    assert batch.x.shape == (4, 3, 16, 16)
    # Two pixels (16 // 8) of black padding enter most random crops, none without.
    black = -data.mean[0] / data.std[0]
    touched = bool(torch.isclose(batch.x[:, 0], torch.tensor(black)).any())
    assert touched == (augment == "pad-crop")


def test_jitter_changes_colours_only(folder_config):
    config = folder_config(color_jitter=0.4, augment="none")
    data = load_data(config)
    [batch] = next(TrainBatches(data, config, device="cpu").epoch(1))
    spread = batch.x.amax(dim=(2, 3)) - batch.x.amin(dim=(2, 3))
    assert float(spread.max()) < 0.05  # one colour stays one colour
    green = batch.x[:, 1, 0, 0] * data.std[1] + data.mean[1]
    assert float((green - 100).abs().min()) > 0.5  # and is no longer the 100 of the file


def test_lighting_has_the_covariance_of_the_colours():
    torch.manual_seed(0)
    shifts = torch.stack([lighting_shift(0.1).flatten() for _ in range(4000)])
    # Most of it along (-0.5675, -0.5808, -0.5836), with a standard deviation of 0.1 * 0.2175.
    along = shifts @ torch.tensor([-0.5675, -0.5808, -0.5836])
    assert float(along.std()) == pytest.approx(0.02175, rel=0.05)
    assert float(shifts.mean()) == pytest.approx(0, abs=0.002)
    assert float((shifts - along[:, None] * torch.tensor([-0.5675, -0.5808, -0.5836])).std()) < 0.003


def test_lighting_shifts_all_pixels_alike(folder_config):
    config = folder_config(lighting=0.1, augment="none")
    data = load_data(config)
    [lit] = next(TrainBatches(data, config, device="cpu").epoch(1))
    [plain] = next(TrainBatches(data, folder_config(augment="none"), device="cpu").epoch(1))
    shift = (lit.x - plain.x) * torch.tensor(data.std).view(1, 3, 1, 1) / 255
    assert torch.allclose(shift, shift[:, :, :1, :1], atol=1e-6)
    assert 0.001 < float(shift.abs().mean()) < 0.05


def test_lighting_in_grey_levels_takes_off_one_at_most():
    # By hand: of a shift of -0.01 to -0.1 levels the part behind the point is cut off, so is that of a positive one.
    torch.manual_seed(0)
    image = Image.new("RGB", (2, 2), (0, 100, 255))
    seen = {lit(image, strength=0.1, unit="level").getpixel((0, 0)) for _ in range(200)}
    assert {(0, 100, 255), (0, 99, 254)} <= seen <= {(0, green, blue) for green in (99, 100) for blue in (254, 255)}


def test_lighting_of_a_picture_is_the_published_shift_rounded():
    image = Image.new("RGB", (2, 2), (0, 100, 255))
    torch.manual_seed(3)
    expected = (torch.tensor([0, 100, 255]) + 255 * lighting_shift(0.5).flatten()).round().clamp(0, 255)
    torch.manual_seed(3)
    assert lit(image, strength=0.5, unit="range").getpixel((1, 1)) == tuple(expected.int().tolist())
    assert expected[1] != 100


def test_lighting_of_grey_images_is_refused(digits):
    with pytest.raises(ValueError, match=r"^lighting 0.1 shifts colours, but digits is grey; leave --lighting out"):
        TrainBatches(digits, Config(lighting=0.1), device="cpu")


@pytest.mark.parametrize(("mode", "colours"), [("const", 1), ("rand", 1), ("pixel", 5)])
def test_erasing_fills_a_part(folder_config, mode, colours):
    config = folder_config(reprob=1.0, remode=mode, augment="none", img_size=32)
    [batch] = next(TrainBatches(load_data(config), config, device="cpu").epoch(1))
    for image in batch.x[:, 0]:
        background = image.flatten().mode().values
        erased = image[image != background]
        assert 0 < len(erased) < 0.4 * 32 * 32  # timm: 2 % to a third of the area
        assert len(erased.unique()) >= colours if mode == "pixel" else len(erased.unique()) == colours
        assert mode != "const" or float(erased.abs().max()) == 0


def test_evaluation_is_not_augmented(folder_config):
    config = folder_config(aa="rand-m9", color_jitter=0.4, reprob=1.0, lighting=0.1)
    data = load_data(config)
    plain, augmented = (
        torch.cat([x for x, _ in EvalBatches(data.val, data, c, device="cpu")]) for c in (folder_config(), config)
    )
    assert torch.equal(plain, augmented)
