"""`unloaf train`: one run, begun or gone on with."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import tyro

from unloaf.commands.parsing import parse
from unloaf.config import Config, dump_config, load_config
from unloaf.config.figures import FIGURES
from unloaf.engine.run_folder import open_run, run_of
from unloaf.own_code import check_allowed, is_own, own_settings
from unloaf.recipes import recipe
from unloaf.streams import say


@dataclass(frozen=True, kw_only=True)
class Train:
    """Options of `unloaf train` that are no settings of the run."""

    option_groups = (("config", "run"),)

    config: Annotated[str | None, tyro.conf.arg(aliases=["-c"], metavar="FILE")] = None
    """Take defaults from a YAML file, such as the args.yaml of a run."""
    recipe: str | None = None
    """Take defaults from a recipe; `unloaf recipes` lists them."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="auto|RUN")] = None
    """auto: resume the run OUTPUT/NAME if it was begun, begin it otherwise; RUN: resume this run with its
    settings, in its folder."""
    allow_changed_data: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue a run though training or validation images were added, removed, renamed or relabelled."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that --model or --dataset name as module:function."""
    allow_changed_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue a run though the file of such a function was changed."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the configuration and stop."""


_ABOUT = (
    "Train one network; the run folder OUTPUT/NAME keeps settings, figures and checkpoints. Options override what a "
    "file, a recipe or the resumed run says."
)
_SWITCHES = ("--print-config", "--allow-changed-data", "--run-own-code", "--allow-changed-code")
_FORMER_FLAGS = {"--ema": "--group-ema for the knowledge of GKT's groups, --model-ema to average the weights"}


def parse_train(words: list[str]) -> tuple[Config, Train]:
    """Reads the words after `unloaf train`.

    Raises:
        ValueError: a flag or value is not allowed; one line.
        SystemExit: help was asked for and shown.
    """
    words, file = _take_value(words, "-c", "--config", kind="a file")
    words, name = _take_value(words, "--recipe", kind="a name")
    words, resume = _take_value(words, "--resume", kind="auto or a run folder")
    switches = {flag: flag in words for flag in _SWITCHES}
    given = {flag[2:].replace("-", "_"): there for flag, there in switches.items()}
    asked = Train(config=file, recipe=name, resume=resume, **given)
    words, channels = _input_size([word for word in words if word not in switches])
    default = _defaults(asked)
    config = parse(Config, words, prog="unloaf train", default=default, about=_ABOUT, more=Train, former=_FORMER_FLAGS)
    if config.dataset == "digits" and config.data_dir is not None and not (default and default.data_dir):
        raise ValueError(
            f"data_dir {config.data_dir}: the dataset is digits, which ships with scikit-learn and needs none; give "
            "--dataset too, imagefolder for class folders"
        )
    grey = config.dataset in ("digits", "fashion_mnist")
    if channels is not None and not is_own(config.dataset) and channels != (1 if grey else 3):
        raise ValueError(
            f"--input-size {channels} ...: images of {config.dataset} have {1 if grey else 3} channel(s); "
            "give --img-size and the side alone"
        )
    return config, asked


def run(words: list[str]) -> int:
    """Trains, prints the accuracy of the end."""
    config, asked = parse_train(words)
    if asked.print_config:
        print(dump_config(config), end="")
        return 0
    check_allowed(own_settings(config), allowed=asked.run_own_code)
    # Only the first process of a run owns its folder, opened before torch is loaded: a bad one is known at once.
    first = os.environ.get("RANK", "0") == "0"
    folder = open_run(config, resume=asked.resume) if first else None
    from unloaf.display import RunConsole
    from unloaf.engine.run import train

    allowed = {name: getattr(asked, name) for name in ("allow_changed_data", "run_own_code", "allow_changed_code")}
    result = train(config, folder=folder, console=RunConsole(), **allowed)
    if folder is not None:
        print(f"{result.split} {FIGURES[config.task].text(result.test)}")
        say(f"run: {result.path}")
    return 0


def _input_size(words: list[str]) -> tuple[list[str], int | None]:
    """The words with timm's ``--input-size 3 224 224`` as ``--img-size 224``, and the channels that it names."""
    spelled = [flag for word in words for flag in ("--input-size", "--input_size") if word.partition("=")[0] == flag]
    if not spelled:
        return words, None
    at = next(index for index, word in enumerate(words) if word.partition("=")[0] == spelled[0])
    first = [value for value in (words[at].partition("=")[2],) if value]
    more = list(takewhile(lambda word: not word.startswith("-"), words[at + 1 :]))
    sizes = first + more
    if not all(re.fullmatch("[0-9]{1,4}", size) for size in sizes) or len(sizes) not in (1, 3):
        raise ValueError(f"--input-size {' '.join(sizes)}: give channels, height and width, as in 3 224 224")
    if len(sizes) == 3 and sizes[1] != sizes[2]:
        raise ValueError(f"--input-size {' '.join(sizes)}: images are square here; give --img-size and one side")
    rest = [*words[:at], f"--img-size={sizes[-1]}", *words[at + 1 + len(more) :]]
    return rest, int(sizes[0]) if len(sizes) == 3 else None


def _defaults(asked: Train) -> Config | None:
    """The settings that the flags override: of a file, a recipe or the resumed run."""
    run = None if asked.resume == "auto" else asked.resume
    sources = {"-c": asked.config, "--recipe": asked.recipe, "--resume RUN": run}
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both give all settings; give one of them, and flags beside it")
    if asked.config is not None:
        return load_config(asked.config)
    if asked.recipe is not None:
        return recipe(asked.recipe)
    return None if run is None else load_config(run_of(Path(run)) / "args.yaml")


def _take_value(words: list[str], *flags: str, kind: str) -> tuple[list[str], str | None]:
    """The words without the flag, and its value: a configuration file is read before the flags that override it."""
    rest: list[str] = []
    value: str | None = None
    iterator = iter(words)
    for word in iterator:
        flag, equals, text = word.partition("=")
        if flag not in flags:
            rest.append(word)
            continue
        value = text if equals else next(iterator, "")
        if value == "" or (value.startswith("-") and not equals):
            raise ValueError(f"{flag}: give {kind}")
    return rest, value
