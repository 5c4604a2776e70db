"""What each command accepts. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from unloaf.commands.parsing import parse
from unloaf.config import Config, load_config
from unloaf.config.checks import check_device
from unloaf.config.fields import Dataset
from unloaf.engine.run_folder import run_of

_STAGE = "[0-9]{1,4}(:[01]+)?"  # a depth, and perhaps which blocks are kept


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
class Eval:
    """Judge a trained run, also one that is still training: its main network and, if asked, networks inside it."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of the run, as `unloaf train` named it."""
    subnets: str | None = None
    """Also judge all ordered subnets, those that are best for their cost (pareto), or a number drawn with the run's
    seed, and write subnets.csv into the run folder."""
    recalibrate: int | None = None
    """Training images from which the batch-norm statistics of a subnet are estimated; default: as in the run."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the best validation accuracy."""
    split: Literal["val", "test"] | None = None
    """Images that judge; default: both for the main network, val for subnets if there is one."""
    ema: bool = False
    """Judge the moving average of the weights."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["-b"])] = None
    """Images in a forward pass; default: as in the run."""
    workers: Annotated[int | None, tyro.conf.arg(aliases=["-j"])] = None
    """Processes that read images; default: as in the run."""
    data_dir: str | None = None
    """Folder of the image set; default: as in the run."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    output: str | None = None
    """Write the table of subnets to this file instead; its folder is made."""

    def __post_init__(self) -> None:
        given = self.subnets
        if given not in (None, "all", "pareto") and not (re.fullmatch("[0-9]{1,5}", given or "") and int(given or 0)):
            raise ValueError(f"subnets {given!r}: give all, pareto or a number from 1 to 99999")
        if given is None and self.output is not None:
            raise ValueError(
                f"output {self.output} is for the table of subnets; give --subnets with it, or leave --output out"
            )
        check_device(self.device)
        check_least(self, recalibrate=2, batch_size=2, workers=0)


@dataclass(frozen=True, kw_only=True)
class Subnets:
    """What the subnets of a run or of a model cost, and of a run how good they are."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|MODEL")]
    """Folder of a run, or a network as for train."""
    num: str = "16"
    """How many ordered subnets beside the main network, all, or, of a run, pareto for those that no other beats."""
    latency: bool = False
    """Measure how long a forward pass takes."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["-b"])] = (1, 32)
    """Images in a measured pass, one number or several."""
    repeats: int = 30
    """Passes that are timed, of each subnet and batch size."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    checkpoint: Literal["last", "best"] = "last"
    """Of a run: the newest checkpoint that is not damaged, or the one with the best validation accuracy."""
    split: Literal["val", "test"] | None = None
    """Of a run: images that judge the subnets; default: val if there is one."""
    ema: bool = False
    """Of a run: judge the moving average of the weights."""
    data_dir: str | None = None
    """Of a run: folder of the image set; default: as in the run."""
    img_size: int | None = None
    """Of a model: side of the images in pixels; default: its own."""
    num_classes: int | None = None
    """Of a model: classes of the head; default: 1000, 10 for cifar/."""
    output: str | None = None
    """Write the table to this CSV file too; its folder is made."""

    def __post_init__(self) -> None:
        if self.num not in ("all", "pareto") and not (re.fullmatch("[0-9]{1,5}", self.num) and int(self.num)):
            raise ValueError(f"num {self.num!r}: give all, pareto or a number from 1 to 99999")
        if not self.batch_size or min(self.batch_size) < 1:
            raise ValueError(f"batch_size {self.batch_size}: give one or more numbers of at least 1")
        check_device(self.device)
        check_least(self, repeats=1, img_size=1, num_classes=1)

    @property
    def timed(self) -> tuple[int, ...]:
        """Batch sizes to measure."""
        return self.batch_size if self.latency else ()


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Look a model over before it is trained: what can be skipped, what a step would cost. Nothing is trained."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """timm/NAME, tv/NAME, cifar/NAME, hf/FOLDER or hf/CLASS, or module:function of yours, which is imported and run."""
    img_size: int | None = None
    """Side of the images in pixels; default: the model's own."""
    num_classes: int | None = None
    """Classes of the head; default: 1000, 10 for cifar/."""
    json: bool = False
    """Print everything as JSON."""

    def __post_init__(self) -> None:
        check_least(self, img_size=1, num_classes=1)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a subnet of a run as an ordinary model, or a run as one elastic file."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    depths: str | None = None
    """Kept blocks of each stage, as in 3,3,5,3, or chosen ones, as in 3,2:101,5,3; default: the whole network."""
    format: Literal["state_dict", "timm", "pt2", "onnx"] = "state_dict"
    """Weights with a JSON file beside them (of an hf/ run also a config.json), a model that timm reloads, a
    torch.export program, or ONNX."""
    recalibrate: int | None = None
    """Training images from which batch-norm statistics are estimated; 0 for none; default: as in the run."""
    elastic: bool = False
    """Write one file of which any depth can be run instead of one subnet."""
    subnets: tuple[str, ...] = ()
    """elastic: subnets that get batch-norm statistics of their own, as in 3-3-5-3; default: all ordered ones, up to
    64."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the best validation accuracy."""
    ema: bool = False
    """Export the moving average of the weights."""
    data_dir: str | None = None
    """Folder of the image set; default: as in the run."""
    device: str = "auto"
    """auto takes an accelerator when there is one, for the statistics and the accuracy; or cpu, cuda, cuda:1, mps."""
    output: str | None = None
    """New folder for the results; default: one in RUN/export."""
    push_to_hub: str | None = None
    """Also upload it under this name, by the library of timm or Hugging Face; never done unless asked for."""

    def __post_init__(self) -> None:
        check_depths(self.depths)
        if self.subnets and not self.elastic:
            raise ValueError("subnets are those of an elastic file; give --elastic with them, or --depths for one")
        if self.elastic and (self.depths is not None or self.format != "state_dict"):
            raise ValueError("elastic holds all depths in a format of its own; leave --depths and --format out")
        check_device(self.device)
        check_least(self, recalibrate=0)


