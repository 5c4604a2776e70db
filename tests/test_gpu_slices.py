"""benchmarks/gpu.sh: which slices there are, that each runs, and when a bar holds."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import gpu_checks, throughput

from unloaf.bench import write_rows
from unloaf.measure.step_time import Setup, StepTimeRow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*words, script=SCRIPT, python=sys.executable, cwd=ROOT, **options):
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHON": str(python)}
    return subprocess.run(
        [script, *words], capture_output=True, text=True, check=False, env=environment, cwd=cwd, **options
    )


SLICES = run("--list").stdout.split()


def row(method, *, relative, seconds, compiled=False, memory=1.0):
    setup = Setup("timm/vit_small_patch16_224", 224, 128, "cuda", "bfloat16", compiled)
    common = StepTimeRow(method, seconds, relative, (relative, relative), 1.0, relative, 2.0, 2.0, 1, memory)
    return replace(common, setup=setup)


def asked(*methods, modes=("eager",)):
    return {"model": ["timm/vit_small_patch16_224@224"], "methods": ["common", *methods], "modes": list(modes)}


def stub(folder, lines):
    """An interpreter of a few lines."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_every_network_of_the_issue_has_slices():
    networks = {"resnet50", "cifar-resnet50", "cifar-resnet56", "cifar-resnet110", "mobilenetv3", "vit-small"}
    networks |= {"swin-tiny", "convnext-tiny"}
    assert set(SLICES) == networks | {f"{name}-smaller" for name in networks} | {"throughput", "overhead"}


def test_unknown_slice_is_refused_with_those_there_are(tmp_path):
    done = run("resnet51", str(tmp_path))
    assert done.returncode == 2
    assert "no slice 'resnet51'; give one of: resnet50 " in done.stderr


def test_all_slices_run_from_any_folder_with_an_interpreter_of_a_relative_path(tmp_path):
    python = os.path.relpath(stub(tmp_path, 'echo "ran $*"'), SCRIPT.parent)
    done = run("all", str(tmp_path), script="./gpu.sh", cwd=SCRIPT.parent, python=python)
    assert (done.returncode, done.stderr) == (0, "")
    checked = [
        line.split()[3] for line in done.stdout.splitlines() if line.startswith("ran benchmarks/gpu_checks.py c")
    ]
    assert checked == SLICES
    assert done.stdout.splitlines()[-1] == f"ran benchmarks/gpu_checks.py summary {tmp_path}"


def test_the_record_of_an_earlier_try_is_not_that_of_one_that_dies(tmp_path):
    write_rows(tmp_path / "swin-tiny", [row(m, relative=1.0, seconds=1.0) for m in ("common", "st")], asked("st"))
    dying = stub(tmp_path, f'[ "$1" != -m ] || exit 7\nexec {sys.executable} "$@"')
    done = run("swin-tiny", str(tmp_path), python=dying)
    assert done.returncode == 7
    assert "swin-tiny: nothing was measured" in done.stdout
    assert [path.name for path in (tmp_path / "swin-tiny").iterdir()] == ["log.txt"]


def test_the_mode_with_the_shortest_step_is_judged():
    rows = [
        row("st", relative=1.05, seconds=0.4),
        row("st", relative=1.30, seconds=0.2, compiled=True),
        row("common", relative=1.0, seconds=0.3),
    ]
    [check] = gpu_checks.of_steps("convnext-tiny", rows)
    assert (check.holds, check.measured, check.bar) == (False, "1.30 compiled (1.05 eager)", "<= 1.20")


def test_a_mode_whose_graphs_were_compiled_while_timed_holds_no_bar():
    late = replace(row("st", relative=1.05, seconds=0.1, compiled=True), late_graphs=2)
    [check] = gpu_checks.of_steps("convnext-tiny", [late, row("st", relative=1.30, seconds=0.2)])
    assert (check.holds, check.measured) == (False, "1.30 eager")
    assert list(gpu_checks.of_steps("convnext-tiny", [late])) == []


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
    [check], _ = gpu_checks.check("throughput", tmp_path)
    assert (check.holds, check.measured) == (True, "41,000 at batch 1024")


@pytest.mark.parametrize(("ratio", "holds"), [(1.05, True), (1.06, False)])
def test_loop_overhead_is_that_of_a_whole_epoch(ratio, holds, tmp_path):
    document = {"model": "cifar/resnet20", "width": 4, "batch_size": 64, "method": "common", "bare_ms": 5.0}
    document["ratios"] = {"engine's step": 1.0, "engine's epoch": ratio}
    (tmp_path / "overhead.json").write_text(json.dumps(document), encoding="utf-8")
    [check], _ = gpu_checks.check("overhead", tmp_path)
    assert check.holds is holds
    assert check.what.startswith("cifar/resnet20 of width 4, common, batch 64, a step of 5.0 ms: ")


