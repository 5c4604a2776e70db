"""COCO's and VOC's layouts: what is read of them, what is left out and said, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import annotated_files as files
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.data.annotated.segmentations import segmentation_text
from unloaf.data.annotated.targets import masks_of
from unloaf.data.annotated_sets import load_annotated
from unloaf.data.changed_images import check_resumed
from unloaf.data.fingerprint import listing, read_listing, record_of


def opened(folder, dataset="coco", *, masks=False, **settings):
    task = "instance" if masks else "detection"
    settings = {"model": "retinanet", "method": "common"} | settings
    return load_annotated(Config(task=task, dataset=dataset, data_dir=str(folder), **settings), masks=masks)


def read(folder, **settings):
    return opened(folder, **settings).train


def replaced(**changes):
    """Changes the first entry of a list."""
    return lambda entries: [entries[0] | changes, *entries[1:]]


def test_boxes_are_corners_and_classes_count_in_the_order_of_their_numbers(tmp_path):
    files.write_coco(tmp_path, "train", [[(1, [4, 6, 10, 20]), (2, [30, 0, 8, 8])], [(2, [1, 2, 3, 4])]])
    data = opened(tmp_path, val_fraction=0.0)
    assert data.class_names == ("red", "green")  # 1 and 2, listed the other way round
    first = data.train.target(0)
    assert first["boxes"].tolist() == [[4, 6, 14, 26], [30, 0, 38, 8]]
    assert first["classes"].tolist() == [0, 1]
    assert first["areas"].tolist() == [200, 64]
    assert data.train.target(1)["boxes"].tolist() == [[1, 2, 4, 6]]


def test_an_image_without_objects_stays_and_is_told_about(tmp_path):
    files.write_coco(tmp_path, "train", [[(1, [4, 6, 10, 20])], []])
    data = opened(tmp_path, val_fraction=0.0)
    assert data.train.target(1)["boxes"].shape == (0, 4)
    assert data.notes[0] == ("train: 1 of 2 images have no object; they are trained on as images without any")


def test_crowds_are_no_targets(tmp_path):
    file = files.write_coco(tmp_path, "train", [[(1, [4, 6, 10, 20]), (2, [30, 0, 8, 8])]])
    files.changed(file, {"annotations": replaced(iscrowd=1)})
    images = read(tmp_path, val_fraction=0.0)
    assert images.target(0)["crowd"].tolist() == [True, False]
    assert images.counts.tolist() == [1]


def test_a_box_of_no_area_is_left_out_and_one_over_the_edge_is_cut(tmp_path):
    file = files.write_coco(tmp_path, "train", [[(1, [4, 6, 10, 20]), (2, [30, 0, 8, 8]), (2, [70, 50, 20, 20])]])
    files.changed(file, {"annotations": replaced(bbox=[4, 6, 0, 20])})
    data = opened(tmp_path, val_fraction=0.0)
    assert data.train.target(0)["boxes"].tolist() == [[30, 0, 38, 8], [70, 50, 80, 64]]
    assert data.notes[:2] == (
        "train: 1 box(es) of no area are left out: instances_train.json, annotation 1",
        "train: 1 box(es) are cut at the edge of their image: instances_train.json, annotation 3",
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotations": replaced(image_id=99)}, "annotation 1: there is no image 99"),
        ({"annotations": replaced(category_id=7)}, "category_id 7 is none of the 2 categories"),
        ({"annotations": replaced(bbox=[90, 0, 5, 5])}, "lies outside its image of 80 x 64 pixels"),
        ({"annotations": replaced(bbox=[1, 2, 3])}, r"bbox \[1, 2, 3\]; give \[left, top, width, height\]"),
        ({"annotations": replaced(bbox=[1, 2, float("nan"), 4])}, "give finite numbers"),
        ({"images": replaced(file_name="../x.png")}, "leads out of the folder"),
        ({"images": replaced(file_name="none.png")}, "1 of the 1 images of .* are not in .*train: none.png"),
        ({"images": replaced(height="64")}, "needs a file_name, height and width"),
        ({"images": lambda entries: entries * 2}, "image id 1 is there twice"),
        ({"categories": lambda entries: []}, "0 categories"),
        ({"categories": lambda entries: "x"}, "needs lists images, annotations and categories"),
        ({"images": replaced(id="1")}, "image id '1'; give integers"),
        ({"images": replaced(id=None)}, "image id None; give integers"),
        ({"images": replaced(height=10**30)}, "needs a file_name, height and width"),
        ({"images": replaced(file_name="a" * 5000)}, "are not in .*train: aaa"),
        ({"images": lambda entries: [*entries, entries[0] | {"id": 2}]}, "file_name 1.png is that of two images"),
        ({"annotations": replaced(image_id=True)}, "there is no image True"),
        ({"annotations": replaced(image_id=[1])}, r"there is no image \[1\]"),
        ({"annotations": replaced(category_id=True)}, "category_id True is none of the 2 categories"),
        ({"annotations": replaced(bbox=[1, 1, 10**400, 3])}, "give .left, top, width, height. in pixels"),
        ({"annotations": replaced(iscrowd="0")}, "annotation 1: iscrowd '0'; give 0 or 1"),
        ({"annotations": replaced(area=-1)}, "annotation 1: area -1; give one from 0 to 1e10"),
        ({"annotations": replaced(area=float("nan"))}, "annotation 1: area nan; give one from 0 to 1e10"),
        ({"annotations": replaced(area="200")}, "annotation 1: area '200'; give one from 0 to 1e10"),
        ({"categories": replaced(name=None)}, "category name None; give a text"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, said):
    file = files.write_coco(tmp_path, "train", [[(1, [4, 6, 10, 20])]])
    files.changed(file, change)
    with pytest.raises(ValueError, match=said):
        opened(tmp_path)


def test_a_box_that_float32_takes_for_a_line_is_left_out(tmp_path):
    """70 and 70.0000001 are one number there; torchvision's detectors end a run at such a box."""
    file = files.write_coco(tmp_path, "train", [[(1, [4, 6, 10, 20]), (2, [30, 0, 8, 8])]])
    files.changed(file, {"annotations": replaced(bbox=[70, 6, 1e-7, 20])})
    data = opened(tmp_path, val_fraction=0.0)
    assert data.train.target(0)["boxes"].tolist() == [[30, 0, 38, 8]]
    assert data.notes[0] == "train: 1 box(es) of no area are left out: instances_train.json, annotation 1"


