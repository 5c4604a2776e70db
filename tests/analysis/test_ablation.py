"""`unloaf ablate`: grids, their table at equal cost, their pictures, and what goes wrong."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from unloaf.analysis.ablation import AblationRow, ablation_rows, ablation_table
from unloaf.analysis.cells import Judged
from unloaf.analysis.grids import Grid, GridRow, at_equal_cost, grid_names, named_grid, own_grid
from unloaf.commands import main as cli
from unloaf.commands.ablate import NAMES, Ablate, base_of
from unloaf.config import Config
from unloaf.pages.studies import ablation_picture
from unloaf.stages import Stage

TINY = ("--model", "cifar/resnet14", "--width", "2", "--batch-size", "64", "--device", "cpu", "--epochs", "1",
        "--recalibrate", "64", "--train-images", "128")  # fmt: skip
BASE = Config(model="cifar/resnet14", width=2, batch_size=64, device="cpu", epochs=4)
HOSTILE = "<script>alert(1)</script>\x1b[31m\n\u202e\"'"


def stages(*depths):
    return tuple(
        Stage(name, tuple(f"{name}.{i}" for i in range(depth)), (False, *(True,) * (depth - 1)))
        for name, depth in zip("abcd", depths, strict=False)
    )


def in_process(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


# --- grids


def test_the_command_knows_the_grids_without_torch():
    assert list(NAMES) == grid_names()


@pytest.mark.parametrize("name", NAMES)
def test_each_grid_is_allowed_on_any_network(name):
    for depths in ((4, 4, 4), (3, 4, 6, 3), (12,)):
        rows = named_grid(name, BASE, stages(*depths)).rows
        assert len({row.label for row in rows}) == len(rows) > 1
        assert len({row.config for row in rows}) == len(rows)


def changed(row):
    return {name: value for name, value in vars(row.config).items() if value != getattr(BASE, name)}


def test_rows_change_what_they_say():
    by_name = {name: named_grid(name, BASE, stages(3, 4, 6, 3)).rows for name in NAMES}
    assert [row.config.sampler for row in by_name["sampling"]] == [
        "raw", "stochastic", "ordered", "inter-stage", "exponential-decay",
    ]  # fmt: skip
    assert [(r.config.subnet_loss, r.config.num_subnets) for r in by_name["losses"]] == [
        (loss, number) for loss in ("kl", "kl-") for number in (1, 2, 4, 6)
    ]
    assert [row.config.space for row in by_name["spaces"]][:3] == [(3, 4, 6, 3), (2, 3, 5, 2), (1, 2, 4, 1)]
    assert [(row.config.method, row.config.epochs) for row in by_name["epochs"]] == [
        (method, epochs) for method in ("common", "st", "st++") for epochs in (1, 2, 4)
    ]
    assert [row.config.subnet_inputs for row in by_name["inputs"]] == [
        "same", "smaller", "smaller", "larger", "larger", "crop", "flip", "jitter",
    ]  # fmt: skip
    st, *_, whole = by_name["components"][1:]
    assert (st.config.method, st.config.num_subnets_or_default, st.config.subnet_loss_or_default) == ("st", 1, "kl")
    assert (whole.config.method, whole.config.num_subnets, whole.config.sampler) == ("st++", 6, "inter-stage")


def test_raw_is_left_out_where_the_network_cannot_run_it():
    grid = named_grid("sampling", BASE, stages(3, 4, 6, 3), raw=False)
    assert [row.label for row in grid.rows] == ["stochastic", "ordered", "inter-stage", "exponential-decay"]
    assert "raw is left out" in grid.notes[0]


def test_spaces_of_ones_own_are_rows():
    rows = named_grid("spaces", BASE, stages(3, 4, 6, 3), spaces=("1,2,4,1", "2,3,5,2")).rows
    assert [(row.label, row.config.space) for row in rows] == [("1,2,4,1", (1, 2, 4, 1)), ("2,3,5,2", (2, 3, 5, 2))]


def test_a_grid_of_ones_own_has_rows_or_a_product(tmp_path):
    (tmp_path / "mine.yaml").write_text("rows:\n  low: {lr: 0.01}\n  as it is: {}\n")
    grid = own_grid(tmp_path / "mine.yaml", BASE)
    assert [(row.label, changed(row)) for row in grid.rows] == [("low", {"lr": 0.01}), ("as it is", {})]
    (tmp_path / "all.yaml").write_text("product: {lr: [0.01, 0.02], method: [st, gkt]}\n")
    assert [(row.label, row.config.lr, row.config.method) for row in own_grid(tmp_path / "all.yaml", BASE).rows] == [
        ("lr 0.01, method st", 0.01, "st"),
        ("lr 0.01, method gkt", 0.01, "gkt"),
        ("lr 0.02, method st", 0.02, "st"),
        ("lr 0.02, method gkt", 0.02, "gkt"),
    ]


# --- rows


class Prepared:
    """A store whose runs are known: a method's step costs so much."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []

    def results(self, cells):
        self.asked += [(cell.config.method, cell.config.epochs, cell.config.seed) for cell in cells]
        flops = {"common": 1.0, "st": 1.3, "gkt": 2.0}
        return [
            Judged(
                cell, self.folder, "val", main=90.0 + cell.config.seed + cell.config.epochs, main_reestimated=None,
                subnets={"1": 60.0, "2": 70.0}, flops=flops[cell.config.method], step_flops=100.0, seconds=1.0,
            )
            for cell in cells
        ]  # fmt: skip


