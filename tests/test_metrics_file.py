import csv
import os

import pytest
from fake_trainer import EVALUATED, SCORES, STATS, UPDATES, FakeTrainer, disk_full, table

from callbacks import Callback, MetricsCSV
from harness import metrics_file
from harness.metrics_file import number, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


@pytest.fixture
def straight(tmp_path):
    """The rows of a training that was never interrupted."""
    path = tmp_path / "straight.csv"
    train(path)
    rows = table(path)
    path.unlink()
    return rows


def train(path, until=None, **options):
    return FakeTrainer([MetricsCSV(path, EVALUATED)], **options).learn(until)


def test_metrics(path):
    train(path)
    with open(path, encoding="utf-8") as file:
        columns, *rows = csv.reader(file)
    evaluation = [f"eval_{name}" for name in EVALUATED]
    assert columns == [
        "update", "global_step", "seconds", *STATS, "steps_per_second", "episode_return", *evaluation,
    ]  # fmt: skip
    assert [row[0] for row in rows] == list("12345678")
    assert rows[0][-8:] == ["nan", *[""] * 7]
    assert rows[3][:4] == ["4", "400", "6.0", str(4 / 3)]
    assert rows[3][-8:] == ["40.0", "300.0", "220.0", "390.0", "0", "812.5", "0.25", "0.71"]
    assert rows[4][-7:] == [""] * 7


def test_every_row_is_on_disk_at_once(path):
    for n in (1, 2, 3):
        train(path, until=n)
        assert len(path.read_text().splitlines()) == n + 1


@pytest.mark.parametrize("saved, killed", [(3, 3), (3, 5), (4, 7), (0, 2)])
def test_resumed_metrics_equal_a_straight_run(path, straight, saved, killed):
    train(path, until=killed)
    train(path, start=saved)
    assert table(path) == straight
    assert os.listdir(path.parent) == ["metrics.csv"]


def test_an_evaluation_from_before_the_stop_brings_no_stale_rows_back(path, straight):
    """The evaluation is reported at the first update after the resume, before that update has its row."""

    class Report(Callback):
        def on_update_end(self, trainer):
            if trainer.evaluating and trainer.evaluating["update_count"] < trainer.update_count:
                trainer.finish_evaluation()

    train(path, delay=4, until=7)
    resumed = FakeTrainer([Report(), MetricsCSV(path, EVALUATED)], start=4, delay=9)
    resumed.begin_evaluation()
    resumed.learn()
    assert table(path) == straight


def test_a_torn_last_line_is_dropped_without_a_warning(path, straight, capsys):
    train(path, until=5)
    whole = path.read_bytes()
    last_line = whole.rindex(b"\n", 0, -1) + 1
    all_cells_but_no_end = len(whole) - 1
    for cut, rows in ((last_line + 1, 4), (last_line + 30, 4), (all_cells_but_no_end, 5)):
        path.write_bytes(whole[:cut])
        assert [row["update"] for row in read_metrics(path)] == list(range(1, rows + 1))
        train(path, start=4)
        assert table(path) == straight
    assert capsys.readouterr().out == "" and not list(path.parent.glob("*copy*"))


def test_garbage_or_nothing_in_the_file(path, straight):
    for garbage in (b"", b"\n", b"upda", bytes(100), b"\xff\xfe\n"):
        path.write_bytes(garbage)
        train(path)
        assert table(path) == straight


def test_a_new_statistic_after_a_resume_gets_a_column(path):
    train(path, until=2)
    resumed = FakeTrainer([MetricsCSV(path, EVALUATED)], start=2, stats=[*STATS, "new"])
    resumed.begin_evaluation()
    resumed.callbacks[0].on_training_start(resumed)
    resumed.finish_evaluation()  # before there is a row with the new column
    resumed.learn(until=3)
    assert [bool(row["new"]) for row in table(path)] == [False, False, True]


