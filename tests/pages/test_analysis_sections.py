"""Analyses as files and as parts of pages: rows written by hand, no run is trained."""

import json

import pytest

from unloaf.analysis.ablation import AblationRow
from unloaf.analysis.bound import BoundRow
from unloaf.analysis.damage import DamageRow
from unloaf.analysis.loafing import LoafingRow
from unloaf.analysis.logits import LogitsRow
from unloaf.analysis.receptive_field import ReceptiveField
from unloaf.analysis.subnets import SubnetAnalysisRow
from unloaf.commands.main import main
from unloaf.pages.analysis_sections import Analysis, cells_of, kinds, read_analysis, section_of, text_of
from unloaf.pages.layout import page
from unloaf.pages.runs import analysis_page
from unloaf.runs.histories import read_histories
from written_runs import HOSTILE, write_run

DATA = {"dataset": "digits", "num_classes": 10}
FOUND = [
    Analysis(
        "damage", [DamageRow(HOSTILE, "ST", 0, (), 92.0), DamageRow(HOSTILE, "ST", 1, ("a.1", "b<i>"), 90.5)],
        ["a <b>note</b>"], {"command": HOSTILE}, DATA, {"figure": HOSTILE},
    ),
    Analysis("logits", [LogitsRow(HOSTILE, "ST", "2-2", True, 90.0, 3.5, 0.5, 80.0, 1.0)], (), {}, DATA),
    Analysis(
        "receptive-field", [ReceptiveField(HOSTILE, "ST", "2", 8, (1.0, 2.0, 3.0, 9.0), ((0.5, 0.5),))], (), {}, DATA
    ),
    Analysis(
        "subnets",
        [
            SubnetAnalysisRow(HOSTILE, "ST", "main", "2-2", 90.0, 0.5, 3.0, 100.0, 0.2, 1.5, True, 80.0, None),
            SubnetAnalysisRow(HOSTILE, "ST", "subnet", "2-1", 80.0, 0.6, 4.0, 70.0, 0.1, None, False, None, None),
            SubnetAnalysisRow(HOSTILE, "ST", "ensemble", HOSTILE, 91.0, 0.4, 2.0, 95.0, 0.3, None, False, 85.0, 88.0),
        ],
        (), {}, DATA,
    ),
    Analysis("loafing", [LoafingRow(HOSTILE, HOSTILE, False, 0, 60.0, 95.0, 35.0)], (), {}, DATA),
    Analysis(
        "ablate", [AblationRow(HOSTILE, HOSTILE, 1.0, 0, 98.0, None, 95.0, 1.5, 38, 97.5, 3.0, "")], (), {}, DATA,
        {"axis": "epochs"},
    ),
    Analysis("bound", [BoundRow(HOSTILE, "ST", 1.0, "1-1", 0.1, 0.4, 0.3, 0.05, 0.35, 0.2, 0.25)], (), {}, DATA),
]  # fmt: skip


@pytest.mark.parametrize("found", FOUND, ids=lambda found: found.name)
def test_an_analysis_is_read_as_it_was_written(found, tmp_path):
    (tmp_path / "a.json").write_text(text_of(found))
    again = read_analysis(tmp_path / "a.json")
    assert (again.rows, list(again.notes), again.facts) == (found.rows, list(found.notes), found.facts)
    assert (again.options, again.data) == (found.options, DATA)


def test_every_kind_of_analysis_is_tried_here():
    assert {found.name for found in FOUND} == set(kinds())


@pytest.mark.parametrize("found", FOUND, ids=lambda found: found.name)
def test_a_section_has_the_numbers_and_names_as_text(found):
    text = page("t", "", [section_of(found)])
    assert "<script>alert" not in text
    assert "<b>note" not in text
    assert "\x1b" not in text
    assert text.count('role="img"') == 1 + len(kinds()[found.name].more)
    assert "img-src data:;" in text  # shades of pixels are pictures inside the picture
    assert "alert(1)" in text
    heads, lines = cells_of(found)
    assert len(lines) == len(found.rows)
    assert len(heads) == len(lines[0])


def test_a_report_has_the_analyses_that_it_is_given(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    files = []
    for found in FOUND:
        files.append(str(tmp_path / f"{found.name}.json"))
        (tmp_path / f"{found.name}.json").write_text(text_of(found))
    target = tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(target), "--analysis", *files]) == 0
    assert all(f">{kind.title}</h2>" in target.read_text() for kind in kinds().values())


def test_the_page_of_an_analysis_compares_methods_at_equal_cost(tmp_path):
    runs = [write_run(tmp_path / method, method=method) for method in ("common", "st")]
    text = analysis_page(section_of(FOUND[0]), read_histories(runs))
    assert "<h1>Blocks deleted at test time</h1>" in text
    assert ">At equal cost</h2>" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found | {"analysis": "loaf"}, "is no analysis that a page can show"),
        (lambda found: found | {"rows": []}, "it has no rows"),
        (lambda found: found | {"rows": [{"run": "a"}]}, "is no whole file of unloaf damage ('method')"),
        (lambda found: found | {"rows": [found["rows"][0] | {"value": "<b>"}]}, "float is expected, not '<b>'"),
        (lambda found: found | {"data": DATA | {"dataset": "cifar10"}}, "run has data set digits, "),
        (lambda found: found | {"data": DATA | {"num_classes": 3}}, "run has classes 10, "),
        (lambda found: [found], "is no analysis that a page can show"),
        (lambda found: "half", "is no analysis"),
    ],
)
def test_other_files_are_refused_and_no_page_is_left(tmp_path, capsys, change, said):
    run, file, target = write_run(tmp_path / "run"), tmp_path / "a.json", tmp_path / "page.html"
    file.write_text(json.dumps(change(json.loads(text_of(FOUND[0])))))
    assert main(["report", str(run), "--output", str(target), "--analysis", str(file)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), said in err) == ("", 1, True)
    assert not target.exists()


def test_an_analysis_without_a_page_is_refused(tmp_path, capsys):
    assert main(["report", str(write_run(tmp_path / "run")), "--analysis", "a.json"]) == 2
    assert "analysis a.json is for the page; give --output FILE.html with it" in capsys.readouterr().err