def test_images_of_two_splits_are_told_of(tmp_path):
    files.write_coco(tmp_path, "images", files.drawn(4, 0))
    file = tmp_path / "instances_images.json"
    for split, part in (("train", slice(0, 3)), ("val", slice(2, 4))):
        (tmp_path / f"instances_{split}.json").write_text(file.read_text())
        names = {image["id"] for image in json.loads(file.read_text())["images"][part]}
        files.changed(
            tmp_path / f"instances_{split}.json",
            {
                "images": lambda entries, names=names: [one for one in entries if one["id"] in names],
                "annotations": lambda entries, names=names: [one for one in entries if one["image_id"] in names],
            },
        )
    assert "val: 1 of these images are training images too: 3.png" in opened(tmp_path).notes


def test_test_images_without_any_object_are_left_out(tmp_path):
    """Their mAP would be -1, which means that there is none."""
    files.coco(tmp_path)
    files.write_coco(tmp_path, "test", [[], []])
    data = opened(tmp_path)
    assert len(data.test) == 0
    assert "test: no image has an object to find, so nothing is tested on them" in data.notes


def test_a_file_that_is_no_json_is_refused(tmp_path):
    files.write_coco(tmp_path, "train", [[(1, [4, 6, 10, 20])]]).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"instances_train\.json cannot be read as JSON"):
        opened(tmp_path)


def test_an_image_of_another_size_is_refused_when_it_is_opened(tmp_path):
    file = files.write_coco(tmp_path, "train", [[(1, [4, 6, 10, 20])]])
    files.changed(file, {"images": replaced(width=81)})
    images = read(tmp_path, val_fraction=0.0)
    with pytest.raises(Exception, match="it has 80 x 64 pixels, its annotations are about 81 x 64"):
        images.open(0)


def test_a_set_without_any_object_is_refused(tmp_path):
    files.write_coco(tmp_path, "train", [[], []])
    with pytest.raises(ValueError, match="the training images have no object at all"):
        opened(tmp_path, val_fraction=0.0)


def test_splits_have_the_same_classes(tmp_path):
    files.coco(tmp_path)
    files.changed(
        tmp_path / "instances_val.json", {"categories": lambda entries: [*entries, {"id": 3, "name": "blue"}]}
    )
    with pytest.raises(ValueError, match="val has other classes than the training images: blue"):
        opened(tmp_path)


def test_without_validation_images_some_are_held_out(tmp_path):
    files.write_coco(tmp_path, "train", files.drawn(10, 0))
    data = opened(tmp_path, val_fraction=0.2)
    names = [{split.name(i) for i in range(len(split))} for split in (data.train, data.val)]
    assert list(map(len, names)) == [8, 2]
    assert not names[0] & names[1]


def test_layouts_of_published_coco(tmp_path):
    file = files.write_coco(tmp_path, "train2017", [[(1, [4, 6, 10, 20])]])
    (tmp_path / "annotations").mkdir()
    file.rename(tmp_path / "annotations" / file.name)
    assert len(read(tmp_path, val_fraction=0.0)) == 1