def test_throughput_without_a_cuda_device_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(throughput, "measure", lambda *_: pytest.fail("it trains on the CPU"))
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        throughput.main()
    assert ended.value.code == 2
    assert "no CUDA device here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("late", "told"), [(None, "not measured"), (3, "3 graphs compiled while timed")], ids=["left out", "late"]
)
def test_a_slice_that_lacks_a_method_in_a_mode_is_not_complete(late, told, tmp_path, capsys):
    rows = [row(name, relative=1.0, seconds=1.0, compiled=mode) for name in ("common", "st") for mode in (False, True)]
    gkt = row("gkt", relative=1.0, seconds=1.0)
    rows += [gkt] if late is None else [gkt, replace(gkt, setup=rows[1].setup, late_graphs=late)]
    folder = tmp_path / "convnext-tiny"
    write_rows(folder, rows, asked("st", "gkt", modes=("eager", "compiled")))
    assert gpu_checks.main(["check", "convnext-tiny", str(folder)]) == 1
    assert not (folder / "checks.json").exists()
    checks = json.loads((folder / "checks-partial.json").read_text(encoding="utf-8"))["checks"]
    assert [check["holds"] for check in checks] == [True, True, False]
    assert checks[-1]["what"] == "timm/vit_small_patch16_224, gkt, compiled"
    assert checks[-1]["measured"] == told
    assert "2 of 3 bars hold\nconvnext-tiny: not complete" in capsys.readouterr().out


def test_a_slice_in_which_every_method_was_left_out_is_not_complete(tmp_path, capsys):
    write_rows(tmp_path, [row("common", relative=1.0, seconds=1.0)], asked("st"), notes=["st left out: OOM"])
    assert gpu_checks.main(["check", "swin-tiny", str(tmp_path)]) == 1
    assert "0 of 1 bars hold" in capsys.readouterr().out


def test_records_of_a_slice_name_no_path_of_the_machine(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "swin-tiny"
    words = ["--model", "timm/vit_small_patch16_224@224", "--data-dir", "/srv/images", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", ["/opt/bin/unloaf", "bench", "step", *words])
    note = f"gkt left out: OSError: no /srv/model.bin; see https://host/a/b and {folder}/log.txt"
    write_rows(folder, [row(m, relative=1.0, seconds=1.0) for m in ("common", "st")], asked("st"), notes=[note])
    gpu_checks.main(["check", "swin-tiny", str(folder)])
    written = json.loads((folder / "step_time.json").read_text(encoding="utf-8"))
    asked_for = ["unloaf", "bench", "step", "--model", "timm/vit_small_patch16_224@224", "--data-dir", "DIR"]
    assert written["environment"]["command"] == [*asked_for, "--output", "output/gpu/swin-tiny"]
    [told] = written["notes"]
    assert told == "gkt left out: OSError: no model.bin; see https://host/a/b and output/gpu/swin-tiny/log.txt"
    assert written["rows"][1]["method"] == "st"


def test_a_complete_slice_is_shown_and_not_measured_again(tmp_path, capsys):
    folder = tmp_path / "vit-small"
    write_rows(folder, [row(m, relative=1.0, seconds=1.0) for m in ("common", "st")], asked("st"))
    assert gpu_checks.main(["check", "vit-small", str(folder)]) == 0
    before = sorted(path.name for path in folder.iterdir())
    done = run("vit-small", str(tmp_path))
    assert done.returncode == 0
    assert "vit-small: complete; remove" in done.stdout
    assert "2 of 2 bars hold" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == before


def test_summary_is_what_the_performance_page_reads(tmp_path, capsys):
    for name, relative in [("vit-small", 1.0), ("swin-tiny", 1.3)]:
        rows = [row("common", relative=1.0, seconds=1.0), row("gkt", relative=relative, seconds=1.0)]
        write_rows(tmp_path / name, rows, asked("gkt"))
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


def test_a_slice_runs_tiny_on_the_cpu_and_its_record_says_what_ran(tmp_path):
    check_smoke("overhead", tmp_path)
    record = json.loads((tmp_path / "overhead" / "overhead.json").read_text(encoding="utf-8"))
    ran = {"model": "cifar/resnet20", "width": 4, "batch_size": 64, "method": "common", "device_data": False}
    assert record | ran == record


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