def check_depths(depths: str | None) -> None:
    """Raises ValueError if this is no list of depths; whether a network has them is found out later."""
    if depths is not None and not re.fullmatch(f"{_STAGE}([-,]{_STAGE})*", depths):
        raise ValueError(f"depths {depths!r}: give a number for each stage, as in 3,3,5,3, or 2:101 for its blocks")


def check_least(options: Any, **least: int) -> None:
    """Raises ValueError if an option is given and lower than this."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise ValueError(f"{name} {value}: give at least {low}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Compare runs by what is in their folders, also while they train."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")] = ()
    """Folders of the runs, or folders that hold runs, as OUTPUT of train does: then all of them."""
    output: str | None = None
    """Write a page with the curves of the runs to this .html file."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("report: give at least one run folder")


@dataclass(frozen=True, kw_only=True)
class CheckData:
    """Open every image of an image set, count them, and list those that cannot be read."""

    dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """Folder of the image set."""
    dataset: Dataset = "imagefolder"
    """What lies in the folder, as for train."""
    train_split: str = "train"
    """Folder, split or shard prefix of the training images."""
    val_split: str | None = None
    """The same for validation; default: val, validation or test, whichever there is."""
    input_key: str = "image"
    """Column of the images, for hf."""
    target_key: str = "label"
    """Column of the labels, for hf."""
    num_classes: int | None = None
    """Classes that the labels must have; default: what the image set says."""
    max_pixels: int = Config.max_pixels
    """Files: width x height above which an image is not decoded but bad."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 4
    """Threads that open images."""

    def config(self) -> Config:
        """The part of a run's configuration that decides how images are read; nothing is held out."""
        return Config(
            dataset=self.dataset,
            data_dir=self.dir,
            train_split=self.train_split,
            val_split=self.val_split,
            input_key=self.input_key,
            target_key=self.target_key,
            num_classes=self.num_classes,
            max_pixels=self.max_pixels,
            workers=self.workers,
            val_fraction=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Measure time and memory of a training step against common training."""

    model: tuple[str, ...] = ("timm/resnet50",)
    """Networks, as for train, NAME@SIDE for a side of their own; standard for the eight of the performance page."""
    input_size: int | None = None
    """Side of the images in pixels; default: 32 for cifar/, else the model's own if it has but one, else 64."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 16
    """Images per step."""
    num_classes: int | None = None
    """Classes of the head; default: 1000, 10 for cifar/."""
    num_subnets: int = 6
    """Subnets per step of ST and ST++."""
    methods: tuple[str, ...] = ("st", "st-inter-stage", "st++", "st++-one-side", "gkt")
    """Methods to measure, also stochastic-depth; common training always is."""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager",)
    """Blocks as they are, compiled, or both."""
    amp: bool = False
    """Mixed precision: bfloat16."""
    channels_last: bool = False
    """Keep images and weights in channels-last memory format."""
    device: str = "auto"
    """auto takes a CUDA device when there is one; or cpu, cuda, cuda:1."""
    repeats: int = 10
    """Rounds over all methods; medians count."""
    minutes: float | None = None
    """Begin nothing after so long; each network and mode gets an equal share."""
    output: str | None = None
    """Folder for step_time.json, step_time.csv and step_time.svg."""
    plot: str | None = None
    """File for the picture alone, .svg."""

    def __post_init__(self) -> None:
        if not self.model or not self.modes or not self.methods:
            raise ValueError("model, methods and modes take one or more names; give them, or leave the flag out")
        if self.plot is not None and not self.plot.endswith(".svg"):
            raise ValueError(f"plot {self.plot!r}: give a file that ends in .svg")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise ValueError(f"minutes {self.minutes}: give a number above 0")
        check_device(self.device)
        check_least(self, input_size=1, batch_size=1, num_classes=2, num_subnets=1, repeats=1)


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
    config = parse(Config, words, prog="unloaf train", default=default, about=about, more_flags=more)
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
