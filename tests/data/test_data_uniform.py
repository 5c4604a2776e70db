"""UniformAugment as the published runs of ST++ had it. Facts: 14 operations by name; 2 draws, each applied with
probability 1/2, at one of 31 levels; 4 to 8 bits; 10 pixels; black; nearest; after jitter and lighting; a pixel of a
photo of 200 pixels changes by 19.2 of 255 on average, a third of the images are left as they are, none is black."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision.transforms import v2

from unloaf.config import Config
from unloaf.data import load_data
from unloaf.data.augment import lit, training_transform
from unloaf.data.uniform import operations, uniform_augment

NAMES = {
    *("Identity", "AutoContrast", "Equalize", "Rotate", "Solarize", "Color", "Posterize", "Contrast", "Brightness"),
    *("Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
}


def noise(side=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(1, 256, (side, side, 3), dtype=np.uint8))


def applied(name, level, image, *, seeds=range(1)):
    """What an operation makes of an image, once for each seed."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append(np.asarray(operations()[name](image, level)))
    return found


def test_there_are_the_14_operations():
    assert set(operations()) == NAMES


def test_identity_changes_nothing():
    assert (applied("Identity", 30, noise())[0] == np.asarray(noise())).all()


@pytest.mark.parametrize(("level", "bits"), [(0, 8), (7, 8), (8, 7), (15, 6), (22, 6), (23, 5), (29, 5), (30, 4)])
def test_posterize_keeps_4_to_8_bits(level, bits):
    kept = np.asarray(noise()) >> (8 - bits) << (8 - bits)
    assert (applied("Posterize", level, noise())[0] == kept).all()


@pytest.mark.parametrize(("level", "threshold"), [(0, 256), (15, 128), (30, 0)])
def test_solarize_inverts_from_its_threshold_on(level, threshold):
    pixels = np.asarray(noise())
    assert (applied("Solarize", level, noise())[0] == np.where(pixels < threshold, pixels, 255 - pixels)).all()


@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
@pytest.mark.parametrize(("level", "by"), [(0, 0), (2, 0), (3, 1), (15, 5), (30, 10)])
def test_translations_are_by_whole_pixels_and_black_comes_in(name, level, by):
    pixels = np.asarray(noise())
    axis = 1 if name == "TranslateX" else 0
    forth = np.roll(pixels, by, axis)
    back = np.roll(pixels, -by, axis)
    forth[tuple([slice(None)] * axis + [slice(0, by)])] = 0
    back[tuple([slice(None)] * axis + [slice(40 - by, None)])] = 0
    found = applied(name, level, noise(), seeds=range(20))
    assert all((one == forth).all() or (one == back).all() for one in found)
    assert len({one.tobytes() for one in found}) == (1 if by == 0 else 2)


def test_shear_takes_the_nearest_pixel():
    # Row y moves by 0.3 * (y + 1/2) pixels; of pixel x the middle is x + 1/2.
    pixels, expected = np.asarray(noise()), np.zeros((40, 40, 3), np.uint8)
    for y in range(40):
        for x in range(40):
            source = math.floor(x + 0.5 + 0.3 * (y + 0.5))
            if source < 40:
                expected[y, x] = pixels[y, source]
    found = applied("ShearX", 30, noise(), seeds=range(10))
    agreement = max((one == expected).all(axis=2).mean() for one in found)
    assert agreement > 0.99  # what is left lies on the edge of two pixels
    upright = applied("ShearY", 30, noise(), seeds=range(10))
    assert max((one == expected.transpose(1, 0, 2)).all(axis=2).mean() for one in upright) < 0.5
    turned = Image.fromarray(pixels.transpose(1, 0, 2).copy())
    upright = applied("ShearY", 30, turned, seeds=range(10))
    assert max((one.transpose(1, 0, 2) == expected).all(axis=2).mean() for one in upright) > 0.99


def test_rotation_is_by_up_to_30_whole_degrees():
    for level in (0, 1, 30):
        found = {one.tobytes() for one in applied("Rotate", level, noise(), seeds=range(20))}
        assert found == {noise().rotate(angle).tobytes() for angle in (level, -level)}


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
@pytest.mark.parametrize(("level", "factor"), [(0, 0.1), (15, 1.0), (30, 1.9)])
def test_blends_go_from_a_tenth_to_nearly_twice(name, level, factor):
    expected = np.asarray(getattr(ImageEnhance, name)(noise()).enhance(factor)).astype(int)
    assert np.abs(applied(name, level, noise())[0] - expected).max() <= 1  # 0.1 + 1.8 is not quite 1.9


