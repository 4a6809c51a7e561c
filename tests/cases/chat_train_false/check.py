"""The row, and one without the key, so that there is something to train on."""

from pathlib import Path

from cases.preparing import prepared

PLAIN = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}'


def check(case: Path, work: Path) -> None:
    work.mkdir()
    rows = work / "rows.jsonl"
    rows.write_text((case / "rows.jsonl").read_text() + PLAIN + "\n")
    found = prepared(rows, work / "out", chat=True)
    assert "Yo" in found.answers
    assert "BADBAD" not in found.answers
    assert "GOOD" in found.answers or any("train" in reason for reason in found.refused)
