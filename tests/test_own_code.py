"""Models and image sets of the user's own, module:function: allowed, recorded, told when they fail."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import own_functions
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.data.own import load_own
from unloaf.data.own_sets import load_own_classes
from unloaf.engine.loop import prepare
from unloaf.models.load import load_model
from unloaf.models.own import build_own
from unloaf.release.exports import export_run

FLAG = "--run-own-code"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a module that can be edited: its folder, beside the module."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(own_functions.__file__, folder / "edited.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        words = ["train", FLAG, "--model", "edited:build", "--dataset", "edited:memory", "--epochs", "1", "-b", "16"]
        assert main([*words, "--device", "cpu", "--output", str(folder), "--name", "run"]) == 0
        yield folder / "run"
        sys.modules.pop("edited", None)


def edited(run):
    """The module with another hash."""
    (run.parent / "edited.py").write_text(Path(own_functions.__file__).read_text() + "# edited\n")


def error(capsys, *words):
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


# --- allowed


def test_code_is_not_run_unless_asked(capsys, tmp_path):
    told = error(capsys, "train", "--model", "never_imported:build", "--output", tmp_path)
    assert "model never_imported:build is a function of your own" in told
    assert "add --run-own-code if you trust it" in told
    assert "never_imported" not in sys.modules
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["eval"], ["subnets"], ["export"], ["predict", "x.png"], ["anytime"], ["train", "--resume"]]
)
def test_a_run_of_own_code_is_opened_with_the_flag_alone(run, words, capsys):
    command, *more = words
    told = error(capsys, command, *(more if command == "train" else []), run, *(more if command == "predict" else []))
    assert "model edited:build and dataset edited:memory are functions of your own" in told
    assert "add --run-own-code" in told


def test_a_run_is_evaluated_and_reported(run, capsys):
    assert main(["eval", str(run), "--subnets", "1", "--device", "cpu", FLAG]) == 0
    assert main(["report", str(run)]) == 0  # reads files alone
    out = capsys.readouterr().out
    # 10 of 16 validation images are of one class: a network of three epochs is no worse than guessing.
    assert "val top-1" in out
    assert "edited:build" in (run / "args.yaml").read_text()


# --- recorded


def test_the_record_has_name_file_and_hash(run):
    import hashlib

    found = json.loads((run / "env.json").read_text())["own_code"]
    expected = hashlib.sha256(Path(own_functions.__file__).read_bytes()).hexdigest()
    assert found["model"] == {"function": "edited:build", "file": "edited.py", "sha256": expected}
    assert found["dataset"]["function"] == "edited:memory"


def test_changed_code_is_told_or_refused(run, capsys):
    original = (run.parent / "edited.py").read_text()
    edited(run)
    try:
        told = error(capsys, "train", "--resume", run, "--epochs", "2", FLAG)
        assert "edited.py (model edited:build, dataset edited:memory) was changed since step-00000003" in told
        assert "--allow-changed-code" in told
        assert main(["eval", str(run), "--device", "cpu", FLAG]) == 0
        assert "edited.py (model edited:build, dataset edited:memory) was changed since" in capsys.readouterr().out
        copy = run.parent / "copy"
        shutil.copytree(run, copy, symlinks=True)
        assert main(["train", "--resume", str(copy), "--epochs", "2", FLAG, "--allow-changed-code"]) == 0
        assert "was changed since" in (copy / "log.txt").read_text()
    finally:
        (run.parent / "edited.py").write_text(original)


# --- exported


def test_only_forms_without_code_are_exported(run, tmp_path):
    with pytest.raises(ValueError, match="made by edited:build, which no other file holds; give --format pt2 or onnx"):
        export_run(run, output=tmp_path / "a", device="cpu", run_own_code=True)
    found = export_run(run, depths="2", format="pt2", output=tmp_path / "b", device="cpu", run_own_code=True)
    assert found.difference < 1e-5
    assert "model.pt2" in found.files


# --- what the functions get and return


def test_the_model_gets_what_it_has_arguments_for():
    model = build_own("own_functions:build", num_classes=5, in_chans=1, img_size=8, given={"width": 4})
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"build\(\) has no argument depth"):
        build_own("own_functions:build", num_classes=5, in_chans=1, img_size=8, given={"depth": 4})


def test_inspect_gives_a_required_argument():
    model, _ = load_model("own_functions:build", num_classes=7)
    assert model.head.out_features == 7
    assert load_model("own_functions:build")[0].head.out_features == 1000


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("broken", r"build\(\) raised KeyError: 'depth' \(.*own_functions.py, line 16: return \{\}\[\"depth\"\]\)"),
        ("number", r"build\(\) returned int; return a torch.nn.Module"),
        ("narrow", r"at images \(2, 1, 8, 8\) raised RuntimeError: .*channels.* \(.*, line \d+: .*\)"),
    ],
)
def test_faults_of_a_model_are_told_with_their_line(kind, expected):
    with pytest.raises(ValueError, match=expected):
        build_own("own_functions:build", num_classes=5, in_chans=1, img_size=8, given={"kind": kind})


def test_images_in_memory_are_fed_as_such():
    data = load_own_classes(Config(dataset="own_functions:memory"))
    images = own_functions.memory()["train"][0].float()
    assert data.class_names == ("dark", "light")
    assert (len(data.train), len(data.val), len(data.test), data.img_size) == (48, 16, 0, 8)
    assert data.mean[0] == pytest.approx(float(images.mean()), rel=1e-6)


def test_data_sets_keep_their_targets_and_get_the_folder():
    config = Config(task="multilabel", dataset="own_functions:pictures", data_dir="place", method="common")
    own = load_own(config, columns=True)
    assert own.names == ("light", "place")
    assert own.train.labels[:6].tolist() == [[0, 0], [0, 1], [0, 0], [0, 1], [0, 0], [1, 1]]
    assert own.train.open(7).getpixel((0, 0)) == (140, 140, 140)
    assert len(own.notes) == 1  # the training split has targets, validation was read once
    assert "val: all 10 images were read once" in own.notes[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("own_functions:fails", r"fails\(\) raised LookupError: no such table \(.*own_functions.py, line \d+: raise"),
        ("own_functions:numbers", "train, number 0: ValueError: too many values to unpack"),
        ("own_functions:absent", "has no function 'absent'"),
        ("no_such_module:f", "module no_such_module cannot be imported: ModuleNotFoundError"),
    ],
)
def test_faults_of_data_are_told(name, expected):
    with pytest.raises(ValueError, match=expected):
        load_own_classes(Config(dataset=name))


def test_an_image_that_raises_is_a_bad_one():
    config = Config(task="multilabel", dataset="own_functions:damaged", method="common", img_size=8, batch_size=16)
    config = Config(**vars(config) | {"model": "own_functions:build", "device": "cpu"})
    from unloaf.data.own_sets import load_columns

    images = load_columns(config).train
    with pytest.raises(Exception, match=r"number 5 of train.*RuntimeError: the disk is gone \(.*, line \d+"):
        images.open(5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dataset": "digit"}, "dataset 'digit': give digits or cifar10"),
        ({"model": "m:f", "pretrained": True}, "--pretrained: model m:f decides that itself"),
        ({"dataset": "own_functions:memory", "task": "detection"}, "task detection reads coco and voc"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        Config(**settings)


def test_a_run_is_prepared_of_both():
    config = Config(model="own_functions:build", dataset="own_functions:memory", device="cpu", batch_size=16)
    training = prepare(config)
    assert len(training.stages) == 1
    assert [len(stage.blocks) for stage in training.stages] == [3]
