"""Run folders in which something else lies than unloaf wrote: one line and 2, or what can be told all the same."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from unloaf.commands.main import main
from unloaf.config import Config, dump_config
from unloaf.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

KINDS: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "empty": lambda path: path.touch(),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe"),
    "nulls": lambda path: path.write_bytes(bytes(50)),
    "list": lambda path: path.write_text("[1, 2]\n"),
    "deep": lambda path: path.write_text("[" * 100_000 + "\n"),
    "long": lambda path: path.write_text("epoch\n" + "x" * 200_000 + "\n"),
    "types": lambda path: path.write_text(
        '{"event": "result", "test_top1": "x", "versions": 3, "command": 5, "hardware": [1], "started": 2}\n'
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["env.json", "metrics.jsonl", "summary.csv", "args.yaml"])
def test_report_of_a_damaged_run_is_a_report_or_one_line(tmp_path, capsys, name, kind):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_text(dump_config(Config()))
    (tmp_path / "run" / name).unlink(missing_ok=True)
    KINDS[kind](tmp_path / "run" / name)
    code = main(["report", str(tmp_path / "run")])
    told = capsys.readouterr().err
    assert code == (2 if kind in ("folder", "pipe", "bytes") or name == "args.yaml" or "cannot read" in told else 0)
    assert len(told.splitlines()) == (code == 2)
    assert code == 0 or str(tmp_path / "run") in told


def test_path_that_is_no_utf8_is_told_and_not_taken_for_damage(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff/checkpoints"))
    path = save_checkpoint(tmp_path / "run" / "checkpoints", 1, weights={}, state={})
    shutil.copytree(tmp_path / "run", folder.parent, symlinks=True)
    for read in (lambda: load_checkpoint(folder / path.name), lambda: newest_checkpoint(folder)):
        with pytest.raises(
            ValueError, match="its path is not UTF-8, and safetensors takes no other; rename the folder"
        ):
            read()


def test_link_to_itself_is_no_newest_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", 1, weights={}, state={})
    (tmp_path / "last").unlink()
    (tmp_path / "last").symlink_to("last")
    found, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.path == path.resolve()