# --- masks


def test_masks_of_polygons_and_of_both_kinds_of_rle():
    """A square of 2 x 3 pixels; COCO's RLE counts down the columns, pixels outside and inside in turn."""
    from pycocotools import mask as pycocotools

    expected = np.zeros((5, 6), np.uint8)
    expected[1:3, 2:5] = 1
    counts = [11, 2, 3, 2, 3, 2, 7]  # 2 columns of 5 and 1, then 2 of each 5
    compressed = pycocotools.encode(np.asfortranarray(expected))
    forms = [
        [[2, 1, 5, 1, 5, 3, 2, 3]],
        {"size": [5, 6], "counts": counts},
        {"size": [5, 6], "counts": compressed["counts"].decode()},
    ]
    from faster_coco_eval.core import mask as utilities

    masks = masks_of([json.dumps(form).encode() for form in forms], 5, 6, utilities=utilities)
    assert all(torch.equal(mask, torch.from_numpy(expected)) for mask in masks)


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ({"size": [64, 81], "counts": "x"}, r"its mask is of height and width \[64, 81\], its image of \[64, 80\]"),
        ([[1, 2, 3, 4]], "give polygons of at least 3 points, or COCO's RLE"),
        ([], "give polygons"),
        ([[1, 1, 5, 1, 5, 5, 1]], "give polygons"),
        ([[1, 1, float("nan"), 2, 3, 3]], r"does not lie in its image of 80 x 64 pixels"),
        ([[1, 1, 1e9, 2, 3, 3]], r"from \(1, 1\) to \(1e\+09, 3\), does not lie in its image"),
        ([[100, 70, 120, 70, 120, 90]], "does not lie in its image"),
        ({"size": [64, 80], "counts": [5, 5]}, "RLE .5, 5. does not have the 5120 pixels"),
        ({"size": [64, 80], "counts": [-5, 5125]}, "does not have the 5120 pixels"),
        ({"size": [64, 80], "counts": ["a"]}, "does not have the 5120 pixels"),
        ({"size": [64, 80], "counts": [2**32 + 10, 5110]}, "does not have the 5120 pixels"),
        ({"size": [64, 80], "counts": "x"}, "does not have the 5120 pixels"),
        ({"size": [64, 80], "counts": "\ud800"}, "does not have the 5120 pixels"),
        ({"size": [64.0, 80.0], "counts": [5120]}, "its mask is of height and width"),
        (None, "give polygons"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, segmentation, said):
    file = files.write_coco(tmp_path, "train", [[(1, [4, 6, 10, 20])]])
    files.changed(file, {"annotations": replaced(segmentation=segmentation)})
    with pytest.raises(ValueError, match=said):
        opened(tmp_path, masks=True, model="mask-rcnn")


@pytest.mark.parametrize("seed", range(3))
def test_compressed_runs_are_read_as_pycocotools_writes_them(seed):
    from pycocotools import mask as pycocotools

    expected = np.random.default_rng(seed).random((60, 70)) < [0.5, 0.01, 0.999][seed]
    written = pycocotools.encode(np.asfortranarray(expected, dtype=np.uint8))
    text = {"size": [60, 70], "counts": written["counts"].decode()}
    assert segmentation_text(text, (60, 70), "it")
    with pytest.raises(ValueError, match="does not have the 4200 pixels"):
        segmentation_text(text | {"counts": text["counts"] + "1"}, (60, 70), "it")


# --- VOC


def test_boxes_of_voc_count_from_one_and_include_their_last_pixel(tmp_path):
    one = files.VOC_OBJECT.format(1, 1, 80, 64, name="dog", difficult=0)
    other = files.VOC_OBJECT.format(11, 21, 20, 30, name="cat", difficult=1)
    files.write_voc(tmp_path, "train", ["a", "b"], one + other)
    data = opened(tmp_path, "voc", val_fraction=0.0)
    assert data.class_names == ("cat", "dog")
    found = data.train.target(0)
    assert found["boxes"].tolist() == [[0, 0, 80, 64], [10, 20, 20, 30]]
    assert found["classes"].tolist() == [1, 0]
    assert found["crowd"].tolist() == [False, True]
    assert data.notes[0] == "train: 2 difficult object(s) are no targets"


