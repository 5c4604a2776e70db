"""What no source file does, and what training does not do: rules of security (R30)."""

import ast
import io
import socket
from pathlib import Path

import pytest
from rich.console import Console

from unloaf.config import Config
from unloaf.engine.run import train

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
# Imports by name: the public names of the package, from a table in that file.
# Public names of the package; functions of the user's own, which run with --run-own-code or where their name is typed.
IMPORTS_BY_NAME = {"src/unloaf/__init__.py", "src/unloaf/own_code.py"}
FORBIDDEN = {
    "eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load", "numpy.load", "np.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader",
    "runpy.run_path", "torch.hub.load",
}  # fmt: skip


def called(node: ast.Call) -> str:
    """The name that is called, with its module where that is written out: `yaml.load`, `eval`."""
    return ast.unparse(node.func)


def violations(text: str, name: str = "some.py") -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module in {"pickle", "marshal", "shelve", "dill", "joblib"}:
            found.append(f"{name}:{node.lineno} imports from {node.module}")
        if not isinstance(node, ast.Call):
            continue
        function = called(node)
        by_name = function.endswith("import_module") and name not in IMPORTS_BY_NAME
        if (
            function in FORBIDDEN
            or by_name
            or any(ast.unparse(k.value) == "True" for k in node.keywords if k.arg == "shell")
        ):
            found.append(f"{name}:{node.lineno} calls {function}")
        if function in {"torch.load", "load"} and "torch" in text:
            safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            if not safe:
                found.append(f"{name}:{node.lineno} calls {function} without weights_only=True")
    return found


def test_no_source_runs_code_that_a_file_or_a_configuration_brings():
    found = [
        line for path in SOURCES for line in violations(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "yaml.load(x)", "eval('1')", "exec(x)", "importlib.import_module(config.model)", "pickle.load(f)",
        "import torch\ntorch.load(f)", "import torch\ntorch.load(f, weights_only=False)", "from pickle import loads",
        "subprocess.run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_rule_sees_what_it_forbids(text):
    assert len(violations(text)) == 1


def test_safe_calls_are_left_alone():
    assert violations("import torch\ntorch.load(f, weights_only=True)\nyaml.safe_load(x)\nmodel.eval()") == []


@pytest.mark.parametrize("method", ["st++", "gkt"])
def test_training_opens_no_socket(tmp_path, monkeypatch, method):
    def refuse(self, address):
        raise AssertionError(f"training tried to reach {address!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    config = Config(model="cifar/resnet14", width=2, epochs=1, batch_size=256, device="cpu", method=method,
                    output=str(tmp_path), name="run", min_ratio=0.75)  # fmt: skip
    assert train(config, console=Console(file=io.StringIO())).split == "test"
