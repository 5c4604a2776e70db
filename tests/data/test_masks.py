"""Sets of images with masks: what is read of them, what is refused, and how image and mask change together."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import mask_files as files
import tiny
from unloaf.commands import main as cli
from unloaf.config import Config
from unloaf.data.changed_images import check_resumed
from unloaf.data.fingerprint import listing, read_listing, record_of
from unloaf.data.masks.batches import MaskEvalBatches, MaskTrainBatches, augmented, window
from unloaf.data.masks.images import decode_mask
from unloaf.data.masks.sets import load_masked

CPU = torch.device("cpu")


def config(folder, **settings):
    usual = {"task": "semantic", "dataset": "masks", "data_dir": str(folder), "model": "semantic-fpn"}
    usual |= {"method": "common", "img_size": 32, "batch_size": 4, "hflip": 0.5}
    return Config(**usual | settings)


def opened(folder, **settings):
    return load_masked(config(folder, **settings))


def batches(folder, *, rank=0, world=1, **settings):
    return MaskTrainBatches(opened(folder, **settings), config(folder, **settings), device=CPU, rank=rank, world=world)


def whole(folder, *, rank=0, world=1, **settings):
    data = opened(folder, **settings)
    return MaskEvalBatches(data.val, data, config(folder, **settings), device=CPU, rank=rank, world=world)


# --- ids


@pytest.mark.parametrize("colour", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ids_are_the_samples_of_the_file(bits, colour):
    rows = [[0, 1, 1], [2**bits - 1, 0, min(2, 2**bits - 1)]]
    found = decode_mask(files.png(rows, bits=bits, colour=colour), name="a.png", max_pixels=100)
    assert (found.tolist(), found.dtype) == (rows, np.uint8)


@pytest.mark.parametrize("turned", [False, True], ids=["SPLIT/images", "images/SPLIT"])
def test_both_layouts_are_read(tmp_path, turned):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        files.write(tmp_path, split, [files.drawn(at) for at in range(count)], turned=turned)
    data = opened(tmp_path)
    assert [len(images) for images in (data.train, data.val, data.test)] == [3, 2, 1]
    assert (data.num_classes, data.class_names) == (4, ("0", "1", "2", "3"))
    picture, mask = data.train.pair(2)
    assert np.array_equal(mask.numpy(), files.drawn(2))
    assert np.array_equal(np.asarray(picture), files.COLOURS[files.drawn(2)])


def test_ids_beyond_num_classes_are_void_and_it_is_said(tmp_path):
    files.masked(tmp_path)
    data = opened(tmp_path, num_classes=3)
    expected = np.where(files.drawn(0) == 3, 255, files.drawn(0))
    assert np.array_equal(data.train.pair(0)[1].numpy(), expected)
    assert (data.num_classes, data.notes) == (3, ("ids from 3 on are void, as 255 is (--num-classes 3)",))


def test_void_is_no_class(tmp_path):
    files.write(tmp_path, "train", [np.where(files.drawn(0) == 3, 255, files.drawn(0)).astype(np.uint8)])
    data = opened(tmp_path, val_fraction=0.0)
    assert data.num_classes == 3
    assert sorted(np.unique(data.train.pair(0)[1])) == [0, 1, 2, 255]


def test_names_come_from_classes_txt_and_classes_without_a_pixel_are_told(tmp_path):
    files.masked(tmp_path)
    (tmp_path / "classes.txt").write_text("ground\nred\ngreen\nblue\nyellow\n")
    data = opened(tmp_path)
    assert (data.num_classes, data.class_names[4]) == (5, "yellow")
    assert data.notes == ("1 of the 5 classes are in no training mask: yellow",)


# --- what does not fit


def remove(folder, split, part, name="0.png"):
    (folder / split / part / name).unlink()


def replace_mask(content, split="train"):
    def change(folder):
        file = folder / split / "masks" / "0.png"
        if callable(content):
            content(file)
        else:
            file.write_bytes(content)

    return change


def save(ids):
    return lambda file: Image.fromarray(np.asarray(ids)).save(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: remove(folder, "train", "masks"), r"1 of the 8 images of .* have no mask: train/masks/0.png"),
        (lambda folder: remove(folder, "val", "images"), r"1 of the 4 masks of .* have no image: 0.png"),
        (lambda folder: shutil.rmtree(folder / "train" / "masks"), "8 of the 8 images of .* have no mask"),
        (lambda folder: shutil.rmtree(folder / "train"), "no masks split train in .*: expected train/images/NAME.jpg"),
        (
            replace_mask(save(np.zeros((48, 65), np.uint8))),
            "train/images/0.png: it has 64 x 48 pixels, its mask 65 x 48; give both the same size",
        ),
        (replace_mask(save(np.full((48, 64), 7, np.uint8)), "val"), "val/masks/0.png: id 7 is none of the 4 classes"),
        (
            replace_mask(save(np.zeros((48, 64, 3), np.uint8))),
            "train/masks/0.png cannot be read: colour type 2, 8 bits",
        ),
        (replace_mask(save(np.zeros((48, 64), np.uint16))), "train/masks/0.png cannot be read: colour type 0, 16 bits"),
        (replace_mask(b"P5 no PNG at all, but long enough"), "train/masks/0.png cannot be read: it is no PNG"),
        (
            lambda folder: shutil.copy(folder / "train/images/1.png", folder / "train/images/1.bmp"),
            "1.bmp and 1.png would have the same mask",
        ),
        (lambda folder: (folder / "train/images/0.png").write_bytes(b"no image"), "train/images/0.png cannot be read"),
        (lambda folder: (folder / "classes.txt").write_text("a\n\nb\n"), "give 2 to 255 names, one a line"),
        (lambda folder: (folder / "classes.txt").write_text("a\nb\nc\n"), "id 3 is none of the 3 classes, 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, said):
    files.masked(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=said):
        opened(tmp_path)


def test_masks_of_0_and_255_are_refused_with_advice(tmp_path):
    files.write(tmp_path, "train", [np.where(files.drawn(0) > 1, 255, 0).astype(np.uint8)])
    with pytest.raises(ValueError, match=r"the id 0 alone beside 255, which is void.* must be one of 0 and 1"):
        opened(tmp_path, val_fraction=0.0)


def test_a_mask_fits_the_image_as_it_is_turned_upright(tmp_path):
    files.write(tmp_path, "train", [files.drawn(0)])
    image = Image.new("RGB", (48, 64))  # lying; its mask is of 64 x 48 pixels
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "train/images/0.png", exif=exif)
    picture, mask = opened(tmp_path, val_fraction=0.0).train.pair(0)
    assert (picture.size, tuple(mask.shape)) == ((64, 48), (48, 64))


def test_a_damaged_mask_stops_or_is_skipped_as_an_image_is(tmp_path):
    """With num_classes masks are not decoded before they are needed."""
    files.masked(tmp_path, train=101)
    file = tmp_path / "train/masks/0.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"image train/masks/0.png cannot be read: .*; remove or replace it"):
        list(batches(tmp_path, num_classes=4).epoch(1))
    skipping = batches(tmp_path, num_classes=4, bad_images="skip")
    list(skipping.epoch(1))
    assert skipping.bad_images == ("train/masks/0.png",)


# --- image and mask change together


def pictured(seed, **size):
    ids = files.drawn(seed, **size)
    return torch.from_numpy(files.COLOURS[ids]).permute(2, 0, 1).float() / 255, torch.from_numpy(ids)


def test_a_window_is_cut_out_of_both_and_what_lies_outside_is_void():
    image, mask = torch.arange(1.0, 7).view(1, 2, 3), torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    cut, ids = window(image, mask, top=-1, left=1, side=2)
    assert (cut.tolist(), ids.tolist()) == ([[[0, 0], [2, 3]]], [[255, 255], [2, 3]])
    cut, ids = window(image, mask, top=1, left=0, side=3)
    assert (cut.tolist(), ids.tolist()) == (
        [[[4, 5, 6], [0, 0, 0], [0, 0, 0]]],
        [[4, 5, 6], [255, 255, 255], [255, 255, 255]],
    )


@pytest.mark.parametrize("seed", range(6))
def test_pixels_have_the_colour_of_their_class_wherever_they_are(seed):
    image, mask = pictured(seed)
    torch.manual_seed(seed)
    image, mask = augmented(image, mask, side=40, hflip=0.5)
    colours = torch.from_numpy(files.COLOURS).float() / 255
    # Away from the edges of a class, where colours are mixed: 5 x 5 pixels of the same class around.
    patches = mask.float()[None, None].unfold(2, 5, 1).unfold(3, 5, 1).flatten(4)[0, 0]
    inner = patches.amax(-1) == patches.amin(-1)
    ids, pixels = mask[2:-2, 2:-2][inner].long(), image[:, 2:-2, 2:-2][:, inner].T
    assert len(ids) > 100
    assert torch.allclose(pixels[ids != 255], colours[ids[ids != 255]], atol=1e-5)
    assert not pixels[ids == 255].any()


def test_images_come_at_half_to_twice_their_size():
    image, mask = pictured(0)
    areas = []
    for seed in range(60):
        torch.manual_seed(seed)
        areas.append(int((augmented(image, mask, side=130, hflip=0.0)[1] != 255).sum()) / mask.numel())
    assert 0.25 <= min(areas) < 0.5
    assert 3 < max(areas) <= 4
    assert np.sqrt(areas).mean() == pytest.approx(1.25, abs=0.15)  # of a uniform factor; its spread of 60 is 0.06


def test_a_mirrored_pair_is_the_other_one_turned_around():
    torch.manual_seed(3)
    image, mask = augmented(*pictured(0), side=32, hflip=0.0)
    torch.manual_seed(3)
    mirrored, turned = augmented(*pictured(0), side=32, hflip=1.0)
    assert torch.equal(mirrored, image.flip(-1))
    assert torch.equal(turned, mask.flip(-1))


# --- batches


def test_training_batches_are_normalised_crops(tmp_path):
    files.masked(tmp_path, train=4)
    [[(x, y)]] = batches(tmp_path, mean=(0.5,), std=(0.25,)).epoch(1)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((4, 3, 32, 32), torch.float32, (4, 32, 32), torch.int64)
    inside = x.movedim(1, -1)[y == 0]
    # 20 of 255, less the mean, by the spread; most pixels of a class are not at its edge.
    assert inside[:, 0].median() == pytest.approx((20 / 255 - 0.5) / 0.25, abs=1e-5)


def test_whole_images_are_evaluated_at_their_own_size(tmp_path):
    files.write(tmp_path, "train", [files.drawn(0)] * 4)
    files.write(tmp_path, "val", [files.drawn(0, height=16, width=80), files.drawn(1, height=32, width=48)])
    [(images, masks)] = whole(tmp_path)
    assert [tuple(image.shape) for image in images] == [(3, 16, 80), (3, 32, 48)]
    assert np.array_equal(masks[1].numpy(), files.drawn(1, height=32, width=48))


def test_batches_of_a_resumed_epoch_are_those_of_the_whole(tmp_path):
    files.masked(tmp_path)
    everything = list(batches(tmp_path).epoch(3))
    [rest] = batches(tmp_path).epoch(3, start=1)
    assert tiny.same([list(part) for part in everything[1]], [list(part) for part in rest])
    other = list(batches(tmp_path).epoch(4))
    assert not tiny.same([list(part) for part in everything[1]], [list(part) for part in other[1]])


def test_each_image_of_each_epoch_is_drawn_anew(tmp_path):
    files.write(tmp_path, "train", [files.drawn(0)] * 4)
    crops = [crop for epoch in (1, 2) for [(x, _)] in batches(tmp_path, val_fraction=0.0).epoch(epoch) for crop in x]
    assert len({crop.numpy().tobytes() for crop in crops}) == 8


def test_workers_read_what_the_process_itself_reads(tmp_path):
    files.masked(tmp_path)
    working = batches(tmp_path, workers=1)
    [[alone], _], [[theirs], _] = batches(tmp_path).epoch(1), working.epoch(1)
    working.close()
    assert tiny.same(list(alone), list(theirs))


def test_two_processes_share_the_images_of_one(tmp_path):
    files.masked(tmp_path)
    [[alone]] = batches(tmp_path, batch_size=8).epoch(1)
    parts = [next(batches(tmp_path, rank=rank, world=2).epoch(1))[0] for rank in (0, 1)]
    assert torch.equal(alone.x, torch.stack([parts[0].x, parts[1].x], 1).flatten(0, 1))
    assert torch.equal(alone.y, torch.stack([parts[0].y, parts[1].y], 1).flatten(0, 1))


def test_images_that_two_processes_both_have_count_once(tmp_path):
    files.masked(tmp_path, val=3)
    counted = [y is not None for rank in (0, 1) for _, masks in whole(tmp_path, rank=rank, world=2) for y in masks]
    assert sorted(counted) == [False, True, True, True]


# --- a run notices that they are others


def test_a_changed_mask_is_another_label(tmp_path):
    files.masked(tmp_path)
    before = opened(tmp_path)
    (tmp_path / "list.csv.gz").write_bytes(listing(before))
    record = record_of(before)
    ids = files.drawn(1)
    ids[0, 0] = (ids[0, 0] + 1) % 4
    save(ids)(tmp_path / "train/masks/1.png")
    now, listed = opened(tmp_path), read_listing(tmp_path / "list.csv.gz")
    with pytest.raises(ValueError, match=r"1 labelled otherwise \(train/train/images/1.png\)"):
        check_resumed(now, record_of(now), record, listed, checkpoint="step-1", allow=False)
    assert check_resumed(before, record_of(before), record, listed, checkpoint="step-1", allow=False) == []


def test_without_validation_images_some_are_held_out(tmp_path):
    files.write(tmp_path, "train", [files.drawn(at) for at in range(10)])
    data = opened(tmp_path, val_fraction=0.2, train_images=5)
    names = [{split.name(i) for i in range(len(split))} for split in (data.train, data.val)]
    assert list(map(len, names)) == [5, 2]
    assert not names[0] & names[1]
    assert record_of(data)["held_out"]


# --- check-data


def test_check_data_counts_the_pixels_of_each_class(tmp_path, capsys):
    """Two masks of 4 x 2 pixels by hand, one of them with two void pixels."""
    for split, rows in (("train", [[0, 0, 1, 1], [0, 2, 2, 255]]), ("val", [[1, 1, 1, 1], [2, 0, 0, 255]])):
        files.write(tmp_path, split, [np.array(rows, np.uint8)])
    assert cli.main(["check-data", str(tmp_path), "--dataset", "masks"]) == 0
    printed = capsys.readouterr().out
    assert "train: 1 images, 7 pixels, 3 classes: 0 3, 1 2, 2 2\n" in printed
    assert "val: 1 images, 7 pixels, 3 classes: 0 2, 1 4, 2 1\n" in printed
    assert "modes: RGB 2\n" in printed


def test_check_data_lists_each_image_and_each_mask_that_cannot_be_read(tmp_path, capsys):
    folder = files.masked(tmp_path)
    image, mask = (sorted((folder / "train" / part).iterdir())[at] for part, at in (("images", 1), ("masks", 3)))
    image.write_bytes(image.read_bytes()[:-40])
    mask.write_bytes(mask.read_bytes()[:-40])
    assert cli.main(["check-data", str(folder), "--dataset", "masks"]) == 2
    out, err = capsys.readouterr()
    listed = [line.split(": ")[1] for line in out.splitlines() if line.startswith("bad: ")]
    assert listed == [f"train/images/{image.name}", f"train/masks/{mask.name}"]
    assert "2 of 12 images cannot be read" in err


def test_check_data_says_what_keeps_a_run_from_a_set_of_masks(tmp_path, capsys):
    folder = files.masked(tmp_path)
    gone = sorted((folder / "train" / "masks").iterdir())[0]
    gone.unlink()
    assert cli.main(["check-data", str(folder), "--dataset", "masks"]) == 2
    assert f"have no mask: train/masks/{gone.stem}.png" in capsys.readouterr().err
