"""Without its library a trainer's module says which extra brings it; the package itself needs none."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "extra"), [("lightning", "lightning"), ("transformers", "transformers"), ("timm", "engine")]
)
def test_the_extra_is_named(name, extra, monkeypatch):
    module = f"unloaf.integrations.{name}"
    for loaded in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=rf"{module} needs {name}.*pip install 'unloaf\[{extra}\]'"):
        importlib.import_module(module)
    with pytest.raises(ValueError, match="pip install"):
        importlib.import_module(module)
