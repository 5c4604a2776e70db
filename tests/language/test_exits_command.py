"""`unloaf exits` on the folder of a model."""

import csv
import json

import pytest

import tiny
from decoders import decoder
from unloaf.commands import main as cli
from unloaf.config import Config
from unloaf.engine.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "small"
    decoder("Llama", vocab_size=257, eos_token_id=256, pad_token_id=256).save_pretrained(place)
    (place.parent / "text.txt").write_text("A subnet that works is speed at inference. " * 20, encoding="utf-8")
    return place


def call(source, *words, text=None):
    text = source.parent / "text.txt" if text is None else text
    given = ["--seq-len", "32", "--tokens", "320", "--prompts", "2", "--new-tokens", "4", "--device", "cpu"]
    return cli.main(["exits", str(source), "--text", str(text), *given, *words])


def test_a_table_a_file_and_json_say_the_same(folder, tmp_path, capsys):
    table = tmp_path / "exits.csv"
    assert call(folder, "--repeats", "1", "--early-exit", "--depths", "1", "3", "--output", str(table)) == 0
    printed = capsys.readouterr().out
    lines = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [line["depth"] for line in lines] == ["1", "3", "4"]
    assert [line["same"] for line in lines] == ["1.0"] * 3
    assert lines[1]["transformers_same"] == "1.0"
    assert f"{float(lines[0]['nats']):.3f}" in printed
    assert "310 tokens of text.txt" in printed  # ten sequences of 32, whose first token is not predicted
    # Which is best is measured; within 2 % of plain decoding no draft is advised.
    fastest = max(lines[:2], key=lambda line: float(line["speed"]))
    words = f"draft with {fastest['depth']} of 4 layers" if float(fastest["speed"]) >= 1.02 else "without a draft"
    assert "advice: " in printed
    assert words in printed
    assert call(folder, "--repeats", "0", "--depths", "1", "3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["nats"] for row in found["rows"]] == pytest.approx([float(line["nats"]) for line in lines])
    assert found["ways"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "none.txt"], "cannot be read"),
        (["--text", "EMPTY"], "it is empty"),
        (["--seq-len", "127", "--text", "SHORT"], "has 11 tokens, less than one sequence of 127"),
        (["--seq-len", "500"], "takes 128 tokens at most"),
        (["--depths", "7"], "depth 7: the model has 4 layers"),
        (["--tokenizer", "model"], "comes without one"),
        (["--text", ""], "give a text that the model was not trained on"),
        (["--early-exit", "--repeats", "0"], "early_exit is timed"),
    ],
)
def test_bad_input_is_told_in_a_line(folder, words, message, capsys):
    for name, text in (("EMPTY", " \n"), ("SHORT", "eleven byte")):
        (folder.parent / name).write_text(text, encoding="utf-8")
    words = [str(folder.parent / word) if word.isupper() else word for word in words]
    assert call(folder, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("unloaf: error: ")
    assert message in error


def test_a_folder_that_is_not_there_is_told(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    assert cli.main(["exits", str(tmp_path / "none"), "--text", str(tmp_path / "text.txt")]) == 2
    assert "no such folder; give a run, or a model" in capsys.readouterr().err


def test_exits_of_a_run_are_judged_at_its_checkpoint(folder, tmp_path, capsys):
    sizes = ("hidden_size=16", "intermediate_size=24", "num_hidden_layers=3", "num_attention_heads=2")
    settings = {"task": "language", "dataset": "text", "model": "hf/LlamaConfig", "method": "st", "device": "cpu"}
    settings |= {"model_kwargs": sizes, "seq_len": 16, "batch_size": 8, "epochs": 1, "opt": "adamw", "lr": 1e-2}
    run, text = tmp_path / "runs" / "one", folder.parent / "text.txt"
    train(
        Config(**settings, data_dir=str(text), output=str(run.parent), name=run.name),
        console=tiny.quiet(),
    )
    assert call(run, "--repeats", "0", "--json", text=text) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["depth"] for row in found["rows"]] == [1, 2, 3]
    assert found["rows"][-1]["nats"] < 5.5  # log 257 is 5.55
    assert call(run, "--repeats", "0", "--tokenizer", "byte", text=text) == 2
    assert "a run has its own" in capsys.readouterr().err