def edited(root, old, new):
    file = root / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "Annotations" / "a.xml").unlink(), "a.xml is no annotation of VOC"),
        (lambda root: (root / "Annotations" / "a.xml").write_text("<annotation>"), "a.xml is no annotation of VOC"),
        (lambda root: (root / "Annotations" / "a.xml").write_text("<!DOCTYPE a>\n<a/>"), "document type"),
        (lambda root: edited(root, "<width>80", "<width>inf"), "cannot convert float infinity"),
        (lambda root: edited(root, "<width>80", "<width>1e30"), "size .* x 64"),
        (lambda root: edited(root, "<difficult>0", "<difficult>True"), "<difficult> 'True', which is 0 or 1"),
        (lambda root: edited(root, "<name>dog", "<name> "), "an object has an empty <name>"),
        (lambda root: (root / "JPEGImages" / "a.jpg").write_bytes(b""), "it is not known which one is a"),
        (lambda root: (root / "JPEGImages" / "a.png").unlink(), "1 of the 1 images of .* are not in JPEGImages: a"),
        (lambda root: (root / "ImageSets/Main/train.txt").write_text("a\na\n"), "a is there twice"),
    ],
)
def test_a_set_of_voc_that_does_not_fit_is_refused(tmp_path, change, said):
    files.write_voc(tmp_path, "train", ["a"], files.VOC_OBJECT.format(1, 1, 8, 8, name="dog", difficult=0))
    change(tmp_path)
    with pytest.raises(ValueError, match=said):
        opened(tmp_path, "voc")


def test_classes_of_voc_that_no_training_image_has_are_refused(tmp_path):
    for split, name in (("train", "dog"), ("val", "cat")):
        files.write_voc(tmp_path, split, [split], files.VOC_OBJECT.format(1, 1, 8, 8, name=name, difficult=0))
    with pytest.raises(ValueError, match="classes that the training images do not have: cat"):
        opened(tmp_path, "voc")


# --- a run notices that they are others


def test_a_moved_box_is_another_label(tmp_path):
    files.coco(tmp_path)
    before = opened(tmp_path)
    (tmp_path / "list.csv.gz").write_bytes(listing(before))
    record = record_of(before)
    assert not record["held_out"]
    files.changed(tmp_path / "instances_train.json", {"annotations": replaced(bbox=[1, 1, 24, 26])})
    now = opened(tmp_path)
    listed = read_listing(tmp_path / "list.csv.gz")
    with pytest.raises(ValueError, match=r"1 labelled otherwise \(train/1.png\)"):
        check_resumed(now, record_of(now), record, listed, checkpoint="step-1", allow=False)
    assert check_resumed(before, record_of(before), record, listed, checkpoint="step-1", allow=False) == []


def test_no_image_is_decoded_before_it_is_needed(tmp_path):
    files.coco(tmp_path)
    (tmp_path / "train" / "1.png").write_bytes(b"no image")
    images = read(tmp_path)
    with pytest.raises(Exception, match="cannot be read"):
        images.open(0)
    assert isinstance(images.open(1), Image.Image)


# --- unloaf check-data


def test_check_data_lists_all_that_is_wrong(tmp_path, capsys):
    files.coco(tmp_path)
    changes = [{"image_id": 77}, {"iscrowd": "0"}]
    files.changed(
        tmp_path / "instances_train.json",
        {"annotations": lambda e: [*(one | change for one, change in zip(e, changes, strict=False)), *e[2:]]},
    )
    (tmp_path / "val" / "1.png").write_bytes(b"x")
    assert main(["check-data", str(tmp_path), "--dataset", "coco"]) == 2
    out = capsys.readouterr()
    lines = (out.out + out.err).splitlines()
    assert "val: 4 images, 8 objects, 2 classes: red 5, green 3" in lines
    assert [line.partition(",")[2] for line in lines if line.startswith("wrong: ")] == [
        " annotation 1: there is no image 77; remove the annotation or add the image",
        " annotation 2: iscrowd '0'; give 0 or 1",
    ]
    assert any(line.startswith("bad: 1.png: ") for line in lines)
    assert lines[-1].startswith("unloaf: error: 2 faults of the image set and 1 of 4 images cannot be read")
    with pytest.raises(ValueError, match=r"no image 77.*\(1 more such faults: see `unloaf check-data`\)"):
        opened(tmp_path)


def test_check_data_looks_at_masks_where_it_is_told_to(tmp_path):
    files.coco(tmp_path)
    files.changed(tmp_path / "instances_val.json", {"annotations": replaced(segmentation=[])})
    words = ["check-data", str(tmp_path), "--dataset", "coco"]
    assert [main(words), main([*words, "--masks"])] == [0, 2]


def test_check_data_lists_all_files_of_voc_that_are_wrong(tmp_path, capsys):
    files.write_voc(tmp_path, "train", ["a", "b"], files.VOC_OBJECT.format(1, 1, 8, 8, name="dog", difficult="no"))
    assert main(["check-data", str(tmp_path), "--dataset", "voc"]) == 2
    out = capsys.readouterr()
    assert (out.out + out.err).count("is no annotation of VOC: <difficult> 'no', which is 0 or 1") == 2
