"""Ctrl-C and SIGTERM end a run between two steps, after its checkpoint is written."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

import tiny
from unloaf.commands import main as cli
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.run import train
from unloaf.engine.signals import stop_requests
from unloaf.errors import StoppedError

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def send_in_pass(number: int, training: bool, *signals: int) -> Callable[[tiny.TinyNetwork, Tensor], None]:
    """A hook for a network: its so-many-th pass in training or in evaluation mode is when the signals come.

    The passes of two images in which blocks are looked for are not counted.
    """
    passes = 0

    def hook(network: tiny.TinyNetwork, x: Tensor) -> None:
        nonlocal passes
        if network.training == training and len(x) > 2:
            passes += 1
            for sent in signals if passes == number else ():
                os.kill(os.getpid(), sent)

    return hook


@pytest.fixture
def default_signals():
    """As if started by hand: a job in the background inherits an ignored SIGINT."""
    before = {number: signal.getsignal(number) for number, _ in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, cli._terminate)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, default_signals: None) -> Callable[..., int]:
    """`unloaf train` on the tiny data and network."""

    def run(*words: str, network: tiny.TinyNetwork | None = None) -> int:
        tiny_train = partial(train, data=tiny.data(), model=network or tiny.network())
        monkeypatch.setattr("unloaf.engine.run.train", tiny_train)
        usual = ["--device", "cpu", "-b", "16", "--log-interval", "1", "--name", "run"]
        return cli.main(["train", *usual, *words])

    return run


def logged_steps(run: Path) -> int:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["event"] == "step"][-1]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_in_a_step_ends_the_run_after_that_step(tmp_path, command, capsys, number, code):
    network = tiny.network()
    network.on_forward = send_in_pass(6, True, number)
    assert command("--method", "common", "--output", str(tmp_path), network=network) == code
    assert load_checkpoint(tmp_path / "run" / "last").step == 6
    assert logged_steps(tmp_path / "run") == 6
    assert f"after step 6; continue with --resume {tmp_path}/run" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_during_validation_ends_the_run_before_the_next_batch(tmp_path, command, number, code):
    network, judged = tiny.network(), []
    send = send_in_pass(1, False, number)

    def hook(model: tiny.TinyNetwork, x: Tensor) -> None:
        judged.append(not model.training and len(x) > 2)
        send(model, x)

    network.on_forward = hook
    assert command("--method", "common", "--output", str(tmp_path), network=network) == code
    assert sum(judged) == 1  # of two
    assert load_checkpoint(tmp_path / "run" / "last").step == 4


def test_run_whose_lines_nobody_reads_ends_with_a_checkpoint(tmp_path):
    """`unloaf train 2>&1 | head -n 1`."""
    words = ["train", "--device", "cpu", "--width", "4", "--epochs", "500", "--output", str(tmp_path), "--name", "run"]
    with subprocess.Popen([sys.executable, "-m", "unloaf", *words], stderr=subprocess.PIPE) as run:
        assert run.stderr is not None
        try:
            while b"epoch 1/500" not in run.stderr.readline():
                assert run.poll() is None
            run.stderr.close()
            assert run.wait(timeout=180) == 143
        finally:
            run.kill()
    assert 7 <= load_checkpoint(tmp_path / "run" / "last").step < 500 * 7
    assert "stopped as nobody reads its output after step" in (tmp_path / "run" / "log.txt").read_text()


def test_validation_that_was_stopped_is_made_up_for(tmp_path, default_signals):
    config = tiny.config(output=str(tmp_path), name="run", epochs=1)
    whole = tiny.run(tiny.config(output=str(tmp_path), name="whole", epochs=1))
    network = tiny.network()
    network.on_forward = send_in_pass(1, False, signal.SIGTERM)
    with pytest.raises(StoppedError):
        tiny.run(config, model=network)
    assert not (tmp_path / "run" / "summary.csv").exists()
    again = tiny.run(config, resume="auto")
    assert again.test == whole.test
    texts = [(path / "summary.csv").read_text().splitlines() for path in (again.path, whole.path)]
    rows = [list(csv.DictReader(lines)) for lines in texts]
    assert rows[0][0]["eval_loss"] == rows[1][0]["eval_loss"]


def test_second_ctrl_c_quits_at_once(tmp_path, command, capsys):
    network = tiny.network()
    network.on_forward = send_in_pass(6, True, signal.SIGINT, signal.SIGINT)
    words = ("--method", "common", "--output", str(tmp_path), "--checkpoint-interval", "2")
    assert command(*words, network=network) == 130
    assert load_checkpoint(tmp_path / "run" / "last").step == 4  # step 6 was not ended, 5 has no checkpoint
    assert capsys.readouterr().err.endswith("unloaf: error: stopped by Ctrl-C\n")


def test_second_sigterm_waits_as_the_first_does(default_signals):
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.code == 143


def test_ctrl_c_after_sigterm_quits_at_once(default_signals):
    with stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back(default_signals):
    with stop_requests():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is cli._terminate


def test_signal_before_the_first_step_leaves_no_folder(tmp_path, command):
    network = tiny.network()
    network.on_forward = lambda *_: os.kill(os.getpid(), signal.SIGINT)  # while blocks are looked for
    assert command("--method", "st", "--output", str(tmp_path), network=network) == 130
    assert not list(tmp_path.iterdir())


def test_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(tmp_path, default_signals):
    config = tiny.config(method="st++", output=str(tmp_path), name="run")
    whole = tiny.run(tiny.config(method="st++", output=str(tmp_path), name="whole"))
    network = tiny.network()
    network.on_forward = send_in_pass(3, True, signal.SIGTERM)
    with pytest.raises(StoppedError):
        tiny.run(config, model=network)
    paths = [path / "last" for path in (tiny.run(config, resume="auto").path, whole.path)]
    weights = [load_checkpoint(path).weights for path in paths]
    assert tiny.same(*weights)


def send_to_group(child: int, number: int) -> None:
    os.killpg(child, number)


def send_to_each(child: int, number: int) -> None:
    workers = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    for process in [child, *map(int, workers)]:
        os.kill(process, number)


def stop(
    command: Callable[..., int], output: Path, send: Callable[[int, int], None], number: int, *words: str
) -> tuple[int, Path]:
    """Exit code of a run whose processes get a signal, and its folder."""
    run, settled = output / "run", time.monotonic() + 180

    def work() -> int:
        os.setsid()
        return command("--output", str(output), "--epochs", "100000", *words)

    child = tiny.fork(work, errors=output / "errors.txt")
    while not (run / "summary.csv").exists():
        assert time.monotonic() < settled
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before the signal"
        time.sleep(0.01)
    send(child, number)
    while (end := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < settled
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(end[1]), run


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_to_the_whole_process_group(tmp_path, command, number, code, workers):
    """As a terminal sends Ctrl-C, and a batch system SIGTERM: data workers get it too."""
    got, run = stop(command, tmp_path, send_to_group, number, "--workers", workers)
    assert got == code
    assert load_checkpoint(run / "last").step == logged_steps(run)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_to_every_process_of_a_job(tmp_path, command, number, code):
    """As Slurm and systemd send it, whatever group a process is in."""
    got, run = stop(command, tmp_path, send_to_each, number, "--workers", "2")
    assert got == code
    assert load_checkpoint(run / "last").step == logged_steps(run)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signals_to_the_whole_process_group_again_and_again(tmp_path, command, number, code, workers, attempt):
    test_signal_to_the_whole_process_group(tmp_path, command, number, code, workers)
