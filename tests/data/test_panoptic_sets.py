"""COCO's panoptic layout: what is read of it, how segments follow their image, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import annotated_files
import panoptic_files as files
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.data.annotated.targets import mirrored, resized
from unloaf.data.annotated_sets import load_annotated
from unloaf.data.fingerprint import record_of
from unloaf.data.images import BadImageError
from unloaf.data.panoptic.batches import PanopticEvalBatches, PanopticTrainBatches

HERE = {"device": torch.device("cpu"), "rank": 0, "world": 1}


def config(folder, **settings):
    usual = {"task": "panoptic", "dataset": "coco", "data_dir": str(folder), "model": "panoptic-fpn"}
    return Config(**usual | {"method": "common", "val_fraction": 0.0, "batch_size": 2} | settings)


def opened(folder, **settings):
    return load_annotated(config(folder, **settings), masks=False)


def one(ids, kinds):
    return [(np.array(ids), kinds)]


def target_of(ids, classes, crowd=None):
    crowd = crowd or [False] * len(classes)
    return {"segments": torch.tensor(ids), "classes": torch.tensor(classes), "crowd": torch.tensor(crowd)}


def test_segments_are_the_colours_of_the_png(tmp_path):
    files.write(tmp_path, "train", one([[70_001, 70_001, 0], [300, 12, 12]], {70_001: 3, 300: 5, 12: 8}))
    data = opened(tmp_path)
    assert data.class_names == ("sky", "box", "grass", "ball")  # 3, 5, 8 and 9
    assert data.train.things == (False, True, False, True)
    found = data.train.target(0)
    assert found["segments"].tolist() == [[0, 0, -1], [1, 2, 2]]
    assert found["classes"].tolist() == [0, 1, 2]


def test_the_official_layout_is_read(tmp_path):
    file = files.write(tmp_path, "train", [files.drawn(0)])
    (tmp_path / "annotations").mkdir()
    file.rename(tmp_path / "annotations" / "panoptic_train2017.json")
    (tmp_path / "train" / "panoptic").rename(tmp_path / "annotations" / "panoptic_train2017")
    (tmp_path / "train" / "images").rename(tmp_path / "train2017")
    (tmp_path / "train").rmdir()
    assert opened(tmp_path).train.pair(0)[0].size == (64, 48)


def test_a_smaller_image_has_the_nearest_segments_and_drops_those_without_a_pixel():
    ids = [[0, 0, 1, 1], [0, 0, 1, 2], [-1, -1, 3, 3], [-1, -1, 3, 3]]
    image, found = resized(torch.zeros(3, 4, 4), target_of(ids, [5, 6, 7, 8], [False, False, False, True]), (2, 2))
    assert image.shape == (3, 2, 2)
    # The pixels under the middles: rows and columns 1 and 3; there segment 1 has none.
    assert found["segments"].tolist() == [[0, 1], [-1, 2]]
    assert (found["classes"].tolist(), found["crowd"].tolist()) == ([5, 7, 8], [False, False, True])


def test_a_mirrored_image_has_mirrored_segments():
    found = mirrored(torch.zeros(3, 1, 3), target_of([[0, 1, -1]], [5, 6]))[1]
    assert found["segments"].tolist() == [[-1, 1, 0]]


def test_training_images_come_at_the_side_and_those_of_evaluation_as_they_are(tmp_path):
    files.panoptic(tmp_path, train=2, val=1)
    settings = config(tmp_path, img_size=24, hflip=1.0)
    data = load_annotated(settings, masks=False)
    [[(images, targets)]] = PanopticTrainBatches(data, settings, **HERE).epoch(1)
    assert [image.shape for image in images] == [(3, 24, 32)] * 2
    for image, target in zip(images, targets, strict=True):  # red where the box is
        box = target["segments"] == target["classes"].tolist().index(1)
        assert float(image[0][box].mean()) > 0.8
        assert target["segments"].shape == (24, 32)
    [(images, targets)] = PanopticEvalBatches(data.val, data, settings, **HERE)
    assert images[0].shape[1:] == targets[0]["segments"].shape == (48, 64)


def segment(**changes):
    """Changes the first segment of the first image."""

    def change(entries):
        first, *rest = entries[0]["segments_info"]
        return [entries[0] | {"segments_info": [first | changes, *rest]}, *entries[1:]]

    return change


def entry(**changes):
    return lambda entries: [entries[0] | changes, *entries[1:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotations": segment(id=999)}, "its id 70001 is no segment of its annotation"),
        ({"annotations": segment(id=0)}, "segment id 0; give an integer from 1"),
        ({"annotations": segment(id=12)}, "segment id 12 is there twice"),
        ({"annotations": segment(category_id=4)}, "category_id 4 of segment 70001 is none of the 4 categories"),
        ({"annotations": segment(iscrowd=2)}, "iscrowd 2 of segment 70001; give 0 or 1"),
        ({"annotations": entry(image_id=77)}, "there is no image 77"),
        ({"annotations": entry(segments_info="x")}, "segments_info 'x'; give a list"),
        ({"annotations": entry(file_name="../1.png")}, "give the name of a PNG"),
        ({"annotations": entry(file_name="9.png")}, "1 of the 1 PNGs of .* are not in .*panoptic: 9.png"),
        ({"annotations": lambda entries: []}, "1 of the 1 images of .* have no annotation: 1.png"),
        ({"annotations": lambda entries: entries * 2}, "the image has two annotations"),
        ({"images": entry(height=47)}, r"its image has 64 x 47 pixels, its mask 64 x 48"),
        ({"categories": entry(isthing=None)}, "category ball has no isthing"),
        ({"categories": lambda entries: [one | {"isthing": 1} for one in entries]}, "things alone.* --task instance"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, said):
    annotated_files.changed(files.write(tmp_path, "train", [files.drawn(0)]), change)
    with pytest.raises(ValueError, match=said):
        opened(tmp_path)


def test_a_segment_without_a_pixel_is_refused(tmp_path):
    ids, kinds = files.drawn(0)
    files.write(tmp_path, "train", [(ids, kinds | {77: 5})])
    with pytest.raises(ValueError, match="no pixel of segment 77, which its annotation has"):
        opened(tmp_path)


def test_a_png_that_is_no_rgb_is_refused(tmp_path):
    files.write(tmp_path, "train", [files.drawn(0)])
    Image.new("L", (64, 48)).save(tmp_path / "train" / "panoptic" / "1.png")
    with pytest.raises(ValueError, match="colour type 0, 8 bits; segments are a PNG in RGB"):
        opened(tmp_path)


def test_an_image_of_another_size_is_bad_when_it_is_opened(tmp_path):
    files.write(tmp_path, "train", [files.drawn(0)])
    Image.new("RGB", (64, 47)).save(tmp_path / "train" / "images" / "1.png")
    with pytest.raises(BadImageError, match="64 x 47 pixels, its annotation is about 64 x 48"):
        opened(tmp_path).train.pair(0)


def test_what_cannot_be_read_may_be_skipped(tmp_path):
    files.write(tmp_path, "train", [files.drawn(at) for at in range(120)][:100])
    (tmp_path / "train" / "panoptic" / "3.png").write_bytes(b"nothing")
    settings = config(tmp_path, bad_images="skip", img_size=24, batch_size=100)
    batches = PanopticTrainBatches(load_annotated(settings, masks=False), settings, **HERE)
    [[(images, _)]] = batches.epoch(1)
    assert len(images) == 100
    assert len(batches.bad_images) == 1


def test_a_changed_png_is_noticed_by_a_resumed_run(tmp_path):
    files.panoptic(tmp_path, train=2, val=1)
    before = record_of(opened(tmp_path))
    files.write(tmp_path, "val", [files.drawn(7)])
    after = record_of(opened(tmp_path))
    assert before["splits"]["train"] == after["splits"]["train"]
    assert before["splits"]["val"] != after["splits"]["val"]


def test_other_kinds_of_classes_in_another_split_are_refused(tmp_path):
    files.panoptic(tmp_path, train=2, val=1)
    file = tmp_path / "panoptic_val.json"
    annotated_files.changed(file, {"categories": entry(isthing=0)})
    with pytest.raises(ValueError, match="val has other classes than the training images: ball"):
        opened(tmp_path)


def test_all_that_is_wrong_is_listed(tmp_path, capsys):
    files.panoptic(tmp_path, train=2, val=1)
    words = ["check-data", str(tmp_path), "--dataset", "coco", "--panoptic"]
    assert main(words) == 0
    assert "train: 2 images, 8 objects, 4 classes: sky 2, box 2, grass 2, ball 2" in capsys.readouterr().out
    for split in ("train", "val"):
        annotated_files.changed(tmp_path / f"panoptic_{split}.json", {"annotations": segment(id=5)})
    assert main(words) == 2
    out = capsys.readouterr().out
    assert out.count("is no segment of its annotation") == 2
