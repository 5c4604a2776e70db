"""`unloaf check-data`: all that is wrong with an image set, in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unloaf.commands.options import CheckData
from unloaf.commands.parsing import parse
from unloaf.streams import say

if TYPE_CHECKING:
    from unloaf.data import CheckReport


def check_data(words: list[str]) -> int:
    """Prints what is there and what is wrong.

    Raises:
        ValueError: something is wrong.
    """
    config = parse(CheckData, words, prog="unloaf check-data").config()
    from unloaf.data import check_images

    report = check_images(config)
    for split, counts in report.counts.items():
        if sum(counts.values()):
            say(f"{split}: {sum(counts.values())} images, {_classes(counts)}")
    for note in report.notes:
        say(f"note: {note}")
    if report.modes:
        say("modes: " + ", ".join(f"{mode} {count}" for mode, count in report.modes.items()))
    if len(report.faults) == 1 and not report.bad:
        raise ValueError(report.faults[0])
    for fault in report.faults:
        say(f"wrong: {fault}")
    for name, reason in report.bad:
        say(f"bad: {name}: {reason}")
    if report.faults or report.bad:
        raise ValueError(_verdict(report))
    say("all images can be read")
    return 0


def _verdict(report: CheckReport) -> str:
    total = sum(sum(counts.values()) for counts in report.counts.values())
    unread = f"{len(report.bad)} of {total} images cannot be read"
    if not report.faults:
        skip = ", or train with --bad-images skip" if 100 * len(report.bad) <= total else ""  # which bears 1 %
        return f"{unread}; replace or remove them{skip}"
    count = "1 fault" if len(report.faults) == 1 else f"{len(report.faults)} faults"
    parts = [f"{count} of the image set", *[unread] * bool(report.bad)]
    return f"{' and '.join(parts)}, listed above; mend them and check again"


def _classes(counts: dict[str, int]) -> str:
    if len(counts) <= 20:
        return f"{len(counts)} classes: " + ", ".join(f"{name} {count}" for name, count in counts.items())
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return f"{len(counts)} classes of {counts[fewest]} ({fewest}) to {counts[most]} ({most}) images"
