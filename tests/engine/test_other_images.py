"""A run knows its classes and its images: it is not judged, exported or trained on with others unseen."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

import tiny
import unloaf
from unloaf.commands import main as cli
from unloaf.config import Config, load_config
from unloaf.data import load_data
from unloaf.data.fingerprint import listing, read_listing, record_of
from unloaf.data.images import ImageSet
from unloaf.engine.checkpoint import load_checkpoint, save_checkpoint
from unloaf.engine.run import train
from unloaf.engine.setup import prepare
from unloaf.release.exports import export_elastic, export_run
from unloaf.runs.judge import judge_run
from unloaf.runs.opened import open_trained

COLOURS = {"cat": (250, 0, 0), "dog": (0, 0, 250), "elk": (0, 250, 0)}


def paint(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def paint_all(root: Path, *splits: str, count: int = 8) -> Path:
    """So many images of each of the three classes in each split, of one colour each."""
    for split in splits:
        for name, colour in COLOURS.items():
            for number in range(count):
                paint(root / split / name / f"{number}.png", colour)
    return root


def start(root: Path, output: Path, **settings: Any) -> Path:
    usual: dict[str, Any] = {
        "dataset": "imagefolder", "data_dir": str(root), "model": "cifar/resnet14", "width": 2, "img_size": 8,
        "augment": "none", "batch_size": 4, "epochs": 1, "lr": 0.05, "method": "common", "device": "cpu",
        "output": str(output), "name": "run",
    }  # fmt: skip
    return train(Config(**usual | settings), console=Console(file=io.StringIO())).path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images in three splits, and a run of eight epochs on them; nobody writes there."""
    folder = tmp_path_factory.mktemp("trained")
    root = paint_all(folder / "images", "train", "val", "test")
    return root, start(root, folder, epochs=8)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same with validation images that are held out of the training images."""
    folder = tmp_path_factory.mktemp("held_out")
    root = paint_all(folder / "images", "train", count=10)
    return root, start(root, folder, val_fraction=0.3)


def test_statistics_are_estimated_from_images_of_all_classes(tmp_path: Path):
    """Files lie class by class: the first 12 of 24 would be of two of the three classes."""
    root = paint_all(tmp_path / "images", "train", "val")
    config = Config(
        dataset="imagefolder", data_dir=str(root), model="cifar/resnet8", width=2, img_size=8, batch_size=4,
        recalibrate=12, method="common", device="cpu",
    )  # fmt: skip
    first, second = (torch.cat([y for _, y in prepare(config).calibration_batches()]) for _ in range(2))
    assert len(first) == 12
    assert torch.equal(first, second)
    assert min(first.bincount(minlength=3).tolist()) >= 2


def copied(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Images and run of one's own; the run names the images as it was begun, so they are given again."""
    root = Path(shutil.copytree(made[0], tmp_path / "images"))
    return root, Path(shutil.copytree(made[1], tmp_path / "run", symlinks=True))


@pytest.fixture
def images_and_run(trained: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return copied(trained, tmp_path)


@pytest.fixture
def held_out_run(held_out: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return copied(held_out, tmp_path)


def go_on(run: Path, root: Path, **options: Any) -> None:
    config = replace(load_config(run / "args.yaml"), data_dir=str(root))
    train(config, console=Console(file=io.StringIO()), resume=str(run), **options)


def judge(run: Path, root: Path) -> Any:
    return judge_run(run, data_dir=str(root), device="cpu")


def export(run: Path, root: Path) -> Any:
    return open_trained(run, data_dir=str(root), device="cpu")


# Classes


def rename(root: Path, old: str, new: str) -> None:
    for split in root.iterdir():
        (split / old).rename(split / new)


def another_class(root: Path) -> None:
    for split in root.iterdir():
        paint(split / "ant" / "0.png", (9, 9, 9))


def one_class_less(root: Path) -> None:
    for split in root.iterdir():
        shutil.rmtree(split / "cat")


@pytest.mark.parametrize("use", [go_on, judge, export])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda root: rename(root, "cat", "zebra"),
         r"cat, dog, elk \(3\) in the run, dog, elk, zebra \(3\) there; class 0 is cat in the run and dog there; "
         "missing there: cat; only there: zebra"),
        (lambda root: rename(root, "elk", "moose"), "class 2 is elk in the run and moose there"),
        (another_class, r"ant, cat, dog, elk \(4\) there; class 0 is cat in the run and ant there; only there: ant"),
        (one_class_less, r"dog, elk \(2\) there; class 0 is cat in the run and dog there; missing there: cat"),
    ],
)  # fmt: skip
def test_other_classes_are_refused_with_both_lists(images_and_run, use, change: Callable[[Path], None], told):
    root, run = images_and_run
    change(root)
    with pytest.raises(ValueError, match=f"not those that the run learned: .*{told}"):
        use(run, root)


