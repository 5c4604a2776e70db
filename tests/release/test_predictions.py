"""`unloaf predict`: classes of images as the run would judge them, and each mistake told."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import unloaf
from unloaf.commands import main as cli
from unloaf.config import Config
from unloaf.data.in_memory import load_digits
from unloaf.engine.run import train
from unloaf.models.build import build_model
from unloaf.release.predictions import predict_run
from unloaf.tasks.methods import class_probabilities

COLOURS = {"ash": (90, 90, 90), "brick": (200, 40, 40), "cyan": (30, 200, 200)}


def picture(colour, seed, size=(14, 11)):
    noise = np.random.default_rng(seed).integers(-30, 30, (*size[::-1], 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A network of 15 blocks that saw four pictures of each of three colours."""
    root = tmp_path_factory.mktemp("colours")
    for number, (name, colour) in enumerate(COLOURS.items()):
        (root / "data" / name).mkdir(parents=True)
        for index in range(4):
            picture(colour, 10 * number + index).save(root / "data" / name / f"{index}.png")
    config = Config(
        dataset="imagefolder", data_dir=str(root / "data"), model="cifar/resnet14", width=2, img_size=8, epochs=1,
        batch_size=12, val_fraction=0.0, output=str(root), name="run", device="cpu", lr=0.01,
    )  # fmt: skip
    train(config, console=Console(quiet=True))
    return root / "run"


def network(run):
    model = build_model("cifar/resnet14", num_classes=3, width=2)
    model.load_state_dict(load_file(run / "last" / "model.safetensors"))
    return model.eval()


