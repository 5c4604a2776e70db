"""Rules of the project that no linter knows."""

import ast
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
CORE = (
    "stages",
    "subnet",
    "sampling",
    "losses",
    "inputs",
    "batchnorm",
    "compilation",
    "export",
    "passes",
    "evaluation",
    "methods",
)
# numpy is missing here because torch imports it by itself where it is installed.
EXTRAS = {
    "accelerate",
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


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_source_file_is_of_readable_length(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_no_file_is_a_bag():
    # methods/common.py holds the method called common training.
    bags = [relative(p) for p in SOURCES if p.stem in {"utils", "util", "helpers", "misc", "common"}]
    assert set(bags) <= {"src/unloaf/methods/common.py"}


@pytest.mark.parametrize("room", CORE)
def test_core_imports_only_torch_and_the_standard_library(room: str):
    imported = set()
    for path in SOURCES:
        if path.relative_to(ROOT / "src" / "unloaf").with_suffix("").parts[0] == room:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(str(node.module).partition(".")[0])
    assert imported, f"src/unloaf/{room} imports nothing: was it moved?"
    assert imported - sys.stdlib_module_names <= {"torch", "unloaf"}


def test_contributing_says_what_lies_in_every_room():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| room |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, flags=re.M)))
    rooms = {path.relative_to(ROOT / "src" / "unloaf").parts[0].removesuffix(".py") for path in SOURCES}
    assert sorted(named) == sorted(rooms - {"__init__"})


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
