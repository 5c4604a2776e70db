"""Tables on narrow terminals."""

import io
import random

import pytest
from rich.console import Console
from rich.table import Table

from unloaf.bench import tables
from unloaf.commands.tables import parts
from unloaf.measure.step_time import StepTimeRow


def printed(table, width):
    console = Console(file=io.StringIO(), width=width, markup=False)
    for part in parts(table, width):
        console.print(part)
    return console.file.getvalue()


@pytest.mark.parametrize("columns", [3, 9, 16])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_cell_stands_whole_on_one_line_with_its_first_column(columns, width):
    draw = random.Random(0)
    table = Table("depths", box=None)
    cells = [[f"{draw.randrange(10**8):,}" for _ in range(columns)] for _ in range(4)]
    for n in range(columns):
        table.add_column(f"figure {n}, batch of {n}", justify="right")
    for row, values in enumerate(cells):
        table.add_row(f"row-{row}", *values)
    lines = printed(table, width).splitlines()
    assert max(map(len, lines)) <= width
    for row, values in enumerate(cells):
        mine = [line.split() for line in lines if line.split()[:1] == [f"row-{row}"]]
        assert [word for words in mine for word in words[1:]] == values


def test_long_words_are_folded_beside_whole_numbers():
    name = "a/very/long/folder/" * 6
    table = Table("run", "top-1", box=None)
    table.add_row(name, "97.33")
    lines = printed(table, 40).splitlines()
    assert max(map(len, lines)) <= 40
    assert "".join("".join(line.split()) for line in lines[1:]).replace("97.33", "") == name


def test_table_of_measured_steps_fits_into_80_columns():
    figures = {"relative": 2.345, "spread": (2.111, 2.999), "limit": 2.1, "over_limit": 1.06, "separate": 6.5}
    memory = {"separate_limit": 5.13, "peak_bytes": 10, "relative_memory": 1.72, "rounds": 8}
    [table] = tables([StepTimeRow("st-inter-stage", 12.345, **figures, **memory)])
    text = printed(table, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert [text.count(cell) for cell in ("2.11-3.00", "2.10x", "1.234e+04", "1.72x")] == [1, 1, 1, 1]