def test_rows_after_a_full_disk(path, straight, capsys):
    """The limit on the size of a file tears the row of update 4 and lets nothing of update 5 be written."""
    resource = pytest.importorskip("resource")
    trainer = train(path, until=3)
    size = path.stat().st_size
    _, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, highest))
    try:
        trainer.learn(until=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (highest, highest))
    assert path.read_bytes()[size:].startswith(b"4,400,")
    assert capsys.readouterr().out == f"warning: {path}: not written (File too large); training goes on\n"
    trainer.learn()
    assert table(path) == straight and not list(path.parent.glob("*copy*"))


# --- changed by others ------------------------------------------------------------------------------------------------


def with_semicolons(text):
    return text.replace(".", "@").replace(",", ";").replace("@", ",")


def as_pandas(text):
    """Return the table with an index, and with decimal points in the integers."""
    header, *rows = text.splitlines()
    rows = [f"{i},{row.replace(',', '.0,', 2)}" for i, row in enumerate(rows)]
    return "\n".join([f",{header}", *rows]) + "\n"


def backwards(text):
    header, *rows = text.splitlines(True)
    return header + "".join(reversed(rows))


SAVED_BY_OTHERS = {
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "no end": lambda text: text[:-1].encode("utf-8-sig"),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "semicolons and decimal commas": lambda text: with_semicolons(text).encode("utf-8-sig"),
    "UTF-16 and tabs": lambda text: text.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
    "quotation marks": lambda text: ('"' + text[:-1].replace(",", '","').replace("\n", '"\n"') + '"\n').encode(),
    "stray quotation marks": lambda text: ('"' + text.replace("\n3,", '\n"3,').replace(",400,", ',"400,')).encode(),
    "empty lines": lambda text: (text + ",,,\n\n").encode(),
    "sorted": lambda text: backwards(text).encode(),
    "pandas": lambda text: as_pandas(text).encode(),
}


@pytest.mark.parametrize("saved", SAVED_BY_OTHERS.values(), ids=SAVED_BY_OTHERS)
def test_a_resumed_run_keeps_the_rows_of_a_file_that_a_spreadsheet_has_saved(path, straight, capsys, saved):
    train(path, until=5)
    path.write_bytes(saved(path.read_text()))
    train(path, start=5)
    columns = list(straight[0])
    assert [{name: number(row[name]) for name in columns} for row in table(path)] == [
        pytest.approx({name: number(row[name]) for name in columns}, nan_ok=True) for row in straight
    ]
    assert capsys.readouterr().out == "" and os.listdir(path.parent) == ["metrics.csv"]


@pytest.mark.parametrize(
    "change, missing, odd",
    [
        (lambda text: text.replace("3,300,", "3,300,,"), 1, 1),
        (lambda text: text.replace("update,", "upd,"), 5, 6),
        (lambda text: text.replace("2,200,", "2nd,200,"), 1, 1),
        (lambda text: text + "looks good from here\n", 0, 1),
        (lambda text: text[:-9], 1, 0),
        (lambda text: text + text.splitlines()[2] + ",9\n", 0, 1),
        (lambda text: "", 5, 0),
        (lambda text: text[: text.index("\n4,") + 1], 2, 0),
        (lambda text: text.replace("1,100,", "1," + "9" * 200_000), 1, 1),
        (lambda text: text + text.splitlines()[2] + "\n", 0, 1),
        (lambda text: "sep=,\n" + text, 0, 1),
        (lambda text: text + text, 0, 6),
    ],
)
def test_a_resumed_run_keeps_a_copy_of_a_file_that_it_does_not_understand(path, straight, capsys, change, missing, odd):
    train(path, until=5)
    changed = change(path.read_text())
    for i in (1, 2):
        path.write_text(changed)
        train(path, start=5)
        copy = path.with_name(f"metrics.copy-{i}.csv")
        assert copy.read_text() == changed
        wrong = f"earlier rows missing: {missing}, lines not understood: {odd}"
        assert capsys.readouterr().out == f"warning: {path}: {wrong}; the file as it was: {copy}\n"
        rows = table(path)
        assert len(rows) == UPDATES - missing and all(row in straight for row in rows)


