"""docs/performance.md says what the records say."""

import json
import re
from pathlib import Path

import pytest
from benchmarks import performance

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RECORDS = sorted((ROOT / "docs" / "results").glob("step-time-*.json"))


def test_page_is_what_the_script_writes():
    assert performance.page(TEXT, performance.records()) == TEXT


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_measured_time_stands_in_the_table_of_its_record(path: Path):
    document = json.loads(path.read_text(encoding="utf-8"))
    table = TEXT[: TEXT.index(f"results/{path.name}")].rpartition(performance.HEAD)[2]
    stated = re.findall(r"^\| ([\w+-]+) \| ([\d.]+) \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|", table, flags=re.M)
    figures = [(row["method"], row["relative"], row["limit"], row["over_limit"]) for row in document["rows"]]
    assert stated == [(method, *(f"{number:.2f}" for number in numbers)) for method, *numbers in figures]


def test_readme_states_the_step_of_its_record():
    rows = json.loads((RECORDS[0].parent / "step-time-resnet50-64px-batch32.json").read_text("utf-8"))["rows"]
    [row] = [row for row in rows if row["method"] == "st-inter-stage"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    stated = re.search(r"at 64 pixels: ([\d.]+) times common training, with separate passes ([\d.]+)\)", readme)
    assert stated is not None
    assert stated.groups() == (f"{row['relative']:.2f}", f"{row['separate']:.2f}")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_no_record_names_a_path_of_a_machine(path: Path):
    assert not re.search(r'["\s](/|[A-Z]:\\)\w', path.read_text(encoding="utf-8"))


def test_picture_has_every_time_of_the_fullest_records():
    picture = (ROOT / "docs" / "results" / "step-time-cpu.svg").read_text(encoding="utf-8")
    record = ROOT / "docs" / "results" / "step-time-resnet50-64px-batch32.json"
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    assert {f"{row['relative']:.2f}" for row in rows} <= set(re.findall(r">([\d.]+)</text>", picture))


def test_checks_of_a_cuda_device_fill_their_table(tmp_path, monkeypatch):
    check = {"what": "ViT-S, ST", "measured": "1.05", "bar": "<= 1.10", "holds": True}
    document = {"hardware": "a device", "checks": [check, check | {"measured": "1.20", "holds": False}]}
    (tmp_path / "gpu-checks.json").write_text(json.dumps(document), encoding="utf-8")
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    written = performance.page(TEXT, [])
    assert "| ViT-S, ST | 1.05 | <= 1.10 | yes |\n| ViT-S, ST | 1.20 | <= 1.10 | no |" in written
    assert performance.NOT_MEASURED not in written
