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

from checkpoint_tools import STATE, forge_state, reseal, same, save_tiny
from unloaf.engine.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from unloaf.errors import CheckpointError

FILES = ["manifest.json", "model.safetensors", "state.pt"]


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_every_flip_and_truncation_is_noticed_and_passed_over(tmp_path: Path, count: int):
    save_tiny(tmp_path, 1)
    folder = save_tiny(tmp_path, 2)
    chance = random.Random(0)
    for number in range(count):
        file = folder / FILES[number % 3]
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
        (save_tiny(tmp_path, step) / "state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"none of 2 .*\n.*0002/state\.pt: is missing.*\n.*0001/state\.pt: is"):
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
    folder = save_tiny(tmp_path)
    forge_state(folder, forged(tmp_path / "canary"))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert f"{folder / 'state.pt'}: its pickle calls for {named}, which" in str(caught.value)
    assert not appears(tmp_path / "canary", 0.05)


def test_no_payload_runs_where_torch_is_told_to_load_everything(tmp_path: Path):
    folders = []
    for number, (_, forged) in enumerate(PAYLOADS.values()):
        folders.append(save_tiny(tmp_path, number))
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


def bomb_shape_in_header(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [100_000, 1_000_000], "data_offsets": [0, 4]}
    header = json.dumps({"fc.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
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


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (
            bomb_expanded,
            "state.pt: tensor optimizer.state.0.momentum_buffer declares 100000x100000 (40,000,000,000 bytes), "
            "but the file holds 4 for it",
        ),
        (bomb_of_many_views, "state.pt: its tensors share storages"),
        (bomb_of_a_longer_storage, "state.pt: tensor optimizer.state.0.momentum_buffer declares 2x3 (24 bytes)"),
        (bomb_compressed, "state.pt: its entry state/data.pkl is compressed"),
        (bomb_of_laughs, "entries appears at two places"),
        (bomb_of_cycles, "state.pt: cannot be read (ValueError: a list of 1 entries appears at two places)"),
        (bomb_nested, "nested deeper than 64"),
        (bomb_of_the_memo, "state.pt: its pickle contains LONG_BINPUT 2147483647"),
        (bomb_of_bytes, "state.pt: its pickle calls for builtins.bytearray"),
        (bomb_of_a_storage_class, "state.pt: cannot be read (TypeError"),
        (bomb_of_text, "state.pt: its pickle contains nothing readable"),
        (
            bomb_shape_in_header,
            "model.safetensors: tensor fc.weight declares 100000x1000000 F32 (400,000,000,000 bytes), but holds 4",
        ),
        (bomb_of_two_archives, "state.pt: is no single archive: x/data.pkl begins at byte "),
        (bomb_long_header, "model.safetensors: its header declares 1,152,921,504,606,846,976 bytes"),
    ],
)
def test_bombs_are_named_and_take_no_memory(tmp_path: Path, bomb: Callable[[Path], None], message: str):
    folder = save_tiny(tmp_path)
    bomb(folder)
    told = tmp_path / "told.txt"
    # In a process of its own, because the peak of this one may lie above whatever the bomb takes.
    if (child := os.fork()) == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (20, 20))  # a bomb that goes off does not take the machine
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with pytest.raises(CheckpointError) as caught:
                load_checkpoint(folder)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            told.write_text(f"{grown} {caught.value}")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    grown, error = told.read_text().split(" ", 1)
    assert message in error
    assert int(grown) < 200_000  # KiB


def with_gap(data: bytes) -> bytes:
    """A byte between two entries; every offset behind it is right."""
    source = zipfile.ZipFile(io.BytesIO(data))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
            out.write(b"x")
            archive.start_dir += 1
    return out.getvalue()


def in_the_list(data: bytes, place: int, value: bytes) -> bytes:
    """Other bytes in the record at the end."""
    begin = data.rindex(b"PK\x05\x06") + place
    return data[:begin] + value + data[begin + len(value) :]


@pytest.mark.parametrize(
    "tamper",
    {
        "something in front": lambda data: b"x" + data,
        "something behind": lambda data: data + b"x",
        "a comment": lambda data: in_the_list(data, 20, b"\1\0") + b"x",
        "another end": lambda data: data + data[-22:],
        "another archive": lambda data: data + data,
        "a gap": with_gap,
        "a list elsewhere": lambda data: in_the_list(data, 16, struct.pack("<L", 7)),
        "a longer list": lambda data: in_the_list(data, 12, struct.pack("<L", 7)),
        "a list elsewhere in 64 bits": lambda data: data[:-50] + struct.pack("<Q", 7) + data[-42:],
        "another name in front": lambda data: data.replace(b"data/0", b"data/9", 1),
    }.items(),
    ids=lambda item: item[0],
)
def test_bytes_beside_the_archive_are_refused(tmp_path: Path, tamper: tuple[str, Callable[[bytes], bytes]]):
    folder = save_tiny(tmp_path)
    data = (folder / "state.pt").read_bytes()
    changed = tamper[1](data)
    assert changed != data
    (folder / "state.pt").write_bytes(changed)
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"state\.pt: (is no single archive|cannot be read)"):
        load_checkpoint(folder)


def test_archive_of_python_is_read_where_every_byte_is_its_own(tmp_path: Path):
    folder = save_tiny(tmp_path)
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
    if kind == "pickle":
        with zipfile.ZipFile(folder / "state.pt") as archive:
            program, storage = archive.read("state/data.pkl"), archive.read("state/data/0")
        forge_state(folder, mutated(program, chance), {"0": storage})
        return
    file = folder / chance.choice(FILES if kind == "rot" else FILES[1:])
    file.write_bytes(mutated(file.read_bytes(), chance))
    if kind == "resealed":
        reseal(folder)


def load_or_message(folder: Path) -> Checkpoint | str:
    try:
        return load_checkpoint(folder)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_checkpoints_raise_checkpoint_error_or_load(tmp_path: Path, count: int):
    folder = save_tiny(tmp_path)
    good = {name: (folder / name).read_bytes() for name in FILES}
    chance, refused = random.Random(0), 0
    for _ in range(count):
        mutate(folder, chance)
        outcome = load_or_message(folder)
        assert isinstance(outcome, Checkpoint) or str(folder) in outcome
        refused += isinstance(outcome, str)
        for name, data in good.items():
            (folder / name).write_bytes(data)
    assert same(load_checkpoint(folder).state, STATE)
    # Some changes are legal: another digit, another name, padding.
    assert count * 0.7 < refused < count


def test_a_file_that_is_something_else_is_refused(tmp_path: Path):
    folder = save_tiny(tmp_path)
    (folder / "state.pt").unlink()
    os.mkfifo(folder / "state.pt")  # reading it would wait for ever
    with pytest.raises(CheckpointError, match=r"state\.pt: is missing"):
        load_checkpoint(folder)
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="holds no manifest"):
        load_checkpoint(tmp_path / "last")
