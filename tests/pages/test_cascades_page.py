"""The page of cascades, of a judgement that is written by hand."""

from pathlib import Path

from unloaf import AnytimePoint
from unloaf.pages.cascades import cascades_section
from unloaf.pages.runs import analysis_page
from unloaf.runs.anytime import AnytimeJudgement, NetworkRow
from unloaf.runs.histories import read_histories
from written_runs import HOSTILE, write_run


def test_the_page_has_networks_curve_and_what_was_set(tmp_path):
    points = [AnytimePoint(t, 90.0 + t, 0.5 + t, (0.75, 0.25), 100) for t in (0.0, 0.5)]
    rows = [NetworkRow("2-2", "main", 91.5, 2.0, {}), NetworkRow("1-1", "cascade", 90.5, 1.0, {})]
    judgement = AnytimeJudgement(
        Path(HOSTILE.replace("/", "|")), "ST", "step-1", 3, "model", ("1-1", "2-2"), "max-probability", (0.5, 2.0),
        "a drop", points[1], points[1], "test", tuple(points), tuple(rows), "", 1, (HOSTILE,),
    )  # fmt: skip
    runs = read_histories([write_run(tmp_path / "a"), write_run(tmp_path / "b", method="common")])
    text = analysis_page(cascades_section([judgement]), runs)
    assert "<h1>Cascades that answer early</h1>" in text
    assert '<th scope="row">Anytime</th><td class="word">1-1, 2-2</td><td>90.50</td><td>1</td><td>50.0 %</td>' in text
    assert '<th scope="row">0.5</th><td>90.50</td><td>1</td><td>50.0 %</td><td>75.0 25.0</td>' in text
    assert "threshold 0.5, set on 100 val images for a drop" in text
    assert "<script>alert" not in text
    assert "\x1b" not in text
    assert ">At equal cost</h2>" in text