def inputs(*paths):
    """By hand: the short side to int(8 / 0.875) = 9, the middle 8 x 8, ImageNet's mean and spread."""
    found = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        width, height = (9 * image.width // image.height, 9) if image.width > image.height else (9, 9)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - 8) / 2), round((height - 8) / 2)
        pixels = np.array(image, dtype=np.float32)[top : top + 8, left : left + 8] / 255
        found.append((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    return torch.tensor(np.array(found), dtype=torch.float32).permute(0, 3, 1, 2)


def shares(found, names=tuple(COLOURS)):
    return torch.tensor([[dict(zip(one.classes, one.probabilities, strict=True))[n] for n in names] for one in found])


@pytest.fixture
def new(tmp_path):
    paths = []
    for index, colour in enumerate(COLOURS.values()):
        paths.append(tmp_path / f"new{index}.png")
        picture(colour, 100 + index).save(paths[-1])
    return paths


@torch.no_grad()
def test_probabilities_are_the_softmax_of_the_network_on_images_prepared_by_hand(run, new):
    found = predict_run(run, new, top_k=3, device="cpu")
    assert [one.image for one in found.images] == list(map(str, new))
    torch.testing.assert_close(shares(found.images), network(run)(inputs(*new)).softmax(1), atol=1e-5, rtol=0)
    assert (found.subnet, found.main, found.epoch, found.notes) == ("2-2-2", True, 1, ())
    assert all(list(one.probabilities) == sorted(one.probabilities, reverse=True) for one in found.images)


@torch.no_grad()
def test_a_subnet_has_its_statistics_estimated_on_the_training_images(run, new):
    model = network(run)
    stages = unloaf.find_stages(model, torch.zeros(1, 3, 8, 8))
    subnet = unloaf.Subnet.from_depths(stages, (2, 1, 1))
    trained = inputs(*sorted((run.parent / "data").rglob("*.png")))
    found = predict_run(run, new, depths="2,1,1", top_k=3, device="cpu")
    assert (found.subnet, found.main) == ("2-1-1", False)
    assert found.notes == ("the subnet's batch-norm statistics are re-estimated on 12 training images",)
    raw = predict_run(run, new, depths="2,1,1", top_k=3, recalibrate=0, device="cpu")
    assert raw.notes == ("the subnet's batch-norm statistics are those of the main network",)
    with unloaf.active_subnet(model, stages, subnet):
        torch.testing.assert_close(shares(raw.images), model(inputs(*new)).softmax(1), atol=1e-5, rtol=0)
        unloaf.recalibrate_bn(model, [trained])
        torch.testing.assert_close(shares(found.images), model(inputs(*new)).softmax(1), atol=1e-4, rtol=0)


def test_a_set_in_memory_is_looked_at_as_it_is_validated(tmp_path):
    config = Config(
        model="cifar/resnet14", width=2, epochs=1, batch_size=448, output=str(tmp_path), name="run", device="cpu"
    )
    train(config, console=Console(quiet=True))
    splits = load_digits()
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path, image in zip(paths, splits.val.images, strict=False):
        Image.fromarray(image[0].numpy()).save(path)
    model = build_model("cifar/resnet14", num_classes=10, in_chans=1, width=2)
    model.load_state_dict(load_file(tmp_path / "run" / "last" / "model.safetensors"))
    pixels = splits.train.images.double()
    x = ((splits.val.images[:5].double() - pixels.mean()) / pixels.std()).float()
    found = predict_run(tmp_path / "run", paths, top_k=10, device="cpu")
    with torch.no_grad():
        expected = model.eval()(x).softmax(1)
    torch.testing.assert_close(shares(found.images, tuple("0123456789")), expected, atol=1e-5, rtol=0)


def test_probabilities_are_those_that_the_loss_saw():
    logits = torch.tensor([[1.0, 2.0, 6.0]])
    # ST++ normalises: mean 3, variance (4 + 1 + 9) / 3.
    normal = [2.5 * (value - 3) / math.sqrt(14 / 3) for value in (1, 2, 6)]
    expected = [math.exp(value) / sum(map(math.exp, normal)) for value in normal]
    found = class_probabilities(Config(method="st++", amplitude=2.5), logits)
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-5, rtol=0)
    each = [[1 / (1 + math.exp(-value)) for value in (1, 2, 6)]]
    torch.testing.assert_close(class_probabilities(Config(method="st", bce_loss=True), logits), torch.tensor(each))


def told(capsys, *words):
    code = cli.main(["predict", *map(str, words), "--device", "cpu"])
    return code, *capsys.readouterr()


def test_bad_images_are_told_after_the_good_ones_and_the_code_is_2(run, new, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(new[0].read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    words = [new[0], tmp_path / "cut.png", tmp_path / "none.png", tmp_path / "empty", new[1]]
    code, out, err = told(capsys, run, *words, "--top-k", "1")
    assert code == 2
    assert [line.partition(": ")[0] for line in out.splitlines()[1:]] == [str(new[0]), str(new[1])]
    bad = err.splitlines()
    assert bad[0].startswith(f"bad: {tmp_path / 'cut.png'}: ")
    assert bad[1] == f"bad: {tmp_path / 'none.png'}: No such file or directory"
    assert bad[2] == f"bad: {tmp_path / 'empty'}: there is no image in this folder"
    assert bad[3].startswith("unloaf: error: 3 of 5 images cannot be read; ")


def test_a_folder_stands_for_the_images_below_it(run, new, tmp_path, capsys):
    (tmp_path / "in" / ".hidden").mkdir(parents=True)
    for place in ("in/b.png", "in/.hidden/c.png", "in/notes.txt"):
        (tmp_path / place).write_bytes(new[0].read_bytes())
    code, out, _ = told(capsys, run, tmp_path / "in", "--csv")
    rows = list(csv.reader(io.StringIO(out)))
    assert code == 0
    assert rows[0] == ["image", "rank", "class", "probability"]
    assert {row[0] for row in rows[1:]} == {str(tmp_path / "in" / "b.png")}
    assert [row[1] for row in rows[1:]] == ["1", "2", "3"]
    assert sum(float(row[3]) for row in rows[1:]) == pytest.approx(1, abs=1e-4)


def test_json_holds_everything(run, new, capsys):
    code, out, err = told(capsys, run, *new, "--json", "--depths", "1,2,2", "--top-k", "2")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["subnet"], found["epoch"], found["bad"], len(found["notes"])) == ("1-2-2", 1, [], 1)
    assert [len(image["classes"]) for image in found["images"]] == [2, 2, 2]
    assert set(found["images"][0]["classes"]) < set(COLOURS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["r"], "give at least one image file, or a folder of them, after the run folder"),
        (["r", "a.png", "--json", "--csv"], "give one of them"),
        (["r", "a.png", "--depths", "3;3"], "give a number for each stage"),
        (["r", "a.png", "--top-k", "0"], "top_k 0: give at least 1"),
        (["r", "a.png"], "r is not a run"),
    ],
)
def test_bad_input(capsys, words, message):
    code, out, err = told(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_depths_that_there_are_not_are_refused(run, new, capsys):
    code, _, err = told(capsys, run, *new, "--depths", "9,1,1")
    assert code == 2
    assert "give a depth out of" in err
