"""Effective receptive fields against closed forms."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from unloaf.analysis.receptive_field import area_of, contributions
from unloaf.commands import main as cli
from unloaf.config import Config
from unloaf.engine.run import train


class Residual(nn.Module):
    """``x + conv(x)``, one channel, weights one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, x):
        return x + self.conv(x)


def powers(kernel, count):
    """A separable kernel convolved with itself, in one dimension."""
    found = np.array([1.0])
    for _ in range(count):
        found = np.convolve(found, kernel)
    return found


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_stack_of_convolutions_has_the_convolution_of_their_kernels(count):
    convolutions = nn.Sequential(*(Residual().conv for _ in range(count)))
    found = contributions(convolutions, convolutions[-1], [torch.randn(2, 1, 15, 15)])
    line = powers([1, 1, 1], count)
    expected = np.zeros((15, 15))
    expected[7 - count : 8 + count, 7 - count : 8 + count] = np.outer(line, line)
    assert found.numpy() == pytest.approx(expected / expected.sum())


def test_residual_blocks_see_less_than_convolutions_of_their_depth():
    blocks = nn.Sequential(*(Residual() for _ in range(2)))
    found = contributions(blocks, blocks[-1], [torch.randn(1, 1, 9, 9)])
    once = np.ones((3, 3))
    once[1, 1] += 1  # the shortcut
    padded = np.zeros((9, 9))
    for (i, j), weight in np.ndenumerate(once):  # once convolved with itself
        padded[2 + i : 5 + i, 2 + j : 5 + j] += weight * once
    assert found.numpy() == pytest.approx(padded / padded.sum())


def test_areas_are_those_of_the_squares_around_the_centre():
    field = torch.zeros(5, 5, dtype=torch.float64)
    field[2, 2], field[2, 3], field[0, 0] = 0.5, 0.3, 0.2
    assert [area_of(field, share) for share in (50, 51, 80, 81)] == [4, 36, 36, 100]
    assert area_of(torch.full((4, 4), 1 / 16), 100) == 100


def with_class_token(x):
    """(B, C, H, W) as the tokens of a ViT."""
    tokens = x.flatten(2).mT
    return torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1)


ARRANGED = {"maps": lambda x: x, "channels-last": lambda x: x.permute(0, 2, 3, 1), "tokens": with_class_token}


@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED)
def test_the_centre_is_found_in_maps_and_tokens(arrange):
    class Arranged(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
            nn.init.ones_(self.conv.weight)

        def forward(self, x):
            return arrange(self.conv(x))

    model = Arranged()
    found = contributions(model, model, [torch.randn(1, 1, 7, 7)])
    expected = np.zeros((7, 7))
    expected[2:5, 2:5] = 1 / 9
    assert found.numpy() == pytest.approx(expected)


def test_what_has_no_places_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    with pytest.raises(ValueError, match="gives a tensor of 2 axes"):
        contributions(model, model, [torch.zeros(1, 1, 3, 3)])
    dead = nn.Conv2d(1, 1, 3, padding=1)
    nn.init.zeros_(dead.weight)
    with pytest.raises(ValueError, match="no pixel contributes"):
        contributions(dead, dead, [torch.zeros(1, 1, 3, 3)])


def test_the_command_shows_that_depth_sees_more_and_a_smaller_input_too(tmp_path, capsys):
    tiny = {"model": "cifar/resnet26", "width": 2, "batch_size": 64, "device": "cpu", "epochs": 1, "name": "r"}
    run = train(Config(**tiny, output=str(tmp_path)), console=Console(file=io.StringIO())).path
    words = ["receptive-field", run, "--subnets", "1-1-1", "4-4-4", "--sides", 16, 32, "--device", "cpu"]
    code = cli.main(
        [*map(str, words), "--json", "--plot", str(tmp_path / "f.svg"), "--output", str(tmp_path / "f.csv")]
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert code == 0
    assert [(row["depths"], row["side"]) for row in rows] == [
        ("1-1-1", 16),
        ("1-1-1", 32),
        ("4-4-4", 16),
        ("4-4-4", 32),
    ]
    assert [len(row["contributions"]) for row in rows] == [16, 32, 16, 32]
    assert rows[3]["areas"][2] > rows[1]["areas"][2]
    assert rows[0]["areas"][2] > rows[1]["areas"][2]
    assert "contributions" not in (tmp_path / "f.csv").read_text()
    assert "1-1-1, 16 px" in (tmp_path / "f.svg").read_text()
    for wrong, said in ((["--subnets", "9-9-9"], "give a depth out of"), (["--sides", "0"], "at least 1")):
        assert cli.main(["receptive-field", str(run), *wrong, "--device", "cpu"]) == 2
        assert said in capsys.readouterr().err