def test_other_images_of_the_same_classes_are_judged(images_and_run):
    """Each class has the colour of the next one: what was right is wrong."""
    root, run = images_and_run
    right = judge(run, root).main["val"].top1
    one, *more = COLOURS
    for name, other in zip([one, *more], [*more, one], strict=True):
        shutil.rmtree(root / "val" / name)
        for number in range(5):
            paint(root / "val" / name / f"new {number}.png", COLOURS[other])
    wrong = judge(run, root)
    assert right == 100
    assert wrong.main["val"].top1 == 0
    assert "val: 15 images that are not those of the run" in wrong.notes


def test_commands_refuse_other_classes_with_code_2(images_and_run, capsys):
    root, run = images_and_run
    rename(root, "cat", "zebra")
    for words in (["eval"], ["subnets"], ["export", "--output", str(root.parent / "new")], ["train", "--resume"]):
        assert cli.main([*words, str(run), "--data-dir", str(root)]) == 2
        assert "class 0 is cat in the run and dog there" in capsys.readouterr().err
    assert not (root.parent / "new").exists()


def shard(path: Path, labels: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (80 * label, 0, 0)).save(picture, "PNG")
            for kind, content in (("png", picture.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_classes_without_names_are_counted(tmp_path):
    """Labels 0 to 2 were learned: other images may lack the last class, and may not have one more."""
    for split in ("train", "val"):
        shard(tmp_path / "a" / f"{split}-0.tar", [0, 1, 2] * 4)
        shard(tmp_path / "less" / f"{split}-0.tar", [0, 1] * 4)
        shard(tmp_path / "more" / f"{split}-0.tar", [0, 1, 2, 3] * 4)
    run = start(tmp_path / "a", tmp_path, dataset="webdataset")
    assert json.loads((run / "data.json").read_text())["class_names"] is None
    with pytest.raises(ValueError, match="3"):
        judge(run, tmp_path / "more")
    with pytest.raises(ValueError, match=r"has 2 classes, but the run learned 3|classes have no image|not those"):
        go_on(run, tmp_path / "less")


# Images


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "removed": (lambda train: [(train / "cat" / f"{n}.png").unlink() for n in (3, 5)],
                r"train: 22 images \(was 24\); 2 gone \(train/cat/3\.png, \.\.\.\)"),
    "added": (lambda train: paint(train / "dog" / "late.png", (1, 1, 1)),
              r"train: 25 images \(was 24\); 1 new \(train/dog/late\.png\)"),
    "renamed": (lambda train: (train / "elk" / "7.png").rename(train / "elk" / "8.png"),
                r"train: 24 images \(was 24\); 1 gone \(train/elk/7\.png\); 1 new \(train/elk/8\.png\)"),
    "relabelled": (lambda train: (train / "elk" / "7.png").rename(train / "cat" / "elk 7.png"),
                   r"train: 24 images \(was 24\); 1 gone .train/elk/7\.png.; 1 new .train/cat/elk 7\.png."),
    "validation": (lambda train: (train.parent / "val" / "cat" / "0.png").unlink(),
                   r"was trained on: val: 23 images \(was 24\); 1 gone \(val/cat/0\.png\)"),
    "moved": (lambda train: (train / "cat" / "0.png").rename(train.parent / "val" / "cat" / "from train.png"),
              r"train: 23 images \(was 24\); val: 25 images \(was 24\); 1 gone .*; 1 new"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_run_does_not_go_on_with_other_images_unless_told_to(images_and_run, kind):
    root, run = images_and_run
    change, told = CHANGES[kind]
    change(root / "train")
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"{told}.*; put them back, or continue with them by --allow-changed-data"):
        go_on(run, root)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept
    go_on(run, root, allow_changed_data=True)
    assert "continues with other images than those before: " in (run / "log.txt").read_text()
    record = json.loads((run / "data.json").read_text())
    assert record["splits"]["train"]["images"] == sum(
        len(list(folder.iterdir())) for folder in (root / "train").iterdir()
    )


def test_other_test_images_are_only_said(images_and_run):
    root, run = images_and_run
    (root / "test" / "cat" / "0.png").unlink()
    go_on(run, root)
    assert "the test images are not those that the run began with" in (run / "log.txt").read_text()


def test_moved_images_are_the_same(images_and_run):
    root, run = images_and_run
    moved = root.rename(root.parent / "elsewhere")
    go_on(run, moved)
    assert "other images" not in (run / "log.txt").read_text()
    assert not judge(run, moved).notes


def test_one_image_less_redraws_the_held_out_ones_and_is_refused(held_out_run, held_out):
    """The list that was kept says how many of the 9 validation images of now were trained on."""
    root, run = held_out_run
    (root / "train" / "cat" / "4.png").unlink()
    before = read_listing(run / "images.csv.gz")
    assert before is not None
    trained_on = {name for split, _, name in before if split == "train"}
    data = load_data(replace(load_config(run / "args.yaml"), data_dir=str(root)))
    held = {f"{Path(data.val.name(i)).parent.name}/{Path(data.val.name(i)).name}" for i in range(len(data.val))}
    count = len(held & trained_on)
    assert count > 0
    with pytest.raises(
        ValueError, match=rf"1 gone .*; {count} from training now in validation .*; \d+ from validation"
    ):
        go_on(run, root)
    assert f"by their names {count} of the 9 validation images were trained on" in judge(run, root).notes
    args = run / "args.yaml"  # the images lie where the run says
    args.write_text(args.read_text().replace(str(held_out[0]), str(root)))
    for opening in (judge_run, open_trained):
        with pytest.raises(
            ValueError, match=f"drawn again: {count} of the 9 validation images were trained on .*1 gone"
        ):
            opening(run, device="cpu")


def test_best_so_far_does_not_count_on_other_validation_images(tmp_path):
    """All labels are wrong now, so that epoch 2 is worse than epoch 1 was, and yet the best on these images."""
    config = tiny.config(output=str(tmp_path), name="run", method="common", checkpoint_interval=1, checkpoint_hist=9)
    path = tiny.stopped_after(6, config)
    before = load_checkpoint(path / "model_best")
    val = tiny.data().val
    wrong = tiny.data(val=ImageSet(val.images, (val.labels + 1) % 3))
    tiny.train(config, console=tiny.quiet(), resume="auto", data=wrong, model=tiny.network(), allow_changed_data=True)
    best = load_checkpoint(path / "model_best")
    assert (before.step, best.step) == (4, 8)
    assert best.state["position"]["best"] < before.state["position"]["best"]


@pytest.mark.parametrize("change", ["pixel", "label"])
def test_other_images_in_memory_are_noticed(tmp_path, change):
    config = tiny.config(output=str(tmp_path), name="run", method="common", epochs=1)
    tiny.run(config)
    own = tiny.data().train
    pixels, labels = own.images.clone(), own.labels.clone()
    if change == "pixel":
        pixels[5, 0, 3, 3] += 1
    else:
        labels[5] = (labels[5] + 1) % 3
    other = tiny.data(train=ImageSet(pixels, labels))
    with pytest.raises(ValueError, match=r"was trained on: train: 64 images \(was 64\); put them back"):
        tiny.train(config, console=tiny.quiet(), resume="auto", data=other, model=tiny.network())


def test_run_of_before_is_judged_and_goes_on_and_it_is_said(images_and_run):
    """unloaf 0.1 kept no classes and no images."""
    root, run = images_and_run
    for folder in (run / "checkpoints").iterdir():
        found = load_checkpoint(folder)
        del found.state["data"]
        save_checkpoint(
            run / "checkpoints", found.step, weights=found.weights, state=found.state, metadata=found.metadata
        )
    for name in ("data.json", "images.csv.gz"):
        (run / name).unlink()
    told = "the run has no class names: it was not compared whether these images have its classes"
    assert told in judge(run, root).notes
    assert told in export(run, root).notes
    go_on(run, root)
    assert "does not say on which images it was trained: they were not compared" in (run / "log.txt").read_text()
    assert (run / "data.json").exists()


# What is kept


def test_record_is_over_names_and_labels(tmp_path):
    """By hand: sorted names and labels, each with a zero byte behind it."""
    import hashlib

    root = paint_all(tmp_path / "a", "train", "val", count=2)
    record = record_of(load_data(Config(dataset="imagefolder", data_dir=str(root))))
    text = b"".join(
        b"%s/%d.png\0%d\0" % (name.encode(), n, label) for label, name in enumerate(COLOURS) for n in (0, 1)
    )
    assert record["class_names"] == ["cat", "dog", "elk"]
    assert record["splits"]["train"] == {"images": 6, "sha256": hashlib.sha256(text).hexdigest()}
    assert record["splits"]["test"]["images"] == 0
    assert not record["held_out"]


def test_names_that_are_no_text_are_kept_as_escapes(tmp_path):
    root = paint_all(tmp_path / "a", "train", "val", count=2)
    odd = bytes(root / "train" / "cat") + b"/\xff\n.png"
    shutil.copy(root / "train" / "cat" / "0.png", odd)
    data = load_data(Config(dataset="imagefolder", data_dir=str(root)))
    (tmp_path / "list").write_bytes(listing(data) or b"")
    rows = read_listing(tmp_path / "list")
    assert rows is not None
    assert ("train", "0", "cat/\\xff\n.png") in rows
    assert len(rows) == 13


# mtime: the ids of tests hold the bytes, and processes that collect in two seconds must agree on them
@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"a,b\n", mtime=0), gzip.compress(b"split,label,name\n1\n", mtime=0)],
)
def test_damaged_list_of_images_leaves_the_counts(images_and_run, content):
    root, run = images_and_run
    (run / "images.csv.gz").write_bytes(content)
    (root / "train" / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"was trained on: train: 23 images \(was 24\); put them back"):
        go_on(run, root)