def test_contrast_and_histogram():
    dull = Image.fromarray((np.asarray(noise()) // 4 + 50).astype(np.uint8))
    assert (applied("AutoContrast", 3, dull)[0] == np.asarray(ImageOps.autocontrast(dull))).all()
    assert (applied("Equalize", 3, dull)[0] == np.asarray(ImageOps.equalize(dull))).all()


def test_two_are_drawn_and_each_is_applied_every_other_time(monkeypatch):
    called, levels = Counter(), Counter()

    def counting(name):
        def apply(image, level):
            called[name] += 1
            levels[level] += 1
            return image

        return apply

    recording = {name: counting(name) for name in NAMES}
    monkeypatch.setattr("unloaf.data.uniform.operations", lambda: recording)
    torch.manual_seed(0)
    for _ in range(7000):
        uniform_augment(noise(4))
    # 7,000 images x 2 draws / 2, spread over 14 operations and 31 levels; within five standard deviations.
    assert called.total() == pytest.approx(7000, abs=5 * math.sqrt(14_000 / 4))
    assert set(called) == NAMES
    assert all(count == pytest.approx(500, abs=5 * math.sqrt(500)) for count in called.values())
    assert sorted(levels) == list(range(31))
    assert all(count == pytest.approx(7000 / 31, abs=5 * math.sqrt(7000 / 31)) for count in levels.values())


def colours(draw, common, own):
    """Levels of three channels that correlate by 0.87, with brightness 111 +- 34 and contrast 53 +- 16: what 100 photos
    of COCO have, cut to 200 pixels by RandomResizedCrop."""
    levels = draw.normal(111, 34) + max(10, draw.normal(53, 16)) * (0.87**0.5 * common + 0.13**0.5 * own)
    return levels.clip(0, 255).astype(np.uint8)


def clouds(seed, side=200):
    """A photo without edges: power falls with frequency to the 3.4, as in those of COCO."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    fields = np.fft.ifft2(np.fft.fft2(draw.normal(size=(4, side, side))) / frequency**1.7).real
    fields /= fields.std(axis=(1, 2), keepdims=True)
    return Image.fromarray(colours(draw, fields[0, :, :, None], fields[1:].transpose(1, 2, 0)))


def leaves(seed, side=200):
    """A photo with nothing but edges: discs that cover each other, radii by a power law (Lee, Mumford, Huang 2001)."""
    draw, count = np.random.default_rng(seed), 400
    image = Image.new("RGB", (side, side))
    canvas = ImageDraw.Draw(image)
    radii = 4 / draw.uniform((4 / 100) ** 2, 1, count) ** 0.5
    fills = colours(draw, draw.normal(size=(count, 1)), draw.normal(size=(count, 3)))
    for (x, y), radius, fill in zip(draw.uniform(-20, side + 20, (count, 2)), radii, fills, strict=True):
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(fill.tolist()))
    return image


def test_pixels_change_as_in_the_published_runs():
    photos = [kind(seed) for seed in range(20) for kind in (clouds, leaves)]
    torch.manual_seed(0)
    changes, black = [], 0
    for index in range(2000):
        image = photos[index % len(photos)]
        out = np.asarray(uniform_augment(image))
        black += not out.any()
        changes.append(np.abs(out.astype(int) - np.asarray(image)).mean())
    assert np.mean(changes) == pytest.approx(19.2, rel=0.1)
    # At least half of each draw and the 14th that is Identity: (15/28)**2 = 0.287, and what happens to change nothing.
    assert np.mean(np.array(changes) == 0) == pytest.approx(0.31, abs=0.03)
    assert black == 0


@pytest.mark.parametrize(("unit", "strength"), [("range", 0.1), ("level", 10)])
def test_it_comes_last(folder_config, monkeypatch, unit, strength):
    seen = []
    monkeypatch.setattr("unloaf.data.augment.uniform_augment", lambda image: seen.append(image) or image)
    config = folder_config(aa="uniform", augment="none", color_jitter=0.4, lighting=strength, lighting_unit=unit)
    grey = Image.new("RGB", (8, 8), (90, 90, 90))
    torch.manual_seed(0)
    out = training_transform(load_data(config), config)(grey)
    torch.manual_seed(0)
    jittered = v2.ColorJitter(0.4, 0.4, 0.4)(grey)
    bright = lit(jittered, strength=strength, unit=unit)
    assert seen == [bright]
    assert bright != jittered != grey
    assert out.permute(1, 2, 0).tolist() == np.asarray(bright).tolist()  # and nothing is done to it afterwards


def test_grey_images_stay_grey(digits):
    out = training_transform(digits, Config(aa="uniform"))(Image.new("RGB", (8, 8), (90, 90, 90)))
    assert out.shape == (1, 8, 8)
