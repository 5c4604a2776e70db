"""People in COCO's layout: who is read, what is refused, and how a crop and its joints change together."""

import json

import numpy as np
import pytest
import torch

import people_files as files
import tiny
from annotated_files import changed as rewritten
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.data.annotated_sets import load_people, mirrored_order
from unloaf.data.changed_images import check_resumed
from unloaf.data.fingerprint import listing, record_of
from unloaf.data.people.batches import PeopleEvalBatches, PeopleTrainBatches, changed
from unloaf.data.people.crops import Window, cut_out, mapped, width_of, window_of

CPU = torch.device("cpu")


def config(folder, **settings):
    usual = {"task": "pose", "dataset": "coco", "data_dir": str(folder), "model": "simple-baseline"}
    return Config(**usual | {"method": "common", "img_size": 64, "batch_size": 4} | settings)


def opened(folder, **settings):
    return load_people(config(folder, **settings))


def batches(folder, *, rank=0, world=1, **settings):
    return PeopleTrainBatches(
        opened(folder, **settings), config(folder, **settings), device=CPU, rank=rank, world=world
    )


# --- the crop and its joints


def middle_of(pixels, colour):
    """Where a square of a colour is, (x, y) from the edges; None where it is not."""
    near = (np.abs(pixels.astype(int) - colour).sum(-1) < 60).nonzero()
    return None if not len(near[0]) else (near[1].mean() + 0.5, near[0].mean() + 0.5)


@pytest.mark.parametrize(
    "window",
    [
        Window(40, 30, 60), Window(40, 30, 45, mirrored=True), Window(42, 33, 70, angle=0.6),
        Window(38, 30, 66, angle=-0.5, mirrored=True),
    ],
)  # fmt: skip
def test_joints_of_a_crop_are_where_their_squares_are(window):
    person = files.person(1, 1, [24, 10, 32, 40])
    affine, height, seen = window.to_crop(128), 128, 0
    crop = np.asarray(cut_out(files.picture([person]), affine, height, fill=(0, 0, 0)))
    assert crop.shape == (128, 96, 3)
    points = mapped(torch.tensor(person["keypoints"]).double().view(-1, 3)[:, :2], affine)
    for (x, y), colour in zip(points.tolist(), files.COLOURS, strict=True):
        if 10 < x < 86 and 10 < y < 118:  # whole
            found, seen = middle_of(crop, colour), seen + 1
            assert found == pytest.approx((x, y), abs=1.6)  # squares lie at whole pixels, up to twice as large here
    assert seen >= 4


def test_the_window_of_a_box_has_the_aspect_of_crops_and_a_margin():
    """By hand: 40 x 100 is too narrow for 3 : 4, 90 x 60 too wide; both 1.25 times."""
    assert window_of([10, 0, 50, 100]) == Window(30, 50, 125)
    assert window_of([0, 10, 90, 70]) == Window(45, 40, 150)
    assert [width_of(height) for height in (64, 96, 256, 384)] == [48, 72, 192, 288]


def test_a_mirrored_person_has_the_joints_of_the_other_side(tmp_path):
    """In the mirrored image the square of the left shoulder stands where a right shoulder does."""
    files.write(tmp_path, "train", [[files.person(1, 1, [30, 8, 36, 52])]] * 4)
    rewritten(tmp_path / "person_keypoints_train.json", {
        "annotations": lambda entries: [one | {"id": at, "image_id": at} for at, one in enumerate(entries, start=1)]
    })  # fmt: skip
    partner = {"nose": "nose", "left_shoulder": "right_shoulder", "left_hip": "right_hip"}
    partner |= {value: key for key, value in partner.items()}
    [[(crops, joints)]] = batches(tmp_path, hflip=1.0, val_fraction=0.0, img_size=128).epoch(1)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = 0
    for crop, marked in zip(crops, joints, strict=True):
        pixels = ((crop * std + mean) * 255).round().permute(1, 2, 0).numpy()
        for name, (x, y, mark) in zip(files.JOINTS, marked.tolist(), strict=True):
            if mark and 12 < x < 84 and 12 < y < 116:
                colour, seen = files.COLOURS[files.JOINTS.index(partner[name])], seen + 1
                assert middle_of(pixels, colour) == pytest.approx((x, y), abs=2)
    assert seen > 12


def test_order_of_mirrored_joints_goes_by_their_names():
    lsp = ["right_ankle", "right_knee", "left_knee", "left_ankle", "neck", "head_top"]
    assert mirrored_order(lsp) == [3, 2, 1, 0, 4, 5]


