import resource
import subprocess
import sys

import pytest

# 40 MB: beyond the largest size that the library would keep by itself.
SCRIPT = """
import resource, sys, torch
from unloaf.engine.devices import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(20):  # until the heap has found its shape
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is of the GNU C library")
def test_memory_used_again_faults_no_pages():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "default")
    }
    pages = 10 * 40_000_000 // resource.getpagesize()
    assert faults["default"] > 0.5 * pages  # otherwise the setting has become pointless
    assert faults["kept"] < 0.1 * pages
