"""Whatever is written in a configuration or typed after `unloaf`: exit 0 or 2, one line, no traceback (R26)."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unloaf.commands import main as cli
from unloaf.commands.bench import BenchStep
from unloaf.commands.check_data import CheckData
from unloaf.commands.demo import Demo
from unloaf.commands.eval import Eval
from unloaf.commands.report import Report
from unloaf.config import Config, dump_config

FIELDS = [*Config.__dataclass_fields__]
LONG = 2_000  # configurations; a quarter as many command lines


@contextlib.contextmanager
def nothing_trained() -> Iterator[None]:
    """Commands end where they would begin to work; files that they write would lie in an empty folder."""
    with contextlib.ExitStack() as stack:
        for name in ("commands.train.open_run", "engine.run.train", "demo.run_demo", "bench.bench_step"):
            stack.enter_context(mock.patch(f"unloaf.{name}", side_effect=SystemExit(0)))
        stack.enter_context(mock.patch("unloaf.data.check_images", side_effect=SystemExit(0)))
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        yield


def check(words: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    assert code in (0, 2), err.getvalue()
    if code == 2:
        line = err.getvalue()
        assert line.startswith("unloaf: error: ")
        assert line.count("\n") == 1
        assert 20 < len(line) < 3_000


def check_yaml(text: str | bytes) -> None:
    with nothing_trained():
        Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        check(["train", "-c", "run.yaml"])


numbers = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.integers(0, 400).map(lambda digits: 10**digits),
    st.floats(),
    st.floats(0, 1),
    st.sampled_from([1e-320, 1e308, 2**63, 2**64, -0.0, 0.5]),
)
words = st.one_of(
    st.sampled_from(["", "auto", "none", "null", "true", "1e-3", "nan", "-inf", "0x10", "1:30", "..", "/", "~", "a/b"]),
    st.sampled_from(["st", "gkt", "digits", "cifar10", "sgd", "cifar/resnet20", "rand-m9", "cosine", "common", "val"]),
    st.text(max_size=12),
    st.text(st.characters(codec="utf-8"), max_size=400),
)
scalars = st.one_of(numbers, words, st.booleans(), st.none(), st.dates(), st.binary(max_size=5))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
keys = st.one_of(st.sampled_from(FIELDS), st.sampled_from(FIELDS), words, st.integers(), st.booleans(), st.none())
TAGS = ["!!int", "!!float", "!!bool", "!!timestamp", "!!binary", "!!set", "!!omap", "!!null", "!!python/name:os.system"]
tagged = st.builds(
    "{}: {} {}\n".format,
    st.sampled_from(FIELDS),
    st.sampled_from(TAGS),
    st.sampled_from(["''", "x", "[]", "{a: b}", "[a, a]", "9" * 5000, "2020-99-99", "1_0", "&a [*a]", "é"]),
)


def damaged(text: str, position: int, part: str) -> str:
    position %= len(text)
    return text[:position] + part + text[position + 1 :]


# What safe_dump cannot write, such as a key that is a list, comes from the damaged and tagged texts.
texts = st.one_of(
    st.dictionaries(keys, values, max_size=5).map(lambda entries: yaml.safe_dump(entries, allow_unicode=True)),
    st.dictionaries(st.sampled_from(FIELDS), scalars, max_size=2).map(yaml.safe_dump),
    st.builds(damaged, st.just(dump_config(Config())), st.integers(0, 5_000), st.text(max_size=3)),
    tagged,
    st.text(max_size=60),
    st.binary(max_size=60),
)

COMMANDS = {
    "demo": Demo,
    "train": Config,
    "eval": Eval,
    "report": Report,
    "check-data": CheckData,
    "bench step": BenchStep,
}
EXTRA = [
    "-c",
    "--config",
    "--recipe",
    "--resume",
    "--print-config",
    "-b",
    "-j",
    "-h",
    "--help",
    "--version",
    "--debug_",
]
flags = st.one_of(
    st.sampled_from(
        ["--" + name.replace("_", "-") for kind in COMMANDS.values() for name in kind.__dataclass_fields__]
    ),
    st.sampled_from(EXTRA),
    st.text(max_size=5).map(lambda text: "--" + text),
)
shown = st.one_of(
    numbers.map(str), words, st.text(max_size=6), st.just("auto"), st.just("run.yaml"), st.just("9" * 5000)
)
pieces = st.one_of(
    st.tuples(flags, shown),
    st.tuples(flags, shown).map(lambda pair: (f"{pair[0]}={pair[1]}",)),
    st.tuples(flags),
    st.tuples(shown),
)
command_lines = st.tuples(
    st.one_of(st.sampled_from([*COMMANDS]), st.sampled_from([*COMMANDS]), words),
    st.lists(pieces, max_size=5),
    st.booleans(),
).map(lambda made: made[0].split() + [word for piece in made[1] * (1 + made[2]) for word in piece])


def check_words(typed: list[str]) -> None:
    with nothing_trained():
        Path("run.yaml").write_text("epochs: 3\n", encoding="utf-8")
        check(typed)


_SETTINGS = {"suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=LONG // 10, **_SETTINGS)
@given(texts)
def test_any_file_is_read_or_refused(text):
    check_yaml(text)


@settings(max_examples=LONG // 40, **_SETTINGS)
@given(command_lines)
def test_any_command_line_is_read_or_refused(typed):
    check_words(typed)


@pytest.mark.slow
@settings(max_examples=LONG, **_SETTINGS)
@given(texts)
def test_2000_files_are_read_or_refused(text):
    check_yaml(text)


@pytest.mark.slow
@settings(max_examples=LONG // 4, **_SETTINGS)
@given(command_lines)
def test_500_command_lines_are_read_or_refused(typed):
    check_words(typed)


def nested_aliases() -> str:
    names = ["sides", "scale", "trackers", "lr", "name", "output", "model"]
    lines = ["aa: &k0 [x]"]
    lines += [f"{name}: &k{i} [{', '.join([f'*k{i - 1}'] * 10)}]" for i, name in enumerate(names, start=1)]
    return "\n".join([*lines, "dataset: *k7"])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3_000,
        "epochs: !!int ''",
        "amp: !!bool maybe",
        "name: !!timestamp soon",
        "name: 2020-99-99",
        "epochs: 0x" + "f" * 6_000,
        "epochs: " + "9" * 5_000,
        "lr: 1" + "0" * 400,
        'name: "a\\0b"',
        'name: "\\ud800"',
        "name: " + "a" * 5_000,
        "output: " + "a" * 300,
        "name: [" + "a, " * 5_000 + "]",
        nested_aliases(),
    ],
    ids=lambda text: text[:24],
)
def test_file_that_a_reader_stumbled_over_is_refused(text):
    with nothing_trained():
        Path("run.yaml").write_text(text, encoding="utf-8")
        assert cli.main(["train", "-c", "run.yaml"]) == 2
    check_yaml(text)


@pytest.mark.parametrize(
    "typed",
    [
        ["train", "--epochs", "9" * 5_000],
        ["train", "--resume", "a" * 300],
        ["train", "--resume", "a\0b"],
        ["train", "--recipe", "--epochs", "3"],
        ["train", "-c", "a\0b"],
        ["train", "-c", "."],
        ["train", "--name", "\udc80"],
        ["train", "--name"],
        ["train", "--epochs", "3", "--epochs"],
        ["report", "a" * 300],
        ["eval", "a" * 300],
        ["eval", "r", "--subnets", "²"],
        ["check-data", "d", "-j", "-1"],
        ["\0"],
        ["train", "\0"],
        ["--epochs"],
    ],
    ids=lambda typed: " ".join(typed)[:24].encode("unicode_escape").decode(),
)
def test_words_that_a_reader_stumbled_over_are_refused(typed):
    with nothing_trained():
        assert cli.main(typed) == 2
    check_words(typed)


def test_flag_given_twice_counts_once_the_last_time(capsys):
    assert cli.main(["train", "--epochs", "3", "--lr", "0.5", "--epochs", "7", "--print-config"]) == 0
    assert "epochs: 7" in capsys.readouterr().out.splitlines()


def test_unreadable_file_is_refused(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 3")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("the superuser reads everything")
    assert cli.main(["train", "-c", str(path)]) == 2
