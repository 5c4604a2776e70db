"""What a resumed run must have in common with its checkpoint, and what becomes of one that has less."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from unloaf.commands import main as cli
from unloaf.config import Config, load_config
from unloaf.engine.checkpoint import load_checkpoint, save_checkpoint
from unloaf.runs.judge import judge_run
from unloaf.runs.opened import open_trained


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def log(run: Path) -> str:
    return (run / "log.txt").read_text()


def rates(run: Path) -> list[float]:
    """The learning rate at the end of each epoch."""
    return [float(row["lr"]) for row in csv.DictReader((run / "summary.csv").read_text().splitlines())]


def fewer(count: int) -> Any:
    """The first of the 64 training images, 16 to a step."""
    return tiny.data(train=tiny.data().train.subset(torch.arange(count)))


def go_on(config: Config, *, data: Any = None, **more: Any) -> Path:
    return tiny.train(
        config, console=tiny.quiet(), resume="auto", data=data or tiny.data(), model=tiny.network(), **more
    ).path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs; nobody writes to it."""
    return tiny.run(tiny.config(output=str(tmp_path_factory.mktemp("runs")), name="run", method="common")).path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


# Settings


def resume(run: Path) -> None:
    tiny.run(load_config(run / "args.yaml"), resume=str(run))


OPENERS = pytest.mark.parametrize("opening", [resume, judge_run, open_trained])


@OPENERS
@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("lr: 0.05", "lr: 0.07", r"lr 0\.07 \(there 0\.05\)"),  # one bit: 5 is 0x35, 7 is 0x37
        ("epochs: 2", "epochs: 3", r"epochs 3 \(there 2\)"),
        ("method: common", "method: gkt", r"method 'gkt' \(there 'common'\)"),
        ("width: 16", "width: 18", r"width 18 \(there 16\)"),
        ("sides: []", "sides: [4]", r"sides \(4,\) \(there \(\)\)"),
    ],
)
def test_settings_that_are_not_those_of_the_checkpoint_are_refused(run, opening, before, after, told):
    args = run / "args.yaml"
    assert before in args.read_text()
    args.write_text(args.read_text().replace(before, after))
    kept = content(run)
    with pytest.raises(ValueError, match=f"args.yaml has other settings than step-00000008 was trained with: {told}"):
        opening(run)
    assert content(run) == kept


def test_entry_that_is_left_out_has_its_default_value(run):
    args = run / "args.yaml"
    args.write_text(args.read_text().replace("seed: 0\n", ""))
    before = (run / "summary.csv").read_bytes()
    resume(run)
    assert (run / "summary.csv").read_bytes() == before


@OPENERS
def test_checkpoint_of_another_run_is_refused(run, opening, tmp_path):
    other = tiny.run(tiny.config(output=str(tmp_path), name="other", method="common", seed=5, epochs=1)).path
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    with pytest.raises(ValueError, match=r"epochs 2 \(there 1\), seed 0 \(there 5\); .* or the checkpoint is another"):
        opening(run)


def test_free_settings_that_changed_are_named(run):
    args = run / "args.yaml"
    args.write_text(args.read_text().replace("log_interval: 1", "log_interval: 9"))
    resume(run)
    assert "not as when step-00000008 was written: log_interval 9 (was 1)" in log(run)


# Checkpoints out of sight


def unmounted(run: Path, patch: pytest.MonkeyPatch) -> None:
    (run / "checkpoints").rename(run.parent / "disk")
    (run / "checkpoints").symlink_to(run.parent / "away")


def unreadable(run: Path, patch: pytest.MonkeyPatch) -> None:
    """As for an ordinary user; the superuser may read everything."""
    listdir = os.listdir

    def refuse(path: Any = ".") -> list[str]:
        if Path(path) == run / "checkpoints":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    patch.setattr(os, "listdir", refuse)


def without_links(run: Path, patch: pytest.MonkeyPatch) -> None:
    """As on a file system that has none: summary.csv has two epochs."""
    for name in ("last", "model_best"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")


OUT_OF_SIGHT: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], Any], str]] = {
    "removed": (lambda run, _: shutil.rmtree(run / "checkpoints"), "is missing, but there were checkpoints: last"),
    "renamed": (lambda run, _: (run / "checkpoints").rename(run / "old"), "is missing"),
    "emptied": (lambda run, _: [shutil.rmtree(path) for path in (run / "checkpoints").iterdir()], "is empty"),
    "mount point": (lambda run, _: [path.rename(path.with_name(f".{path.name}"))
                                    for path in (run / "checkpoints").iterdir()], "holds .* and no checkpoint"),
    "unmounted": (unmounted, "is a link to .*away, where nothing is"),
    "unreadable": (unreadable, "cannot be read .Permission denied."),
    "a file": (lambda run, _: [shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()], "cannot be read"),
    "without links": (without_links, "is missing, but there were checkpoints: summary.csv has 2 epochs"),
}  # fmt: skip


@OPENERS
@pytest.mark.parametrize("kind", OUT_OF_SIGHT)
def test_checkpoints_out_of_sight_are_told_and_the_record_stays(run, opening, kind, monkeypatch):
    hide, told = OUT_OF_SIGHT[kind]
    hide(run, monkeypatch)
    before = content(run)
    with pytest.raises(ValueError, match=f"run/checkpoints {told}"):
        opening(run)
    assert content(run) == before


