import csv

import numpy as np
import pytest

from harness.options import CommandLineError
from harness.tables import heat_map, save_figure, show_table, write_csv

ROWS = [{"name": "a", "n": 1, "x": 0.5, "y": None}, {"name": "b", "n": 22, "x": 1 / 3, "y": 1.0}]


def test_rows_as_a_table_and_as_a_file(tmp_path, capsys):
    show_table(ROWS)
    lines = ["| name | n | x | y |", "|---|---|---|---|", "| a | 1 | 0.5 | - |", "| b | 22 | 0.33333 | 1 |"]
    assert capsys.readouterr().out.splitlines() == lines
    write_csv(tmp_path / "rows.csv", ROWS)
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert found[0] == {"name": "a", "n": "1", "x": "0.5", "y": ""} and float(found[1]["x"]) == 1 / 3


def test_a_table_fits_the_terminal(monkeypatch, capsys):
    """Headers are broken at words. What does not fit beside the first columns follows below, beside them again."""
    monkeypatch.setattr("harness.tables.columns", lambda stream: 24)
    rows = [{"name": "abc", "seed": 0, "best: M steps": 1.5, "last": -7.0, "note": "so"}]
    show_table([*rows, {"name": "d", "seed": 1, "best: M steps": None, "last": 2.0, "note": "-"}], labels=2)
    assert capsys.readouterr().out.split("\n") == [
        "            best:",
        "                M",
        "name  seed  steps  last",
        "abc      0    1.5    -7",
        "d        1      -     2",
        "",
        "name  seed  note",
        "abc      0  so",
        "d        1  -",
        "",
    ]


def test_a_heat_map_is_in_order():
    """Rows come the best first; axes ascend, to the right and upwards."""
    points = [(0.01, 1), (0.001, 2), (0.1, 1), (0.001, 1), (0.1, 2), (0.01, 2)]
    rows = [{"LR": lr, "SEED": seed, "best": 100 * lr + seed} for lr, seed in points]
    axes = heat_map(rows, "LR", "SEED", "best").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01", "0.1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    assert axes.get_ylim()[0] < axes.get_ylim()[1]
    np.testing.assert_allclose(axes.images[0].get_array(), [[1.1, 2, 11], [2.1, 3, 12]])


def test_a_figure_that_cannot_be_saved_is_one_line(tmp_path):
    with pytest.raises(CommandLineError, match="a.png: not drawn .*No such file.*; start again to draw it$") as error:
        save_figure(tmp_path / "nowhere" / "a.png", heat_map, [{"x": 1, "y": 1, "z": 1}], "x", "y", "z")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
