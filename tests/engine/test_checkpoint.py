"""Saving, reading, choosing and deleting checkpoints, where nothing goes wrong; and full disks."""

import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from checkpoint_tools import STATE, WEIGHTS, reseal, same, save_tiny, write_manifest
from unloaf.engine.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    position_text,
    prune_checkpoints,
    save_checkpoint,
)
from unloaf.errors import CheckpointError
from unloaf.files.writing import point_to

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint-v1" / "step-00000012"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path):
    folder = save_tiny(tmp_path)
    checkpoint = load_checkpoint(tmp_path / "last")
    assert (checkpoint.path, checkpoint.step, checkpoint.metadata) == (folder.resolve(), 7, {"model": "tiny"})
    assert same(checkpoint.weights, WEIGHTS)
    assert same(checkpoint.state, STATE)
    assert names(folder) == ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]
    assert os.readlink(tmp_path / "last") == "checkpoints/step-00000007"


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 1, 3)], ids=str)
def test_tensors_of_any_kind_come_back_in_both_files(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = torch.randint(0, 2, shape).to(dtype)
    path = save_checkpoint(tmp_path / "checkpoints", 0, weights={"model": {"t": tensor}}, state={"t": tensor})
    checkpoint = load_checkpoint(path)
    assert same(checkpoint.weights["model"]["t"], tensor)
    assert same(checkpoint.state["t"], tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.ones(1).expand(4, 2),
        torch.arange(10.0)[2:5],
        torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.nn.Parameter(torch.rand(2)),
        torch.tensor([1 + 2j]).conj(),
    ],
    ids=["transposed", "expanded", "slice", "channels last", "parameter", "conjugate"],
)
def test_strided_tensors_come_back_with_memory_of_their_own(tmp_path: Path, tensor: torch.Tensor):
    path = save_checkpoint(tmp_path / "checkpoints", 0, weights={"model": {"t": tensor}}, state={"t": tensor})
    checkpoint = load_checkpoint(path)
    for loaded in (checkpoint.weights["model"]["t"], checkpoint.state["t"]):
        assert same(loaded, tensor.detach().clone())
        assert loaded.untyped_storage().nbytes() == tensor.numel() * tensor.dtype.itemsize


def test_tied_weights_stay_tied_and_overlapping_ones_come_apart(tmp_path: Path):
    base = torch.arange(6.0)
    entries = {"a": base, "b": base, "tail": base[3:], "table": base.view(2, 3), "empty": base[:0], "none": base[:0]}
    checkpoint = load_checkpoint(save_checkpoint(tmp_path / "checkpoints", 0, weights={"model": entries}, state={}))
    loaded = checkpoint.weights["model"]
    assert same(loaded, {name: tensor.clone() for name, tensor in entries.items()})
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert len({loaded[name].data_ptr() for name in ("a", "tail", "table")}) == 3


def test_several_weights_and_an_empty_state(tmp_path: Path):
    weights = {"model": {}, "model_ema": {"w": torch.ones(2)}}
    checkpoint = load_checkpoint(save_checkpoint(tmp_path / "checkpoints", 3, weights=weights, state={}))
    assert same(checkpoint.weights, weights)
    assert (checkpoint.state, checkpoint.metadata) == ({}, {})


def test_every_plain_value_comes_back(tmp_path: Path):
    state = {
        "numbers": [0, -1, 255, 2**31, -(2**63), 2**600, True, False, None],
        "floats": [1.5, 0.1, -0.0, 5e-324, float("inf"), -float("inf")],
        "texts": ("", "é", "\ud800", "x" * 300, b"\x00\xff", b""),
        3: {"nested": [[], {}, (), (1,), [(1, 2, 3, 4)]]},
    }
    assert same(load_checkpoint(save_checkpoint(tmp_path / "checkpoints", 0, weights={}, state=state)).state, state)


