"""The command line: parses, calls, prints. Nothing here imports torch before a command starts."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from rich.console import Console

from unloaf import __version__
from unloaf.engine.config import Config, dump_config, load_config
from unloaf.engine.errors import CheckpointError, NonFiniteLossError, StoppedError
from unloaf.engine.run_folder import open_run, run_of


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small network by every method and show what became of the networks inside it."""

    output: str = "output/demo"
    """Folder for report.html, results.json and results.csv."""
    seeds: int = 1
    """Repeat with this many seeds; gives mean and spread."""
    epochs: int | None = None
    """Train for another number of epochs, for a quick look."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds {self.seeds}: give at least 1")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs {self.epochs}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Measure time and memory of a training step against common training."""

    model: str = "timm/resnet50"
    """Network, as for train."""
    input_size: int = 64
    """Side of the images in pixels."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 16
    """Images per step."""
    num_subnets: int = 6
    """Subnets per step of ST and ST++."""
    methods: tuple[str, ...] = ("st", "st-inter-stage", "st++", "st++-one-side", "gkt")
    """Methods to measure, also stochastic-depth; common training always is."""
    repeats: int = 10
    """Rounds over all methods; medians count."""
    output: str | None = None
    """Folder for step_time.json and step_time.csv."""


_HELP = """usage: unloaf COMMAND [OPTIONS]

Train residual networks so that the networks inside them stop loafing.

commands:
  demo        train a small network by every method, write report.html
  train       train one network
  bench step  measure the cost of a training step

options:
  -h, --help  show this, or with a command the options of the command
  --version   show the version
  --debug     show the traceback of an error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    0 done, 1 a fault of the program, 2 bad input or configuration, 3 a loss that is not
    finite, 130 Ctrl-C, 143 SIGTERM.

    Args:
        argv: the words after `unloaf`; default: those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(words)
    except ValueError as error:
        return _fail(error, code=2, debug=debug)
    except NonFiniteLossError as error:
        return _fail(error, code=3, debug=debug)
    except StoppedError as error:
        return _fail(error, code=error.code, debug=debug)
    except CheckpointError as error:
        return _fail(error, code=1, debug=debug)
    except KeyboardInterrupt as error:
        return _fail(error, code=130, debug=debug, text="stopped by Ctrl-C")
    except Exception as error:
        return _fail(error, code=1, debug=debug, text=f"{type(error).__name__}: {error}; --debug shows where")
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: Any) -> NoReturn:
    raise SystemExit(143)


def _fail(error: BaseException, *, code: int, debug: bool, text: str | None = None) -> int:
    if debug:
        raise error
    message = " ".join((text or str(error)).split())
    print(f"unloaf: error: {message}", file=sys.stderr)
    return code


def _run(words: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {"demo": _demo, "train": _train, "bench": _bench}
    if words and words[0] in commands:
        return commands[words[0]](words[1:])
    if words in (["--version"], ["-V"]):
        print(f"unloaf {__version__}")
    elif not words or words[0] in ("-h", "--help"):
        print(_HELP)
    else:
        raise ValueError(f"unknown command {words[0]!r}; give {', '.join(commands)}, or --help")
    return 0


def _demo(words: list[str]) -> int:
    options = _parse(Demo, words, prog="unloaf demo")
    from unloaf.demo import run_demo, table

    result = run_demo(output=options.output, seeds=options.seeds, epochs=options.epochs, console=Console(stderr=True))
    Console().print(table(result.rows))
    print(f"report: {result.report}")
    return 0


def _train(words: list[str]) -> int:
    words, file = _take_value(words, "-c", "--config")
    words, name = _take_value(words, "--recipe")
    words, resume = _take_value(words, "--resume")
    print_config = "--print-config" in words
    words = [word for word in words if word != "--print-config"]
    config = _parse(Config, words, prog="unloaf train", default=_defaults(file, name, resume), about=_ABOUT_TRAIN)
    if print_config:
        print(dump_config(config), end="")
        return 0
    # Only the first process of a run owns its folder; it is opened before torch is loaded, so that a folder that
    # cannot be written is known at once.
    folder = open_run(config, resume=resume) if os.environ.get("RANK", "0") == "0" else None
    try:
        from unloaf.engine.train import train

        result = train(config, folder=folder, console=Console(stderr=True))
    finally:
        if folder is not None:
            folder.discard()
    if folder is not None:
        test = result.test
        print(f"{result.split} top-1 {test.top1:.2f} %, top-5 {test.top5:.2f} %, loss {test.loss:.4f}")
        print(f"run: {result.path}")
    return 0


_ABOUT_TRAIN = (
    "Train one network; the run folder OUTPUT/NAME keeps settings, figures and checkpoints. "
    "-c FILE (--config) takes defaults from a YAML file such as a run's args.yaml, --recipe NAME from a recipe. "
    "--resume auto goes on with OUTPUT/NAME if it was begun, --resume RUN with that run and its settings. "
    "--print-config shows the configuration and stops."
)


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


def _bench(words: list[str]) -> int:
    if words[:1] != ["step"]:
        raise ValueError(f"bench {' '.join(words[:1])}: give 'bench step'")
    options = _parse(BenchStep, words[1:], prog="unloaf bench step")
    from unloaf.bench import bench_step, table

    Console().print(table(bench_step(**vars(options))))
    return 0


def _take_value(words: list[str], *flags: str) -> tuple[list[str], str | None]:
    """The words without the flag, and its value: a configuration file is read before the flags that override it."""
    rest: list[str] = []
    value: str | None = None
    iterator = iter(words)
    for word in iterator:
        flag, equals, text = word.partition("=")
        if flag not in flags:
            rest.append(word)
        elif (value := text if equals else next(iterator, "")) == "":
            raise ValueError(f"{flag}: give a file")
    return rest, value


def _parse(kind: Any, words: list[str], *, prog: str, default: Any = None, about: str | None = None) -> Any:
    """Tyro's parser, with one line for an error where tyro draws a box."""
    box = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=words, prog=prog, description=about, **extra)
    except SystemExit as error:
        if error.code == 0:
            raise
        raise ValueError(_reason(error, box.getvalue())) from error


def _reason(error: SystemExit, box: str) -> str:
    cause = error.__context__
    while cause is not None and cause.__context__ is not None:
        cause = cause.__context__
    if isinstance(cause, ValueError) and "invalid literal" not in str(cause):
        return str(cause)
    # The first line is the title in its frame; where the output has no line characters there is no frame.
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    useful = [line for line in lines if line.strip("─-╰╯") and not line.startswith(("For full help", "Argument help"))]
    return " ".join(useful[:3])
