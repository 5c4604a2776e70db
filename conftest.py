"""Conditions every test and every doctest runs under: one thread, a fixed seed, no network."""

import os
import socket

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tests' tensors are tiny: a second thread waits more than it works, and sums would differ between machines. Also
# for the processes that tests start: accelerate would give each of two ranks as many threads as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

import unloaf

torch.set_num_threads(1)

# No deadline: the first example pays for lazy set-up inside torch.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

_connect = socket.socket.connect


def _connect_locally(self: socket.socket, address: object) -> None:
    local = self.family == getattr(socket, "AF_UNIX", None) or (
        isinstance(address, tuple) and address[0] in {"localhost", "127.0.0.1", "::1"}
    )
    if not local:
        raise RuntimeError(f"a test tried to reach {address!r}; tests run without a network")
    _connect(self, address)


@pytest.fixture(autouse=True)
def _same_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _connect_locally)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, unloaf=unloaf)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Processes that share the tests must collect the same names; an address differs in each.
    named = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named:
        raise pytest.UsageError(f"{named[0]}: its name holds an address; give ids")