Pair = namedtuple("Pair", "a b")
DEEP: list[object] = []
for _ in range(80):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [0, {1}]}}, r"a\.b\.1 is a builtins\.set; .* convert it"),
        ({"lr": torch.ones(2).numpy()[0]}, r"lr is a numpy\.float32"),
        ({"x": Pair(1, 2)}, r"x is a .*Pair"),
        ({"x": bytearray(b"raw")}, r"x is a builtins\.bytearray"),
        ({"x": {(1, 2): 3}}, r"x has the key \(1, 2\)"),
        ({"x": {True: 3}}, r"x has the key True"),
        ({"x": 2**3000}, r"x is an integer of 3001 bits"),
        ({"x": DEEP}, r"nested deeper than 64"),
        ({"x": torch.empty(2, device="meta")}, r"x is a Tensor of layout torch.strided on meta"),
        ({"x": torch.ones(2).to_sparse()}, r"x is a Tensor of layout torch.sparse_coo"),
        ({"x": torch.ones(2, dtype=torch.complex128)}, r"x is torch.complex128; allowed are torch.float64"),
    ],
)
def test_state_that_could_not_be_read_again_is_refused_by_its_path(tmp_path: Path, state: dict, message: str):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "checkpoints", 0, weights={}, state=state)
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"weights": {"state": {}}}, "'state': the name becomes a file name"),
        ({"weights": {"../model": {}}}, r"'\.\./model': the name becomes a file name"),
        ({"weights": {"model": {"w": 1.0}}}, r"model\.w is a builtins\.float"),
        ({"weights": {"model": {"__metadata__": torch.ones(1)}}}, "cannot be stored"),
        ({"metadata": {"epoch": 3}}, "metadata 'epoch' is 3"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "checkpoints", **{"step": 0, "weights": {}, "state": {}} | arguments)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        folder = save_tiny(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_the_same_step_again_gets_a_folder_of_its_own_and_the_old_one_is_pruned(tmp_path: Path):
    save_tiny(tmp_path, 3)
    first = save_tiny(tmp_path)
    point_to(tmp_path / "model_best", first)
    for number in (1, 2):
        path = save_checkpoint(tmp_path / "checkpoints", 7, weights={}, state={"new": number})
        assert path.name == f"step-00000007.{number}"
    assert load_checkpoint(tmp_path / "last").state == {"new": 2}
    (tmp_path / "last").unlink()
    found, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.state == {"new": 2}
    prune_checkpoints(tmp_path / "checkpoints", keep=2, newest=path, protect=[tmp_path / "model_best"])
    assert names(tmp_path / "checkpoints") == ["step-00000003", "step-00000007", "step-00000007.2"]
    assert same(load_checkpoint(tmp_path / "model_best").state, STATE)


def test_a_folder_of_the_user_is_left_alone(tmp_path: Path):
    notes = save_tiny(tmp_path) / "notes.txt"
    notes.write_text("keep me")
    path = save_tiny(tmp_path)
    prune_checkpoints(tmp_path / "checkpoints", keep=1, newest=path)
    assert notes.read_text() == "keep me"
    assert names(tmp_path / "checkpoints") == ["step-00000007", "step-00000007.1"]


def test_the_newest_is_found_and_nothing_is_no_error(tmp_path: Path):
    assert newest_checkpoint(tmp_path / "checkpoints") == (None, [])
    for step in (2, 100_000_000, 10):
        save_tiny(tmp_path, step)
    checkpoint, passed_over = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, passed_over) == (10, [])  # what was written last
    (tmp_path / "last").unlink()
    checkpoint, passed_over = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, passed_over) == (100_000_000, [])


def save_at(run: Path, step: int, position: dict, *, named: bool) -> Path:
    """A checkpoint of a run, with the metadata of today or as unloaf 0.1 wrote it."""
    metadata = position_text(position) if named else {}
    kept = position if named else {name: position[name] for name in ("epoch", "step")}
    return save_checkpoint(run / "checkpoints", step, weights=WEIGHTS, state={"position": kept}, metadata=metadata)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("last", ["missing", "damaged", "elsewhere"])