@pytest.mark.parametrize(
    "change", [lambda text: with_semicolons(text), lambda text: text + "my notes\n", lambda text: ""]
)
def test_a_file_that_is_changed_while_training_is_copied_and_written_anew(path, straight, capsys, change):
    trainer = train(path, until=5)
    changed = change(path.read_text())
    path.write_text(changed)
    trainer.learn()
    assert table(path) == straight
    copy = path.with_name("metrics.copy-1.csv")
    assert copy.read_text() == changed and len(os.listdir(path.parent)) == 2
    assert capsys.readouterr().out == (
        f"warning: {path}: another program has changed it; its version: {copy}; training goes on with ours\n"
    )


def test_a_file_that_is_saved_unchanged_while_training_is_not_copied(path, straight, capsys):
    trainer = train(path, until=5)
    os.utime(path, (1, 1))
    trainer.learn()
    assert table(path) == straight
    assert capsys.readouterr().out == "" and os.listdir(path.parent) == ["metrics.csv"]


def test_a_file_that_is_deleted_while_training_is_written_anew(path, straight, capsys):
    trainer = train(path, until=3)
    path.unlink()
    trainer.learn()
    assert table(path) == straight and capsys.readouterr().out == ""


@pytest.mark.parametrize("resumed", [True, False])
def test_nothing_is_overwritten_before_there_is_a_copy(path, monkeypatch, straight, capsys, resumed):
    """The disk is full while two rows are due."""
    trainer = train(path, until=3)
    changed = path.read_text() + "my notes\n"
    path.write_text(changed)
    if resumed:
        trainer = FakeTrainer([MetricsCSV(path, EVALUATED)], start=3)
    with monkeypatch.context() as patch:
        patch.setattr(metrics_file, "atomic_write", disk_full)
        trainer.learn(until=5)
    assert path.read_text() == changed and capsys.readouterr().out.count("not written (No space left on device)") == 1
    trainer.learn()
    rows = table(path)
    assert [row["update"] for row in rows] == list("12345678")
    assert [row for row in rows if row["update"] != "4"] == [row for row in straight if row["update"] != "4"]
    assert path.with_name("metrics.copy-1.csv").read_text() == changed and len(os.listdir(path.parent)) == 2


def test_a_column_that_the_user_has_added_stays(path):
    train(path, until=2)
    in_latin_1 = path.read_bytes().replace(b"\n", b",n\xf6te\n").replace(b"n\xf6te", b"note", 1)
    path.write_bytes(in_latin_1)
    train(path, start=2)
    with open(path, encoding="latin-1") as file:
        assert [row.pop("note") for row in csv.DictReader(file)] == ["n\xf6te"] * 2 + [""] * 6


def test_a_text_that_the_user_has_added_keeps_its_commas(path):
    train(path, until=2)
    header, *rows = with_semicolons(path.read_text()).splitlines()
    path.write_text("\n".join([f"{header};note", *(f"{row};good, better" for row in rows), ""]))
    train(path, start=2)
    assert [row["note"] for row in table(path)] == ["good, better"] * 2 + [""] * 6


def test_a_late_evaluation_leaves_the_rows_before_it_alone(path, monkeypatch, straight):
    """Only the first row writes the whole file; later writes replace its end."""
    written, real = [], metrics_file.atomic_write
    monkeypatch.setattr(metrics_file, "atomic_write", lambda path, data: (written.append(path), real(path, data)))
    train(path, delay=1)
    assert table(path) == straight and written == [path]
    scores = SCORES | {12: 50.0}
    train(path, updates=500, delay=400, scores=scores)
    assert [int(row["update"]) for row in table(path) if row["eval_score"]] == list(scores) and len(written) == 2
    assert len(path.read_text().splitlines()) == 501