def test_common_training_at_equal_cost_has_so_many_more_epochs(tmp_path):
    common = replace(BASE, method="common")
    grid = Grid("g", "g", (GridRow("plain", common), GridRow("st", BASE), GridRow("gkt", replace(BASE, method="gkt"))))
    store = Prepared(tmp_path)
    rows, judged = ablation_rows(grid, store, (0, 1))
    # 4 epochs at 1.3 and 2.0 times the cost: 5.2, rounded up, and 8.
    assert store.asked[6:] == [("common", 6, 0), ("common", 6, 1), ("common", 8, 0), ("common", 8, 1)]
    assert len(judged) == 10
    assert ablation_table(rows)[1] == [
        ["plain", "94.5 ± 0.7", "65.0 ± 0.0", "60.0 ± 0.0", "1.00x", "–", "–"],
        ["st", "94.5 ± 0.7", "65.0 ± 0.0", "60.0 ± 0.0", "1.30x", "96.5 ± 0.7", "6"],
        ["gkt", "94.5 ± 0.7", "65.0 ± 0.0", "60.0 ± 0.0", "2.00x", "98.5 ± 0.7", "8"],
    ]


def test_an_exact_cost_is_not_rounded_up():
    assert at_equal_cost(replace(BASE, epochs=10), 1.1).epochs == 11
    assert at_equal_cost(replace(BASE, epochs=10), 1.11).epochs == 12
    assert at_equal_cost(replace(BASE, epochs=10, warmup_epochs=5), 0.2).warmup_epochs == 1


def row(label, *, series="", at=0.0, main=90.0, failed=""):
    tops = (None, None, None) if failed else (main, 80.0, 70.0)
    return AblationRow(label, series, at, 0, *tops, 1.0, 4, 89.0, 1.0, failed)


def test_a_row_that_diverged_is_counted():
    heads, lines = ablation_table([row("a"), row("b", failed="a loss is not finite")])
    assert heads[-1] == "diverged"
    assert [line[-1] for line in lines] == ["", "1 of 1"]
    assert lines[1][1] == "–"


@pytest.mark.parametrize("axis", ["", "epochs"])
def test_pictures_are_svg_whatever_rows_are_called(axis):
    rows = [row(HOSTILE, series="$x_1$ & <b>", at=1), row("b" * 99, series="two", at=2), row("c", failed="x")]
    picture = ablation_picture(rows, axis=axis)
    ElementTree.fromstring(picture)
    assert "<script>" not in picture


