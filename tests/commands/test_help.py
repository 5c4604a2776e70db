"""Help texts and the list of recipes: complete, and readable at any width of the terminal."""

import json
import re
from pathlib import Path

import pytest

from unloaf.commands import main as cli
from unloaf.config import load_config
from unloaf.recipes import RECIPES, recipe


def told(capsys, *words):
    assert cli.main(list(words)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize(
    "command", ["", *("bench step" if name == "bench" else name for name in cli._COMMANDS)], ids=lambda c: c or "unloaf"
)
def test_help_fits_the_terminal_and_breaks_no_word(command, capsys, monkeypatch):
    texts = {}
    for width in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        texts[width] = told(capsys, *command.split(), "--help")
        assert max(map(len, texts[width].splitlines())) <= width
    words = {tuple(text.split()) for text in texts.values()}
    assert len(words) == 1
    assert texts[60] != texts[120]
    assert texts[60].startswith(f"usage: unloaf {command or 'COMMAND'}")


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "imagenet_resnet50_a2"]], ids=len)
def test_recipes_fit_the_terminal(words, capsys, monkeypatch):
    for width in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        assert max(map(len, told(capsys, *words).splitlines())) <= width


def test_help_lists_every_command(capsys):
    out = told(capsys, "--help")
    listed = re.findall(r"^  ([a-z]+(?:-[a-z]+)?)(?: step)?  ", out, flags=re.M)
    assert listed == list(cli._COMMANDS)
    assert told(capsys) == out


def test_options_of_train_stand_under_titles(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = told(capsys, "train", "--help")
    groups = dict(re.findall(r"^([a-z ]+):\n(.*?)(?:\n\n|\Z)", out, flags=re.M | re.S))
    titles = ["task and data", "augmentation", "model", "method", "optimizer", "evaluation", "run"]
    assert [*groups] == titles
    firsts = [group.split()[0] for group in groups.values()]
    assert firsts == ["--task", "--img-size", "--model", "--method", "--epochs", "--eval-interval", "--seed"]
    assert "\n  -c, --config FILE           Take defaults from a YAML file, such as the\n" in groups["run"]


@pytest.mark.parametrize(
    "lines",
    [
        "  -b, --batch-size N          Images per device in a forward pass. (default: 128)\n",
        "  --[no-]norm-decay           Weight decay also on biases and the parameters of norms. (default: on)\n",
        "  --scale X X                 Area of a randomly resized crop, as shares of the image. (default: 0.08 1)\n",
        "  --decay-rate, --dr X        step and multistep: factor of a decay; poly: the power. (default: 0.1)\n",
        "  --amplitude X|auto          Scale of the directions in kl-; auto",
        "  --per subnet|step           Draw one side for each subnet, or one for all",
        "of digits, cifar10, cifar100, fashion_mnist,",
    ],
)
def test_help_says_what_a_value_looks_like_and_its_default(lines, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "112")
    assert lines in told(capsys, "train", "--help")


def test_help_beside_a_recipe_has_its_defaults(capsys):
    out = told(capsys, "train", "--recipe", "digits_gkt", "--help")
    assert re.search(r"How the network is trained\.[^-]* stochastic-depth[^(]*\(default: gkt\)", out)
    assert "Highest learning rate. (default: 0.2)" in out


def test_flags_of_train_are_those_of_the_list(capsys):
    """Scripts of users name them: to remove or rename one is a decision, and so is a new one."""
    out = re.sub(r"--\[no-\]([\w-]+)", r"--\1 --no-\1", told(capsys, "train", "--help"))
    flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", out))
    assert sorted(flags) == json.loads(Path(__file__).with_name("flags.json").read_text())


def test_every_recipe_is_listed_with_network_epochs_figure_and_source(capsys):
    out = told(capsys, "recipes")
    assert re.findall(r"^  ([a-z]\w+) ", out, flags=re.M) == list(RECIPES)
    network, source = re.search(
        r"^(\S+) on imagenet\n(?:  .*\n)*  imagenet_resnet50_a2 +400 +80\.97 +(\[\d\])$", out, flags=re.M
    ).groups()
    assert network == "tv/resnet50"
    assert re.search(rf"\n  {re.escape(source)} +Ye et al\. 2023, table III\n", out)
    assert re.search(r"^  cifar100_resnet50_st +500 +\+4\.53 ", out, flags=re.M)


@pytest.mark.parametrize("name", ["imagenet_resnet50_a2", "digits_stpp", "cifar10_resnet110_gkt"])
def test_settings_of_a_recipe_are_shown_as_a_file_has_them(name, capsys, tmp_path):
    out = told(capsys, "recipes", name)
    head, _, rest = out.partition("settings that are not the defaults:\n")
    assert head.startswith(f"{name}: {recipe(name).model}, {recipe(name).method}, {recipe(name).epochs} epochs")
    assert ">>>" not in head
    (tmp_path / "a.yaml").write_text(rest.partition("\n\n")[0])
    assert load_config(tmp_path / "a.yaml") == recipe(name)
    assert "  epochs: " in rest
    assert "  momentum: " not in rest  # 0.9 in all of them, as by default