# Exports


NAMES = ("cat", "dog", "elk")


def test_state_dict_and_elastic_tell_the_classes(images_and_run, tmp_path):
    root, run = images_and_run
    export_run(run, data_dir=str(root), device="cpu", output=tmp_path / "small")
    assert unloaf.load_subnet(tmp_path / "small").class_names == NAMES
    export_elastic(run, data_dir=str(root), device="cpu", output=tmp_path / "elastic", subnets=1)
    model = unloaf.load_elastic(tmp_path / "elastic")
    assert model.class_names == NAMES
    assert model.export(model.subnets[-1]).class_names == NAMES
    for folder in ("small", "elastic"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "The 3 outputs stand for these classes, in this order: cat, dog, elk." in card


def test_other_formats_carry_the_classes(images_and_run, tmp_path):
    root, run = images_and_run
    export_run(run, data_dir=str(root), device="cpu", output=tmp_path / "pt2", format="pt2")
    found = {"class_names.json": ""}
    torch.export.load(tmp_path / "pt2" / "model.pt2", extra_files=found)
    assert json.loads(found["class_names.json"]) == list(NAMES)


def test_class_names_of_another_number_are_damage(images_and_run, tmp_path):
    root, run = images_and_run
    export_run(run, data_dir=str(root), device="cpu", output=tmp_path / "small")
    file = tmp_path / "small" / "subnet.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"class_names": ["cat", "dog"]}))
    with pytest.raises(unloaf.CheckpointError, match="2 class names for 3 outputs"):
        unloaf.load_subnet(tmp_path / "small")
