import json
from pathlib import Path

from cases.preparing import prepared


def check(case: Path, work: Path) -> None:
    found = prepared(case / "rows.jsonl", work, held_out=0.3)
    splits = json.loads((work / "manifest.json").read_text())["splits"]
    assert found.documents + splits["held_out"]["documents"] == 50
    assert min(found.documents, splits["held_out"]["documents"]) > 5
    assert "id" in found.printed.split()