def test_the_newest_is_the_one_after_the_most_epochs_whatever_its_number_is(tmp_path: Path, named: bool, last: str):
    """10 steps an epoch up to the middle of epoch 3, then 4: step 25 is older than step 11."""
    save_at(tmp_path, 25, {"epoch": 3, "step": 5, "steps_per_epoch": 10}, named=named)
    save_at(tmp_path, 11, {"epoch": 3, "step": 3, "steps_per_epoch": 4}, named=named)
    save_at(tmp_path, 20, {"epoch": 3, "step": 0, "steps_per_epoch": 10}, named=named)
    if last == "damaged":
        save_at(tmp_path, 12, {"epoch": 4, "step": 0, "steps_per_epoch": 4}, named=named)
        (tmp_path / "last" / "state.json").write_bytes(b"?")
    elif last == "missing":
        (tmp_path / "last").unlink()
    else:
        elsewhere = save_tiny(tmp_path / "other", 20)
        point_to(tmp_path / "last", elsewhere)
    checkpoint, passed_over = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, len(passed_over)) == (11, last == "damaged")


@pytest.mark.parametrize("named", [True, False])
def test_pruning_keeps_those_after_the_most_epochs(tmp_path: Path, named: bool):
    for step, epoch in ((10, 2), (20, 3), (12, 4)):  # 10, 10 and 4 steps an epoch
        position = {"epoch": epoch, "step": 0, "steps_per_epoch": 4 if step == 12 else 10}
        path = save_at(tmp_path, step, position, named=named)
    prune_checkpoints(tmp_path / "checkpoints", keep=2, newest=path)
    assert names(tmp_path / "checkpoints") == ["step-00000012", "step-00000020"]


def test_pruning_keeps_the_newest_the_protected_and_what_is_not_ours(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    for step in range(1, 8):
        save_tiny(tmp_path, step)
    point_to(tmp_path / "model_best", folder / "step-00000002")
    (folder / "step-00000001" / "notes.txt").write_text("mine")
    (folder / "step-00000003" / "state.json").unlink()
    (folder / "step-00000099").mkdir()
    prune_checkpoints(folder, keep=2, protect=[tmp_path / "model_best"])
    kept = [1, 2, 3, 6, 7, 99]
    assert names(folder) == [f"step-{step:08d}" for step in kept]


def test_pruning_deletes_nothing_when_the_newest_is_damaged(tmp_path: Path):
    for step in range(4):
        save_tiny(tmp_path, step)
    state = tmp_path / "last" / "state.json"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"state\.json: has other bytes"):
        prune_checkpoints(tmp_path / "checkpoints", keep=1)
    assert len(names(tmp_path / "checkpoints")) == 4


def test_pruning_counts_no_damaged_checkpoint_that_a_resumed_run_passed_over(tmp_path: Path):
    for step in (3, 7, 14):
        folder = save_tiny(tmp_path, step)
    state = folder / "state.json"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    written = save_tiny(tmp_path, 10)
    prune_checkpoints(tmp_path / "checkpoints", keep=2, newest=written)
    assert names(tmp_path / "checkpoints") == [f"step-{step:08d}" for step in (7, 10, 14)]


def test_pruning_keeps_what_last_points_to(tmp_path: Path):
    for step in (5, 9, 2):  # resumed from an earlier step: the last one is not the highest
        save_tiny(tmp_path, step)
    prune_checkpoints(tmp_path / "checkpoints", keep=1)
    assert names(tmp_path / "checkpoints") == ["step-00000002", "step-00000009"]
    with pytest.raises(ValueError, match="at least 1"):
        prune_checkpoints(tmp_path / "checkpoints", keep=0)


def test_a_link_is_relative_and_replaces_links_only(tmp_path: Path):
    save_tiny(tmp_path)
    shutil.move(tmp_path, moved := tmp_path.with_name(tmp_path.name + "-moved"))
    assert load_checkpoint(moved / "last").step == 7
    (moved / "model_best").write_text("a file")
    with pytest.raises(CheckpointError, match="is not a link"):
        point_to(moved / "model_best", moved / "last")