@pytest.mark.parametrize("words", [["train", "--resume"], ["eval"], ["subnets"], ["export"]])
def test_checkpoints_out_of_sight_are_bad_input(run, capsys, words):
    (run / "checkpoints").rename(run.parent / "elsewhere")
    assert cli.main([*words, str(run)]) == 2
    err = capsys.readouterr().err
    assert "checkpoints is missing, but there were checkpoints: last leads to checkpoints/step-00000008" in err
    assert err.count("\n") == 1


def test_run_that_was_killed_before_its_first_checkpoint_keeps_what_it_wrote(tmp_path):
    config = tiny.config(output=str(tmp_path), name="run", method="common")
    path = tiny.stopped_after(3, config)
    first = (path / "metrics.jsonl").read_bytes()
    assert first.count(b"\n") == 3
    go_on(config)
    assert (path / "metrics.2.jsonl").read_bytes() == first
    assert "what it wrote is kept as metrics.2.jsonl" in log(path)
    steps = [json.loads(line).get("step") for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if step] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_lines_that_a_copied_run_lacks_are_told_and_none_is_torn(run):
    summary = run / "summary.csv"
    whole = summary.read_bytes().splitlines(keepends=True)
    summary.write_bytes(b"".join(whole[:2]) + whole[2][:5])
    (run / "metrics.jsonl").unlink()
    resume(run)
    assert summary.read_bytes() == b"".join(whole[:2])
    for name in ("summary.csv", "metrics.jsonl"):
        assert f"{name} is shorter than when the checkpoint was written: lines of it are lost" in log(run)


def test_best_checkpoint_that_is_gone_is_told(run):
    (run / "model_best").unlink()
    (run / "model_best").symlink_to("checkpoints/step-00000001")
    with pytest.raises(ValueError, match="model_best leads to checkpoints/step-00000001, which is not there"):
        judge_run(run, checkpoint="best")


# Other steps per epoch


def shrunk(tmp_path: Path, *, stop: int, images: int = 32, **settings: Any) -> Path:
    """Four epochs, begun with four steps an epoch; after `stop` of them half of the images are left, two steps each."""
    config = tiny.config(output=str(tmp_path), name="run", method="common", epochs=4, **settings)
    tiny.stopped_after(stop, config)
    return go_on(config, data=fewer(images), allow_changed_data=True)


def test_schedule_follows_the_epochs_where_an_epoch_has_fewer_steps(tmp_path):
    """From epoch 3 on the rates are those of a run that had two steps an epoch from its beginning."""
    path = shrunk(tmp_path, stop=8)
    config = tiny.config(output=str(tmp_path), name="small", method="common", epochs=4)
    small = rates(tiny.train(config, console=tiny.quiet(), data=fewer(32), model=tiny.network()).path)
    assert rates(path)[2:] == small[2:]
    assert small[2] > small[3] > 0


def test_checkpoints_of_fewer_steps_per_epoch_are_the_newest(tmp_path):
    path = shrunk(tmp_path, stop=8)  # epochs 3 and 4 have steps 9 to 12
    assert (path / "last").resolve().name == "step-00000012"
    last = load_checkpoint(path / "last")
    assert {name: last.state["position"][name] for name in ("epoch", "step", "steps", "updates")} == {
        "epoch": 5, "step": 0, "steps": 12, "updates": 8,
    }  # fmt: skip
    kept = {folder.name for folder in (path / "checkpoints").iterdir()}
    assert {"step-00000010", "step-00000012"} <= kept
    assert "step-00000004" not in kept - {(path / "model_best").resolve().name}


def test_stopped_inside_an_epoch_it_goes_on_at_the_same_share_of_it(tmp_path):
    path = shrunk(tmp_path, stop=6, checkpoint_interval=1)  # half of epoch 2
    told = "an epoch has 2 steps now, it had 4: run and schedule continue at the same share of epoch 2, after 1 of 2"
    assert told in log(path)
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [(event["step"], event["epoch"]) for event in events if event["event"] == "step"]
    assert steps == [*((n, 1) for n in (1, 2, 3, 4)), (5, 2), (6, 2), (7, 2), (8, 3), (9, 3), (10, 4), (11, 4)]


@pytest.mark.parametrize("stop", [3, 6])
def test_checkpoint_of_unloaf_0_1_goes_on_to_the_same_bits(tmp_path, stop):
    """It kept neither the sum of the steps nor those of an epoch, in the state or beside it."""
    config = tiny.config(output=str(tmp_path), method="st", checkpoint_interval=1)
    whole = load_checkpoint(tiny.run(replace(config, name="whole")).path / "last")
    config = replace(config, name="run")
    path = tiny.stopped_after(stop, config)
    for folder in (path / "checkpoints").iterdir():
        found = load_checkpoint(folder)
        for name in ("steps", "steps_per_epoch"):
            del found.state["position"][name]
        old = {name: text for name, text in found.metadata.items() if name != "unloaf_position"}
        save_checkpoint(path / "checkpoints", found.step, weights=found.weights, state=found.state, metadata=old)
    last = load_checkpoint(go_on(config) / "last")
    assert tiny.same(last.weights, whole.weights)
    assert last.step == whole.step == 8
    assert tiny.same(last.state["optimizer"], whole.state["optimizer"])
