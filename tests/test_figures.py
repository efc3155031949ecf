import io
import sys

import pytest
from fake_trainer import EVALUATED, SCORES, FakeTrainer, table

from callbacks import LearningCurve, MetricsCSV
from harness import figures
from harness.metrics_file import read_metrics

LEVELS = {"the best": 960, "random play": 82}


def test_learning_curve_shows_the_scores(tmp_path):
    csv = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(csv, EVALUATED)]).learn()
    rows = read_metrics(csv)
    figure = figures.learning_curve(rows, LEVELS)
    steps, minutes, varied, varied_too = figure.axes
    lines = {line.get_label().split(":")[0]: line for line in steps.get_lines()}
    assert set(lines["random play"].get_ydata()) == {82}
    assert set(lines["the best"].get_ydata()) == {960}
    assert lines["evaluation"].get_xydata().tolist() == [[100 * u, s] for u, s in SCORES.items()]
    assert minutes.get_lines()[2].get_xdata().tolist() == pytest.approx([u * 1.5 / 60 for u in SCORES])
    assert steps.get_ylim() == minutes.get_ylim() and steps.get_ylim()[0] == 0 and steps.get_ylim()[1] > 960
    assert (steps.get_xlabel(), minutes.get_xlabel()) == ("steps", "minutes")
    for axes in (varied, varied_too):
        assert axes.get_lines()[0].get_ydata().tolist() == [0.25] * len(SCORES) and axes.get_ylim()[0] == 0
    for row in rows:
        row["global_step"] *= 100
    steps = figures.learning_curve(rows, LEVELS).axes[0]
    assert steps.get_xlabel() == "thousand environment steps" and steps.get_lines()[2].get_xdata().tolist() == [
        10 * u for u in SCORES
    ]


def test_a_cell_that_holds_no_number_is_left_out_of_the_curve(tmp_path):
    path = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(path, EVALUATED)]).learn()
    for old, new in (
        (",90.0,", ',"81,25",'),
        (",250.0,", ",n/a,"),
        (",300.0,", ",inf,"),
        ("\n5,500,", "\n5,,"),
        (",70.0,", ",yes,"),
    ):
        path.write_text(path.read_text().replace(old, new))
    steps = figures.learning_curve(read_metrics(path), LEVELS).axes[0]
    assert steps.get_lines()[2].get_xydata().tolist() == [[800, 400]]
    LearningCurve(tmp_path / "curve.png", path).draw()
    FakeTrainer([MetricsCSV(path, EVALUATED)], updates=9, start=8).learn()
    assert [row["eval_score"] for row in table(path)] == [
        "",
        "81,25",
        "",
        "inf",
        "",
        "n/a",
        "",
        "400.0",
        "",
    ]  # the cells stay as they are


def test_a_figure_needs_no_backend(monkeypatch):
    """matplotlib cannot be imported while MPLBACKEND names one that is not installed; a figure is drawn
    nevertheless."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    for tried_before in (False, True):
        monkeypatch.setenv("MPLBACKEND", "not_installed")
        if tried_before:
            for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
                del sys.modules[name]
            with pytest.raises(ValueError, match="is not a valid value for backend"):
                import matplotlib.figure  # noqa: F401
        image = io.BytesIO()
        figures.new_figure(1, 1).savefig(image, format="png")
        assert image.getvalue().startswith(b"\x89PNG")
