"""What commands share that train runs for a question: words sorted, settings, results written to a folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unloaf.commands.help import options_of
from unloaf.commands.parsing import parse
from unloaf.commands.tables import show
from unloaf.config import Config, load_config
from unloaf.files.writing import check_writable, write_whole
from unloaf.printable import printable
from unloaf.recipes import recipe
from unloaf.streams import say, standard_error

if TYPE_CHECKING:
    from unloaf.analysis.cells import Judged
    from unloaf.pages.analysis_sections import Analysis

SETTINGS = "Beside these it takes the settings of `unloaf train`, such as --dataset, --data-dir, --model or --epochs."


def split_words(words: Sequence[str], kind: Any) -> tuple[list[str], list[str]]:
    """The words of a command's own options, and those of settings.

    >>> from unloaf.commands.loafing import Loafing
    >>> split_words(["--seeds", "2", "--epochs", "9", "--methods", "common", "st"], Loafing)
    (['--seeds', '2', '--methods', 'common', 'st'], ['--epochs', '9'])
    """
    own = {flag for option in options_of(kind) for flag in option.flags} | {"-h", "--help"}
    mine, others, target = [], [], None
    for word in words:
        if word.startswith("-") or target is None:
            name = word.partition("=")[0].replace("_", "-") if word.startswith("--") else word
            target = mine if name in own or (target is None and not word.startswith("-")) else others
        target.append(word)
    return mine, others


def base_settings(words: Sequence[str], *, config: str | None, name: str | None, prog: str, kind: Any) -> Config | None:
    """Settings that a file, a recipe and words give; None where they say nothing of what is trained on.

    Raises:
        ValueError: a setting is not allowed, or the file and the recipe both give all of them.
    """
    if config is not None and name is not None:
        raise ValueError("-c and --recipe both give all settings; give one of them, and settings beside it")
    default = load_config(config) if config is not None else None if name is None else recipe(name)
    given = parse(Config, list(words), prog=prog, default=default, more=kind)
    return None if default is None and (given.dataset, given.model) == (Config().dataset, Config().model) else given


def with_settings(config: Config, words: Sequence[str], *, prog: str, kind: Any) -> Config:
    """A configuration with settings that words change; its warm-up is cut where fewer epochs are asked for.

    >>> short = with_settings(Config(warmup_epochs=2), ["--epochs", "1"], prog="unloaf loafing", kind=Config)
    >>> short.epochs, short.warmup_epochs
    (1, 0)
    """
    if any(word.partition("=")[0].replace("_", "-") == "--warmup-epochs" for word in words):
        return parse(Config, list(words), prog=prog, default=config, more=kind)
    found = parse(Config, list(words), prog=prog, default=replace(config, warmup_epochs=0), more=kind)
    return replace(found, warmup_epochs=min(config.warmup_epochs, found.epochs - 1))


def check_settings(words: Sequence[str], taken: Mapping[str, str]) -> None:
    """Raises ValueError if words give a setting that the command decides; `taken` says how it is given instead."""
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name in taken:
            raise ValueError(f"{name}: {taken[name]}")


def check_folder(folder: Path, names: Collection[str]) -> None:
    """Raises ValueError where a file of this folder could not be written; known before hours of training."""
    for name in names:
        check_writable(folder / name)


def write_results(folder: Path, stem: str, found: Analysis, *, picture: str, page: str) -> None:
    """STEM.csv, .json, which `unloaf report --analysis` reads, .svg and .html, each of them whole."""
    from unloaf.measure.costs import write_csv
    from unloaf.pages.analysis_sections import text_of

    write_csv([asdict(row) for row in found.rows], folder / f"{stem}.csv")
    write_whole(folder / f"{stem}.json", text_of(found))
    write_whole(folder / f"{stem}.svg", picture)
    write_whole(folder / f"{stem}.html", page)


def tell(
    rows: Sequence[Any],
    *,
    as_json: bool,
    table: Callable[[], tuple[list[str], list[list[str]]]],
    notes: Sequence[str],
    page: Path,
) -> None:
    """Prints rows, as a table or as JSON, and where the page is."""
    if as_json:
        print(json.dumps({"notes": list(notes), "rows": [asdict(row) for row in rows]}, indent=2))
        standard_error().write(f"{printable(f'report: {page}')}\n")
        return
    show(*table())
    for note in notes:
        say(note)
    say(f"report: {page}")


def facts_of(judged: Sequence[Judged], *, seeds: Sequence[int]) -> dict[str, str]:
    """Where and on what the runs of a study ran, for its page."""
    from unloaf.environment import environment

    now, first = environment(), judged[0].environment or {}
    versions = ", ".join(f"{name} {version}" for name, version in (first.get("versions") or {}).items() if version)
    return {
        "command": shlex.join(now["command"]),
        "data": f"{judged[0].cell.config.dataset}, evaluated on its {judged[0].split} images",
        "seeds": ", ".join(map(str, seeds)),
        "hardware": "; ".join(dict.fromkeys(str(run.environment.get("hardware")) for run in judged)),
        "threads": ", ".join(dict.fromkeys(str(run.environment.get("threads")) for run in judged)),
        "versions": f"{versions}, python {first.get('python')}",
        "runs": f"{len({run.path for run in judged})}, trained in "
        f"{sum({run.path: run.seconds for run in judged}.values()):.0f} s, in {judged[0].path.parent}",
        "date": now["started"],
    }


def settings_that_differ(configs: Mapping[str, Config]) -> dict[str, dict[str, str]]:
    """Of each configuration the settings that are not at their defaults in all of them, for a page."""
    plain = Config()
    names = [
        field.name
        for field in fields(Config)
        if field.name not in ("output", "name", "seed")
        and any(getattr(config, field.name) != getattr(plain, field.name) for config in configs.values())
    ]
    return {label: {name: _text(getattr(config, name)) for name in names} for label, config in configs.items()}


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else "–" if value is None else str(value)
