"""The folder of a run: who may write to it, what is in it, and what a resumed run may change."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from unloaf.config import Config, load_config
from unloaf.engine.changed_settings import FREE_SETTINGS, different_settings
from unloaf.engine.run_folder import RunFolder, open_run, run_of
from unloaf.errors import DiskFullError


def occupy(path: Path) -> int:
    """A process that holds the folder until it is killed."""
    ready = path.parent / "ready"

    def work() -> None:
        folder = RunFolder(path)
        ready.touch()
        time.sleep(60)
        folder.close()

    child = tiny.fork(work, errors=path.parent / "errors.txt")
    end = time.monotonic() + 120
    while not ready.exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def begin(config: Config) -> None:
    folder = open_run(config)
    folder.begin(config, {})
    folder.close()


def test_second_process_is_refused_with_process_and_host_of_the_first(tmp_path):
    child = occupy(tmp_path / "run")
    try:
        with pytest.raises(ValueError, match=rf"in use by process {child} on {os.uname().nodename}.*another --name"):
            open_run(tiny.config(output=str(tmp_path), name="run"), resume="auto")
    finally:
        kill(child)


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    kill(occupy(tmp_path / "run"))
    assert (tmp_path / "run" / "run.lock").exists()
    folder = RunFolder(tmp_path / "run")
    assert f"process {os.getpid()} on " in (tmp_path / "run" / "run.lock").read_text()
    folder.close()
    assert not (tmp_path / "run" / "run.lock").exists()


def test_closed_folder_can_be_opened_again(tmp_path):
    RunFolder(tmp_path / "run").close()
    RunFolder(tmp_path / "run").close()


def test_existing_run_is_refused_without_resume(tmp_path):
    config = tiny.config(output=str(tmp_path), name="run")
    begin(config)
    with pytest.raises(ValueError, match=r"run folder .*run exists; give another --name, continue with --resume auto"):
        open_run(config)


@pytest.mark.parametrize("resume", [None, "auto"])
def test_folder_that_is_no_run_is_refused_and_left_alone(tmp_path, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("everything")
    with pytest.raises(ValueError, match=r"run folder .* exists and is not a run; give another --name"):
        open_run(tiny.config(output=str(tmp_path), name="run"), resume=resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_resume_of_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run: it has no args\.yaml"):
        open_run(tiny.config(output=str(tmp_path)), resume=str(tmp_path))


def test_resume_auto_needs_a_name(tmp_path):
    with pytest.raises(ValueError, match="resume auto: give --name"):
        open_run(tiny.config(output=str(tmp_path)), resume="auto")


def test_files_that_the_run_did_not_write_stay(tmp_path):
    config = tiny.config(output=str(tmp_path), name="run", epochs=1)
    run = tiny.run(config).path
    foreign = [run / "notes.txt", run / "checkpoints" / "step-best.txt", run / "checkpoints" / "step-00000001" / "mine"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    tiny.run(config, resume="auto")
    assert [path.read_text() for path in foreign] == ["mine"] * 3


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("lr", 0.01, r"lr 0\.05 \(now 0\.01\)"),
        ("batch_size", 32, r"batch_size 16 \(now 32\)"),
        ("method", "gkt", r"method st \(now gkt\)"),
        ("epochs", 1, r"epochs 2 \(now 1\)"),
        ("seed", 1, r"seed 0 \(now 1\)"),
    ],
)
def test_other_settings_are_refused_on_resume_and_named(tmp_path, name, value, told):
    config = tiny.config(method="st", output=str(tmp_path), name="run")
    begin(config)
    with pytest.raises(ValueError, match=f"was begun with {told}; resume with the same settings"):
        open_run(replace(config, **{name: value}), resume="auto")


def test_settings_that_change_no_bit_are_free_on_resume(tmp_path):
    config = tiny.config(output=str(tmp_path), name="run")
    begin(config)
    changed = {"workers": 2, "log_interval": 7, "checkpoint_interval": 3, "checkpoint_hist": 5, "on_nan": "skip"}
    assert changed.keys() <= FREE_SETTINGS
    open_run(replace(config, **changed), resume="auto").close()


def test_run_that_moved_goes_on_at_its_new_place(tmp_path):
    path = tiny.run(tiny.config(output=str(tmp_path / "old"), name="run", epochs=1)).path
    (tmp_path / "new").mkdir()
    moved = path.rename(tmp_path / "new" / "other")
    config = load_config(moved / "args.yaml")
    assert tiny.run(config, resume=str(moved)).path == moved
    assert not (tmp_path / "old" / "run").exists()


@pytest.mark.parametrize(("flag", "value"), [("name", "other"), ("output", "elsewhere")])
def test_another_place_for_a_run_that_goes_on_is_refused(tmp_path, flag, value):
    config = tiny.config(output=str(tmp_path), name="run")
    begin(config)
    with pytest.raises(
        ValueError, match=rf"^{flag} {value}: the run continues in {tmp_path}/run; leave it out, or move"
    ):
        open_run(replace(config, **{flag: value}), resume=str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["run", "moved", None])
def test_place_where_a_run_lies_or_lay_is_accepted(tmp_path, name):
    config = tiny.config(output=str(tmp_path / "old"), name="run")
    begin(config)
    moved = (tmp_path / "old" / "run").rename(tmp_path / "moved")
    for output in (str(tmp_path / "old"), str(tmp_path), f"{tmp_path}/"):
        with closing(open_run(replace(config, name=name, output=output), resume=str(moved))) as folder:
            assert folder.path == moved


def test_start_that_fails_leaves_no_folder(tmp_path):
    config = tiny.config(model="timm/resnet5O", output=str(tmp_path), name="run")
    with pytest.raises(ValueError, match="did you mean"):
        tiny.train(config, console=tiny.quiet(), data=tiny.data())
    assert not list(tmp_path.iterdir())


def test_resume_that_fails_leaves_the_run_as_it_was(tmp_path):
    config = tiny.config(output=str(tmp_path), name="run", epochs=1)
    run = tiny.run(config).path
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="a step takes 16 images"):
        tiny.train(config, console=tiny.quiet(), resume="auto", model=tiny.network(),
                   data=tiny.data(train=tiny.data().train.subset(tiny.torch.arange(8))))  # fmt: skip
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["below a file", "read-only"])
def test_unwritable_output_is_told_before_torch_is_loaded(tmp_path, kind):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "below" if kind == "below a file" else Path("/proc")
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('heavy', {'torch', 'timm', 'numpy'} & sys.modules.keys()))\n"
        "from unloaf.commands.main import main; sys.exit(main())"
    )
    words = ["train", "--output", str(output), "--name", "run"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"unloaf: error: cannot write to the run folder {output}/run: ")
    assert result.stderr.endswith("; give another --output\n")
    assert result.stdout == "heavy set()\n"  # what takes seconds was not loaded


LINKED = ("args.yaml", "checkpoints", "env.json", "export", "log.txt", "metrics.jsonl", "run.lock", "subnets.csv",
          "summary.csv", "unloaf")  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("target", ["thesis.tex", "folder", "nowhere"])
def test_link_in_a_run_folder_is_refused_and_not_followed(tmp_path, name, target):
    (tmp_path / "thesis.tex").write_text("everything")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(Path("..") / target)
    with pytest.raises(ValueError, match=rf"run/{name} is a link to \.\./{target}; .*: remove the link"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "thesis.tex").read_text() == "everything"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run", "thesis.tex"]
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "run.lock", "summary.csv"])
@pytest.mark.parametrize("kind", ["hard link", "pipe", "folder"])
def test_other_things_than_a_file_of_the_run_are_refused(tmp_path, name, kind):
    (tmp_path / "thesis.tex").write_text("everything")
    path = tmp_path / "run" / name
    path.parent.mkdir()
    if kind == "hard link":
        path.hardlink_to(tmp_path / "thesis.tex")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(ValueError, match=rf"{name} (has 2 names \(hard links\)|is no file)"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "thesis.tex").read_text() == "everything"


def test_link_that_appears_while_the_run_is_open_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("everything")
    folder = RunFolder(tmp_path / "run")
    for name in ("log.txt", "metrics.jsonl", "summary.csv"):
        (tmp_path / "run" / name).symlink_to("../thesis.tex")
    for write in (lambda: folder.log("x"), lambda: folder.event("x", {}), lambda: folder.epoch({"epoch": 1})):
        with pytest.raises(ValueError, match="is a link to"):
            write()
    with pytest.raises(ValueError, match="is a link to"):
        folder.cut_back({})
    folder.close()
    assert (tmp_path / "thesis.tex").read_text() == "everything"


def test_names_from_outside_keep_to_their_line(tmp_path):
    folder = RunFolder(tmp_path / "run")
    name = os.fsdecode(b"cat/\xff\n$(touch x)\x1b[2J.jpg")
    folder.log(f"left out {name}")
    folder.event("bad_images", {"images": [name]})
    folder.close()
    [line] = (tmp_path / "run" / "log.txt").read_text("utf-8").splitlines()
    assert line.endswith(r" left out cat/\xff\n$(touch x)\x1b[2J.jpg")
    [event] = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert json.loads(event)["images"] == [r"cat/\xff\n$(touch x)\x1b[2J.jpg"]


def test_lock_is_kept_when_its_owner_reads_the_lock_file(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "run" / "run.lock").read_text()  # closing it gave up a lock of the process
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        RunFolder(tmp_path / "run")
    child = tiny.fork(lambda: RunFolder(tmp_path / "run").close(), errors=tmp_path / "errors.txt")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 99
    assert f"in use by process {os.getpid()} on " in (tmp_path / "errors.txt").read_text()
    folder.close()
    RunFolder(tmp_path / "run").close()


def test_forked_children_do_not_hold_the_lock_of_a_killed_run(tmp_path):
    worker = tmp_path / "worker"

    def work() -> None:
        folder = RunFolder(tmp_path / "run")
        child = tiny.fork(lambda: time.sleep(60))
        worker.with_suffix(".new").write_text(str(child))
        worker.with_suffix(".new").rename(worker)
        time.sleep(60)
        folder.close()

    owner, end = tiny.fork(work), time.monotonic() + 120
    while not worker.exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    kill(owner)
    try:
        RunFolder(tmp_path / "run").close()
    finally:
        os.kill(int(worker.read_text()), signal.SIGKILL)


def test_settings_and_environment_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = tiny.config(output=str(tmp_path), name="run")
    folder = open_run(config)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskFullError, match=r"disk full: need \d+ bytes, free"):
        folder.begin(config, {"hardware": "a"})
    folder.discard()
    assert not list(tmp_path.iterdir())


def test_runs_in_a_folder_that_is_none_are_named(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.yaml").write_text("epochs: 1")
    with pytest.raises(
        ValueError, match=f"is not a run: .* one of the runs in it, such as {tmp_path}/a, {tmp_path}/b$"
    ):
        run_of(tmp_path)


def test_settings_of_an_older_checkpoint_are_compared_under_their_present_names():
    assert different_settings(Config(method="gkt", group_ema=0.7), {"method": "gkt", "ema": 0.7}) == {}
