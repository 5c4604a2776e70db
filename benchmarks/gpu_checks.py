"""What a slice of benchmarks/gpu.sh measured, against the bars.

    python benchmarks/gpu_checks.py check SLICE FOLDER
    python benchmarks/gpu_checks.py show FOLDER
    python benchmarks/gpu_checks.py summary OUT

`check` writes FOLDER/checks.json from the records in the folder, `summary` OUT/checks.json from all slices. Where a
method or a mode was not measured, `check` writes FOLDER/checks-partial.json and ends with code 1. In the records it
replaces the paths of this machine.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.performance import Record, read

from unloaf.measure.step_time import StepTimeRow

OVER_LIMIT, VIT_ORDERED, MEMORY, IMAGES_PER_SECOND, OVERHEAD = 1.20, 1.10, 1.30, 40_000, 1.05
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[\w.+-]+/)+")  # of an absolute path
RECORDS = ("step_time.json", "throughput.json", "overhead.json")


@dataclass(frozen=True)
class Check:
    """One figure and its bar, in words."""

    what: str
    measured: str
    bar: str
    holds: bool


def at_most(what: str, figure: float, bar: float, told: str = "") -> Check:
    """A figure that may not exceed its bar."""
    return Check(what, f"{figure:.2f}{told}", f"<= {bar:.2f}", figure <= bar)


def of_steps(slice_name: str, rows: Sequence[StepTimeRow]) -> Iterator[Check]:
    """Checks of step times: of each method in the mode in which its step is fastest, the other mode beside it.

    Rows in whose rounds graphs were compiled hold no bar and are not shown.
    """
    rows = [row for row in rows if row.method != "common" and not row.late_graphs]
    for method in dict.fromkeys(row.method for row in rows):
        mine = sorted((row for row in rows if row.method == method), key=lambda row: row.seconds)
        best, *others = mine
        told = f" {mode(best)}" + "".join(f" ({row.over_limit:.2f} {mode(row)})" for row in others)
        network = best.setup.network
        yield at_most(f"{network}, {method}: time / limit", best.over_limit, OVER_LIMIT, told)
        if slice_name == "vit-small" and method == "st":
            yield at_most(f"{network}, {method}: time / common training", best.relative, VIT_ORDERED, f" {mode(best)}")
        if slice_name == "resnet50" and method in ("st", "st-inter-stage", "gkt"):
            yield at_most(f"{network}, {method}: memory / common training", best.relative_memory, MEMORY)


def mode(row: StepTimeRow) -> str:
    """Eager or compiled."""
    return "compiled" if row.setup.compiled else "eager"


def missing(record: Record) -> Iterator[Check]:
    """A check that fails for each method and mode that was asked for and has no figures of use."""
    found = {(row.method, mode(row)): row.late_graphs for row in record.rows}
    network = record.settings["model"][0].partition("@")[0]
    for wanted in record.settings["modes"]:
        for method in record.settings["methods"]:
            late = found.get((method, wanted))
            if late != 0:
                told = "not measured" if late is None else f"{late} graphs compiled while timed"
                yield Check(f"{network}, {method}, {wanted}", told, "measured", holds=False)


def of_throughput(folder: Path) -> Iterator[Check]:
    """Images per second with the data path."""
    measured = json.loads((folder / "throughput.json").read_text(encoding="utf-8"))
    best = max(measured["runs"], key=lambda run: run["images_per_second"])
    figure = best["images_per_second"]
    what = f"{measured['model']}, common training on {measured['images']}: images/s"
    told = f"{figure:,.0f} at batch {best['batch_size']}"
    yield Check(what, told, f">= {IMAGES_PER_SECOND:,}", figure >= IMAGES_PER_SECOND)


def of_overhead(folder: Path) -> Iterator[Check]:
    """The loop beside the bare step."""
    measured = json.loads((folder / "overhead.json").read_text(encoding="utf-8"))
    ran = f"{measured['model']} of width {measured['width']}, {measured['method']}, batch {measured['batch_size']}"
    what = f"{ran}, a step of {measured['bare_ms']:.1f} ms: time of an epoch / its bare steps"
    yield at_most(what, measured["ratios"]["engine's epoch"], OVERHEAD)


def check(slice_name: str, folder: Path) -> tuple[list[Check], list[Check]]:
    """The checks of a slice against its bars, and those that fail since something was not measured.

    Raises:
        FileNotFoundError: it left no record.
    """
    if slice_name == "throughput":
        return list(of_throughput(folder)), []
    if slice_name == "overhead":
        return list(of_overhead(folder)), []
    record = read(folder / "step_time.json")
    return list(of_steps(slice_name, record.rows)), list(missing(record))


def without_paths(folder: Path, shown: str) -> None:
    """Writes the records anew: `shown` for the folder, DIR for that of the images, of other paths their last part.

    Records are committed, and paths of a machine say nothing to others.
    """

    def told(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: told(each) for name, each in value.items()}
        if isinstance(value, list):
            pairs = zip([None, *value], value, strict=False)
            return ["DIR" if flag == "--data-dir" and each.startswith("/") else told(each) for flag, each in pairs]
        return _FOLDERS.sub("", value.replace(str(folder), shown)) if isinstance(value, str) else value

    for path in (folder / name for name in RECORDS):
        if path.is_file():
            document = told(json.loads(path.read_text(encoding="utf-8")))
            path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def hardware(folder: Path) -> str:
    """What the records of a slice were measured on."""
    for name in RECORDS:
        if (folder / name).is_file():
            return json.loads((folder / name).read_text(encoding="utf-8"))["environment"]["hardware"]
    return "unknown hardware"


def show(checks: Sequence[Check]) -> None:
    """One line for each."""
    for one in checks:
        print(f"{'pass' if one.holds else 'FAIL'}  {one.what}: {one.measured}, bar {one.bar}")
    print(f"{sum(one.holds for one in checks)} of {len(checks)} bars hold")


def load(folder: Path) -> list[Check]:
    """What `check` wrote; of a slice that is not complete, what it had measured by then."""
    path = next(path for name in ("checks.json", "checks-partial.json") if (path := folder / name).is_file())
    return [Check(**one) for one in json.loads(path.read_text(encoding="utf-8"))["checks"]]


def write(path: Path, checks: Sequence[Check], measured_on: str) -> None:
    """With what measured them."""
    document = {"hardware": measured_on, "checks": [asdict(one) for one in checks]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main(words: Sequence[str]) -> int:
    """Runs a command; returns its exit code."""
    command, *rest = words or ["--help"]
    if command == "check" and len(rest) == 2:
        name, folder = rest[0], Path(rest[1]).resolve()
        try:
            bars, unmeasured = check(name, folder)
        except FileNotFoundError as error:
            print(f"{name}: nothing was measured: {error.filename} is missing; see {folder / 'log.txt'}")
            return 1
        without_paths(folder, f"output/gpu/{name}")
        checks = [*bars, *unmeasured]
        write(folder / ("checks-partial.json" if unmeasured else "checks.json"), checks, hardware(folder))
        show(checks)
        if unmeasured:
            print(f"{name}: not complete; see {folder / 'log.txt'}")
            return 1
    elif command == "show" and len(rest) == 1:
        show(load(Path(rest[0])))
    elif command == "summary" and len(rest) == 1:
        out = Path(rest[0])
        folders = sorted({path.parent for path in out.glob("*/checks*.json")})
        if not folders:
            print(f"{out}: nothing was measured; run benchmarks/gpu.sh SLICE {out}")
            return 1
        checks = [one for folder in folders for one in load(folder)]
        write(out / "checks.json", checks, ", ".join(dict.fromkeys(map(hardware, folders))))
        show(checks)
    else:
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