def test_a_joint_outside_of_the_crop_or_without_a_mark_does_not_count(tmp_path):
    """The crop of a wide box is cut off by nothing; a joint far from its box is."""
    marks = (2, 1, 0, 2, 2)
    one = files.person(1, 1, [4, 30, 20, 30], marks=marks)
    one["keypoints"][0:2] = [90.0, 5.0]
    files.write(tmp_path, "train", [[one]])
    data = opened(tmp_path, val_fraction=0.0)
    [(_, [judged])] = PeopleEvalBatches(data.train, data, config(tmp_path), device=CPU)
    assert judged.joints[:, 2].tolist() == [0, 1, 0, 1, 1]
    assert judged.person.joints[:, 2].tolist() == [2, 1, 0, 2, 2]
    # By hand: a window of 37.5 pixels of height around (14, 45), 64 pixels high in the crop.
    left_hip = (4 + 0.3 * 20 - 14) * 64 / 37.5 + 24, (30 + 0.9 * 30 - 45) * 64 / 37.5 + 32
    assert judged.joints[3, :2].tolist() == pytest.approx(left_hip, abs=1e-4)
    back = mapped(judged.joints[:, :2].double(), judged.to_image)
    assert torch.allclose(back[[1, 3, 4]], judged.person.joints[[1, 3, 4], :2], atol=1e-4)


def test_crops_are_larger_smaller_and_turned_as_much_as_the_paper_says():
    torch.manual_seed(0)
    drawn = [changed(Window(5, 6, 100), hflip=0.5) for _ in range(400)]
    heights, angles = (np.array([getattr(one, name) for one in drawn]) for name in ("height", "angle"))
    assert (70 < heights.min() < 72, 128 < heights.max() < 130, abs(heights.mean() - 100) < 3) == (True,) * 3
    turned = np.degrees(angles)
    assert (-40 < turned.min() < -38, 38 < turned.max() < 40, abs(turned.mean()) < 4) == (True,) * 3
    assert 150 < sum(one.mirrored for one in drawn) < 250


# --- batches


def test_batches_of_a_resumed_epoch_are_those_of_the_whole(tmp_path):
    files.people(tmp_path)
    whole = list(batches(tmp_path).epoch(3))
    [rest] = batches(tmp_path).epoch(3, start=1)
    assert tiny.same([list(part) for part in whole[1]], [list(part) for part in rest])


def test_workers_read_what_the_process_itself_reads(tmp_path):
    files.people(tmp_path)
    working = batches(tmp_path, workers=2)
    alone, read = list(batches(tmp_path).epoch(2)), list(working.epoch(2))
    working.close()
    assert tiny.same([list(part) for step in alone for part in step], [list(part) for step in read for part in step])


def test_two_processes_share_the_people_of_one(tmp_path):
    files.people(tmp_path)
    [[alone]] = list(batches(tmp_path, batch_size=8).epoch(1))
    parts = [next(batches(tmp_path, rank=rank, world=2).epoch(1))[0] for rank in (0, 1)]
    turns = torch.stack([image for pair in zip(parts[0].x, parts[1].x, strict=True) for image in pair])
    assert torch.equal(alone.x, turns)


def test_people_whom_two_processes_both_have_count_once(tmp_path):
    files.people(tmp_path)
    data, counted = opened(tmp_path), []
    for rank in (0, 1):
        for _, judged in PeopleEvalBatches(data.val, data, config(tmp_path), device=CPU, rank=rank, world=2):
            counted += [one.person.number for one in judged if one is not None]
    assert sorted(counted) == [0, 1, 2, 3, 4]