def test_leftovers_are_removed_by_name_only(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    for name in (".step-00000003-0123abcd", ".step-00000003.1-0123abcd", ".step-mine", ".cache", "step-00000001"):
        (folder / name).mkdir(parents=True)
    (tmp_path / ".last-0123abcd").symlink_to("nowhere")
    save_tiny(tmp_path)
    assert names(folder) == [".cache", ".step-mine", "step-00000001", "step-00000007"]
    assert names(tmp_path) == ["checkpoints", "last"]


def test_disk_full_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_tiny(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=3_100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"disk full: need 4\.\d MB, free 3\.1 MB at .*checkpoints; make room"):
        save_checkpoint(tmp_path / "checkpoints", 2, weights={"model": {"w": torch.ones(1_000_000)}}, state={})
    assert names(tmp_path / "checkpoints") == ["step-00000001"]
    assert load_checkpoint(tmp_path / "last").step == 1


@pytest.mark.parametrize("where", ["weights", "state"])
def test_disk_full_while_writing_leaves_the_last_checkpoint_intact(tmp_path: Path, where: str):
    save_tiny(tmp_path, 1)
    large = {"w": torch.ones(1_000_000)}
    told = tmp_path / "told.txt"
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            weights = {"model": large if where == "weights" else {}}
            save_checkpoint(tmp_path / "checkpoints", 2, weights=weights, state=large if where == "state" else {})
        except BaseException as error:
            told.write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert told.read_text().startswith("CheckpointError: disk full: need 4.0 MB, free ")
    assert "limit on the size of a file" in told.read_text()
    assert names(tmp_path / "checkpoints") == ["step-00000001"]
    assert load_checkpoint(tmp_path / "last").step == 1


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot write .*0007: File exists; make room or look at"):
        save_tiny(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format 3, this unloaf reads up to 2; update unloaf"),
        ({"format_version": "1"}, "format '1'"),
        ({"step": -1}, "step -1"),
        ({"files": {}}, "lists the files"),
        ({"files": {"../state.json": {"bytes": 0, "sha256": ""}}}, "lists the files"),
        ({"format_version": 1}, "lists the files"),
        ({"metadata": {"a": 1}}, "metadata 'a' is 1"),
        ({"aliases": {"model": {"x": "nowhere"}}}, r"model\.safetensors: cannot be read \(KeyError: 'nowhere'\)"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, change: dict, message: str):
    import json

    folder = save_tiny(tmp_path)
    fields = json.loads((folder / "manifest.json").read_bytes())
    write_manifest(folder, fields | change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_the_forger_of_these_tests_writes_what_loads(tmp_path: Path):
    folder = save_tiny(tmp_path)
    before = (folder / "manifest.json").read_bytes()
    reseal(folder)
    assert (folder / "manifest.json").read_bytes() == before


def test_a_path_that_is_no_checkpoint_is_told(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "loop", Path("a\0b")):
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_format_1_still_loads():
    """Written by unloaf 0.1.0 with torch 2.15 and safetensors 0.8; never write it again: see `fixtures/README.md`."""
    checkpoint = load_checkpoint(FIXTURE)
    assert (checkpoint.step, checkpoint.metadata) == (12, {"model": "tiny", "method": "st"})
    assert sorted(checkpoint.weights) == ["model", "model_ema"]
    model = checkpoint.weights["model"]
    assert model["fc.weight"].tolist() == [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]]
    assert model["head.weight"] is model["fc.weight"]
    assert (model["bn.num_batches_tracked"].dtype, model["bn.num_batches_tracked"].item()) == (torch.int64, 12)
    assert (model["half"].dtype, model["half"].tolist()) == (torch.bfloat16, [1.0, -2.0])
    assert checkpoint.weights["model_ema"]["fc.weight"].tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    momentum = checkpoint.state["optimizer"]["state"][0].pop("momentum_buffer")
    assert momentum.tolist() == [[0.25, -0.25, 0.0], [1.0, 2.0, 3.0]]
    assert checkpoint.state == {
        "optimizer": {"state": {0: {}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}]},
        "position": {"epoch": 1, "batch": 4, "seed": 2**40},
        "scaler": None,
        "notes": ["é", True, float("inf")],
    }
