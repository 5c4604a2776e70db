"""benchmarks/gpu.sh: which slices there are, that each runs, and when a bar holds."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import gpu_checks

from unloaf.analysis.step_time import Setup, StepTimeRow
from unloaf.bench.files import write_rows

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*words, **options):
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHON": sys.executable}
    return subprocess.run(
        [SCRIPT, *words], capture_output=True, text=True, check=False, env=environment, cwd=ROOT, **options
    )


SLICES = run("--list").stdout.split()


def row(method, *, relative, seconds, compiled=False, memory=1.0):
    setup = Setup("timm/vit_small_patch16_224", 224, 128, "cuda", "bfloat16", compiled)
    common = StepTimeRow(method, seconds, relative, (relative, relative), 1.0, relative, 2.0, 2.0, 1, memory)
    return replace(common, setup=setup)


def test_every_network_of_the_issue_has_slices():
    networks = {"resnet50", "cifar-resnet50", "cifar-resnet56", "cifar-resnet110", "mobilenetv3", "vit-small"}
    networks |= {"swin-tiny", "convnext-tiny"}
    assert set(SLICES) == networks | {f"{name}-smaller" for name in networks} | {"throughput", "overhead"}


def test_unknown_slice_is_refused_with_those_there_are(tmp_path):
    done = run("resnet51", str(tmp_path))
    assert done.returncode == 2
    assert "no slice 'resnet51'; give one of: resnet50 " in done.stderr


def test_the_mode_with_the_shortest_step_is_judged():
    rows = [
        row("st", relative=1.05, seconds=0.4),
        row("st", relative=1.30, seconds=0.2, compiled=True),
        row("common", relative=1.0, seconds=0.3),
    ]
    [check] = gpu_checks.of_steps("convnext-tiny", rows)
    assert (check.holds, check.measured, check.bar) == (False, "1.30 compiled (1.05 eager)", "<= 1.20")


@pytest.mark.parametrize(("relative", "holds"), [(1.10, [True, True]), (1.11, [True, False]), (1.21, [False, False])])
def test_ordered_subnets_of_a_vit_have_a_bar_of_their_own(relative, holds):
    checks = gpu_checks.of_steps("vit-small", [row("st", relative=relative, seconds=1.0)])
    assert [check.holds for check in checks] == holds


@pytest.mark.parametrize(("memory", "holds"), [(1.30, True), (1.31, False)])
def test_memory_is_judged_on_resnet50(memory, holds):
    checks = list(gpu_checks.of_steps("resnet50", [row("gkt", relative=1.0, seconds=1.0, memory=memory)]))
    assert [(check.bar, check.holds) for check in checks] == [("<= 1.20", True), ("<= 1.30", holds)]


def test_throughput_is_that_of_the_best_batch(tmp_path):
    runs = [{"batch_size": 512, "images_per_second": 39_000.0}, {"batch_size": 1024, "images_per_second": 41_000.0}]
    document = {"model": "cifar/resnet18", "images": "CIFAR-100", "runs": runs}
    (tmp_path / "throughput.json").write_text(json.dumps(document), encoding="utf-8")
    [check] = gpu_checks.check("throughput", tmp_path)
    assert (check.holds, check.measured) == (True, "41,000 at batch 1024")


@pytest.mark.parametrize(("ratio", "holds"), [(1.05, True), (1.06, False)])
def test_loop_overhead_is_that_of_a_whole_epoch(ratio, holds, tmp_path):
    document = {"model": "cifar/resnet20", "bare_ms": 5.0, "ratios": {"engine's step": 1.0, "engine's epoch": ratio}}
    (tmp_path / "overhead.json").write_text(json.dumps(document), encoding="utf-8")
    [check] = gpu_checks.check("overhead", tmp_path)
    assert check.holds is holds


def test_a_complete_slice_is_shown_and_not_measured_again(tmp_path, capsys):
    folder = tmp_path / "vit-small"
    write_rows(folder, [row("st", relative=1.0, seconds=1.0)], {})
    assert gpu_checks.main(["check", "vit-small", str(folder)]) == 0
    before = sorted(path.name for path in folder.iterdir())
    done = run("vit-small", str(tmp_path))
    assert done.returncode == 0
    assert "vit-small: complete; remove" in done.stdout
    assert "2 of 2 bars hold" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == before


def test_summary_is_what_the_performance_page_reads(tmp_path, capsys):
    for name, relative in [("vit-small", 1.0), ("swin-tiny", 1.3)]:
        write_rows(tmp_path / name, [row("gkt", relative=relative, seconds=1.0)], {})
        gpu_checks.main(["check", name, str(tmp_path / name)])
    assert gpu_checks.main(["summary", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("1 of 2 bars hold\n")
    written = json.loads((tmp_path / "checks.json").read_text(encoding="utf-8"))
    assert {check["holds"] for check in written["checks"]} == {True, False}
    assert {"what", "measured", "bar", "holds"} == set(written["checks"][0])
    assert written["hardware"]


def test_a_slice_that_left_nothing_says_so(tmp_path, capsys):
    assert gpu_checks.main(["check", "vit-small", str(tmp_path)]) == 1
    assert "vit-small: nothing was measured" in capsys.readouterr().out


def test_a_slice_runs_tiny_on_the_cpu(tmp_path):
    check_smoke("overhead", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SLICES if name != "overhead"])
def test_every_slice_runs_tiny_on_the_cpu(name, tmp_path):
    check_smoke(name, tmp_path)


def check_smoke(name, tmp_path):
    done = run(name, str(tmp_path), "--smoke", timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bars hold" in done.stdout
    assert "left out" not in done.stdout
    assert {"checks.json", "log.txt"} <= {path.name for path in (tmp_path / name).iterdir()}
