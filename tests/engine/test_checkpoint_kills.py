"""Processes killed at a random moment while they write checkpoints over and over."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from unloaf.engine.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from unloaf.errors import CheckpointError

WEIGHTS = {"model": {"w": torch.ones(1000), "b": torch.ones(10)}}


def write_until_killed(run: Path, first: int, step_of: Callable[[int], int], report: int) -> None:
    os.write(report, b"begun ")
    for number in range(first, first + 100_000):
        state = {"number": number, "momentum": torch.full((1000,), float(number))}
        save_checkpoint(run / "checkpoints", step_of(number), weights=WEIGHTS, state=state)
        os.write(report, b"%d " % number)
        prune_checkpoints(run / "checkpoints", keep=2)


def kill_writer(run: Path, first: int, step_of: Callable[[int], int], seconds: float | None) -> int:
    """The last number whose save had returned; `first - 1` when none had. None: it kills itself."""
    reader, writer = os.pipe()
    # Forked from this warm process, a kill costs milliseconds; a fresh one would import torch for seconds.
    if (child := os.fork()) == 0:
        try:
            write_until_killed(run, first, step_of, writer)
        finally:
            os._exit(1)
    os.close(writer)
    told = os.read(reader, 6)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    with open(reader) as file:
        done = (told.decode() + file.read()).split(" ")[1:-1]
    return int(done[-1]) if done else first - 1


def check_after_kill(run: Path, finished: int) -> int:
    for folder in (run / "checkpoints").glob("step-*"):
        load_checkpoint(folder)
    if finished < 0:
        return load_checkpoint(run / "last").state["number"] if (run / "last").is_symlink() else -1
    last = load_checkpoint(run / "last")
    number = last.state["number"]
    assert finished <= number <= finished + 1
    assert last.state["momentum"].eq(number).all()
    return number


def seconds_of_a_save(run: Path) -> float:
    """The middle one of three, here and now: with it kills hit saves on a slow disk, too."""
    times = [time.perf_counter()]
    for step in range(3):
        save_checkpoint(run / "checkpoints", step, weights=WEIGHTS, state={"momentum": torch.ones(1000)})
        times.append(time.perf_counter())
    return sorted(after - before for before, after in pairwise(times))[1]


@pytest.mark.parametrize("kills", [13, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step_of", [lambda number: number, lambda number: 5], ids=["new steps", "one step again"])
def test_last_always_loads_and_no_folder_is_torn(tmp_path: Path, kills: int, step_of: Callable[[int], int]):
    moments, seconds = random.Random(0), seconds_of_a_save(tmp_path / "warm")
    finished, torn_saves, run = -1, 0, tmp_path / "run"
    for _ in range(kills):
        done = kill_writer(run, finished + 1, step_of, moments.uniform(0, 1.5 * seconds))
        torn_saves += any((run / "checkpoints").glob(".step-*"))
        finished = check_after_kill(run, done)
    assert torn_saves >= kills // 10, "the kills have to hit saves to say anything"
    # The next save removes what the killed ones left.
    save_checkpoint(run / "checkpoints", step_of(finished + 1), weights=WEIGHTS, state={})
    assert not [path for place in (run, run / "checkpoints") for path in place.glob(".*")]


def test_a_writer_that_copies_in_place_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace = os.replace

    def copy_in_place(temporary: Path, target: Path) -> None:
        if not temporary.is_dir():
            return replace(temporary, target)
        target.mkdir()
        shutil.copy(temporary / "model.safetensors", target)
        return os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("unloaf.files.writing.os.replace", copy_in_place)
    done = kill_writer(tmp_path, 0, lambda number: 5, None)
    with pytest.raises(CheckpointError, match="holds no manifest"):
        check_after_kill(tmp_path, done)
