"""Checkpoints that rotted, were cut off, or were made to harm: all are refused, by name."""

import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import STATE, as_format_1, forge_state, reseal, same, save_tiny
from unloaf.engine.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from unloaf.errors import CheckpointError

FILES = ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_every_flip_and_truncation_is_noticed_and_passed_over(tmp_path: Path, count: int):
    save_tiny(tmp_path, 1)
    folder = save_tiny(tmp_path, 2)
    chance = random.Random(0)
    for number in range(count):
        file = folder / FILES[number // 2 % 4]
        data = file.read_bytes()
        place = chance.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
        file.write_bytes(data[:place] if number % 2 else flipped)
        checkpoint, passed_over = newest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.step == 1
        assert len(passed_over) == 1
        assert f"step-00000002/{file.name}: " in passed_over[0]
        file.write_bytes(data)
    assert load_checkpoint(folder).step == 2


def test_when_all_are_damaged_all_are_named(tmp_path: Path):
    for step in (1, 2):
        (save_tiny(tmp_path, step) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of 2 .*\n.*2/state\.json: is missing.*\n.*1/state\.json: is"):
        newest_checkpoint(tmp_path / "checkpoints")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


class _Reduced:
    def __init__(self, *value: object) -> None:
        self.value = value

    def __reduce__(self) -> tuple:
        return self.value


# Name: (what the error names, the pickle that creates the file).
PAYLOADS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "posix.system": ("posix.system", lambda f: b"\x80\x02cposix\nsystem\n(" + text(f"touch {f}") + b"tR."),
    "os.system": ("os.system", lambda f: b"\x80\x02cos\nsystem\n(" + text(f"touch {f}") + b"tR."),
    "eval": ("builtins.eval", lambda f: b"\x80\x02cbuiltins\neval\n" + text(f"open({str(f)!r}, 'w')") + b"\x85R."),
    "exec inside a state": (
        "builtins.exec",
        lambda f: b"\x80\x02}" + text("lr") + b"cbuiltins\nexec\n" + text(f"open({str(f)!r}, 'w')") + b"\x85Rs.",
    ),
    "Popen": (
        "subprocess.Popen",
        lambda f: b"\x80\x02csubprocess\nPopen\n](" + text("touch") + text(str(f)) + b"e\x85R.",
    ),
    "open": ("builtins.open", lambda f: b"\x80\x02cbuiltins\nopen\n" + text(str(f)) + text("w") + b"\x86R."),
    "INST": ("posix.system", lambda f: b"\x80\x02(" + text(f"touch {f}") + b"iposix\nsystem\n."),
    "OBJ": ("posix.system", lambda f: b"\x80\x02(cposix\nsystem\n" + text(f"touch {f}") + b"o."),
    "BUILD": (
        "posix.system",
        lambda f: b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cposix\nsystem\nsb"
        + text(f"touch {f}") + b"b.",
    ),
    "STACK_GLOBAL": (
        "posix.system",
        lambda f: pickle.dumps(_Reduced(os.system, (f"touch {f}",)), protocol=4),
    ),
    "getattr": (
        "builtins.getattr",
        lambda f: b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\n" + text("os") + b"\x85R" + text("system")
        + b"\x86R" + text(f"touch {f}") + b"\x85R.",
    ),
}  # fmt: skip


def appears(file: Path, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return file.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_payloads_are_live(tmp_path: Path, name: str):
    canary = tmp_path / "canary"
    if (child := os.fork()) == 0:
        try:
            pickle.loads(PAYLOADS[name][1](canary))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert appears(canary, 60)


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_runs_and_the_error_names_file_and_global(tmp_path: Path, name: str):
    named, forged = PAYLOADS[name]
    folder = as_format_1(save_tiny(tmp_path))
    forge_state(folder, forged(tmp_path / "canary"))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert f"{folder / 'state.pt'}: its pickle calls for {named}, which" in str(caught.value)
    assert not appears(tmp_path / "canary", 0.05)


def test_no_payload_runs_where_torch_is_told_to_load_everything(tmp_path: Path):
    folders = []
    for number, (_, forged) in enumerate(PAYLOADS.values()):
        folders.append(as_format_1(save_tiny(tmp_path, number)))
        forge_state(folders[-1], forged(tmp_path / "canary"))
    script = (
        "import sys\n"
        "from unloaf.engine.checkpoint import load_checkpoint\n"
        "from unloaf.errors import CheckpointError\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_checkpoint(path)\n"
        "    except CheckpointError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, *map(str, folders)]
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(told) == len(PAYLOADS)
    for line, (named, _) in zip(told, PAYLOADS.values(), strict=True):
        assert f"state.pt: its pickle calls for {named}" in line
    assert not appears(tmp_path / "canary", 0.5)


def save_as_it_is(folder: Path, state: object) -> None:
    torch.save(state, folder / "state.pt")
    reseal(folder)


def bomb_expanded(folder: Path) -> None:
    expanded = torch.ones(1).expand(100_000, 100_000)
    save_as_it_is(folder, {"optimizer": {"state": {0: {"momentum_buffer": expanded}}}})


def bomb_of_many_views(folder: Path) -> None:
    shared = torch.ones(1_000_000)
    save_as_it_is(folder, {"views": [shared.view(1_000_000) for _ in range(2_000)]})


def bomb_of_a_longer_storage(folder: Path) -> None:
    with zipfile.ZipFile(folder / "state.pt") as archive:
        program = archive.read("state/data.pkl")
    # BININT1 6 is how many numbers the storage has; the file keeps its 24 bytes for them.
    longer = program.replace(b"K\x06t", b"J\x00\x00\x00\x40t")
    assert longer != program
    forge_state(folder, longer, {"0": bytes(24)})


def bomb_compressed(folder: Path) -> None:
    with zipfile.ZipFile(folder / "state.pt") as archive:
        program = archive.read("state/data.pkl")
    forge_state(folder, program, {"0": bytes(300_000_000)}, compression=zipfile.ZIP_DEFLATED)


def bomb_of_laughs(folder: Path) -> None:
    laughs: list[object] = ["ha"]
    for _ in range(40):
        laughs = [laughs] * 10
    save_as_it_is(folder, {"x": laughs})


def bomb_of_cycles(folder: Path) -> None:
    cycle: list[object] = []
    cycle.append(cycle)
    save_as_it_is(folder, {"x": cycle})


def bomb_nested(folder: Path) -> None:
    forge_state(folder, b"\x80\x02}" + text("x") + b"]" * 100_000 + b"a" * 99_999 + b"s.")


def bomb_of_the_memo(folder: Path) -> None:
    forge_state(folder, b"\x80\x02}r" + struct.pack("<I", 0x7FFFFFFF) + b".")


def bomb_of_bytes(folder: Path) -> None:
    forge_state(folder, b"\x80\x02}" + text("x") + b"cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85Rs.")


def bomb_of_a_storage_class(folder: Path) -> None:
    forge_state(folder, b"\x80\x02}" + text("x") + b"ctorch\nFloatStorage\nJ\x00\x00\x00\x40\x85Rs.")


def bomb_of_text(folder: Path) -> None:
    forge_state(folder, b"\x80\x02}X\xff\xff\xff\x7fa")


def bomb_shape_in_header(folder: Path, file: str = "model", name: str = "fc.weight") -> None:
    entry = {"dtype": "F32", "shape": [100_000, 1_000_000], "data_offsets": [0, 4]}
    header = json.dumps({name: entry}).encode()
    (folder / f"{file}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    reseal(folder)


def bomb_shape_in_state(folder: Path) -> None:
    bomb_shape_in_header(folder, "state", "0:momentum")


def bomb_nested_json(folder: Path) -> None:
    (folder / "state.json").write_text("[" * 100_000 + "]" * 100_000)
    reseal(folder)


def bomb_of_digits(folder: Path) -> None:
    (folder / "state.json").write_text('{"dict": [["x", ' + "9" * 10_000_000 + "]]}")
    reseal(folder)


def bomb_long_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    reseal(folder)


def bomb_of_two_archives(folder: Path) -> None:
    """Python finds the list of the small archive at the end; torch the one of the first, whose entry inflates."""
    large, small, size = io.BytesIO(), io.BytesIO(), 300_000_000
    with zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", state_of_one_tensor(size))
        archive.writestr("x/data/0", bytes(size))
    begin = zipfile.ZipFile(large).start_dir
    rest = begin - len(state_of_one_tensor(0)) - sum(30 + len(name) for name in ("x/data.pkl", "x/data/0"))
    with zipfile.ZipFile(small, "w") as archive:
        archive.writestr("x/data.pkl", state_of_one_tensor(rest))
        archive.writestr("x/data/0", bytes(rest))
    assert zipfile.ZipFile(small).start_dir == begin  # where the first has its list as well
    (folder / "state.pt").write_bytes(large.getvalue() + small.getvalue())
    assert zipfile.ZipFile(folder / "state.pt").getinfo("x/data/0").file_size == rest
    reseal(folder)


def state_of_one_tensor(size: int) -> bytes:
    """The pickle of {"x": so many bytes in storage 0}."""
    number = b"J" + struct.pack("<i", size)
    return (
        b"\x80\x02}" + text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nByteStorage\n"
        + text("0") + text("cpu") + number + b"tQK\x00" + number + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


BOMBS = [
    (
        bomb_shape_in_header,
        "model.safetensors: tensor fc.weight declares 100000x1000000 F32 (400,000,000,000 bytes), but holds 4",
    ),
    (bomb_shape_in_state, "state.safetensors: tensor 0:momentum declares 100000x1000000 F32"),
    (bomb_long_header, "model.safetensors: its header declares 1,152,921,504,606,846,976 bytes"),
    (bomb_nested_json, "state.json: cannot be read (RecursionError"),
    (bomb_of_digits, "state.json: cannot be read (ValueError: Exceeds the limit (4300 digits)"),
]
BOMBS_OF_FORMAT_1 = [
    (
        bomb_expanded,
        "state.pt: cannot be read (ValueError: tensor 0 declares 100000x100000, but the file holds 1 ",
    ),
    (bomb_of_many_views, "storage '0' is none, or its tensors share it"),
    (bomb_of_a_longer_storage, "storage 0 declares 1,073,741,824 numbers, but the file holds 24 bytes for it"),
    (bomb_compressed, "its entry state/data.pkl is compressed"),
    (bomb_of_laughs, "a list appears at two places"),
    (bomb_of_cycles, "state.pt: cannot be read (ValueError: a list appears at two places)"),
    (bomb_nested, "nested deeper than 64"),
    (bomb_of_the_memo, None),  # is no bomb to a reader whose memory of a value takes one entry, wherever it is
    (bomb_of_bytes, "state.pt: its pickle calls for builtins.bytearray"),
    (bomb_of_a_storage_class, "its pickle calls torch.float32, which is no function"),
    (bomb_of_text, "state.pt: cannot be read (ValueError: expected 2147483647 bytes"),
    (bomb_of_two_archives, None),  # there is one reader, which sees the small one
]


@pytest.mark.parametrize(
    ("bomb", "message", "version"), [*((*bomb, 2) for bomb in BOMBS), *((*bomb, 1) for bomb in BOMBS_OF_FORMAT_1)]
)
def test_bombs_are_named_and_take_no_memory(
    tmp_path: Path, bomb: Callable[[Path], None], message: str | None, version: int
):
    folder = save_tiny(tmp_path)
    bomb(folder if version == 2 else as_format_1(folder))
    told = tmp_path / "told.txt"
    # In a process of its own, because the peak of this one may lie above whatever the bomb takes.
    if (child := os.fork()) == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (20, 20))  # a bomb that goes off does not take the machine
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            error = load_or_message(folder)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            told.write_text(f"{grown} {error if isinstance(error, str) else 'loaded'}")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    grown, error = told.read_text().split(" ", 1)
    assert error == "loaded" if message is None else message in error
    assert int(grown) < 200_000  # KiB


def change_json(before: str, after: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "state.json").read_text()
        assert before in text
        (folder / "state.json").write_text(text.replace(before, after))

    return change


def change_tensors(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = folder / "state.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return changed


def add_a_tensor(folder: Path) -> None:
    file = folder / "state.safetensors"
    save_file({**load_file(file), "more": torch.ones(1)}, file)


def put_a_list(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


MOMENTUM = '{"tensor": "0:optimizer.state.0.momentum_buffer"}'
ODD_STATES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor more": (add_a_tensor, "state.safetensors holds more, which is nowhere in it"),
    "a tensor twice": (change_json(MOMENTUM, f"[{MOMENTUM}, {MOMENTUM}]"), "is no value, or one that was there"),
    "a tensor that is not there": (change_json("0:optimizer", "1:optimizer"), "'1:optimizer.state.0.momentum_buffer'}"),
    "a key twice": (change_json('["epoch", 2]', '["epoch", 2], ["epoch", 3]'), "{'dict': [['epoch', 2], ['epoch', 3]"),
    "an entry twice": (change_json('{"tuple": ', '{"tuple": [], "tuple": '), "is no value"),
    "an object of another kind": (change_json('{"tuple": ', '{"set": '), "{'set': [0.9, 0.999]} is no value"),
    "a key that is no text": (change_json('["epoch", 2]', "[1.5, 2]"), "is no value"),
    "no pair": (change_json('["epoch", 2]', '["epoch"]'), "not enough values to unpack"),
    "a text for a pair": (change_json('["epoch", 2]', '"ep"'), "is no value"),
    "NaN": (change_json("0.999", "NaN"), "the number NaN is not finite"),
    "too large a number": (change_json("0.999", "1e999"), "the number 1e999 is not finite"),
    "something behind": (change_json("\n", "\n{}"), "Extra data"),
    "a list": (put_a_list, "it holds no dict"),
    "bytes behind the tensors": (change_tensors(lambda data: data + b"x"), "state.safetensors: cannot be read"),
    "bytes before them": (change_tensors(lambda data: b"x" + data), "state.safetensors: its header declares"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_STATES)
def test_state_with_anything_beside_its_values_is_refused(tmp_path: Path, kind: str):
    change, message = ODD_STATES[kind]
    folder = save_tiny(tmp_path)
    change(folder)
    reseal(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert message in str(caught.value)
    assert str(caught.value).endswith("resume from an older checkpoint or copy this one again from its source")


def test_state_of_format_1_is_read_from_an_archive_of_torch_and_of_python(tmp_path: Path):
    folder = as_format_1(save_tiny(tmp_path))
    assert same(load_checkpoint(folder).state, STATE)
    with zipfile.ZipFile(folder / "state.pt") as archive:
        storages = {n.rpartition("/")[2]: archive.read(n) for n in archive.namelist() if n.startswith("state/data/")}
        forge_state(folder, archive.read("state/data.pkl"), storages)
    assert same(load_checkpoint(folder).state, STATE)


def mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        place = chance.randrange(len(changed) + 1)
        length = chance.choice([1, 1, 2, 4, 16])
        match chance.randrange(5):
            case 0:
                changed[place : place + length] = chance.randbytes(length)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = chance.randbytes(length)
            case 3:
                start = chance.randrange(len(changed) + 1)
                changed[place : place + length] = changed[start : start + length]
            case 4:
                changed[place : place + 1] = chance.choice([b"\0", b"\xff", b"R", b"c", b"t", b"(", b"0", b"9", b"}"])
    return bytes(changed)


def mutate(folder: Path, chance: random.Random) -> None:
    """One of: a file that disagrees with the manifest, one that agrees, or a good zip with a mutated pickle."""
    kind = chance.choice(["rot", "resealed", "resealed", "pickle", "pickle"])
    if kind == "pickle" and (folder / "state.pt").exists():
        with zipfile.ZipFile(folder / "state.pt") as archive:
            name = archive.namelist()[0].partition("/")[0]
            program, storage = archive.read(f"{name}/data.pkl"), archive.read(f"{name}/data/0")
        forge_state(folder, mutated(program, chance), {"0": storage})
        return
    files = sorted(path for path in folder.iterdir() if kind == "rot" or path.name != "manifest.json")
    file = chance.choice(files)
    file.write_bytes(mutated(file.read_bytes(), chance))
    if kind != "rot":
        reseal(folder)


def load_or_message(folder: Path) -> Checkpoint | str:
    try:
        return load_checkpoint(folder)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_checkpoints_raise_checkpoint_error_or_load(tmp_path: Path, count: int, version: int):
    folder = save_tiny(tmp_path)
    if version == 1:
        as_format_1(folder)
    good = {path: path.read_bytes() for path in folder.iterdir()}
    chance, refused = random.Random(0), 0
    for _ in range(count):
        mutate(folder, chance)
        outcome = load_or_message(folder)
        assert isinstance(outcome, Checkpoint) or str(folder) in outcome
        refused += isinstance(outcome, str)
        for path, data in good.items():
            path.write_bytes(data)
    assert same(load_checkpoint(folder).state, STATE)
    # Some changes are legal: another digit, another name, padding.
    assert count * 0.6 < refused < count


def test_a_file_that_is_something_else_is_refused(tmp_path: Path):
    folder = save_tiny(tmp_path)
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")  # reading it would wait for ever
    with pytest.raises(CheckpointError, match=r"state\.json: is missing"):
        load_checkpoint(folder)
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="holds no manifest"):
        load_checkpoint(tmp_path / "last")
