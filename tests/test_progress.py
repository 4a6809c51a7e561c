"""Lines of progress: never too far apart, and the time left by what was done."""

import re
import time
from pathlib import Path

import pytest
from training import runs

from lit_longctx import progress
from lit_longctx.data.making.read_progress import ReadProgress
from lit_longctx.data.reading.documents import DocumentReader
from lit_longctx.data.reading.faults import Faults
from lit_longctx.progress import Heartbeat, TimeLeft, counted, duration


class Clock:
    """Time that passes when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_lines_come_while_the_work_is_stuck_and_none_after_it(
    capsys: pytest.CaptureFixture[str],
):
    with Heartbeat(lambda: "stuck", every=0.02):
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) <= 15
    assert set(lines) == {"stuck"}
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_no_line_comes_between_lines_that_are_close(capsys: pytest.CaptureFixture[str]):
    with Heartbeat(lambda: "stuck", every=5.0) as heartbeat:
        for _ in range(20):
            heartbeat.say("on its way")
            time.sleep(0.005)
    assert set(capsys.readouterr().out.splitlines()) == {"on its way"}


def test_the_time_left_is_that_of_what_was_done(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    left = TimeLeft(100)
    clock.now = 7.0
    assert str(left) == "after 0:00:07"
    clock.now, left.done = 60.0, 20.0
    assert str(left) == "ETA 0:04:00"
    clock.now, left.done = 7200.0, 50.0
    assert str(left) == "ETA 2:00:00"
    left.done = 100.0
    assert str(left) == "ETA 0:00:00"
    assert duration(59.6) == "0:01:00"


def test_counted_items_in_a_file_are_lines_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = Clock(monkeypatch)
    for tokens in counted([100, 300, 400], "evaluate x", float):
        clock.now += tokens / 10
    out = capsys.readouterr().out.splitlines()
    assert out == ["evaluate x: 1 of 3  ETA 0:01:10", "evaluate x: 3 of 3  ETA 0:00:00"]


def test_a_slow_item_is_said_to_be_on_its_way(capsys: pytest.CaptureFixture[str]):
    for number in counted(range(1, 3), "evaluate x", float, every=0.02):
        time.sleep(0.1 * number)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "evaluate x: 0 of 2  after 0:00:00"
    assert any(re.fullmatch(r"evaluate x: 1 of 2  ETA 0:00:0\d", line) for line in out)
    assert out[-1] == "evaluate x: 2 of 2  ETA 0:00:00"


def test_reading_says_files_and_the_time_left_by_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sizes = {"a": 100_000, "b": 300_000}
    for name, size in sizes.items():
        (tmp_path / f"{name}.txt").write_text("x" * size)
    clock = Clock(monkeypatch)
    with ReadProgress(DocumentReader().file_parts([str(tmp_path)]), every=1e9) as reading:
        assert capsys.readouterr().out == "prepare: reading 2 files, 0.4 MB\n"
        first, second = (unit.read(Faults()) for unit in reading.file_parts)
        next(first)
        clock.now = 10.0
        assert next(first, None) is None
        assert reading.line() == (
            "prepare: 1 documents, 0.1 M characters, 0.0 M/s, 1 of 2 files  ETA 0:00:30"
        )
        next(second)
        clock.now = 40.0
        assert next(second, None) is None
        assert reading.line().endswith("2 of 2 files  ETA 0:00:00")


def test_reading_of_one_file_knows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = ['{"text": "' + "x" * 9_990 + '"}' for _ in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    clock = Clock(monkeypatch)
    with ReadProgress(DocumentReader().file_parts([str(tmp_path)]), every=1e9) as reading:
        documents = reading.file_parts[0].read(Faults())
        for _ in range(6):  # the sixth is being worked on
            next(documents)
        clock.now = 50.0
        assert re.search(r"5 documents, .* 0 of 1 files  ETA 0:00:5\d$", reading.line())


def test_prepare_to_a_file_says_what_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs.prepare(tmp_path / "texts", runs.documents(seed=1, number=20))
    assert "prepare: reading 1 file, 0.0 MB\n" in capsys.readouterr().out
