"""MkDocs hook that writes the table of claims out of reproductions.yaml."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

STATUSES = {
    "reproduced": "reproduced",
    "ordering": "ordering",
    "formula": "formula",
    "not_shown": "not shown",
    "not_run": "not run",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Append the tables to reproductions.md; other pages stay as they are."""
    if page.file.src_uri != "reproductions.md":
        return markdown
    papers = yaml.safe_load(Path(__file__).with_name("reproductions.yaml").read_text())
    counts = Counter(claim["status"] for paper in papers for claim in paper["claims"])
    said = ", ".join(f"{counts[status]} {text}" for status, text in STATUSES.items())
    return "\n\n".join([markdown, f"{counts.total()} claims: {said}.", *map(_section, papers)])


def _section(paper: dict[str, Any]) -> str:
    lines = [
        f"## {paper['paper']}",
        "",
        f"{paper['source']}",
        "",
        "| claim | where | paper | here | status | command |",
        "|---" * 6 + "|",
    ]
    for claim in paper["claims"]:
        status = STATUSES[claim["status"]] + (f": {claim['why']}" if "why" in claim else "")
        cells = [claim["claim"], claim["where"], claim["theirs"], claim["ours"], status]
        lines.append(f"| {' | '.join(cells)} | `{claim['command']}` |")
    return "\n".join(lines)
