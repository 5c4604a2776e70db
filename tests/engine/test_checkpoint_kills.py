"""Processes killed at a random moment while they write checkpoints over and over."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unloaf.engine.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint

WEIGHTS = {"model": {"w": torch.ones(1000), "b": torch.ones(10)}}


def write_until_killed(run: Path, first: int, step_of: Callable[[int], int], report: int) -> None:
    for number in range(first, first + 100_000):
        state = {"number": number, "momentum": torch.full((1000,), float(number))}
        save_checkpoint(run / "checkpoints", step_of(number), weights=WEIGHTS, state=state)
        os.write(report, b"%d " % number)
        prune_checkpoints(run / "checkpoints", keep=2)


def kill_writer(run: Path, first: int, step_of: Callable[[int], int], seconds: float) -> int:
    """The last number whose save had returned; `first - 1` when none had."""
    reader, writer = os.pipe()
    # Forked from this warm process, a kill costs milliseconds; a fresh one would import torch for seconds.
    if (child := os.fork()) == 0:
        try:
            write_until_killed(run, first, step_of, writer)
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    with open(reader) as file:
        done = file.read().split(" ")[:-1]
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


@pytest.mark.parametrize("kills", [13, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step_of", [lambda number: number, lambda number: 5], ids=["new steps", "one step again"])
def test_last_always_loads_and_no_folder_is_torn(tmp_path: Path, kills: int, step_of: Callable[[int], int]):
    moments = random.Random(0)
    finished, torn_saves = -1, 0
    for _ in range(kills):
        done = kill_writer(tmp_path, finished + 1, step_of, moments.uniform(0, 0.03))
        torn_saves += any((tmp_path / "checkpoints").glob(".step-*"))
        finished = check_after_kill(tmp_path, done)
    assert torn_saves >= kills // 10, "the kills have to hit saves to say anything"
    # The next save removes what the killed ones left.
    save_checkpoint(tmp_path / "checkpoints", step_of(finished + 1), weights=WEIGHTS, state={})
    assert not [path for place in (tmp_path, tmp_path / "checkpoints") for path in place.glob(".*")]


def test_a_writer_that_copies_in_place_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def copy_in_place(temporary: Path, target: Path) -> None:
        shutil.copytree(temporary, target, dirs_exist_ok=True)

    monkeypatch.setattr("unloaf.engine.checkpoint.store._publish", copy_in_place)
    with pytest.raises(Exception, match=r"SHA-256|bytes|manifest"):
        test_last_always_loads_and_no_folder_is_torn(tmp_path, 400, lambda number: 5)
