"""The commands of docs/fine-tune.md, one after the other, on photos made here, with a small network and two epochs."""

import csv
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unloaf.commands import main as cli

PAGE = Path(__file__).parents[1] / "docs" / "fine-tune.md"
# What the page says, and what is small enough for a test without a network.
SMALLER = {
    "--model timm/resnet18 --pretrained": "--model cifar/resnet14 --width 2 --img-size 16",
    "--epochs 20 -b 32": "--epochs 2 -b 8",
    "--epochs 30": "--epochs 3",
    "-j 4": "--device cpu",
    "--depths 2,1,2,1": "--depths 2,1,2",
}


def photos(folder: Path, seed: int, count: int) -> None:
    noise = np.random.default_rng(seed)
    for name, colour in {"apple": (200, 40, 40), "banana": (220, 200, 40), "plum": (90, 40, 150)}.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.array(colour) + noise.integers(-20, 20, (24, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"IMG_{index:04}.jpg")


def test_commands_of_the_page_do_what_it_says(tmp_path, monkeypatch, capsys):
    text = PAGE.read_text(encoding="utf-8")
    commands = [
        line for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S) for line in block.splitlines()
    ]
    for said, small in SMALLER.items():
        assert any(said in command for command in commands), said
        commands = [command.replace(said, small) for command in commands]
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 0, 20)
    photos(tmp_path / "new", 1, 1)
    printed = {}
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
        printed[" ".join(command.split()[1:3])] = capsys.readouterr().out
    assert "60 images, 3 classes: apple 20, banana 20, plum 20" in printed["check-data photos"]
    rows = list(csv.DictReader(Path("output/train/photos/summary.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    predicted = list(csv.DictReader(io.StringIO(printed["predict output/train/photos"])))
    assert [row["image"] for row in predicted] == [f"new/{name}/IMG_0000.jpg" for name in ("apple", "banana", "plum")]
    assert {row["class"] for row in predicted} <= {"apple", "banana", "plum"}
    assert Path("output/train/photos/export/2-1-2-state_dict/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["README.md", "docs/command-line.md"])
def test_page_is_linked(name):
    assert "fine-tune.md" in (PAGE.parents[1] / name).read_text(encoding="utf-8")