def test_an_image_that_cannot_be_read_stops_with_its_name_or_is_left_out(tmp_path):
    """1 of 100 images, 1 %, is borne; 1 of 9 people is not."""
    files.people(tmp_path)
    (tmp_path / "train" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image 2\.png cannot be read.*or give --bad-images skip"):
        list(batches(tmp_path).epoch(1))
    with pytest.raises(ValueError, match=r"1 of 9 images cannot be read, more than 1 %: 2\.png"):
        list(batches(tmp_path, bad_images="skip").epoch(1))
    images = [[files.person(at, at, [30, 8, 36, 52])] for at in range(1, 101)]
    files.write(tmp_path / "many", "train", images)
    (tmp_path / "many" / "train" / "7.png").write_bytes(b"no image")
    skipping = batches(tmp_path / "many", bad_images="skip", val_fraction=0.0, batch_size=50, img_size=16)
    assert len(list(skipping.epoch(1))) == 2
    assert skipping.bad_images == ("7.png",)
    data = opened(tmp_path / "many", val_fraction=0.0)
    settings = config(tmp_path / "many", bad_images="skip", img_size=16)
    judged = [one for _, people in PeopleEvalBatches(data.train, data, settings, device=CPU) for one in people]
    assert sum(one is None for one in judged) == 1


# --- who is read


def test_groups_and_people_without_a_marked_joint_are_no_targets_but_known(tmp_path):
    people = [
        files.person(1, 1, [4, 4, 30, 40]),
        files.person(2, 1, [40, 4, 30, 40], marks=(0,) * 5),
        files.person(3, 1, [50, 4, 30, 40], iscrowd=1),
    ]
    files.write(tmp_path, "train", [people, [files.person(4, 2, [4, 4, 30, 40], marks=(0,) * 5)]])
    data = opened(tmp_path, val_fraction=0.0)
    assert (len(data.train), data.train.name(0)) == (1, "1.png#1")
    [(_, [judged])] = PeopleEvalBatches(data.train, data, config(tmp_path), device=CPU)
    assert (judged.others.ids.tolist(), judged.others.crowd.tolist()) == ([2, 3], [False, True])
    assert data.notes[:3] == (
        "train: 1 group(s) (iscrowd) are no targets, and no prediction is blamed for them",
        "train: 2 people without a marked joint are no targets, likewise",
        "train: 1 of 2 images have nobody to learn from",
    )


def test_people_go_with_their_image_into_validation(tmp_path):
    files.write(tmp_path, "train", files.drawn(8, 0))
    data = opened(tmp_path, val_fraction=0.25)
    images = [{name.partition("#")[0] for name in map(part.name, range(len(part)))} for part in (data.train, data.val)]
    assert [len(part) for part in images] == [6, 2]
    assert not images[0] & images[1]
    assert len(data.train) + len(data.val) == 12
    assert f"{len(data.val)} of 12 people are held out for validation (--val-fraction)" in data.notes


def test_a_run_notices_joints_that_were_moved(tmp_path):
    files.people(tmp_path)
    before = opened(tmp_path)
    record, listed = record_of(before), listing(before)
    assert listed is not None
    rewritten(tmp_path / "person_keypoints_train.json", {
        "annotations": lambda entries: [entries[0] | {"keypoints": [1.0, *entries[0]["keypoints"][1:]]}, *entries[1:]]
    })  # fmt: skip
    now = opened(tmp_path)
    with pytest.raises(ValueError, match="the images are not those"):
        check_resumed(now, record_of(now), record, None, checkpoint="step 3", allow=False)


# --- what is wrong


def first(**more):
    return lambda entries: [entries[0] | more, *entries[1:]]


def joints_of_first(how):
    return lambda entries: [entries[0] | {"keypoints": how(list(entries[0]["keypoints"]))}, *entries[1:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotations": joints_of_first(lambda joints: joints[:-1])}, "keypoints has 14 numbers; give 15, x, y and"),
        ({"annotations": first(keypoints=None)}, "keypoints has None; give 15"),
        ({"annotations": joints_of_first(lambda joints: [1e999, *joints[1:]])}, "give finite numbers"),
        ({"annotations": joints_of_first(lambda joints: [*joints[:2], 3, *joints[3:]])}, "visibility 3; give 0"),
        ({"annotations": first(image_id=99)}, "there is no image 99; remove the annotation or add the image"),
        ({"annotations": first(bbox=[1, 2, 3])}, r"bbox \[1, 2, 3\]; give \[left, top, width, height\]"),
        ({"annotations": first(bbox=[200, 2, 30, 30])}, "lies outside its image of 96 x 72 pixels"),
        ({"annotations": first(area=0)}, "area 0; give one above 0"),
        ({"annotations": first(iscrowd=2)}, "iscrowd 2; give 0 or 1"),
        ({"annotations": first(id=None)}, "id None; give each annotation an integer"),
        ({"annotations": joints_of_first(lambda joints: [-50.0, *joints[1:]])}, "1 of 45 marked joints lie outside"),
        ({"annotations": lambda entries: []}, "the training images have nobody with a marked joint"),
        ({"categories": lambda entries: [{"id": 1, "name": "person"}]}, "0 of 1 categories have a list keypoints"),
        ({"categories": lambda entries: [*entries, entries[0] | {"id": 2, "name": "dog"}]}, "2 of 2 categories have"),
        ({"categories": lambda entries: [entries[0] | {"keypoints": ["a", "a"]}]}, "2 joints, 1 names; name each once"),
        ({"categories": lambda entries: [entries[0] | {"keypoints": "nose"}]}, "give a list of names"),
        ({"images": lambda entries: [entries[0] | {"file_name": "gone.png"}, *entries[1:]]}, "1 of the 6 images"),
    ],
)  # fmt: skip
def test_annotations_that_do_not_fit_are_refused(tmp_path, change, said):
    files.people(tmp_path)
    rewritten(tmp_path / "person_keypoints_train.json", change)
    with pytest.raises(ValueError, match=said):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["nose", "left_shoulder", "shoulder", "left_hip", "right_hip"], "left_shoulder without a joint of the other"),
        (["a", "b", "c", "d", "e"], "of a, b, c, d and 1 more: none begins so; rename them .*, or give --hflip 0"),
    ],
)
def test_joints_whose_mirrored_ones_are_not_known_are_refused_unless_nothing_is_mirrored(tmp_path, names, said):
    files.people(tmp_path)
    for split in ("train", "val"):
        change = {"categories": lambda entries: [entries[0] | {"keypoints": names}]}
        rewritten(tmp_path / f"person_keypoints_{split}.json", change)
    with pytest.raises(ValueError, match=said):
        opened(tmp_path)
    assert opened(tmp_path, hflip=0.0).class_names == tuple(names)
    assert len(list(batches(tmp_path, hflip=0.0).epoch(1))) == 2


