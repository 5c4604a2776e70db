"""The command line: parses, calls, prints. Nothing here imports torch before a command starts."""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from unloaf import __version__
from unloaf.commands import (
    ablate,
    anytime,
    bench,
    bound,
    check_data,
    damage,
    demo,
    eval,
    exits,
    export,
    inspect,
    loafing,
    logits,
    predict,
    probe,
    receptive_field,
    recipes,
    report,
    subnets,
    train,
)
from unloaf.commands.help import beside, text_width, wrapped
from unloaf.config.names import similar
from unloaf.errors import (
    CheckpointError,
    DiskFullError,
    NonFiniteLossError,
    NonFiniteWeightsError,
    StoppedError,
    in_one_line,
)
from unloaf.printable import printable
from unloaf.streams import open_closed_streams, send_nowhere, standard_error, stdout_is_closed

_ABOUT = (
    "Train residual networks so that the subnets inside them, which skip some of their blocks, stop loafing. "
    "`unloaf COMMAND --help` shows the options of a command."
)
_OPTIONS = (
    ("-h, --help", "Show this and stop."),
    ("--version", "Show the version and stop."),
    ("--debug", "Show the traceback of an error."),
)

# Where a path was asked for that cannot be one, or that this user may not read.
_BAD_PATHS = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, the words after `unloaf`; returns its exit code.

    0 done, 1 a fault of the program, 2 bad input or configuration, 3 a loss that is not finite, 130 Ctrl-C, 143
    SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    previous = signal.signal(signal.SIGTERM, _terminate)
    open_closed_streams()
    try:
        code = _run(words)
        sys.stdout.flush()  # here, where a reader that has gone can be met
        return code
    except BrokenPipeError as error:
        if stdout_is_closed():
            return 0
        return _fail(error, code=1, debug=debug, text=f"{error}; --debug shows where")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except ValueError as error:
        return _fail(error, code=2, debug=debug)
    except (NonFiniteLossError, NonFiniteWeightsError) as error:
        return _fail(error, code=3, debug=debug)
    except StoppedError as error:
        return _fail(error, code=error.code, debug=debug)
    except (CheckpointError, DiskFullError) as error:
        return _fail(error, code=1, debug=debug)
    except KeyboardInterrupt as error:
        return _fail(error, code=130, debug=debug, text="stopped by Ctrl-C")
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:  # files are written by unloaf.files.writing
            send_nowhere(sys.stdout)
            return _fail(error, code=1, debug=debug, text="disk full: the output cannot be written; make room")
        code = 2 if error.errno in _BAD_PATHS else 1
        return _fail(error, code=code, debug=debug, text=str(error) + "; --debug shows where" * (code == 1))
    except Exception as error:
        return _fail(error, code=1, debug=debug, text=f"{in_one_line(error)}; --debug shows where")
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: Any) -> NoReturn:
    raise SystemExit(143)


def _fail(error: BaseException, *, code: int, debug: bool, text: str | None = None) -> int:
    if debug:
        traceback.print_exception(error)
    message = " ".join((text or str(error)).split())
    if len(message) > 2_500:  # it repeats what was typed; what to do stands at its end
        message = f"{message[:1_200]} ... {message[-1_200:]}"
    standard_error().write(f"unloaf: error: {printable(message)}\n")
    return code


def _run(words: list[str]) -> int:
    if words and words[0] in _COMMANDS:
        return _COMMANDS[words[0]][0](words[1:])
    if words in (["--version"], ["-V"]):
        print(f"unloaf {__version__}")
    elif not words or words[0] in ("-h", "--help"):
        print(_help())
    else:
        close = similar(words[0], [*_COMMANDS, "--version", "--help"])
        hint = f"; did you mean {close}?" if close else ""
        raise ValueError(f"unknown command {words[0]!r}; give {', '.join(_COMMANDS)}, or --help{hint}")
    return 0


def _help() -> str:
    width = text_width()
    commands = [("bench step" if name == "bench" else name, meaning) for name, (_, meaning) in _COMMANDS.items()]
    lines = ["usage: unloaf COMMAND [OPTIONS]", "", *wrapped(_ABOUT, width)]
    lines += ["", "commands:", *beside(commands, width, 19), "", "options:", *beside(_OPTIONS, width, 19)]
    return "\n".join(lines)


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "demo": (demo.run, "Train a small network by every method, write report.html."),
    "train": (train.run, "Train one network."),
    "recipes": (recipes.run, "List the recipes for train, or show one."),
    "eval": (eval.run, "Judge the main network of a trained run, and its subnets."),
    "subnets": (subnets.run, "What the subnets of a run or of a model cost."),
    "anytime": (anytime.run, "Judge a run as a cascade that answers easy images early (classifiers only)."),
    "exits": (exits.run, "Judge the exits of a language model, and which one drafts best."),
    "loafing": (loafing.run, "Compare subnets inside a network with the same ones alone (classifiers only)."),
    "ablate": (ablate.run, "Train the rows of a grid of settings, compare them (classifiers only)."),
    "logits": (logits.run, "Compare the size of the logits of networks and of their subnets (classifiers only)."),
    "receptive-field": (
        receptive_field.run,
        "Compare which part of an image networks look at (classifiers only).",
    ),
    "damage": (damage.run, "Delete blocks of trained networks and evaluate what is left."),
    "bound": (bound.run, "Cross-entropies of subnets and main network beside the bound (classifiers only)."),
    "inspect": (inspect.run, "Look a model over: stages, subnets, what a step would cost."),
    "predict": (predict.run, "The classes of images, by a run or a subnet of it (classifiers only)."),
    "probe": (probe.run, "A linear classifier on an encoder that learned without labels."),
    "export": (export.run, "Write a subnet of a run as an ordinary model."),
    "report": (report.run, "Compare runs: a table, and a page with their curves."),
    "check-data": (check_data.run, "Open every image of an image set, list the bad ones."),
    "bench": (bench.run, "Measure the cost of a training step."),
}
