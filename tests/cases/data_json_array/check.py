from functools import partial
from pathlib import Path

from cases.against_transformers import tried
from cases.preparing import prepared


def check(case: Path, work: Path) -> None:
    for file, chat, expected in (("alpaca", True, "The Elbe."), ("texts", False, "two")):
        found, refusal = tried(partial(prepared, case / f"{file}.json", work / file, chat=chat))
        assert expected in found.train if found else "array" in refusal
