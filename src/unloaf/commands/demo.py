"""`unloaf demo`: a small network by every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from unloaf.commands.parsing import parse
from unloaf.commands.tables import print_table
from unloaf.streams import say, standard_error


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small network by every method and show what became of its subnets."""

    task: Literal["digits", "language"] = "digits"
    """Digits by five methods, or a byte-level language model by common training and ST: its exits, and how fast it
    writes with them."""
    output: str = "output/demo"
    """Folder for report.html, results.json and results.csv; older ones in it are replaced."""
    seeds: int = 1
    """Repeat with seeds 0, 1, ...; the table then has mean and standard deviation."""
    epochs: int | None = None
    """Another number of epochs than the recipes', for a quick look."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds {self.seeds}: give at least 1")
        if self.seeds > 1 and self.task == "language":
            raise ValueError(f"seeds {self.seeds}: --task language has one; leave it out")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs {self.epochs}: give at least 1")


def run(words: list[str]) -> int:
    """Trains, prints the table, says where the report is."""
    options = parse(Demo, words, prog="unloaf demo")
    if options.task == "language":
        return _language(options)
    from unloaf.demo import run_demo, table

    result = run_demo(
        output=options.output, seeds=options.seeds, epochs=options.epochs, console=Console(file=standard_error())
    )
    print_table(table(result.rows))
    say(f"report: {result.report}")
    return 0


def _language(options: Demo) -> int:
    from unloaf.language_demo import run_language_demo, tables

    console = Console(file=standard_error())
    runs, report = run_language_demo(output=options.output, epochs=options.epochs, console=console)
    for table in tables(runs):
        print_table(table)
    say(f"report: {report}")
    return 0
