"""The command line: parses, calls, prints. Nothing here imports torch before a command starts."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from unloaf import __version__
from unloaf.commands.check_data import check_data
from unloaf.commands.options import BenchStep, Demo, Eval, Export, Inspect, Report, Subnets, parse_train
from unloaf.commands.parsing import parse
from unloaf.commands.predict import predict
from unloaf.commands.tables import print_table, show
from unloaf.config import dump_config
from unloaf.config.names import similar
from unloaf.engine.run_folder import open_run
from unloaf.errors import (
    CheckpointError,
    DiskFullError,
    NonFiniteLossError,
    NonFiniteWeightsError,
    StoppedError,
    in_one_line,
)
from unloaf.files.writing import check_writable, write_whole
from unloaf.printable import printable
from unloaf.streams import open_closed_streams, say, send_nowhere, standard_error, stdout_is_closed

if TYPE_CHECKING:
    from unloaf.evaluation import Accuracy, SubnetRow
    from unloaf.measure.costs import Timing
    from unloaf.runs.judge import RunJudgement

_HELP = """usage: unloaf COMMAND [OPTIONS]

Train residual networks so that the networks inside them stop loafing.

commands:
  demo        train a small network by every method, write report.html
  train       train one network
  eval        judge a trained run and the networks inside it
  subnets     what the networks inside a run or a model cost
  inspect     look a model over: stages, subnets, what a step would cost
  predict     the classes of images, by a run or a network inside it
  export      write a network inside a run as an ordinary model
  report      compare runs: a table, and a page with their curves
  check-data  open every image of an image set, list the bad ones
  bench step  measure the cost of a training step

