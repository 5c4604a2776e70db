"""The files of `examples`: short, and each trains, saves and evaluates."""

import runpy
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
# What the last lines tell of, and what a short run is.
SHORT = {
    "accelerate_loop": ("6: ", {"epochs": 1}),
    "custom_loss": ("depth 6: ", {"epochs": 1}),
    "detection": ("step 1: main ", {"steps": 2}),
    "lightning_module": ("6: ", {"epochs": 1}),
    "timm_task": ("2-2-2-2: ", {"epochs": 1}),
    "transformers_trainer": ("depth 6: ", {"epochs": 1}),
}


def test_every_example_is_run():
    assert [file.stem for file in FILES] == list(SHORT)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_example_is_under_sixty_lines(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers", "ignore:'pin_memory' argument is set as true"
)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_example_trains_and_prints_figures(file, tmp_path, monkeypatch, capsys):
    last, short = SHORT[file.stem]
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(file))["main"](**short)
    assert last in capsys.readouterr().out
