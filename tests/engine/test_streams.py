"""Standard streams that are closed, or on a full disk, end no command."""

import os
import sys
from collections.abc import Callable

import pytest

import tiny
from unloaf.commands.main import main
from unloaf.display import RunConsole, show_progress


def in_a_process(work: Callable[[], int | None], *, streams: dict[str, str | None]) -> int:
    """The exit code of a process with those streams, closed where they are None."""

    def prepared() -> int | None:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            if name not in streams:
                continue
            os.close(number)
            target = streams[name]
            if target is not None:
                assert os.open(target, os.O_WRONLY) == number
            errors = "strict" if name == "stdout" else "backslashreplace"
            stream = None if target is None else open(number, "w", errors=errors, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        code = work()
        sys.stdout.flush()  # as Python does at its end
        sys.stderr.flush()
        return code

    return os.waitstatus_to_exitcode(os.waitpid(tiny.fork(prepared), 0)[1])


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["nonsense"], 2)])
@pytest.mark.parametrize("streams", [{"stdout": None}, {"stderr": None}, {"stderr": "/dev/full"}])
def test_stream_that_takes_nothing_does_not_change_the_exit_code(words, code, streams):
    assert in_a_process(lambda: main(words), streams=streams) == code


def test_output_on_a_full_disk_ends_with_1_and_no_second_error(tmp_path):
    (tmp_path / "told").touch()
    streams: dict[str, str | None] = {"stdout": "/dev/full", "stderr": str(tmp_path / "told")}
    assert in_a_process(lambda: main(["--version"]), streams=streams) == 1
    assert (tmp_path / "told").read_text() == "unloaf: error: disk full: the output cannot be written; make room\n"


def test_closed_streams_are_not_taken_by_the_next_file(tmp_path):
    def work() -> int:
        main(["--version"])
        with (tmp_path / "file").open("w") as file:
            return file.fileno()

    assert in_a_process(work, streams={"stderr": None}) > 2


def test_lines_of_a_run_are_lost_where_standard_error_has_no_room():
    def work() -> None:
        with show_progress(RunConsole(), total=1, label="st") as display:
            for _ in range(3):
                display.line("epoch 1")

    assert in_a_process(work, streams={"stderr": "/dev/full"}) == 0


def test_name_with_control_characters_keeps_to_its_line_in_an_error(capsys):
    assert main(["report", os.fsdecode(b"a\x1b[2J\xff\nunloaf: all is well")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(r"unloaf: error: a\x1b[2J\xff unloaf: all is well is not a run")