# --- the command


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two rows of a file, one seed, and the common training that costs the same."""
    folder = tmp_path_factory.mktemp("ablate")
    grid = folder / "mine.yaml"
    grid.write_text(json.dumps({"rows": {HOSTILE: {"method": "st"}, "plain": {"method": "common"}}}))
    words = ["ablate", str(grid), *TINY, "--seeds", "1", "--subnets", "2", "--output", str(folder / "out")]
    assert cli.main(words) == 0
    return words, folder / "out"


def test_the_files_of_a_study_hold_its_rows(done):
    _, folder = done
    rows = json.loads((folder / "mine.json").read_text())["rows"]
    assert [row["label"] for row in rows][1] == "plain"
    lines = list(csv.DictReader((folder / "mine.csv").read_text().splitlines()))
    assert [float(line["main"]) for line in lines] == [row["main"] for row in rows]
    assert rows[0]["epochs_at_cost"] == 2  # an epoch of ST costs more than one and less than two
    assert rows[0]["cost"] > rows[1]["cost"] == 1
    ElementTree.fromstring((folder / "mine.svg").read_text())


def test_hostile_names_are_text_on_the_page(done):
    _, folder = done
    page = (folder / "mine.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    assert not {"\x1b", "\u202e"} & set(page)


def test_finished_rows_are_not_trained_again(done, capsys, monkeypatch):
    words, folder = done
    monkeypatch.setattr("unloaf.analysis.cells.train", None)
    before = (folder / "mine.csv").read_text()
    code, _, err = in_process(capsys, *words)
    assert (code, "to train" in err) == (0, False)
    assert (folder / "mine.csv").read_text() == before


def test_the_demo_gives_the_settings_where_none_are_given():
    config = base_of(Ablate(grid="sampling"), ["--epochs", "9"])
    assert (config.dataset, config.model, config.width, config.epochs, config.lr) == (
        "digits", "cifar/resnet26", 8, 9, 0.2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "ablate '': give sampling, losses"),
        (["colours"], "give sampling, losses, inputs, spaces, components, epochs, or a file that ends in .yaml"),
        (["none.yaml"], "cannot read the grid none.yaml"),
        (["sampling", "--space", "1,2,4,1"], "--space belongs to `unloaf ablate spaces`"),
        (["spaces", "--space", "1-2"], "give a number of depths for each stage, as in 1,2,4,1"),
        (["spaces", "--space", "1,2", "1,2"], "give each once"),
        (["spaces", "--space", "1,2,4,1"], "the network has 3 stages with 4 4 4 depths"),
        (["sampling", "--subnets", "0"], "subnets 0: give at least 1"),
        (["sampling", "--task", "pose"], "this is for classification"),
        (["{tmp}/empty.yaml"], "give lines of the form"),
        (["{tmp}/list.yaml"], "rows is [1]; give a mapping"),
        (["{tmp}/both.yaml"], "give either rows"),
        (["{tmp}/unknown.yaml"], "row 'a': unknown entry 'learning'"),
        (["{tmp}/value.yaml"], "row 'a': lr -1: give a finite number above 0"),
        (["{tmp}/words.yaml"], "row 'a': give settings, as in {{lr: 0.1}}"),
        (["{tmp}/late.yaml"], "bad, seed 0: space 9 9 9: the network has 3 stages with 4 4 4 depths"),
        (["{tmp}/values.yaml"], "'lr': give a list of values"),
        (["{tmp}/many.yaml"], "the product has 1000000 rows; give fewer values"),
    ],
)
def test_bad_input_is_answered_in_a_line(words, said, capsys, tmp_path):
    listed = ", ".join(f"{name}: {list(range(100))}" for name in ("seed", "epochs", "width"))
    many = f"product: {{{listed}}}"
    files = {"empty": "", "list": "rows: [1]", "both": "{rows: {a: {}}, product: {lr: [1]}}", "many": many,
             "unknown": "rows: {a: {learning: 1}}", "value": "rows: {a: {lr: -1}}", "words": "rows: {a: 3}",
             "values": "product: {lr: 1}",
             "late": "rows: {good: {}, bad: {sampler: inter-stage, space: [9, 9, 9]}}"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    words = [word.format(tmp=tmp_path) for word in words]
    code, out, err = in_process(capsys, "ablate", *words, "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert said.replace("{{", "{").replace("}}", "}") in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "runs").exists()
