"""Rules of the project that no linter knows."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import unloaf

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
# numpy is missing here because torch imports it by itself where it is installed.
EXTRAS = {
    "accelerate",
    "lightning",
    "matplotlib",
    "rich",
    "safetensors",
    "sklearn",
    "timm",
    "torchvision",
    "transformers",
    "tyro",
    "yaml",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_import_loads_torch_at_most_and_costs_at_most_an_eighth_of_torch():
    script = (
        "import sys, time\n"
        "begin = time.process_time()\n"
        "import torch\n"
        "start = time.process_time()\n"
        "import unloaf, unloaf.methods\n"
        "own = (time.process_time() - start) / (start - begin)\n"
        "print(own, *{name.partition('.')[0] for name in sys.modules})\n"
    )
    share, *loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert EXTRAS.isdisjoint(loaded)
    assert float(share) <= 1 / 8


@pytest.mark.parametrize("name", [name for name in unloaf.__all__ if not name.startswith("__")])
def test_public_name_is_documented_with_an_example(name: str):
    assert ">>>" in (getattr(unloaf, name).__doc__ or "")


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {unloaf.__version__, citation["version"]} == {importlib.metadata.version("unloaf")}


def test_source_files_are_of_readable_length():
    assert [relative(p) for p in SOURCES if len(p.read_text(encoding="utf-8").splitlines()) > 400] == []


def test_no_file_is_a_bag():
    assert [relative(p) for p in SOURCES if p.stem in {"utils", "util", "helpers", "misc", "common"}] == []


def test_tracked_files_name_no_machine_and_no_package_host():
    foreign = re.compile(
        r"(?<![\w.])/(work|tmp|root|home)/\w|\.\./shared\b|\bpypi\.[o]rg|[p]ythonhosted\.org|[d]ownload\.pytorch\.org"
    )
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file():
            text = path.read_bytes().decode("utf-8", errors="ignore")
            found += [f"{name}: {match.group()}" for match in foreign.finditer(text)]
    assert not found


def test_a_command_by_python_m_is_told_by_its_name(monkeypatch):
    from unloaf.environment import environment

    monkeypatch.setattr(sys, "argv", ["/somewhere/unloaf/__main__.py", "train", "--epochs", "1"])
    assert environment()["command"] == ["unloaf", "train", "--epochs", "1"]
