from pathlib import Path

from cases.preparing import prepared


def check(case: Path, work: Path) -> None:
    found = prepared(case / "rows.jsonl", work)
    assert (found.documents, found.refused) == (3, {})
    assert all(text in found.train for text in ("one", "\u2028", "\u2029", "\x85", "two"))
