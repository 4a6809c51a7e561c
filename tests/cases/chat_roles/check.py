from pathlib import Path

from cases.preparing import prepared


def check(case: Path, work: Path) -> None:
    found = prepared(case / "rows.jsonl", work, chat=True)
    assert (found.documents, sum(found.refused.values())) == (1, 5)
