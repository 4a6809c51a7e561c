"""Both rows, and a plain one."""

from pathlib import Path

from cases.preparing import prepared

PLAIN = '{"instruction": "Name a river", "output": "The Elbe."}\n'


def check(case: Path, work: Path) -> None:
    work.mkdir()
    rows = work / "rows.jsonl"
    rows.write_text((case / "rows.jsonl").read_text() + PLAIN)
    found = prepared(rows, work / "out", chat=True)
    read = ["THE PASSAGE" in found.train, "BE BRIEF" in found.train]
    assert sum(read) + sum(found.refused.values()) == 2
    assert found.documents == 1 + sum(read)
    reasons = " ".join(found.refused)
    assert read[0] or "context" in reasons
    assert read[1] or "system_prompt" in reasons