def test_another_split_with_other_joints_is_refused(tmp_path):
    files.people(tmp_path)
    others = {
        "val has other joints than the training images: nose, x": ["x", *files.JOINTS[1:]],
        "val has the joints of the training images in another order": files.JOINTS[::-1],
    }
    for said, names in others.items():
        rewritten(tmp_path / "person_keypoints_val.json", {
            "categories": lambda entries, names=names: [entries[0] | {"keypoints": list(names)}]
        })  # fmt: skip
        with pytest.raises(ValueError, match=said):
            opened(tmp_path)


def test_what_is_left_out_is_told(tmp_path):
    """Of 100 people one has a joint outside, one a box of no area; a dog has no joints."""
    people = [[files.person(at, at, [30, 8, 36, 52])] for at in range(1, 101)]
    people[0][0]["keypoints"][0] = -3.0
    people[1][0]["bbox"] = [30, 8, 0, 52]
    people[2][0].pop("area")
    file = files.write(tmp_path, "train", people)
    rewritten(file, {
        "categories": lambda entries: [*entries, {"id": 7, "name": "dog"}],
        "annotations": lambda entries: [*entries, entries[3] | {"id": 900, "category_id": 7}],
    })  # fmt: skip
    data, name = opened(tmp_path, val_fraction=0.0), "person_keypoints_train.json, annotation"
    assert len(data.train) == 99
    assert data.train.person(0).joints[0].tolist() == [0, 0, 0]
    assert data.train.person(1).area == 36 * 52
    assert data.notes == (
        f"train: 1 box(es) of no area are left out: {name} 2",
        "train: 1 of 100 images have nobody to learn from",
        f"train: 1 marked joint(s) outside their images are taken for not marked: {name} 1",
        f"train: 1 people without an area have that of their box in OKS: {name} 3",
        f"train: 1 annotation(s) of categories without joints are not read: {name} 900",
        "0 of 99 people are held out for validation (--val-fraction)",
    )


def test_all_that_is_wrong_is_listed_at_once(tmp_path, capsys):
    files.people(tmp_path)
    rewritten(tmp_path / "person_keypoints_train.json", {
        "annotations": lambda entries: [entries[0] | {"area": -1}, entries[1] | {"keypoints": []}, *entries[2:]]
    })  # fmt: skip
    (tmp_path / "val" / "3.png").write_bytes(b"no image")
    words = ["check-data", str(tmp_path), "--dataset", "coco", "--keypoints"]
    assert main(words) == 2
    out = capsys.readouterr()
    told = out.out + out.err
    assert "annotation 1: area -1" in told
    assert "annotation 2: keypoints has 0 numbers" in told
    assert "bad: 3.png: " in told
    assert main([*words, "--masks"]) == 2
    assert "--keypoints is for --dataset coco, without --masks" in capsys.readouterr().err


def test_people_and_joints_are_counted(tmp_path, capsys):
    files.people(tmp_path)
    assert main(["check-data", str(tmp_path), "--dataset", "coco", "--keypoints"]) == 0
    out = capsys.readouterr()
    assert "val: 5 people, 25 marked joints, 5 joints: nose 5, left_shoulder 5" in out.out + out.err
    assert json.loads((tmp_path / "person_keypoints_val.json").read_text())["categories"] == files.CATEGORIES
