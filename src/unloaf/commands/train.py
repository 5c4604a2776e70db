"""`unloaf train`: one run, begun or gone on with."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from unloaf.commands.parsing import parse
from unloaf.config import Config, dump_config, load_config
from unloaf.engine.run_folder import open_run, run_of
from unloaf.streams import say


@dataclass(frozen=True)
class Train:
    """What `unloaf train` was asked for: the run, how to resume, and whether to train at all."""

    config: Config
    resume: str | None
    print_config: bool
    allow_changed_data: bool = False


_ABOUT_TRAIN = (
    "Train one network; the run folder OUTPUT/NAME keeps settings, figures and checkpoints. "
    "-c FILE (--config) takes defaults from a YAML file such as a run's args.yaml, --recipe NAME from a recipe. "
    "--resume auto goes on with OUTPUT/NAME if it was begun, --resume RUN with that run and its settings, "
    "--allow-changed-data also where its images are others by now. "
    "--print-config shows the configuration and stops. timm's --input-size 3 224 224 is --img-size 224."
)


_FORMER_FLAGS = {"--ema": "--group-ema for the knowledge of GKT's groups, --model-ema to average the weights"}


def parse_train(words: list[str]) -> Train:
    """Reads the words after `unloaf train`.

    Raises:
        ValueError: a flag or value is not allowed; one line.
        SystemExit: help was asked for and shown.
    """
    words, file = _take_value(words, "-c", "--config", kind="a file")
    words, name = _take_value(words, "--recipe", kind="a name")
    words, resume = _take_value(words, "--resume", kind="auto or a run folder")
    show, allow = ("--print-config" in words), ("--allow-changed-data" in words)
    words, channels = _input_size([word for word in words if word not in ("--print-config", "--allow-changed-data")])
    about = _ABOUT_TRAIN
    if "-h" in words or "--help" in words:
        from unloaf.recipes import recipe_names

        about = f"{about} Recipes: {', '.join(recipe_names())}."
    default = _defaults(file, name, resume)
    more = ("--config", "--recipe", "--resume", "--print-config", "--allow-changed-data", "--input-size")
    config = parse(
        Config, words, prog="unloaf train", default=default, about=about, more_flags=more, former=_FORMER_FLAGS
    )
    if config.dataset == "digits" and config.data_dir is not None and not (default and default.data_dir):
        raise ValueError(
            f"data_dir {config.data_dir}: the dataset is digits, which ships with scikit-learn and needs none; give "
            "--dataset too, imagefolder for class folders"
        )
    grey = config.dataset in ("digits", "fashion_mnist")
    if channels is not None and channels != (1 if grey else 3):
        raise ValueError(
            f"--input-size {channels} ...: images of {config.dataset} have {1 if grey else 3} channel(s); "
            "give --img-size and the side alone"
        )
    return Train(config, resume, show, allow)


def run(words: list[str]) -> int:
    """Trains, prints the accuracy of the end."""
    asked = parse_train(words)
    if asked.print_config:
        print(dump_config(asked.config), end="")
        return 0
    # Only the first process of a run owns its folder, opened before torch is loaded: a bad one is known at once.
    first = os.environ.get("RANK", "0") == "0"
    folder = open_run(asked.config, resume=asked.resume) if first else None
    from unloaf.display import RunConsole
    from unloaf.engine.run import train

    result = train(asked.config, folder=folder, console=RunConsole(), allow_changed_data=asked.allow_changed_data)
    if folder is not None:
        test = result.test
        print(f"{result.split} top-1 {test.top1:.2f} %, top-5 {test.top5:.2f} %, loss {test.loss:.4f}")
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


def _defaults(file: str | None, name: str | None, resume: str | None) -> Config | None:
    """The settings that the flags override: of a file, a recipe or the run that goes on."""
    sources = {"-c": file, "--recipe": name, "--resume RUN": None if resume == "auto" else resume}
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both give all settings; give one of them, and flags beside it")
    if file is not None:
        return load_config(file)
    if name is not None:
        from unloaf.recipes import recipe

        return recipe(name)
    return load_config(run_of(Path(resume)) / "args.yaml") if given and resume is not None else None


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
