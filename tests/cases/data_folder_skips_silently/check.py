from pathlib import Path

from cases.preparing import prepared


def check(case: Path, work: Path) -> None:
    found = prepared(case / "mix", work)
    assert "read" in found.train
    upper_case_is_read = found.documents > 1
    assert upper_case_is_read or ".JSONL" in found.printed
    assert all(ending in found.printed for ending in (".csv", ".xz", ".bz2"))
