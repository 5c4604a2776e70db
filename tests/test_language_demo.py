"""The demo of language models, end to end and small."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from unloaf import language_demo
from unloaf.commands.main import main
from unloaf.language import DecodingRow
from unloaf.language_demo import LanguageRun, decoding_cells, exit_cells

SIZES = ("hidden_size=16", "intermediate_size=16", "num_hidden_layers=3", "num_attention_heads=2",
         "num_key_value_heads=1", "max_position_embeddings=160")  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    recipes = [replace(recipe(), model_kwargs=SIZES, batch_size=512) for recipe in language_demo._RECIPES]
    monkeypatch.setattr(language_demo, "_RECIPES", [lambda config=config: config for config in recipes])
    for name, value in (("_DRAFTS", (1,)), ("_EXITS", (1, 2)), ("_PROMPTS", 1), ("_NEW", 4), ("_REPEATS", 1)):
        monkeypatch.setattr(language_demo, name, value)


def test_demo_writes_page_and_results(tmp_path, small):
    runs, report = language_demo.run_language_demo(output=tmp_path, epochs=1, console=Console(file=io.StringIO()))
    assert [run.label for run in runs] == ["common training", "ST"]
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "results.json", "results.csv"}
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [(line["method"], line["layers"]) for line in lines] == [
        (label, depth) for label in ("common training", "ST") for depth in "123"
    ]
    assert all(0 < float(line["test_nats_per_token"]) < math.log(257) + 1 for line in lines)
    assert json.loads((tmp_path / "results.json").read_text())["configs"]["ST"]["method"] == "st"
    page = report.read_text()
    for run in runs:
        assert f"<td>{run.nats[1]:.3f}</td>" in page
        assert [(row.decoder, row.depth) for row in run.decoding][:2] == [("plain", None), ("unloaf", 1)]
        assert run.decoding[1].same == 1.0


def test_cells_by_hand():
    row = DecodingRow("unloaf", 2, 0.5, 0.75, 1.0, 120.4, 1.251, 1.0)
    run = LanguageRun("ST", {1: math.log(2), 8: 0.0}, 1.1, 1.05, (row, DecodingRow("transformers", 2, note="cannot")))
    assert exit_cells([run])[1] == [["1", "0.693", "2.00"], ["8", "0.000", "1.00"]]
    assert decoding_cells([run])[1] == [["ST", "unloaf, exit 2", "0.50", "0.75", "120", "1.25x"]]


def test_more_seeds_are_refused(capsys):
    assert main(["demo", "--task", "language", "--seeds", "2"]) == 2
    assert "seeds 2: --task language has one" in capsys.readouterr().err