options:
  -h, --help  show this, or with a command the options of the command
  --version   show the version
  --debug     show the traceback of an error"""


# Where a path was asked for that cannot be one, or that this user may not read.
_BAD_PATHS = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)


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
        return _COMMANDS[words[0]](words[1:])
    if words in (["--version"], ["-V"]):
        print(f"unloaf {__version__}")
    elif not words or words[0] in ("-h", "--help"):
        print(_HELP)
    else:
        close = similar(words[0], [*_COMMANDS, "--version", "--help"])
        hint = f"; did you mean {close}?" if close else ""
        raise ValueError(f"unknown command {words[0]!r}; give {', '.join(_COMMANDS)}, or --help{hint}")
    return 0


def _demo(words: list[str]) -> int:
    options = parse(Demo, words, prog="unloaf demo")
    from unloaf.demo import run_demo, table

    result = run_demo(
        output=options.output, seeds=options.seeds, epochs=options.epochs, console=Console(file=standard_error())
    )
    print_table(table(result.rows))
    say(f"report: {result.report}")
    return 0


def _train(words: list[str]) -> int:
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


def _eval(words: list[str]) -> int:
    options = parse(Eval, words, prog="unloaf eval")
    run, given = Path(options.run), {name: value for name, value in vars(options).items() if name not in _NOT_JUDGING}
    output = Path(options.output) if options.output else run / "subnets.csv"
    from unloaf.measure.records import accuracy_table
    from unloaf.runs.judge import judge_run, write_subnets

    if options.subnets is not None:
        check_writable(output)
    judgement = judge_run(run, **given, console=Console(file=standard_error()))
    for line in _main_lines(judgement):
        say(line)
    if judgement.subnets:
        _say_subnets(judgement)
        show(*accuracy_table(judgement.subnets))
        write_subnets(judgement, output)
        say(f"all {len(judgement.judged)} that were judged: {output}")
    return 0


_NOT_JUDGING = ("run", "output")


def _main_lines(judgement: RunJudgement) -> list[str]:
    average = ", moving average of the weights" if judgement.weights == "model_ema" else ""
    size = f"{judgement.params:,} parameters, {judgement.gmacs:.4g} GMACs"
    lines = [
        *judgement.notes,
        f"{judgement.run}, {judgement.checkpoint} (after epoch {judgement.epoch}){average}: {size}",
        *(f"{split} {_accuracy(result)}" for split, result in judgement.main.items()),
    ]
    main = judgement.judged[0] if judgement.judged else None
    if main is not None and main.running is not None:
        lines.append(
            f"{judgement.split} {_accuracy(main)}, with batch-norm statistics re-estimated as the subnets' are"
        )
    return lines


def _accuracy(found: Accuracy | SubnetRow) -> str:
    return f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f}"


def _say_subnets(judgement: RunJudgement) -> None:
    print(f"\nsubnets, on the {judgement.split} images:")
    if judgement.judged[0].running is not None:
        print(
            "batch-norm statistics re-estimated; (running): the main network as it stands, with those of its training"
        )


def _subnets(words: list[str]) -> int:
    options = parse(Subnets, words, prog="unloaf subnets")
    from unloaf.measure.costs import write_csv
    from unloaf.measure.pareto import pareto_front
    from unloaf.measure.records import cost_records, cost_table

    if options.output is not None:
        check_writable(Path(options.output))
    rows, times = _costs_of_run(options) if _is_run(options.source) else _costs_of_model(options)
    cost = "latency_ms" if options.timed else "gmacs"
    front = {row.subnet for row in pareto_front(rows, cost=cost)} if rows[0].top1 is not None else None
    shown = [i for i, row in enumerate(rows) if not front or options.num != "pareto" or row.subnet in front]
    show(*cost_table([rows[i] for i in shown], [times[i] for i in shown] if times else [], front))
    for timing in times[0][:1] if times else []:
        print(f"median and 95th percentile of {timing.repeats} passes, on {timing.device}, {timing.threads} thread(s)")
    if front is not None:
        price = "milliseconds at the smallest batch" if options.timed else "GMACs"
        print(f"* no other subnet is as accurate and as cheap in {price}, and better in one of the two")
    if options.output is not None:
        records = cost_records(rows, times)
        if front is not None:
            records = [record | {"pareto": row.subnet in front} for record, row in zip(records, rows, strict=True)]
        write_csv(records, Path(options.output))
        say(f"all {len(rows)}: {options.output}")
    return 0


def _is_run(source: str) -> bool:
    family, slash, _ = source.partition("/")
    is_model = not slash or family in ("cifar", "timm", "tv", "hf")
    return not is_model or (Path(source) / "args.yaml").is_file()


def _costs_of_run(options: Subnets) -> tuple[Sequence[SubnetRow], Sequence[Sequence[Timing]]]:
    if options.img_size is not None or options.num_classes is not None:
        raise ValueError("a run has its images and classes; leave --img-size and --num-classes out")
    from unloaf.runs.judge import judge_run

    given = {
        name: getattr(options, name)
        for name in ("checkpoint", "split", "ema", "data_dir", "device", "timed", "repeats")
    }
    judgement = judge_run(Path(options.source), subnets=options.num, **given, console=Console(file=standard_error()))
    for line in _main_lines(judgement):
        say(line)
    _say_subnets(judgement)
    return judgement.judged, judgement.times


def _costs_of_model(options: Subnets) -> tuple[Sequence[SubnetRow], Sequence[Sequence[Timing]]]:
    if options.num == "pareto":
        raise ValueError("num pareto: a model that is not trained has no accuracy; give a run, or all or a number")
    from unloaf.inspection import cost_of_model

    given = {name: getattr(options, name) for name in ("timed", "repeats", "device", "img_size", "num_classes")}
    return cost_of_model(options.source, number=options.num, **given, console=Console(file=standard_error()))


def _inspect(words: list[str]) -> int:
    options = parse(Inspect, words, prog="unloaf inspect")
    from unloaf.inspection import as_plain, inspect_model, sections

    found = inspect_model(options.model, img_size=options.img_size, num_classes=options.num_classes)
    if options.json:
        print(json.dumps(as_plain(found), indent=2))
        return 0
    for section in sections(found):
        for line in section.lines:
            say(line)
        if section.rows:
            show(section.heads, section.rows)
    return 0


def _export(words: list[str]) -> int:
    options = parse(Export, words, prog="unloaf export")
    from unloaf.release import exports as release

    names = ("recalibrate", "checkpoint", "ema", "data_dir", "device", "push_to_hub", "output")
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.elastic:
        written = release.export_elastic(options.run, subnets=options.subnets or None, **given)
    else:
        written = release.export_run(options.run, depths=options.depths, format=options.format, **given)
    sizes = (f"{name}: {size:,} bytes" for name, size in written.files.items())
    for line in (*written.notes, *sizes, f"export: {written.folder}", *written.loading.split("\n")):
        say(line)
    return 0


def _report(words: list[str]) -> int:
    options = parse(Report, words, prog="unloaf report")
    from unloaf.runs.histories import differences, read_histories, run_row, table_of

    histories = read_histories(options.runs)
    show(*table_of([run_row(history) for history in histories]))
    different = differences(histories)
    if different:
        heads = ["settings that differ", *(printable(history.label) for history in histories)]
        show(heads, [[name, *values] for name, values in different.items()])
    if options.output is not None:
        from unloaf.pages.runs import runs_page

        write_whole(Path(options.output), runs_page(histories))
        say(f"report: {options.output}")
    return 0


def _bench(words: list[str]) -> int:
    if words in (["-h"], ["--help"]):
        words = ["step", *words]
    if words[:1] != ["step"]:
        raise ValueError(f"bench {' '.join(words[:1])}: give 'bench step'")
    options = vars(parse(BenchStep, words[1:], prog="unloaf bench step"))
    from unloaf.bench import bench_step, tables

    for table in tables(bench_step(**options, console=Console(file=standard_error()))):
        print_table(table)
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "train": _train,
    "eval": _eval,
    "subnets": _subnets,
    "inspect": _inspect,
    "predict": predict,
    "export": _export,
    "report": _report,
    "check-data": check_data,
    "bench": _bench,
}
